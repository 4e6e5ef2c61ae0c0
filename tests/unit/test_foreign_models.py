"""Language models of other makers: what planning reads of their folders, which suites take them, and what their rows may say."""

import dataclasses
import json
import shlex
import sys
import types

import pytest
import torch
from torch import nn

from hgrn2_bench import engine, plan, registry, trained
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.engine import Shape, SkippedError
from hgrn2_bench.errors import ConfigError, DataError
from hgrn2_bench.plan import make_plan
from hgrn2_bench.protocol import Metric, Preset, Protocol
from hgrn2_bench.weights import write_tensors

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 8, "n_layer": 2, "n_positions": 64, "vocab_size": 16}
MAMBA2 = {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], "hidden_size": 8, "num_hidden_layers": 1}
RECALL = 0.75


@dataclasses.dataclass(frozen=True)
class Data:
    lm_task: str = "piqa"
    fingerprint: str = ""


class Tiny(nn.Module):
    """A model as transformers builds one: tied table and head, and a table of positions."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe, self.mlp = nn.Embedding(16, 8), nn.Embedding(64, 8), nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 16, bias=False)
        self.lm_head.weight = self.wte.weight

    def get_output_embeddings(self):
        return self.lm_head


class Runner:
    """Scores nothing: one number, or nothing where there are no files."""

    data_hash, truncated, skipped = "d", 0, 0

    def __init__(self, cell):
        if cell.data.lm_task == "absent":
            raise SkippedError("no data/absent.jsonl")

    @staticmethod
    def shape(cell):
        return Shape(1, 1.0, 1, 1, 1)

    @staticmethod
    def build(cell):
        return Tiny()

    def report(self, model):
        return [Metric("test", "score", RECALL, 4)]


@pytest.fixture(autouse=True)
def suite(monkeypatch):
    """Suite zeroshot, which takes any language model, beside the suites that are there."""
    tasks = {name: (f"lm_task={name}",) for name in ("piqa", "absent")}
    presets = {
        "smoke": Preset("s", "ours", ("model=hgrn2", "num_layers=1"), {"piqa": ()}),
        "evaluate": Preset("s", "ours", ("lr=1e-3", "conv=0", "eval_batch_size=3"), tasks),
    }
    made = Protocol(
        *("zeroshot", 1, "score", "fraction", True, Data, lambda data: data.lm_task), presets=presets, takes_any_language_model=True
    )
    known = registry.protocol
    monkeypatch.setattr(registry, "protocol", lambda name: made if name == "zeroshot" else known(name))
    names = registry.suites() | {"zeroshot": "zeroshot_of_test"}
    monkeypatch.setattr(registry, "suites", lambda: names)
    monkeypatch.setitem(sys.modules, "zeroshot_of_test.runner", types.SimpleNamespace(Runner=Runner))


def made(folder, content=LLAMA, **changes):
    """A folder as transformers writes one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content | changes))
    write_tensors(folder / "model.safetensors", {"a": torch.zeros(2)})
    (folder / "tokenizer.json").write_text("{}")
    return folder


def cells(*words):
    return make_plan(["suite=zeroshot", *words], "cpu").cells


def one(*words):
    (cell,) = cells("task=piqa", *words)
    return cell


@pytest.mark.parametrize(
    ("content", "settings", "sizes"),
    [
        (LLAMA | {"max_position_embeddings": 32}, {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 16}, (16, 32)),
        (GPT2, {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 16}, (16, 64)),
        (MAMBA2, {"hidden_size": 8, "num_hidden_layers": 1}, (0, 0)),
    ],
)
def test_a_folder_says_what_its_configuration_says(tmp_path, content, settings, sizes):
    found = trained.read(made(tmp_path / "some model", content))
    assert found.card.settings == {"model_type": content["model_type"]} | settings
    assert (found.vocab_size, found.max_len) == sizes
    assert (found.foreign, found.tokens, found.remark) == (True, None, "")
    assert found.label == f"some_model@{found.hash[:6]}"


def test_the_hash_is_over_configuration_tokenizer_and_weights_alone(tmp_path):
    first = trained.read(made(tmp_path / "a")).hash
    made(tmp_path / "b")
    (tmp_path / "b/README.md").write_text("of whose making it is")
    assert trained.read(tmp_path / "b").hash == first
    (tmp_path / "b/tokenizer.json").write_text('{"other": 1}')
    assert trained.read(tmp_path / "b").hash != first
    (tmp_path / "b/tokenizer.json").write_text("{}")
    write_tensors(tmp_path / "b/model.safetensors", {"a": torch.ones(2)})
    assert trained.read(tmp_path / "b").hash != first
    assert trained.read(made(tmp_path / "c", hidden_size=9)).hash != first


def test_rows_say_nothing_of_a_configuration_of_ours(tmp_path):
    cell = one(f"model={made(tmp_path / 'm')}")
    name = cell.model
    assert cell.fields() == {
        "eval_batch_size": 3,
        "lm_task": "piqa",
        "fingerprint": "",
        **{"match": "none", "match_target": 0, "match_tolerance": 0.02, "match_len": 0},
        f"{name}.model_type": "llama",
        f"{name}.hidden_size": 8,
        f"{name}.num_hidden_layers": 1,
        f"{name}.vocab_size": 16,
        f"{name}.checkpoint": cell.checkpoint,
    }
    assert (cell.backend, cell.dtype, cell.mixer_version, cell.preset) == ("transformers", "float32", "", "evaluate")
    assert cell.model_config == ModelConfig()
    assert plan.Cell.from_json(json.loads(json.dumps(cell.to_json()))) == cell
    words = [word for word in shlex.split(cell.command) if "=" in word]
    assert make_plan(words, "cpu").cells[0].key == cell.key


