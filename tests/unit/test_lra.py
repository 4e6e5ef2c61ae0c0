"""LRA's names, presets, batches and images: what a cell is called, what it builds, what it feeds a model."""

from types import SimpleNamespace

import lra_folders
import numpy as np
import pytest
import torch

from hgrn2_bench import engine, measure, registry
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.pixels import shifted
from hgrn2_bench.plan import make_plan
from suites.lra import data, runner, standins
from suites.lra.files import fingerprint_of
from suites.lra.items import Split, Texts
from suites.lra.places import CLASSES
from suites.lra.protocol import DATASETS, PROTOCOL, LRAConfig, name_task
from suites.lra.runner import Items

PUBLISHED_PARAMETERS = {
    "listops": 149_770,
    "text": 483_714,
    "retrieval": 1_607_426,
    "image": 11_061_258,
    "pathfinder": 699_650,
    "pathx": 45_890,
}
"""Computed from run_lra.py's sizes, with vocabularies of 18, 135 and 98."""
VOCABULARIES = {"listops": 18, "text": 135, "retrieval": 98}


def cells(*words):
    return make_plan(["suite=lra", *words], "cpu", files=False).cells


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ({"dataset": "text"}, "text"),
        ({"dataset": "text", "source": "standin"}, "standin-text"),
        ({"dataset": "image", "fingerprint": "jpeg:0123"}, "image-jpeg"),
        ({"dataset": "image", "fingerprint": "0123"}, "image"),
        ({"dataset": "listops"}, "listops"),
        ({"dataset": "listops", "source": "generated"}, "listops-generated"),
        ({"dataset": "listops", "source": "generated", "min_tokens": 100, "max_tokens": 500, "max_depth": 6}, "listops-500"),
        ({"dataset": "listops", "source": "generated", "max_depth": 6}, "listops-2000"),
        ({"dataset": "pathfinder", "source": "generated"}, "pathfinder-generated"),
        ({"dataset": "pathfinder", "source": "generated", "contour_length": 6}, "pathfinder-6"),
        ({"dataset": "pathx", "source": "generated", "resolution": 128}, "pathx-generated"),
        ({"dataset": "pathx", "source": "generated", "resolution": 64, "contour_length": 9}, "pathx-64px-9"),
        ({"dataset": "pathfinder", "contour_length": 6}, "pathfinder-files-6"),
        ({"dataset": "text", "max_len": 256}, "text-len256"),
        ({"dataset": "text", "max_len": 4096}, "text"),
        ({"dataset": "listops", "source": "generated", "max_len": 100}, "listops-generated-len100"),
    ],
)
def test_only_real_files_have_the_real_name(words, name):
    assert name_task(LRAConfig(**words)) == name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"dataset": "text", "source": "generated"}, "source=generated: nothing generates text"),
        ({"dataset": "listops", "source": "standin"}, "source=standin: listops has a generator"),
        ({"dataset": "text", "colour": "rgb"}, "colour=rgb has no effect on text"),
        ({"dataset": "pathfinder", "augment": True}, "augment=true has no effect on pathfinder"),
        ({"dataset": "image", "validation": "test"}, "validation=test is for text alone"),
        ({"dataset": "listops", "min_tokens": 9, "max_tokens": 10}, "no expression can be longer than one and shorter than the other"),
        ({"resolution": 48}, "resolution=48 must be 32, 64, 128 or 256"),
        ({"dataset": "pathx", "resolution": 32}, "resolution=32: the files of pathx have 128"),
        ({"contour_length": 7}, "contour_length=7 must be 6, 9 or 14"),
        ({"train_examples": -1}, "train_examples=-1 must not be negative"),
        ({"max_len": 1}, "max_len=1 leaves no room"),
        ({"dataset": "image", "max_len": 50}, "max_len=50 has no effect on image with source=files"),
        ({"dataset": "listops", "max_tokens": 600}, "max_tokens=600 has no effect on listops with source=files"),
        ({"dataset": "text", "contour_length": 9}, "contour_length=9 has no effect on text"),
    ],
)
def test_what_cannot_be_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        LRAConfig(**words)


