"""The wikitext suite end to end: presets, batches, metrics and their cards, files from the command line."""

import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hgrn2_bench import engine
from hgrn2_bench.blocks import BlockTask
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.checkpoints import load
from hgrn2_bench.corpus import Corpus, TokenSplit
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.lines import comparable
from hgrn2_bench.plan import make_plan
from hgrn2_bench.tables import make_tables
from hgrn2_bench.trainer import DivergedError
from suites.wikitext import runner
from suites.wikitext.presets import PRESETS
from suites.wikitext.protocol import PROTOCOL, name_task
from suites.wikitext.runner import Runner, unigram_perplexities
from suites.wikitext.settings import WikitextConfig


def cells(*words):
    return make_plan(["suite=wikitext", *words], "cpu").cells


def corpus(vocab_size, tokens=600, **fields):
    """A corpus of random ids."""
    rng = np.random.default_rng(0)
    splits = {
        name: TokenSplit(rng.integers(vocab_size, size=tokens).astype(np.uint16), 100, 700) for name in ("train", "validation", "test")
    }
    return Corpus(splits, vocab_size, 0, {"tokenizer": "none"}, "hash", **fields)


@pytest.fixture
def anything(monkeypatch):
    """Any text may be asked for: what comes is random ids of GPT-2's vocabulary."""
    found = corpus(50_264)
    monkeypatch.setattr(runner, "corpus_of", lambda cell: found)
    monkeypatch.setattr("suites.wikitext.texts.fingerprint_of", lambda config, model: "raw:0")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of preset test, and the folder of HGRN2's cell."""
    found, folders = [], {}
    for cell in cells("preset=test", "seed=0"):
        folder = CellFolder(tmp_path_factory.mktemp("results"), cell)
        with folder.lock():
            found += engine.run_cell(cell, folder, lambda *_: None, lambda: False)
        folders[cell.model] = folder
    return found, folders


def test_paper_has_the_published_sizes_for_each_expansion_and_both_readings(anything):
    found = cells("preset=paper", "model=hgrn2")
    assert [c.settings["expand_ratio"] for c in found[::2]] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert {c.settings["variant"] for c in found} == {"paper", "paper_lm"}
    with torch.device("meta"):
        sizes = {c.settings["variant"]: sum(p.numel() for p in Runner.build(c).parameters()) for c in found[:2]}
    assert sizes["paper"] == 44_660_732
    (control,) = cells("preset=paper", "model=hgrn1")
    assert control.settings["variant"] == "expand2"


def test_paper_trains_on_65536_tokens_an_update_as_fairseq_does(anything):
    cell = cells("preset=paper", "model=hgrn1")[0]
    train = cell.train
    assert (train.updates, train.batch_size * cell.data.block, train.schedule, train.warmup_steps) == (50_000, 65_536, "inverse_sqrt", 4000)
    assert (train.beta2, train.weight_decay, train.clip, train.lr) == (0.98, 0.1, 1.0, 5e-4)
    assert engine.describe(cell, engine.build(cell)).tokens == 50_000 * min(65_536, 512)  # of a corpus with one block


@pytest.mark.parametrize("task", PRESETS["pretrain"].tasks)
def test_pretraining_sizes_are_what_their_names_say(task, anything):
    with torch.device("meta"):
        model = Runner.build(cells("preset=pretrain", f"task={task}", "model=hgrn2")[0])
    said = float(task[:-1]) * {"M": 1e6, "B": 1e9}[task[-1]]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(said, rel=0.06)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"dataset": "wikitext103", "fingerprint": "raw:1"}, "wikitext103-gpt2"),
        ({"dataset": "wikitext103", "fingerprint": "bin:1"}, "wikitext103-gpt2"),
        ({"dataset": "wikitext103", "fingerprint": "tokens:1"}, "wikitext103-tokens-gpt2"),
        ({"dataset": "wikitext103", "fingerprint": "tokens:1", "tokenizer": "word"}, "wikitext103-word"),
        ({"dataset": "imdb", "tokenizer": "bytes"}, "imdb-bytes"),
        ({"dataset": "markov"}, "markov-64"),
        ({"dataset": "markov", "symbols": 32, "facts": 4}, "markov-32-facts4"),
    ],
)
def test_a_task_is_named_by_its_text_and_its_tokens(fields, name):
    assert name_task(WikitextConfig(**fields)) == name


def made(tokens=600, block=16, batch=8, **fields):
    """A runner of random ids without a model."""
    cell = cells(
        "preset=test",
        f"block={block}",
        f"batch_size={batch}",
        "window=0",
        "curve=0",
        "model=hgrn2",
        *(f"{k}={v}" for k, v in fields.items()),
    )[0]
    found = Runner.__new__(Runner)
    BlockTask.__init__(found, dataclasses.replace(cell, seed=3), corpus(40, tokens))
    found.config, found.eval_batch_size = cell.data, batch
    found.card, found.unigram = {"tokenizer": "none"}, unigram_perplexities(found.corpus)
    found.extrapolates = True
    return found


