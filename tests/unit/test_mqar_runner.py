"""MQAR's runner: which examples come in which batch, what is drawn with which seed, and what is reported."""

import dataclasses

import numpy as np
import pytest
import torch

from hgrn2_bench import engine
from hgrn2_bench.plan import make_plan
from hgrn2_bench.trainer import DivergedError
from suites.mqar import data, protocol, runner
from suites.mqar.protocol import BEYOND, MQAR, Mixture, MQARConfig, Segment
from suites.mqar.runner import Runner, make_splits, mean_floors

MIXED = Mixture(
    train=(Segment(16, 4, 20), Segment(8, 2, 7), Segment(16, 2, 9)),
    test=(Segment(8, 2, 30), Segment(16, 4, 20), Segment(32, 8, 10)),
)
BATCH = 8


@pytest.fixture(autouse=True)
def mixture(monkeypatch):
    monkeypatch.setitem(protocol.MIXTURES, "mixed", MIXED)
    make_splits.cache_clear()


def cell_of(*words):
    preset = ("suite=mqar", "preset=test", "model=attention", "train_examples=20", f"batch_size={BATCH}")
    return make_plan([*preset, *words], "cpu").cells[0]


def mixed(*words, **changes):
    """A cell of the mixture, whose name the registered schema does not know."""
    made = cell_of(*words)
    config = {"vocab_size": 32, "mixture": "mixed"} | MIXED.sizes | changes
    return dataclasses.replace(made, data=MQARConfig(**config))


def rows_of(run, step):
    """The tokens of one batch as tuples."""
    return [tuple(tokens) for tokens in run.batch(step)[0].tolist()]


def examples(run, split="train"):
    return [tuple(tokens) for queries in run.splits[split] for tokens in queries.tokens_NT.tolist()]


# batches


@pytest.mark.parametrize("made", [cell_of, mixed])
def test_an_epoch_is_every_example_once_in_order_and_each_epoch_repeats_it(made):
    run = Runner(made())
    epoch = [rows_of(run, step) for step in range(run.steps_per_epoch)]
    assert [row for batch in epoch for row in batch] == examples(run)
    assert [rows_of(run, step + 3 * run.steps_per_epoch) for step in range(run.steps_per_epoch)] == epoch