def test_a_fingerprint_is_not_for_users():
    with pytest.raises(ConfigError, match="has no effect on suite=lra"):
        cells("preset=paper", "fingerprint=1")


def test_missing_data_are_one_line_and_name_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("HGRN2_BENCH_DATA", str(tmp_path / "nowhere"))
    data.load.cache_clear()
    with pytest.raises(ConfigError, match=r"text needs files: .*nowhere is no folder; give data_dir=DIR or set HGRN2_BENCH_DATA"):
        make_plan(["suite=lra", "preset=paper", "task=text"], "cpu")


@pytest.mark.parametrize("preset", ["paper", "standard", "hgrn1", "smoke"])
def test_whole_presets_have_all_six_tasks(preset):
    assert tuple(PROTOCOL.presets[preset].tasks) == DATASETS
    assert {cell.data.dataset for cell in cells(f"preset={preset}")} == set(DATASETS)


def test_paper_builds_models_of_the_published_size(monkeypatch):
    monkeypatch.setattr(runner, "vocab_size", lambda config: VOCABULARIES[config.dataset])
    for cell in cells("preset=paper"):
        assert measure.parameters(engine.build(cell))[0] == PUBLISHED_PARAMETERS[cell.data.dataset]


def test_paper_reproduces_its_source_by_name():
    text, image, pathx = (cells("preset=paper", f"task={name}")[0] for name in ("text", "image", "pathx"))
    assert (text.data.validation, text.data.mask_padding, text.model_config.norm) == ("test", False, "layernorm")
    assert (image.data.colour, image.data.augment, image.model_config.scan) == ("rgb", True, "2d_parallel")
    assert (pathx.model_config.norm_group, pathx.model_config.scan, pathx.train.schedule_steps) == (32, "2d_series", 500_000)


def some_texts(lengths):
    return Texts(np.concatenate([np.full(n, i % 7 + 3, np.uint8) for i, n in enumerate(lengths)]), np.cumsum(lengths))


def test_texts_are_padded_to_few_lengths_with_zeros():
    split = Split(some_texts([5, 70, 3]), np.array([0, 1, 0]))
    ids, lengths, labels = Items(split, LRAConfig(dataset="text", max_len=100), "cpu").batch(np.array([2, 0]))
    assert ids.shape == (2, 64)
    assert lengths.tolist() == [3, 5]
    assert labels.tolist() == [0, 0]
    assert ids[0, :3].tolist() == [5, 5, 5]
    assert ids[0, 3:].sum() == 0
    assert Items(split, LRAConfig(dataset="text", max_len=100), "cpu").batch(np.array([1]))[0].shape == (1, 100)


@pytest.mark.parametrize(
    ("longest", "masked", "lengths", "padded"),
    [
        (4096, True, (53, 257, 4000), (256, 512, 4096)),
        (500, True, (53, 449), (64, 500)),
        (1100, True, (1, 129), (128, 256)),
        (4096, False, (53, 257, 4000), (53, 257, 4000)),  # padding that is read is the published runs' own
    ],
)
def test_padding_that_is_skipped_fills_up_to_one_of_16_lengths(longest, masked, lengths, padded):
    config = LRAConfig(dataset="text", max_len=longest, mask_padding=masked)
    items = Items(Split(some_texts(lengths), np.zeros(len(lengths), np.int64)), config, "cpu")
    assert tuple(items.batch(np.array([row]))[0].shape[1] for row in range(len(lengths))) == padded


def test_of_pairs_the_first_documents_come_first():
    split = Split(some_texts([2, 3]), np.array([1, 0]), some_texts([4, 1]))
    ids, lengths, labels = Items(split, LRAConfig(dataset="retrieval", max_len=8), "cpu").batch(np.array([1, 0]))
    assert ids.shape == (4, 8)
    assert lengths.tolist() == [3, 2, 1, 4]
    assert labels.tolist() == [0, 1]