def test_the_key_knows_weights_and_precision_but_no_path(tmp_path):
    cell = one(f"model={made(tmp_path / 'm')}")
    assert one(f"model={made(tmp_path / 'n')}").key == cell.key
    assert one(f"model={tmp_path / 'm'}", "dtype=bfloat16").key != cell.key
    assert one(f"model={made(tmp_path / 'o', vocab_size=17)}").key != cell.key


@pytest.mark.parametrize("backend", ["chunked", "fla", "reference"])
def test_backends_of_ours_are_refused(tmp_path, backend):
    with pytest.raises(ConfigError, match=rf"backend={backend}: m@\w+ has only transformers"):
        one(f"model={made(tmp_path / 'm')}", f"backend={backend}")


@pytest.mark.parametrize("word", ["lr=1e-3", "seed=1", "conv=4", "match=params"])
def test_what_only_training_takes_is_refused(tmp_path, word):
    with pytest.raises(ConfigError, match="is trained and stays as it is"):
        one(f"model={made(tmp_path / 'm')}", word)


@pytest.mark.parametrize("suite_name", ["wikitext", "mqar"])
def test_other_suites_refuse_it_in_one_line(tmp_path, suite_name):
    folder = made(tmp_path / "m")
    says = r"m/config.json: model_type is 'llama'; only hgrn2 can be read by suite=wikitext"
    says = r"suite=mqar trains its models: m@\w+ is a trained language model" if suite_name == "mqar" else says
    with pytest.raises(ConfigError, match=says):
        make_plan([f"suite={suite_name}", f"model={folder}"], "cpu")


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled, "its weights are a pickle, which can run code: convert them to model.safetensors"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b"123"), "cut short or no safetensors file"),
        (
            lambda f: made(f, architectures=["BertForMaskedLM"]),
            "'llama' of architectures BertForMaskedLM; a causal model's ends in",
        ),
        (lambda f: made(f, architectures=["LlamaModel"]), "'llama' of architectures LlamaModel; a causal model's ends in"),
        (lambda f: made(f, architectures=None), "of architectures none"),
        (lambda f: made(f, model_type="hgrn2", num_heads=3, expand_ratio=None), "num_heads=3"),  # ours to read, or nobody's
    ],
)
def test_what_is_wrong_with_a_folder_is_said_at_once(tmp_path, damage, message):
    folder = made(tmp_path / "m")
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        one(f"model={folder}")
    assert "\n" not in str(caught.value)


def test_code_of_the_folder_s_own_is_named_and_not_run(tmp_path):
    folder = made(tmp_path / "m", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (note,) = make_plan(["suite=zeroshot", f"model={folder}", "task=piqa"], "cpu").notes
    assert note.endswith("names code of the folder's own (auto_map): it is not run, transformers' own code for llama is")


# names on the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model, in a folder that has not its name."""
    folder = made(tmp_path / "snapshots" / "0123abc")

    def fetched(name):
        if name != "org/some-model":
            raise ConfigError(f"{name}: not a folder here, and the hub did not give it")
        return folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "hgrn2_bench.hub", types.SimpleNamespace(fetch=fetched))
    registry._trained_model.cache_clear()
    return folder


def test_a_name_on_the_hub_is_a_model_of_that_name(hub):
    cell = one("model=org/some-model")
    assert cell.model == f"some-model@{cell.checkpoint[:6]}"
    assert (cell.model_ref, cell.key, cell.preset) == ("org/some-model", one(f"model={hub}").key, "evaluate")


def test_a_name_that_cannot_be_fetched_is_one_line(hub):
    with pytest.raises(ConfigError, match=r"^org/other: not a folder here, and the hub did not give it$"):
        one("model=org/other")


@pytest.mark.parametrize("ref", ["snapshots/nowhere", "./org/some-model", "/org/some-model", "org/some-model/x", "../some-model", "org/.."])
def test_paths_are_no_names_on_the_hub(hub, ref):
    with pytest.raises(DataError, match="no such folder of a model"):
        one(f"model={ref}")


def test_a_folder_that_is_here_wins_over_the_hub(hub, tmp_path):
    made(tmp_path / "org/some-model", hidden_size=99)
    assert one("model=org/some-model").settings["hidden_size"] == 99


# cells that run


def run(cell, results):
    folder = CellFolder(results, cell)
    with folder.lock():
        return engine.run_cell(cell, folder, lambda *_: None, lambda: False)


def test_a_row_says_what_was_built(tmp_path):
    (row,) = run(one(f"model={made(tmp_path / 'm')}"), tmp_path / "results")
    assert (row.status, row.value, row.backend, row.steps, row.tokens) == ("ok", RECALL, "transformers", 0, 0)
    assert (row.parameters, row.non_embedding_parameters) == (16 * 8 + 64 * 8 + 72, 72)
    assert (row.state_bytes, row.train_flops_per_token) == (None, None)
    assert row.effective["weights_dtype"] == "float32"
    assert row.effective["class"] == "test_foreign_models.Tiny"
    assert (row.details["trained_model"], row.details["trained_tokens"]) == ("llama", None)


def test_a_cell_without_its_files_is_planned_described_and_skipped(tmp_path):
    cell, absent = cells(f"model={made(tmp_path / 'm')}")
    assert engine.describe(absent, engine.build(absent)).parameters == 712
    (row,) = run(absent, tmp_path / "results")
    assert (row.status, row.reason, row.value, row.metric) == ("skipped", "no data/absent.jsonl", None, "score")
    assert run(cell, tmp_path / "results")[0].status == "ok"