def test_an_epoch_takes_each_whole_block_once_in_an_order_of_its_own():
    task = made(tokens=16 * 24 + 5)
    assert task.steps_per_epoch == 3
    ids = task.corpus.splits["train"].ids_N
    epochs = []
    for epoch in range(2):
        pairs = [task.batch(epoch * 3 + step) for step in range(3)]
        targets = torch.cat([t for _, t in pairs])
        starts = [next(b for b in range(24) if np.array_equal(ids[16 * b : 16 * b + 16], row.numpy())) for row in targets]
        assert sorted(starts) == list(range(24))
        epochs.append(starts)
        for inputs, row in zip(torch.cat([i for i, _ in pairs]), starts, strict=True):
            before = 0 if row == 0 else ids[16 * row - 1]
            assert inputs.tolist() == [before, *ids[16 * row : 16 * row + 15]]
    assert epochs[0] != epochs[1]
    assert torch.equal(made(tokens=16 * 24 + 5).batch(4)[0], task.batch(4)[0])  # of (seed, step) alone


def test_a_text_shorter_than_a_batch_is_one_step():
    task = made(tokens=40)
    assert task.steps_per_epoch == 1
    assert task.batch(0)[0].shape == (2, 16)
    assert task.batch(5)[0].shape == (2, 16)


def test_a_batch_is_split_by_its_blocks():
    task = made()
    batch = task.batch(0)
    assert (task.size(batch), task.targets(batch)) == (8, 128)
    part = task.part(batch, slice(2, 5))
    assert torch.equal(part[1], batch[1][2:5])
    assert task.targets(part) == 48


class Uniform:
    """A model that knows nothing."""

    can_carry = True

    def losses(self, inputs_BT, targets_BT, states=None, return_states=False):
        return torch.full(targets_BT.shape, math.log(40.0)), []


def test_every_metric_follows_from_the_one_sum_of_nats():
    found = {m.name: m for m in made().metrics(Uniform(), "test")}
    nats = 600 * math.log(40.0)
    assert found["nats"].value == pytest.approx(nats)
    assert found["perplexity"].value == pytest.approx(40.0, rel=1e-6)
    assert found["word_perplexity"].value == pytest.approx(math.exp(nats / 100), rel=1e-5)
    assert found["bits_per_byte"].value == pytest.approx(nats / math.log(2) / 700)
    assert found["perplexity_carried"].value == pytest.approx(40.0, rel=1e-6)
    assert {m.num_items for m in found.values()} == {600}
    assert found["perplexity"].floors == {"unigram": unigram_perplexities(corpus(40))["test"]}
    units = {name: m.card["unit"] for name, m in found.items()}
    assert (units["perplexity"], units["word_perplexity"], units["bits_per_byte"]) == ("per token", "per word", "bits per byte")
    assert found["perplexity"].card["window"] == "16 tokens, up to 0 of them old and not scored"
    assert found["perplexity_carried"].card["state"].startswith("carried")


def test_the_unigram_floor_is_that_of_the_training_frequencies():
    train, test = np.array([0, 0, 0, 1]), np.array([0, 1, 2])
    splits = {"train": TokenSplit(train, None, None), "test": TokenSplit(test, None, None)}
    expected = math.exp(-(math.log(4 / 7) + math.log(2 / 7) + math.log(1 / 7)) / 3)
    assert unigram_perplexities(Corpus(splits, 3, 0, {}, "")) == {"test": round(expected, 2)}


def test_a_loss_that_is_not_finite_is_divergence():
    class Broken(Uniform):
        def losses(self, inputs_BT, targets_BT, states=None, return_states=False):
            return torch.full(targets_BT.shape, math.nan), []

    with pytest.raises(DivergedError, match="the loss on test data is not finite"):
        made().metrics(Broken(), "test")
    with pytest.raises(DivergedError):
        made().score(Broken(), "validation")


def test_selection_goes_by_the_mean_nats_of_blocks_alone():
    assert made().score(Uniform(), "validation") == pytest.approx(-math.log(40.0))


def test_preset_test_scores_every_token_in_each_way(rows):
    found = {(r.model, r.split, r.metric): r for r in rows[0]}
    for split in ("validation", "test"):
        for name in ("perplexity", "perplexity_window", "perplexity_carried", "excess_free", "excess_recalled"):
            assert ("hgrn2", split, name) in found
        assert ("attention", split, "perplexity_carried") not in found  # its cache grows
        assert found["hgrn2", split, "perplexity"].num_items == found["hgrn2", split, "nats"].num_items
    curve = [r for r in rows[0] if r.model == "hgrn2" and r.metric == "nats_per_token" and r.split.startswith("test_to_")]
    assert [r.split for r in curve] == [f"test_to_{n}" for n in (1, 2, 4, 8, 16, 32)]
    whole = found["hgrn2", "test", "nats"].num_items
    assert sum(r.num_items for r in curve) == whole
    assert all(r.card for r in rows[0])