def fake_runner(count, batch, sort):
    lengths = np.random.default_rng(0).integers(1, 60, count)
    made = runner.Runner.__new__(runner.Runner)
    made.config, made.batch_size, made.seed = LRAConfig(dataset="text", max_len=64, sort_lengths=sort), batch, 3
    made.splits = {"train": Items(Split(some_texts(lengths), np.zeros(count, np.int64)), made.config, "cpu")}
    made.steps_per_epoch = count // batch
    return made


@pytest.mark.parametrize("sort", [False, True])
def test_an_epoch_takes_each_item_once_in_an_order_of_its_own(sort):
    made = fake_runner(103, 5, sort)
    one, again, other = ([rows.tolist() for rows in made._batches(epoch)] for epoch in (0, 0, 1))
    assert one == again != other
    assert {len(rows) for rows in one} == {5}
    taken = [row for rows in one for row in rows]
    assert len(set(taken)) == len(taken) == 100


def test_sorted_batches_hold_texts_of_similar_length():
    def spread(sort):
        made = fake_runner(1000, 10, sort)
        return np.mean([np.ptp(made.splits["train"].lengths_N[rows]) for rows in made._batches(0)])

    assert spread(True) < spread(False) / 5


def test_a_crop_mirrors_the_border_and_a_flip_turns_it():
    image = torch.arange(32 * 32).reshape(1, 32, 32, 1)
    draws = SimpleNamespace(integers=lambda *_, size: np.zeros(size, np.int64), random=lambda n: np.zeros(n))
    out = shifted(image, draws)[0, ..., 0]  # the crop at the top left corner, flipped
    padded = torch.from_numpy(np.pad(image[0, ..., 0].numpy(), 4, mode="symmetric"))
    assert torch.equal(out, padded[:32, :32].flip(1))


