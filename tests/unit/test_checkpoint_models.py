"""Folders of trained models in a run: the numbers of the cell that trained them, a key free of the path, one line for what cannot be."""

import json
import shlex
import shutil

import pytest
import torch
import wikitext_folders as made

from hgrn2_bench import checkpoints, engine, registry
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.checkpoints import Card
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.engine import SkippedError
from hgrn2_bench.errors import ConfigError, DataError
from hgrn2_bench.language import LanguageModel
from hgrn2_bench.lines import tokens_seen
from hgrn2_bench.plan import make_plan
from suites.wikitext import texts
from suites.wikitext.tokenizers import Bytes

TEST = ("suite=wikitext", "preset=test")


def plan(*words):
    return make_plan([*TEST, *words], "cpu")


def one(*words):
    (cell,) = plan(*words).cells
    return cell


def run(cell, results):
    folder = CellFolder(results, cell)
    with folder.lock():
        return engine.run_cell(cell, folder, lambda *_: None, lambda: False)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A cell that was trained, with its rows and the folder of its model."""
    results = tmp_path_factory.mktemp("results")
    cell = one("model=hgrn2", "hgrn2.expand_ratio=8")
    return cell, run(cell, results), CellFolder(results, cell).weights


@pytest.fixture
def copy(taught, tmp_path):
    return shutil.copytree(taught[2], tmp_path / "some where" / "my model")


def values(rows):
    return {(row.split, row.metric): (row.value, row.num_items, row.floors, row.card) for row in rows}


def test_a_folder_has_the_numbers_of_the_cell_that_trained_it(taught, tmp_path):
    cell, rows, folder = taught
    again = run(one(f"model={folder}"), tmp_path)
    assert values(again) == values(rows)
    first = again[0]
    assert {(row.status, row.steps, row.tokens) for row in again} == {("ok", 0, 0)}
    assert first.wall_s > 0  # of the evaluation
    assert first.model == f"hgrn2@{first.settings[f'{first.model}.checkpoint'][:6]}"
    assert first.details["trained_tokens"] == rows[0].tokens
    assert first.details["layers"] == rows[0].details["layers"]
    assert first.details["checkpoint"] == str(folder)
    assert first.settings[f"{first.model}.d_model"] == cell.model_config.d_model
    assert first.settings[f"{first.model}.expand_ratio"] == 8
    assert (first.settings["conv"], first.settings["block"]) == (4, 16)
    assert not {"lr", "epochs", "d_model"} & set(first.settings)
    assert (first.parameters, first.weights_hash, first.data_hash) == (rows[0].parameters, rows[0].weights_hash, rows[0].data_hash)
    assert not list((tmp_path / "cells").glob("*/*/model"))


def test_the_same_weights_elsewhere_are_the_same_cell(taught, copy, tmp_path):
    here, there = one(f"model={taught[2]}"), one(f"model='{copy}'")
    assert here.key == there.key
    assert (here.model.split("@")[0], there.model.split("@")[0]) == ("hgrn2", "my_model")
    rows = run(here, tmp_path)
    assert CellFolder(tmp_path, there).rows() == rows
    assert CellFolder(tmp_path, there).damage() == ""
    assert len(plan(f"model={taught[2]},'{copy}'").cells) == 1


@pytest.mark.parametrize("change", ["weights", "config"])
def test_other_weights_or_another_config_are_another_cell(taught, copy, change):
    model, card = checkpoints.load(copy), checkpoints.read_card(copy)
    if change == "weights":
        with torch.no_grad():
            model.head.weight[0, 0] += 1
    else:
        card = Card(card.model, card.settings, card.tokenizer, card.tokens + 1)
    checkpoints.save(model, card, copy)
    assert one(f"model='{copy}'").key != one(f"model={taught[2]}").key


def test_how_it_is_scored_is_part_of_the_key(taught):
    cell = one(f"model={taught[2]}")
    for word in ("block=32", "window=4", "carry=false", "dtype=bfloat16", "eval_batch_size=3", "backend=reference"):
        assert one(f"model={taught[2]}", word).key != cell.key


@pytest.mark.parametrize("word", ["lr=1e-3", "epochs=2", "seed=1", "d_model=32", "conv=0", "forget_bias=0", "match=params", "batch_size=4"])
def test_words_that_would_change_a_trained_model_are_refused(taught, word):
    with pytest.raises(ConfigError, match=rf"'{word}' has no effect: hgrn2@\w{{6}} is trained and stays as it is"):
        plan(f"model={taught[2]}", word)


def test_beside_models_that_learn_words_are_for_those(taught):
    found = plan(f"model={taught[2]},gla", "lr=1e-3,2e-3", "seed=1,2", "d_model=8")
    kept, *others = found.cells
    assert (kept.checkpoint != "", kept.seed, kept.model_config.d_model) == (True, 0, 16)
    assert {(cell.model, cell.seed, cell.train.lr, cell.model_config.d_model) for cell in others} == {
        ("gla", seed, lr, 8) for seed in (1, 2) for lr in (1e-3, 2e-3)
    }
    assert f"d_model, lr, seed: no effect on {kept.model}, which is trained" in found.notes
    assert "seed" not in kept.command
    assert kept.key == one(f"model={taught[2]}").key


def test_the_command_of_a_cell_gives_that_cell(taught):
    cell = plan(f"model={taught[2]}", "window=4,8").cells[1]
    words = [word for word in shlex.split(cell.command) if "=" in word]
    assert make_plan(words, "cpu").cells[0].key == cell.key


@pytest.mark.parametrize("error", [SkippedError("nothing to read"), RuntimeError("boom")])
def test_an_evaluation_that_fails_still_says_what_the_model_has_seen(taught, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("suites.wikitext.runner.Runner.report", fail)
    (row,) = run(one(f"model={taught[2]}"), tmp_path)
    assert row.status == ("skipped" if isinstance(error, SkippedError) else "failed")
    assert tokens_seen(row) == taught[1][0].tokens


def test_suites_that_keep_no_models_take_none(taught):
    with pytest.raises(ConfigError, match=r"suite=mqar trains its models: hgrn2@\w{6} is a trained language model"):
        make_plan(["suite=mqar", f"model={taught[2]}"], "cpu")


def test_without_a_preset_trained_models_are_evaluated_and_others_learn(taught):
    words = ("suite=wikitext", "dataset=markov", "symbols=16", "facts=2", "document=24")
    (cell,) = make_plan([*words, f"model={taught[2]}", "window=400"], "cpu").cells
    assert (cell.preset, cell.data.block, cell.data.window) == ("evaluate", 1024, 400)
    assert make_plan([*words, f"model={taught[2]},gla"], "cpu").preset == "smoke"


def test_a_preset_without_models_asks_for_one():
    with pytest.raises(ConfigError, match="preset=evaluate names no model: write model=DIR"):
        make_plan(["suite=wikitext", "preset=evaluate"], "cpu")


def test_a_preset_for_trained_models_trains_none(taught):
    for models in ("hgrn2", f"{taught[2]},hgrn2"):
        with pytest.raises(ConfigError, match=r"^preset=evaluate is for trained models: write model=DIR; preset=smoke trains hgrn2$"):
            make_plan(["suite=wikitext", "preset=evaluate", f"model={models}"], "cpu")


def edited(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "my model: no such folder of a model"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing: .* holds no model"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: edited(f, format="other"), "of no checkpoint that this program knows"),
        (lambda f: edited(f, mixer_version="0"), "saved with version 0 of hgrn2, here it is"),
        (lambda f: edited(f, settings={"expand": 3}), "config and weights do not make a model here: .*expand"),
        (lambda f: edited(f, model_config={"d_modle": 3}), "config and weights do not make a model here: .*d_modle"),
        (lambda f: edited(f, model_type="llama", architectures=["LlamaForCausalLM"]), "model_type is 'llama'; only hgrn2 can be read"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b"12345678"), "model.safetensors is cut short or no safetensors file"),
        (flip, r"another SHA-256"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_before_anything_runs(damage, message, copy):
    damage(copy)
    with pytest.raises(DataError, match=message) as caught:
        plan(f"model='{copy}'")
    assert "\n" not in str(caught.value)


def test_a_folder_that_changed_after_planning_is_not_run(taught, copy, tmp_path):
    cell = one(f"model='{copy}'")
    registry._trained_model.cache_clear()
    model = checkpoints.load(copy)
    with torch.no_grad():
        model.head.weight += 1
    checkpoints.save(model, checkpoints.read_card(copy), copy)
    (row,) = run(cell, tmp_path)
    assert (row.status, row.reason) == ("failed", f"{copy} changed after the run was planned; run again")


def test_tokens_of_another_source_are_refused(taught):
    with pytest.raises(ConfigError, match=r"was trained with text markov: 16 symbols.*; this text has markov: 8 symbols"):
        engine.build(one(f"model={taught[2]}", "symbols=8"))


@pytest.mark.parametrize(
    ("tokenizer", "fault"),
    [
        (f"bytes {Bytes.hash}, 256 ids", ""),
        ("bytes 0123, 256 ids", "was trained with tokenizer bytes 0123, 256 ids; this text has bytes"),
        ("gpt2 0123, 50264 ids", "was trained with tokenizer gpt2 0123, 50264 ids; this text has bytes"),
    ],
)
def test_a_checkpoint_is_scored_with_its_own_tokenizer(tmp_path, monkeypatch, tokenizer, fault):
    monkeypatch.setenv("HGRN2_BENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HGRN2_BENCH_CACHE", str(tmp_path / "cache"))
    texts.load.cache_clear()
    texts._fingerprint.cache_clear()
    made.write_json(tmp_path / "data")
    card = Card("hgrn2", {"expand_ratio": 8}, {"tokenizer": tokenizer, "text": "another"})
    model = LanguageModel(ModelConfig(d_model=16, num_layers=1), registry.load("hgrn2"), card.settings, "chunked", 256, 16)
    checkpoints.save(model, card, tmp_path / "model")
    (cell,) = make_plan(["suite=wikitext", f"model={tmp_path / 'model'}", "dataset=text", "tokenizer=bytes"], "cpu").cells
    if not fault:
        assert engine.build(cell).vocab_size == 256
        return
    with pytest.raises(ConfigError, match=fault):
        engine.build(cell)


@pytest.mark.parametrize("positions", ["learned", "sinusoid", "none"])
def test_blocks_beyond_training_length_need_positions_that_do_not_end(tmp_path, positions):
    config = ModelConfig(d_model=16, num_layers=1, positions=positions)
    card = Card("attention", {"num_heads": 2})
    model = LanguageModel(config, registry.load("attention"), card.settings, "chunked", 16, 16)
    checkpoints.save(model, card, tmp_path / positions)
    assert engine.build(one(f"model={tmp_path / positions}")).max_len == 16
    cell = one(f"model={tmp_path / positions}", "block=32")
    if positions == "none":
        assert {row.status for row in run(cell, tmp_path)} == {"ok"}
        return
    with pytest.raises(ConfigError, match=rf"block=32: .*{positions} has a table of positions \({positions}\) for 16"):
        engine.build(cell)