def test_the_table_shows_the_optimum_and_the_metrics_beside(rows):
    (table,) = make_tables(rows[0], PROTOCOL)
    heads = [column.name for column in table.columns]
    assert {"in a context window", "with carried state", "excess nats, free tokens", "recalled, in a window"} <= set(heads)
    assert any("optimum perplexity " in note for note in table.notes)
    assert not any(r.metric in ("bits_per_byte", "word_perplexity") for r in rows[0])  # symbols have neither
    assert "(nats per token; lower is better)" in make_tables(rows[0], PROTOCOL, "excess_free")[0].title


def test_rows_of_other_windows_share_no_table(rows):
    other = [r for r in rows[0] if r.metric == "perplexity"]
    changed = [r.__class__(**{**r.__dict__, "cell": r.cell + "x", "card": {**r.card, "window": "64 tokens"}}) for r in other]
    assert len(comparable([*other, *changed], PROTOCOL, "perplexity")) == 2


def test_the_trained_model_and_what_its_state_does_are_kept(rows):
    folder = rows[1]["hgrn2"]
    model = load(folder.weights, "chunked", "cpu")
    row = next(r for r in rows[0] if r.model == "hgrn2" and r.split == "test" and r.metric == "perplexity")
    cell = next(c for c in cells("preset=test", "seed=0") if c.model == "hgrn2")
    again = next(m for m in Runner(cell).metrics(model, "test") if m.name == "perplexity")
    assert again.value == pytest.approx(row.value, rel=1e-6)
    assert len(row.details["layers"]) == 1
    assert row.details["layers"][0]["effective_rank"] >= 1


def test_fewer_tokens_than_a_block_leave_nothing_to_probe():
    task = made(tokens=600)
    task.corpus.splits["validation"] = TokenSplit(np.arange(5, dtype=np.uint16), None, None)
    assert task.details(SimpleNamespace(training=False)) == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("window=512", "block=512"), "window=512 leaves no new token in a block of 512"),
        (("curve=100", "block=64"), "curve=100 must be a multiple of block=64"),
        (("preset=short", "facts=3"), "facts=3 has no effect on dataset=imdb"),
        (("scan=both",), "scan"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(words, said):
    with pytest.raises(ConfigError, match=said) as caught:
        cells(*(() if words[0].startswith("preset") else ("preset=test",)), *words)
    assert "\n" not in str(caught.value)


def run(*words, cwd, **env):
    command = [sys.executable, "-m", "hgrn2_bench", "run", "suite=wikitext", "preset=test", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_text_files_of_ones_own_are_trained_on_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HGRN2_BENCH_CACHE", str(tmp_path / "cache"))
    texts = tmp_path / "mine"
    texts.mkdir()
    for split, lines in (("train", 200), ("valid", 20), ("test", 30)):
        (texts / f"{split}.txt").write_text("".join(f"line {i} of {split}, {i * 7919 % 101}\n" for i in range(lines)))
    words = ("dataset=text", "tokenizer=bytes", "symbols=64", "facts=0", "document=256", "model=hgrn2")
    done = run(*words, f"data_dir={texts}", "--results", str(tmp_path / "r"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (kept,) = (tmp_path / "r" / "cells" / "wikitext").glob("*/rows.jsonl")
    found = [json.loads(line) for line in kept.read_text().splitlines()]
    assert str(tmp_path) not in json.dumps([row["settings"] for row in found])
    assert {row["task"] for row in found} == {"text-bytes"}
    by_name = {(row["split"], row["metric"]): row for row in found}
    size = (texts / "test.txt").stat().st_size
    nats = by_name["test", "nats"]["value"]
    eval_tokens = by_name["test", "nats"]["num_items"]
    assert eval_tokens == min(600, size)
    assert by_name["test", "bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / eval_tokens, rel=0.01)


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    done = run("dataset=text", "data_dir=nowhere", cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (2, "error: data_dir=nowhere: no such folder")


def test_a_text_without_one_whole_block_is_refused_for_what_learns():
    (cell,) = cells("preset=test", "model=hgrn2", "block=16", "train_tokens=16")
    assert Runner.shape(cell).tokens_per_epoch == 16
    (short,) = cells("preset=test", "model=hgrn2", "block=16", "train_tokens=15")
    with pytest.raises(ConfigError, match=r"^block=16 is longer than all text to train on, 15 tokens$"):
        Runner.shape(short)