def test_augmentation_is_a_function_of_the_step_and_keeps_the_pixels():
    images = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8)
    one, same, other = (shifted(images, np.random.default_rng([0, 1, step])) for step in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.dtype == torch.uint8
    assert set(one[0].unique().tolist()) <= set(images[0].unique().tolist())


def test_grey_pixels_have_the_published_scale():
    split = Split(np.full((2, 32, 32, 1), 255, np.uint8), np.zeros(2, np.int64))
    values, _ = Items(split, LRAConfig(dataset="image"), "cpu").batch(np.arange(2))
    assert values.shape == (2, 1024, 1)
    assert values[0, 0, 0].item() == pytest.approx((255 - 122.6) / 61.0)
    path = Items(split, LRAConfig(dataset="pathfinder"), "cpu").batch(np.arange(2))[0]
    raw = Items(split, LRAConfig(dataset="pathfinder", centred=False), "cpu").batch(np.arange(2))[0]
    assert (path.max().item(), raw.max().item()) == (1.0, 1.0)


@pytest.mark.parametrize(("dataset", "shape"), [("text", 200), ("retrieval", 200), ("image", 200)])
def test_stand_ins_are_seeded_balanced_and_differ_between_splits(dataset, shape):
    config = LRAConfig(
        dataset=dataset,
        source="standin",
        max_len=0 if dataset == "image" else 64,
        train_examples=shape,
        validation_examples=shape,
        test_examples=shape,
    )
    one, again = data._invent(config), data._invent(config)
    assert one.hash == again.hash
    assert len({split.labels_N.tobytes() for split in one.splits.values()}) == 3
    for split in one.splits.values():
        assert np.bincount(split.labels_N).min() > 0.5 * shape / np.unique(split.labels_N).size
    if dataset != "image":
        texts = one.splits["train"].inputs
        assert texts.lengths_N.max() <= 64
        assert all(texts[i][-1] == standins.END for i in range(10))
        assert texts.ids_S.max() < data.vocab_size(config)


def test_too_few_items_are_refused(monkeypatch):
    few = data.Data({name: Split(some_texts([2]), np.zeros(1, np.int64)) for name in ("train", "validation", "test")})
    monkeypatch.setattr(data, "_read", lambda config: few)
    with pytest.raises(ConfigError, match="text has 1 train items, 22500 are wanted"):
        data.load(LRAConfig(dataset="text"))


def test_every_registered_model_has_a_place_in_preset_test():
    assert {cell.model for cell in cells("preset=test", f"model={','.join(set(registry.models()) - {'hybrid'})}")} == set(
        registry.models()
    ) - {"hybrid"}


def test_a_part_of_listops_files_is_that_part(monkeypatch, tmp_path):
    lra_folders.write_listops(tmp_path, rows=[f"( ( ( [MAX {i} ) 0 ) ] )\t{i}" for i in range(10)])
    monkeypatch.setenv("HGRN2_BENCH_DATA", str(tmp_path))
    data.load.cache_clear()
    made = data.load(LRAConfig(dataset="listops", train_examples=6, validation_examples=3, test_examples=10))
    assert {name: len(split) for name, split in made.splits.items()} == {"train": 6, "validation": 3, "test": 10}
    assert len(set(made.splits["train"].labels_N.tolist())) == 6


def test_bounds_of_the_generator_do_not_cut_files():
    assert LRAConfig(dataset="listops").longest == 2048
    assert LRAConfig(dataset="listops", source="generated", max_tokens=600).longest == 600


def test_one_jpeg_among_other_files_names_the_task(monkeypatch, tmp_path):
    for split in ("train", "test"):
        for name in CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.jpg").write_bytes(b"\xff\xd8\xff\xe0")
        (tmp_path / split / ".DS_Store").write_bytes(b"0")
    monkeypatch.setenv("HGRN2_BENCH_DATA", str(tmp_path))
    fingerprint_of.cache_clear()
    assert fingerprint_of("image").startswith("jpeg:")


def test_floors_are_at_least_chance():
    few = {name: Split(np.zeros((4, 32, 32, 1), np.uint8), np.array([0, 0, 0, 1])) for name in ("train", "test")}
    few["test"] = Split(few["test"].inputs, np.array([1, 2, 3, 4]))
    config = LRAConfig(dataset="image")
    made = SimpleNamespace(config=config, splits={name: Items(split, config, "cpu") for name, split in few.items()})
    assert runner.Runner._floors(made, "test") == {"majority": 0.0, "chance": 0.1}


def test_skipped_items_are_counted_not_missed(monkeypatch):
    part = Split(some_texts([2] * 3), np.zeros(3, np.int64), skipped={"damaged": 1})
    monkeypatch.setattr(data, "_read", lambda config: data.Data(dict.fromkeys(("train", "validation", "test"), part)))
    config = LRAConfig(dataset="listops", train_examples=4, validation_examples=4, test_examples=4)
    data.load.cache_clear()
    assert data.load(config).skipped == 3


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        (("task=text",), 100),
        (("task=text", "mask_padding=false", "sort_lengths=false"), 100),
        (("task=retrieval",), 200),
        (("task=listops", "scan=causal"), 100),
    ],
)
def test_scoring_in_parts_reads_few_tokens_at_once_and_gives_the_same_logits(monkeypatch, words, limit):
    (cell,) = cells("preset=test", "model=hgrn2", "test_examples=20", "eval_batch_size=16", *words)
    torch.manual_seed(0)
    made, model = runner.Runner(cell), runner.Runner.build(cell).eval()
    seen, forward = [], model.logits
    monkeypatch.setattr(model, "logits", lambda inputs, lengths: seen.append((inputs.numel(), forward(inputs, lengths))) or seen[-1][1])
    whole, at_once = made.metric(model, "test"), seen[:]
    seen.clear()
    monkeypatch.setattr(runner, "EVAL_TOKENS", limit)
    assert made.metric(model, "test") == whole
    assert len(at_once) == 2 < len(seen)
    assert max(tokens for tokens, _ in seen) * made.ways <= limit
    torch.testing.assert_close(torch.cat([logits for _, logits in seen]), torch.cat([logits for _, logits in at_once]))


def test_one_item_beyond_the_tokens_is_scored_alone(monkeypatch):
    (cell,) = cells("preset=test", "model=hgrn2", "task=text")
    made, model = runner.Runner(cell), runner.Runner.build(cell).eval()
    whole = made.metric(model, "test")
    monkeypatch.setattr(runner, "EVAL_TOKENS", 1)
    assert made.metric(model, "test") == whole