def test_a_batch_never_crosses_segments():
    run = Runner(mixed())
    sizes = [run.batch(step)[0].shape for step in range(run.steps_per_epoch)]
    assert sizes == [(8, 16), (8, 16), (4, 16), (7, 8), (8, 16), (1, 16)]
    pairs = [len(run.batch(step)[1]) // len(run.batch(step)[0]) for step in range(run.steps_per_epoch)]
    assert pairs == [4, 4, 4, 2, 2, 2]
    assert run.steps_per_epoch == Runner.shape(mixed()).steps_per_epoch == 6


def test_the_shape_of_a_mixture_is_that_of_its_longest_test_segment():
    shape = Runner.shape(mixed())
    assert shape.seq_len == 32
    assert shape.tokens_per_epoch == 20 * 16 + 7 * 8 + 9 * 16 == 520
    assert shape.labels_per_token == pytest.approx((20 * 4 + 7 * 2 + 9 * 2) / 520)
    assert shape.step_tokens == round(520 / 6)
    single = Runner.shape(cell_of())
    assert (single.steps_per_epoch, single.tokens_per_epoch, single.step_tokens) == (3, 320, BATCH * 16)


def test_a_batch_points_at_its_queries_and_holds_their_values():
    run = Runner(cell_of())
    tokens_BT, where, values = run.batch(1)
    for query, value in zip(where.tolist(), values.tolist(), strict=True):
        row, place = divmod(query, 16)
        context = tokens_BT[row, :4].tolist()
        key = tokens_BT[row, place].item()
        assert context[2 * context[0:4:2].index(key) + 1] == value
    assert len(where) == len(values) == 2 * BATCH


# shuffling


def order(run, epoch):
    return [row for step in range(run.steps_per_epoch) for row in rows_of(run, epoch * run.steps_per_epoch + step)]


def test_shuffling_permutes_the_examples_anew_in_every_epoch_and_for_every_seed():
    run, same, other = (Runner(cell_of("shuffle=true", f"seed={seed}")) for seed in (0, 0, 1))
    first, second = order(run, 0), order(run, 1)
    assert sorted(first) == sorted(second) == sorted(examples(run))
    assert len({tuple(first), tuple(second), tuple(examples(run))}) == 3
    places = [[examples(r).index(row) for row in order(r, 0)] for r in (run, other)]
    assert places[0] != places[1]
    assert order(same, 1) == second  # an epoch out of turn
    assert order(same, 0) == first


def test_shuffling_changes_neither_the_data_nor_the_test_split():
    plain, shuffled = Runner(cell_of()), Runner(cell_of("shuffle=true"))
    assert plain.data_hash == shuffled.data_hash
    assert examples(plain, "test") == examples(shuffled, "test")


# seeds


def zoology_seeds(seed, num_train, num_test):
    """How zoology/data/utils.py draws them, as its reader would write it."""
    rng = np.random.RandomState(seed)
    return rng.randint(0, 2**31, size=num_train), rng.randint(2**31, 2**32, size=num_test, dtype=np.int64)


@pytest.mark.parametrize("generator", ["fast", "reference"])
def test_segments_are_drawn_with_zoology_s_seeds(generator):
    run = Runner(mixed("seed=123", generator=generator))
    train, test = zoology_seeds(123, 3, 3)
    for split, seeds in (("train", train), ("test", test)):
        for queries, segment, seed in zip(run.splits[split], run.segments[split], seeds.tolist(), strict=True):
            task = MQAR(vocab_size=32, seq_len=segment.seq_len, num_pairs=segment.num_pairs)
            draw = data.generate if generator == "fast" else data.generate_reference
            assert np.array_equal(queries.tokens_NT.numpy(), draw(task, segment.examples, seed).inputs)


def test_validation_and_beyond_data_come_after_the_test_data_and_leave_it_alone():
    plain, beyond = Runner(cell_of("vocab_size=64")), Runner(cell_of("vocab_size=64", "beyond_examples=5"))
    for split in ("train", "test", "validation"):
        assert examples(plain, split) == examples(beyond, split)
    assert plain.data_hash != beyond.data_hash
    assert examples(plain, "validation") != examples(plain, "test")
    assert examples(Runner(mixed()), "validation") != examples(Runner(mixed()), "test")


def test_random_fill_of_the_reference_generator_follows_the_segment_s_seed():
    one, other = (Runner(mixed(random_fill=True, generator="reference")) for _ in range(2))
    assert one.data_hash == other.data_hash
    first, second = one.splits["test"][:2]
    assert not torch.equal(first.tokens_NT[:, -1], second.tokens_NT[: len(first), -1])


def test_cells_with_equal_data_share_it():
    one, other = Runner(cell_of("lr=1e-3")), Runner(cell_of("lr=1e-2"))
    assert one.splits is other.splits
    assert Runner(cell_of("seed=1")).splits is not one.splits


# beyond training


def test_beyond_splits_are_longer_or_fuller_by_their_names():
    segments = MQARConfig(vocab_size=128, seq_len=32, num_pairs=4, beyond_examples=5).segments()
    assert list(segments)[3:] == [f"test_{kind}{n}x" for kind in ("len", "kv") for n in BEYOND]
    for n in BEYOND:
        assert segments[f"test_len{n}x"] == (Segment(32 * n, 4, 5),)
        assert segments[f"test_kv{n}x"] == (Segment(max(32, 16 * n), 4 * n, 5),)  # 2 x 4 pairs still fit into 32 tokens
    assert list(MQARConfig(vocab_size=128).segments()) == ["train", "test", "validation"]


def test_more_pairs_than_the_vocabulary_has_keys_are_left_out():
    segments = MQARConfig(vocab_size=34, seq_len=32, num_pairs=4, beyond_examples=5).segments()  # 16 keys
    assert [name for name in segments if "kv" in name] == ["test_kv2x", "test_kv4x"]
    assert [name for name in segments if "len" in name] == ["test_len2x", "test_len4x", "test_len8x"]


def reported(cell):
    run = Runner(cell)
    return run.report(engine.build(cell).eval())


@pytest.mark.parametrize(
    ("positions", "splits"),
    [
        ("none", ["validation", "test", "test_len2x", "test_len4x", "test_len8x", "test_kv2x", "test_kv4x", "test_kv8x"]),
        ("rope", ["validation", "test", "test_len2x", "test_len4x", "test_len8x", "test_kv2x", "test_kv4x", "test_kv8x"]),
        ("learned", ["validation", "test", "test_kv2x"]),  # 4 pairs fit into the 16 tokens of training, 8 do not
    ],
)
def test_learned_positions_are_asked_for_nothing_longer_than_they_know(positions, splits):
    found = reported(cell_of("vocab_size=64", "beyond_examples=5", f"positions={positions}"))
    assert list(dict.fromkeys(m.split for m in found)) == splits
    assert {m.num_items for m in found if m.name == "accuracy" and "x" in m.split} == {5}


# metrics


def test_accuracy_is_the_mean_over_examples_and_accuracy_token_over_queries():
    cell = mixed()
    run, model = Runner(cell), engine.build(cell).eval()
    right = [run._right(model, queries, "test").double() for queries in run.splits["test"]]
    found = {m.name: m for m in run.metrics(model, "test")}
    assert found["accuracy"].value == pytest.approx(torch.cat([r.mean(1) for r in right]).mean().item())
    assert found["accuracy_token"].value == pytest.approx(torch.cat([r.flatten() for r in right]).mean().item())
    assert (found["accuracy"].num_items, found["accuracy_token"].num_items) == (60, 30 * 2 + 20 * 4 + 10 * 8)
    assert run.score(model, "test") == found["accuracy"].value


def test_a_mixture_reports_each_of_its_segments():
    cell = mixed()
    run, model = Runner(cell), engine.build(cell).eval()
    found = run.metrics(model, "test")
    assert [m.name for m in found] == ["accuracy", "accuracy_token", "accuracy_len8_kv2", "accuracy_len16_kv4", "accuracy_len32_kv8"]
    assert [m.num_items for m in found[2:]] == [30, 20, 10]
    weighted = sum(m.value * m.num_items for m in found[2:]) / 60
    assert found[0].value == pytest.approx(weighted)
    assert [m.name for m in Runner(cell_of()).metrics(engine.build(cell_of()).eval(), "test")] == ["accuracy", "accuracy_token"]


class Oracle(torch.nn.Module):
    """Looks every query up in the context; answers 0 to those at even places of the batch's order where `half`."""

    def __init__(self, vocab_size, half):
        super().__init__()
        self.vocab_size, self.half = vocab_size, half

    def logits(self, tokens_BT, where):
        T = tokens_BT.shape[1]
        answers = []
        for number, query in enumerate(where.tolist()):
            row = tokens_BT[query // T].tolist()
            answers.append(0 if self.half and number % 2 else row[row.index(row[query % T]) + 1])
        return torch.nn.functional.one_hot(torch.tensor(answers), self.vocab_size).float()


@pytest.mark.parametrize(("half", "value"), [(False, 1.0), (True, 0.5)])
def test_looking_up_answers_everything(half, value):
    run = Runner(mixed("eval_batch_size=7"))
    assert {m.value for m in run.metrics(Oracle(32, half), "test")} == {value}


def test_logits_that_are_not_finite_diverge():
    class Broken(Oracle):
        def logits(self, tokens_BT, where):
            return super().logits(tokens_BT, where) * float("nan")

    run = Runner(cell_of("beyond_examples=5"))
    with pytest.raises(DivergedError, match="logits on validation data are not finite"):
        run.score(Broken(16, False), "validation")
    assert run.score(Oracle(16, False), "test_len2x") == 1  # beyond training they are wrong answers
    assert run.score(Broken(16, False), "test_len2x") == 0


# floors


def test_floors_of_a_mixture_are_weighted_as_its_metric_is(monkeypatch):
    monkeypatch.setattr(runner, "floors", lambda task: {"guess": {2: 0.5, 4: 0.25, 8: 0.125}[task.num_pairs]})
    config, parts = mixed().data, MIXED.test
    assert mean_floors(config, parts) == {"guess": (30 * 0.5 + 20 * 0.25 + 10 * 0.125) / 60}
    assert mean_floors(config, parts, per_query=True) == {"guess": (60 * 0.5 + 80 * 0.25 + 80 * 0.125) / 220}
    assert mean_floors(config, parts[1:2]) == mean_floors(config, parts[1:2], per_query=True) == {"guess": 0.25}
    run = Runner(mixed())
    found = {m.name: m.floors["guess"] for m in run.metrics(Oracle(32, False), "test")}
    assert found == {
        "accuracy": mean_floors(config, parts)["guess"],
        "accuracy_token": mean_floors(config, parts, per_query=True)["guess"],
        "accuracy_len8_kv2": 0.5,
        "accuracy_len16_kv4": 0.25,
        "accuracy_len32_kv8": 0.125,
    }


def test_floors_name_the_uniform_guess_and_the_recall_free_one():
    found = reported(cell_of())[0].floors
    assert found["1/|values|"] == 1 / 8
    assert found["recall-free guess"] == pytest.approx(data.recall_free_floor(MQAR(vocab_size=16, seq_len=16, num_pairs=2)), abs=5e-5)
    assert set(reported(cell_of("random_fill=true"))[0].floors) == {"1/|values|", "recall-free guess (upper bound)"}


# the schema


@pytest.mark.parametrize(
    "changes", [{"shuffle": True}, {"beyond_examples": 5}, {"seq_len": 64}, {"num_pairs": 4}, {"train_examples": 35}, {"test_examples": 30}]
)
def test_a_mixture_takes_no_other_setting(changes):
    with pytest.raises(protocol.ConfigError, match="mixture=mixed"):
        mixed(**changes)


def test_the_sizes_of_a_mixture_say_what_is_drawn():
    sizes = {"seq_len": 32, "num_pairs": 8, "train_examples": 36, "validation_examples": 60, "test_examples": 60}
    assert MIXED.sizes == sizes
    drawn = {split: len(examples(Runner(mixed()), split)) for split in ("train", "validation", "test")}
    assert {f"{split}_examples": number for split, number in drawn.items()} == {k: v for k, v in sizes.items() if "examples" in k}


def test_a_mixture_s_validation_data_are_those_of_its_test_settings():
    segments = mixed().data.segments()
    assert segments == {"train": MIXED.train, "test": MIXED.test, "validation": MIXED.test}
