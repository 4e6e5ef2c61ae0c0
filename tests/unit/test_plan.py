"""From words to cells: what wins, what merges, what is refused, and keys and commands that find the same cell again."""

import dataclasses
import functools
import importlib.machinery
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import textwrap

import pytest

from hgrn2_bench import plan, registry
from hgrn2_bench.backends import resolve_backend
from hgrn2_bench.config import PLAN_KEYS, ModelConfig, TrainConfig, parse_words, written
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.plan import Cell, make_plan, plan_beside
from hgrn2_bench.protocol import Preset, Protocol

PAPER = ("preset=paper", "task=len64_kv4", "d_model=64", "lr=1e-3")
ALL_MODELS = "model=" + ",".join(registry.models())
MQAR = registry.protocol("mqar")

MINE = """
from typing import Literal
from hgrn2_bench.interfaces import Mixer


class Mine(Mixer):
    size: int = 1
    share: float = 1
    name: str = "plain"
    kind: Literal["a", "b"] = "a"
    depth: int | None = None
    dropout: float = 0.5


class Module:
    def __init__(self, d_model: int, conv: bool = True, num_layers: int = 3):
        pass
"""


def planned(*words, device="cpu"):
    preset = [] if any(word.startswith("preset=") for word in words) else ["preset=test"]
    return make_plan(["suite=mqar", *preset, *words], device)


def cells(*words, device="cpu"):
    return planned(*words, device=device).cells


def one(*words, device="cpu"):
    (cell,) = cells(*words, device=device)
    return cell


def refusal(*words, device="cpu"):
    with pytest.raises(ConfigError) as caught:
        planned(*words, device=device)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def again(cell):
    """What planning a cell's command gives."""
    python, dash_m, name, run, *words, option, device = shlex.split(cell.command)
    assert (python, dash_m, name, run, option) == ("python", "-m", "hgrn2_bench", "run", "--device")
    return make_plan(words, device).cells


@pytest.fixture
def remembered(monkeypatch):
    """Parsing and conversion that remember: planning hundreds of commands then takes a second or two."""
    parse = functools.cache(parse_words)
    monkeypatch.setattr(plan, "convert", functools.lru_cache(maxsize=None, typed=True)(plan.convert))
    monkeypatch.setattr(plan, "parse_words", lambda words: parse(words) if isinstance(words, tuple) else parse_words(words))


def installed(monkeypatch, fla):
    """Let planning find fla, or not, whatever is installed here."""
    find = importlib.util.find_spec
    spec = importlib.machinery.ModuleSpec("fla", None) if fla else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, *rest: spec if module == "fla" else find(module, *rest))


@pytest.fixture
def with_fla(monkeypatch):
    installed(monkeypatch, fla=True)


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "my dir/it's mine.py"
    path.parent.mkdir()
    path.write_text(MINE)
    return str(path)


def quoted(ref):
    """A reference as a user would quote it in a word."""
    return "'" + ref.replace("'", r"\'") + "'"


# the product of the sweeps


def test_plan_is_the_product_of_all_sweeps():
    found = cells("model=hgrn2,gla", "d_model=16,32", "seed=range(3)", "lr=1e-3,1e-2")
    assert len(found) == 2 * 2 * 3 * 2
    assert {(c.model, c.model_config.d_model, c.seed, c.train.lr) for c in found} == {
        (m, d, s, lr) for m in ("hgrn2", "gla") for d in (16, 32) for s in (0, 1, 2) for lr in (1e-3, 1e-2)
    }
    assert len({c.key for c in found}) == len(found)


def test_plan_keeps_the_order_of_tasks_and_models():
    found = cells("preset=paper", "task=len128_kv8,len64_kv4", "model=gla,hgrn2", "d_model=64", "lr=1e-3")
    assert [(c.task, c.model) for c in found] == [(t, m) for t in ("len128_kv8", "len64_kv4") for m in ("gla", "hgrn2")]


def test_plan_takes_all_tasks_and_models_of_the_preset():
    found = cells("preset=paper", "d_model=64", "lr=1e-3")
    assert {c.task for c in found} == set(MQAR.presets["paper"].tasks)
    words = {word.key: word.values for word in parse_words(MQAR.presets["paper"].words)}
    assert {c.model for c in found} == set(words["model"])
    assert {c.seed for c in found} == set(words["seed"])


def test_plan_without_a_preset_is_smoke():
    found = make_plan(["suite=mqar"], "cpu")
    assert found.preset == "smoke"
    assert {c.preset for c in found.cells} == {"smoke"}


def test_a_models_own_sweep_touches_only_its_cells():
    found = cells("model=hgrn2,gla", "hgrn2.expand_ratio=4,8")
    assert [(c.model, c.settings.get("expand_ratio")) for c in found] == [("hgrn2", 4), ("hgrn2", 8), ("gla", None)]


def test_a_shared_key_can_be_swept_for_one_model():
    found = cells("model=hgrn2,gla", "hgrn2.d_model=16,32")
    assert [(c.model, c.model_config.d_model) for c in found] == [("hgrn2", 16), ("hgrn2", 32), ("gla", 16)]


@pytest.mark.parametrize(
    "words",
    [
        ("model=attention", "forget_bias=1,2,3"),
        ("model=gla", "lower_bound=none,exclusive"),
        ("model=hgrn2,hgrn2",),
        ("model=hgrn2", "lr=1e-3,0.001"),
        ("model=hgrn2", "lr=1,1.0"),
        ("model=hgrn2", "seed=0,0"),
        ("model=hgrn2", "backend=auto,chunked"),
    ],
)
def test_cells_that_become_equal_are_merged(words):
    assert len(cells(*words)) == 1


def test_a_default_and_the_same_value_typed_are_one_cell(mine):
    model = f"model={quoted(f'{mine}:Mine')}"
    assert one(model, "Mine.share=1").key == one(model).key
    assert len(cells(model, "Mine.share=1,1.0")) == 1
    assert one("model=hgrn2", "hgrn2.variant=paper").key == one("model=hgrn2").key


# what wins


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ((), "clip", 0.0),  # schema default
        ((), "warmup", 0.1),  # preset over default
        (PAPER, "batch_size", 512),  # task over default
        ((*PAPER, "batch_size=8"), "batch_size", 8),  # user over task
        (("warmup=0.5",), "warmup", 0.5),  # user over preset
        (("conv=2", "hgrn2.conv=3"), "conv", 3),  # model.key over key
        (("hgrn2.conv=3", "conv=2"), "conv", 3),  # whatever their order
        (("gla.conv=3", "conv=2"), "conv", 2),  # another model's
    ],
)
def test_later_layers_win(words, key, value):
    models = "model=hgrn2,gla" if any(word.startswith("gla.") for word in words) else "model=hgrn2"
    assert cells(models, *words)[0].fields()[key] == value


def test_a_presets_word_for_one_model_beats_its_plain_word():
    found = {c.model: c.model_config.positions for c in cells(*PAPER)}
    assert found == {"hgrn2": "none", "hgrn1": "none", "attention": "learned"}


def test_the_users_plain_word_beats_the_presets_word_for_one_model():
    assert {c.model_config.positions for c in cells(*PAPER, "positions=none")} == {"none"}
    assert {c.model_config.positions for c in cells(*PAPER, "positions=sinusoid", "attention.positions=rope")} == {"sinusoid", "rope"}


def toy(monkeypatch, words, task_words):
    """A suite with one preset of the given words."""
    preset = Preset("toy", "ours", ("model=hgrn2", *words), {"t": task_words})
    found = Protocol("mqar", 1, "accuracy", "fraction", True, MQAR.data_schema, lambda data: "t", {"test": preset})
    monkeypatch.setattr(registry, "protocol", lambda name: found)


@pytest.mark.parametrize(
    ("words", "task_words", "conv"),
    [
        (("hgrn2.conv=4", "conv=2"), (), 4),
        (("hgrn2.conv=4",), ("conv=2",), 2),
        (("conv=2",), ("hgrn2.conv=4",), 4),
        (("conv=2",), ("hgrn2.conv=4", "conv=3"), 4),
        (("hgrn2.conv=4", "hgrn2.expand_ratio=8"), ("hgrn2.conv=2",), 2),
    ],
)
def test_a_plain_word_beats_model_words_of_earlier_layers_only(monkeypatch, words, task_words, conv):
    toy(monkeypatch, words, task_words)
    assert one().model_config.conv == conv
    assert one("conv=0").model_config.conv == 0
    assert one("conv=0", "hgrn2.conv=5").model_config.conv == 5


def test_a_setting_that_shares_its_name_with_a_plain_key_stays_apart(mine):
    mixer = f"model={quoted(f'{mine}:Mine')}"
    assert one(mixer).settings["dropout"] == 0.5
    cell = one(mixer, "dropout=0.1", "Mine.dropout=0.2")
    assert (cell.model_config.dropout, cell.settings["dropout"]) == (0.1, 0.2)
    assert one(mixer, "Mine.dropout=0.2").model_config.dropout == 0.0
    module = one(f"model={quoted(f'{mine}:Module')}")  # the preset's conv=4 and num_layers=1 are the model's, not the module's
    assert module.settings == {"conv": True, "num_layers": 3}
    assert module.model_config.num_layers == 1
    assert [c.key for c in again(cell)] == [cell.key]


# words without effect (S12)


@pytest.mark.parametrize(
    ("model", "word", "note"),
    [
        ("attention", "forget_bias=1", "forget_bias has no effect on attention: left out"),
        ("attention", "attention.forget_bias=1", "forget_bias has no effect on attention: left out"),
        ("gla", "lower_bound=exclusive", "lower_bound has no effect on gla: left out"),
    ],
)
def test_a_users_word_without_effect_is_noted(model, word, note):
    found = planned(f"model={model}", word)
    assert found.notes == (note,)
    assert found.cells[0].key == one(f"model={model}").key
    assert "forget_bias" not in found.cells[0].command


def test_a_word_that_acts_on_one_model_is_noted_for_the_other_only():
    found = planned("model=hgrn2,attention", "forget_bias=0,2")
    assert [(c.model, c.model_config.forget_bias) for c in found.cells] == [("hgrn2", 0.0), ("hgrn2", 2.0), ("attention", 0.0)]
    assert found.notes == ("forget_bias has no effect on attention: left out",)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("model=attention", "positions=none"), True),
        (("model=hgrn2,attention", "positions=sinusoid,none"), True),
        (("model=attention", "positions=sinusoid"), False),
        (("model=attention", "positions=none", "conv=4"), False),
        (("model=attention", "positions=none", "scan=causal"), False),
        (("model=attention", "positions=none", "first_layer=base_conv"), False),
        (("model=hgrn2,hybrid", "positions=none"), False),
    ],
)
def test_attention_that_cannot_know_the_order_is_noted(words, told):
    found = make_plan(["suite=lra", "task=listops", *words], "cpu").notes
    assert ("attention with scan=both and positions=none cannot know the order of its tokens" in found) == told


@pytest.mark.parametrize("words", [("suite=lra", "task=image,text"), ("suite=mqar",)])
def test_a_two_dimensional_scan_of_sequences_is_refused(words):
    with pytest.raises(ConfigError, match=r"scan=2d_series needs images: .* gives sequences"):
        make_plan([*words, "scan=both,2d_series"], "cpu")
    assert make_plan(["suite=lra", "task=image,pathfinder,pathx", "scan=both,2d_series"], "cpu").cells


def test_local_mixing_is_not_claimed_for_a_plain_module(mine):
    found = planned(f"model={quoted(f'{mine}:Module')}", "conv=4")
    assert found.cells[0].model_config.conv == 0
    assert found.notes == ("conv has no effect on Module: left out",)


@pytest.mark.parametrize("preset", MQAR.presets)
def test_every_word_of_a_preset_has_an_effect(preset):
    words = {word.name: word for word in parse_words(MQAR.presets[preset].words)}  # the last one where a preset repeats a key
    found = planned(f"preset={preset}", ALL_MODELS)
    assert not found.notes
    seen = [c.fields() | {"seed": c.seed, "dtype": c.dtype, "backend": c.backend} for c in found.cells]
    for word in words.values():
        if word.key not in PLAN_KEYS:
            name = word.name if any(word.name in fields for fields in seen) else word.key
            assert {str(v) for v in word.values} <= {str(f[name]) for f in seen if name in f}, word.text


def test_presets_and_tasks_are_named_after_what_they_run():
    for name, preset in MQAR.presets.items():
        for task in preset.tasks:
            assert {c.task for c in cells(f"preset={name}", f"task={task}")} == {task}


def test_a_changed_task_is_named_after_what_it_runs():
    assert {c.task for c in cells("seq_len=20,24", "random_fill=true")} == {"len20_kv2_fill", "len24_kv2_fill"}


# refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+model.hiden=64"], "Unknown key 'model.hiden'. Did you mean 'model'?"),
        (["lr_=1e-3"], "Unknown key 'lr_'. Did you mean 'lr'?"),
        (["num_passes=2"], "Unknown key 'num_passes'. Did you mean 'num_pairs'?"),
        (["train_power_a=0.1"], "Unknown key 'train_power_a'. Did you mean 'power_a'?"),
        (["hgrn2.expand_rato=16"], "Unknown key 'hgrn2.expand_rato'. Did you mean 'hgrn2.expand_ratio'?"),
        (["expand_ratio=16"], "Unknown key 'expand_ratio'. Did you mean 'hgrn2.expand_ratio'?"),
        (["hgnr2.expand_ratio=16"], "Unknown key 'hgnr2.expand_ratio'. Did you mean 'hgrn2.expand_ratio'?"),
        (["foo.d_model=16"], "Unknown key 'foo.d_model'. Did you mean 'd_model'?"),
        (["hgrn2.d_modle=16"], "Unknown key 'hgrn2.d_modle'. Did you mean 'd_model'?"),
        (["lr=1", "lr=2"], "'lr' is given twice; a sweep is written lr=a,b"),
        (["hgrn2.conv=2", "hgrn2.conv=4"], "'hgrn2.conv' is given twice; a sweep is written hgrn2.conv=a,b"),
        (["model=hgrn2", "gla.num_heads=2"], "'gla.num_heads=2' has no effect: the run has no model 'gla'"),
        (["model=hgrn2", "gla.conv=2"], "'gla.conv=2' has no effect: the run has no model 'gla'"),
        (["+lr=1"], "'+lr=1': write plain lr=value; Hydra's signs +, ~ and @ mean nothing here"),
        (["~hgrn2.variant"], "'~hgrn2.variant': write plain hgrn2.variant=value; Hydra's signs +, ~ and @ mean nothing here"),
        (["+preset=test"], "'+preset=test': write plain preset=value; Hydra's signs +, ~ and @ mean nothing here"),
        (["+task=len16_kv2"], "'+task=len16_kv2': write plain task=value; Hydra's signs +, ~ and @ mean nothing here"),
        (["model=retnt"], "Unknown model 'retnt'. Did you mean 'retnet'? Available: attention, "),
        (["model=[hgrn2,gla]"], "'model=[hgrn2,gla]': a sweep is written without brackets, model=a,b"),
        (["d_model=[16,32]"], "'d_model=[16,32]': a sweep is written without brackets, d_model=a,b"),
        (["hgrn2.d_model=[16]"], "'hgrn2.d_model=[16]': a sweep is written without brackets, hgrn2.d_model=a,b"),
        (["gla.num_heads=[1,2]", "model=gla"], "'gla.num_heads=[1,2]': a sweep is written without brackets, gla.num_heads=a,b"),
        (["model=hybrid", "hybrid.layers=[1,2]"], "hybrid.layers=[1, 2]: expected a list of words [a,b]"),
        (["model=hybrid", "hybrid.layers=null"], "hybrid.layers=null: expected a list of words [a,b]"),
        (["model=hybrid", "hybrid.layers=[]"], "hybrid.layers=[] names no model"),
        (["model=hybrid", "hybrid.layers=[hgrn2,retnt]"], "Unknown model in hybrid.layers 'retnt'. Did you mean 'retnet'?"),
        (["model=hybrid", "hybrid.layers=hybrid"], "hybrid.layers: 'hybrid' is itself built of other models; name those"),
        (["task=len16_kv3"], "Unknown task of mqar preset=test 'len16_kv3'. Did you mean 'len16_kv2'? Available: len16_kv2."),
        (["preset=papr"], "Unknown preset of mqar 'papr'. Did you mean 'paper'? Available: "),
        (["preset=test,smoke"], "'preset=test,smoke': one preset at a time"),
        (["d_model=1.5"], "d_model=1.5: expected a whole number"),
        (["hgrn2.expand_ratio=abc"], "hgrn2.expand_ratio=abc: expected int or null"),
        (["hgrn2.variant=papr"], "Unknown hgrn2.variant 'papr'. Did you mean 'paper'? Available: fla, paper, paper_lm."),
        (["lr=null"], "lr=null: expected a number"),
        (["lr=1e-3,nan"], "lr=nan: expected a finite number"),
        (["forget_bias=inf"], "forget_bias=inf: expected a finite number"),
        (["gla.expand_k=nan"], "gla.expand_k=nan: expected a finite number"),
        (["dtype=float16"], "Unknown dtype 'float16'. Did you mean 'bfloat16'? Available: bfloat16, float32."),
        (["conv=0,1"], "conv=1 must be 0 (none) or a width of at least 2"),
        (["seed=range(0)"], "'seed=range(0)': the sweep is empty"),
        (["model=./no/such.py:C"], "model=./no/such.py:C: no file ./no/such.py"),
    ],
    ids=lambda case: " ".join(case) if isinstance(case, list) else "",
)
def test_wrong_words_are_refused_with_the_nearest_right_one(words, message):
    assert refusal(*words).startswith(message)


def test_a_run_needs_a_known_suite():
    for words, message in [
        ([], "name a suite: suite=imagenet|lra|mqar"),
        (["suite=mqra"], "Unknown suite 'mqra'. Did you mean 'mqar'?"),
        (["suite=mqar,mqar"], "'suite=mqar,mqar': one suite at a time"),
        (["+suite=mqar"], "'+suite=mqar': write plain suite=value"),
    ]:
        with pytest.raises(ConfigError) as caught:
            make_plan(words, "cpu")
        assert str(caught.value).startswith(message)


def test_two_different_files_with_one_class_name_are_refused(tmp_path):
    refs = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.py"
        path.write_text(f"class Same:\n    '''{name}'''\n")
        refs.append(f"{path}:Same")
    assert "two models are called 'Same'" in refusal(f"model={','.join(refs)}")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["seq_len=63", "num_pairs=4"], ["seq_len=63 must be even", "62 or 64"]),
        (["seq_len=17", "num_pairs=4"], ["seq_len=17 must be even", "16 or 18"]),
        (["seq_len=16", "num_pairs=5"], ["num_pairs=5 does not fit in seq_len=16", "num_pairs at most 4", "seq_len at least 20"]),
        (["seq_len=16,12", "num_pairs=4"], ["does not fit in seq_len=12", "num_pairs at most 3", "seq_len at least 16"]),
        (["seq_len=64", "num_pairs=10", "vocab_size=16"], ["needs 10 keys", "has 7", "num_pairs at most 7", "vocab_size at least 22"]),
        (["num_pairs=0"], ["num_pairs=0 must be at least 1"]),
        (["seq_len=0"], ["seq_len=0", "seq_len at least 8"]),
        (["vocab_size=0"], ["vocab_size=0", "vocab_size at least 6"]),
        (["power_a=0"], ["power_a=0.0 must be above 0"]),
        (["train_examples=0"], ["train_examples=0 must be at least 1"]),
        (["test_examples=-1"], ["test_examples=-1 must be at least 1"]),
    ],
)
def test_mqar_refuses_impossible_numbers_and_names_legal_ones(words, parts):
    message = refusal(*words)
    for part in parts:
        assert part in message


def test_mqar_takes_the_limits():
    assert one("model=hgrn2", "seq_len=256", "num_pairs=4", "vocab_size=128").data.vocab_size == 128  # S05: fewer tokens than positions
    assert one("model=hgrn2", "seq_len=20", "num_pairs=5", "vocab_size=12").task == "len20_kv5"


def test_mqar_names_values_that_are_then_taken():
    one("model=hgrn2", "seq_len=62", "num_pairs=4", "vocab_size=10")
    one("model=hgrn2", "seq_len=64", "num_pairs=10", "vocab_size=22")
    one("model=hgrn2", "seq_len=64", "num_pairs=7", "vocab_size=16")


# backends


def model_with(*backends):
    return dataclasses.replace(registry.models()["hgrn2"], name="m", facts={"family": "any"} | ({"backends": backends} if backends else {}))


@pytest.mark.parametrize(
    ("name", "device", "offered", "resolved"),
    [
        ("auto", "cpu", (), "chunked"),
        ("auto", "cuda", (), "fla"),
        ("auto", "cuda", ("reference", "chunked"), "chunked"),
        ("auto", "cuda", ("reference",), "reference"),
        ("auto", "cpu", ("reference",), "reference"),
        ("auto", "cpu", ("module",), "module"),
        ("auto", "cuda", ("module",), "module"),
        ("reference", "cuda", (), "reference"),
        ("chunked", "cuda", (), "chunked"),
        ("fla", "cuda", (), "fla"),
    ],
)
def test_resolve_backend_names_what_runs(with_fla, name, device, offered, resolved):
    assert resolve_backend(name, device, model_with(*offered)) == resolved


@pytest.mark.parametrize(
    ("name", "device", "offered", "message"),
    [
        ("fla", "cpu", (), "backend=fla needs a CUDA device; use backend=chunked"),
        ("fla", "cuda", ("reference", "chunked"), "backend=fla: m has only reference, chunked"),
        ("chunked", "cpu", ("module",), "backend=chunked: m has only module"),
    ],
)
def test_resolve_backend_never_falls_back_quietly(name, device, offered, message):
    with pytest.raises(ConfigError) as caught:
        resolve_backend(name, device, model_with(*offered))
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["auto", "fla"])
def test_resolve_backend_without_fla_names_the_remedy(monkeypatch, name):
    installed(monkeypatch, fla=False)
    with pytest.raises(ConfigError) as caught:
        resolve_backend(name, "cuda", model_with())
    assert str(caught.value) == "CUDA runs need fla: pip install flash-linear-attention, or pass backend=chunked"
    assert resolve_backend("auto", "cpu", model_with()) == resolve_backend("chunked", "cuda", model_with()) == "chunked"
    assert resolve_backend("auto", "cuda", model_with("reference", "chunked")) == "chunked"


def test_every_cell_records_a_resolved_backend_and_device(with_fla):
    backends = {device: {c.model: c.backend for c in cells(ALL_MODELS, device=device)} for device in ("cpu", "cuda")}
    assert "auto" not in {*backends["cpu"].values(), *backends["cuda"].values()}
    assert "fla" not in backends["cpu"].values()
    assert (backends["cpu"]["hgrn2"], backends["cpu"]["mamba"]) == ("chunked", "chunked")
    assert (backends["cuda"]["hgrn2"], backends["cuda"]["mamba"]) == ("fla", "chunked")
    assert {c.device for c in cells(ALL_MODELS, device="cuda")} == {"cuda"}


@pytest.mark.parametrize("name", registry.models())
def test_rope_is_kept_only_where_it_is_built(name):
    kinds = {c.model_config.positions for c in cells(f"model={name}", "positions=none,rope")}
    assert kinds == ({"none", "rope"} if name in ("attention", "hybrid") else {"none"})


def test_rope_without_effect_is_noted():
    assert any("positions=rope has no effect on hgrn2" in note for note in planned("model=hgrn2", "positions=rope").notes)


# another mixer in layer 0


def test_the_version_of_a_cell_names_that_of_its_first_layer(monkeypatch):
    plain, before = one("model=hgrn2"), one("model=hgrn2", "first_layer=base_conv", "num_layers=2")
    assert (plain.mixer_version, before.mixer_version) == ("1", "1 base_conv:1")
    monkeypatch.setitem(registry.model("base_conv").facts, "version", 99)
    after = one("model=hgrn2", "first_layer=base_conv", "num_layers=2")
    assert after.mixer_version == "1 base_conv:99"
    assert after.key != before.key
    assert one("model=hgrn2").key == plain.key
    assert [cell.key for cell in again(after)] == [after.key]


@pytest.mark.parametrize("word", ["first_layer=bse_conv", "hgrn2.first_layer=bse_conv"])
def test_an_unknown_first_layer_is_refused_with_the_nearest_name(word):
    assert refusal("model=hgrn2", word).startswith("Unknown first_layer 'bse_conv'. Did you mean 'base_conv'? Available: attention, ")


def test_a_first_layer_built_of_others_or_alone_is_refused():
    assert refusal("model=gla", "first_layer=hybrid", "num_layers=2") == "first_layer: 'hybrid' is itself built of other models; name those"
    assert refusal("model=gla", "first_layer=hgrn2").startswith("first_layer=hgrn2 would be the only layer: num_layers must be at least 2")


@pytest.mark.parametrize(
    ("model", "first", "word", "key", "value"),
    [
        ("attention", "hgrn2", "forget_bias=3", "forget_bias", 3.0),
        ("attention", "hgrn2", "lower_bound=exclusive", "lower_bound", "exclusive"),
        ("base_conv", "gla", "conv=4", "conv", 4),
        ("gla", "attention", "positions=rope", "positions", "rope"),
    ],
)
def test_shared_keys_act_on_the_first_layer_too(model, first, word, key, value):
    found = planned(f"model={model}", f"first_layer={first}", "num_layers=2", word)
    assert not found.notes
    assert getattr(found.cells[0].model_config, key) == value
    assert [cell.key for cell in again(found.cells[0])] == [found.cells[0].key]


def test_a_key_is_left_out_of_those_cells_only_on_which_it_has_no_effect():
    parts = planned("model=hybrid", "hybrid.layers=[retnet],[hgrn2]", "forget_bias=0,2")
    assert not parts.notes
    assert [(c.settings["layers"], c.model_config.forget_bias) for c in parts.cells] == [(("retnet",), 0), (("hgrn2",), 0), (("hgrn2",), 2)]
    found = planned("model=attention", "first_layer=none,hgrn2", "num_layers=2", "forget_bias=0,3")
    assert not found.notes
    assert [(c.model_config.first_layer, c.model_config.forget_bias) for c in found.cells] == [("none", 0), ("hgrn2", 0), ("hgrn2", 3)]
    assert [[cell.key for cell in again(each)] for each in found.cells] == [[each.key] for each in found.cells]


@pytest.mark.parametrize(("first", "backend"), [("gla", "fla"), ("base_conv", "fla"), ("mamba", "chunked")])
def test_the_backend_is_one_that_the_first_layer_has(with_fla, first, backend):
    words = ("model=hgrn2", f"first_layer={first}", "num_layers=2")
    assert one(*words, device="cuda").backend == backend


def test_a_first_layer_without_the_backend_is_refused(with_fla):
    words = ("model=hgrn2", "first_layer=mamba", "num_layers=2", "backend=fla")
    assert refusal(*words, device="cuda") == "backend=fla: mamba has only reference, chunked"


def test_a_plain_module_runs_on_the_backend_of_its_first_layer(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    assert one(f"model={file}:Module", "num_layers=2").backend == "module"
    assert one(f"model={file}:Module", "first_layer=hgrn2", "num_layers=2").backend == "chunked"
    assert one(f"model={file}:Module", "first_layer=base_conv", "num_layers=2").backend == "module"


# a model built of others


def test_layers_are_a_list_and_a_single_word_is_a_list_of_one():
    found = cells("model=hybrid", "hybrid.layers=[hgrn2,hgrn2,attention],gla")
    assert [c.settings["layers"] for c in found] == [("hgrn2", "hgrn2", "attention"), ("gla",)]
    assert [c.key for c in cells("model=hybrid", "hybrid.layers=gla,[gla]")] == [found[1].key]
    assert one("model=hybrid").key == one("model=hybrid", "hybrid.layers=[hgrn2,attention]").key


def test_the_order_of_the_layers_is_in_the_key():
    assert len({c.key for c in cells("model=hybrid", "hybrid.layers=[gla,hgrn2],[hgrn2,gla],[gla,hgrn2,gla]")}) == 3


def test_a_list_survives_the_cells_command_and_json():
    for cell in cells("model=hybrid", "hybrid.layers=[gla,hgrn2],[attention]"):
        assert [c.key for c in again(cell)] == [cell.key]
        assert cell.fields()["hybrid.layers"] == cell.settings["layers"]
        stored = Cell.from_json(json.loads(json.dumps(cell.to_json())))
        assert (stored, stored.key) == (cell, cell.key)
    assert shlex.split(cells("model=hybrid", "hybrid.layers=[gla,hgrn2]")[0].command)[-3] == "hybrid.layers=[gla,hgrn2]"


@pytest.mark.parametrize(
    ("value", "text"),
    [(("gla", "hgrn2"), "[gla,hgrn2]"), (("gla",), "[gla]"), (("a b", "null"), "['a b','null']"), ((), "[]"), (None, "null"), (0.5, "0.5")],
)
def test_a_written_value_is_read_back(value, text):
    assert written(value) == text
    assert parse_words([f"m.key={text}"])[0].values == (value,)


def test_the_version_of_a_cell_names_the_versions_of_its_parts(monkeypatch):
    before = one("model=hybrid", "hybrid.layers=[gla,hgrn2]")
    other = one("model=hybrid", "hybrid.layers=[retnet]")
    monkeypatch.setitem(registry.model("gla").facts, "version", 99)
    after = one("model=hybrid", "hybrid.layers=[gla,hgrn2]")
    assert "gla 99" in after.mixer_version
    assert before.key != after.key
    assert other.key == one("model=hybrid", "hybrid.layers=[retnet]").key


@pytest.mark.parametrize(
    ("layers", "dropped"),
    [
        ("[hgrn2,attention]", set()),
        ("[gla,attention]", {"lower_bound"}),
        ("[retnet,attention]", {"lower_bound", "forget_bias"}),
        ("[retnet,hgrn2]", {"positions=rope"}),
    ],
)
def test_shared_keys_act_on_a_hybrid_where_they_act_on_a_part(layers, dropped):
    found = planned("model=hybrid", f"hybrid.layers={layers}", "forget_bias=2", "lower_bound=exclusive", "positions=rope")
    assert {note.partition(" has no effect on hybrid")[0] for note in found.notes} == dropped
    for cell in found.cells:
        assert (cell.model_config.forget_bias == 2) == ("forget_bias" not in dropped)
        assert (cell.model_config.lower_bound == "exclusive") == ("lower_bound" not in dropped)
        assert (cell.model_config.positions == "rope") == ("positions=rope" not in dropped)


@pytest.mark.parametrize(
    ("layers", "backend"),
    [("[hgrn2,attention]", "fla"), ("[base_conv,hgrn2]", "fla"), ("[hgrn2,mamba]", "chunked"), ("[mamba]", "chunked")],
)
def test_a_hybrid_runs_on_a_backend_of_all_its_parts(with_fla, layers, backend):
    assert one("model=hybrid", f"hybrid.layers={layers}", device="cuda").backend == backend
    assert one("model=hybrid", f"hybrid.layers={layers}", "backend=reference", device="cuda").backend == "reference"


def test_a_part_without_the_backend_is_named(with_fla):
    message = refusal("model=hybrid", "hybrid.layers=[hgrn2,mamba]", "backend=fla", device="cuda")
    assert message == "backend=fla: mamba has only reference, chunked"
    parts = [dataclasses.replace(model_with(backend), name=backend) for backend in ("fla", "chunked")]
    with pytest.raises(ConfigError, match=r"^no backend is common to fla, chunked$"):
        resolve_backend("auto", "cuda", *parts)


# keys


def changed(value, choices):
    """Another legal value of a field."""
    if choices:
        return choices[1] if value == choices[0] else choices[0]
    if isinstance(value, bool):
        return not value
    if value == ():
        return (5,)
    return value + 2 if isinstance(value, int) else value / 2 + 0.01 if isinstance(value, float) else f"{value}x"


BASE = one("model=hgrn2", "lower_bound=exclusive", "channel_mixer=glu", "num_layers=2")
SECTIONS = ("model_config", "train", "data")
MIXED = {"train_examples": 180_000, "validation_examples": 7_000, "test_examples": 7_000}  # what mixture=based draws
BESIDE = {
    "mixture": {"seq_len": 1024, "num_pairs": 256, "vocab_size": 8192, **MIXED},
    "norm_group": {"norm": "batchnorm"},
    "cutoffs": {"softmax": "adaptive"},
    "warmup_steps": {"warmup": 0.0},
    "lr_end": {"schedule": "cosine_timm", "lr": 0.1},
    "warmup_from": {"schedule": "inverse_sqrt", "warmup": 0.0, "warmup_steps": 5, "lr": 0.1},
}
"""What a field needs beside it to have an effect."""
INNER = [(section, f.name) for section in SECTIONS for f in dataclasses.fields(getattr(BASE, section)) if f.name != "parallel"]
OUTER = [f.name for f in dataclasses.fields(Cell) if f.name not in (*SECTIONS, "settings", "model_ref", "command", "matching")]


@pytest.mark.parametrize(("section", "name"), INNER)
def test_a_key_changes_with_every_setting(section, name):
    old = getattr(BASE, section)
    choices = type(old).__dataclass_fields__[name].metadata.get("choices")
    with_it = BESIDE.get(name, {})
    same = dataclasses.replace(BASE, **{section: dataclasses.replace(old, **with_it)})
    new = dataclasses.replace(old, **{name: changed(getattr(old, name), choices)}, **with_it)
    assert same.key != dataclasses.replace(BASE, **{section: new}).key
    assert dataclasses.replace(BASE, **{section: new}).key != BASE.key


def test_a_key_does_not_know_fields_left_at_their_default():
    """A field that a later version adds would otherwise orphan every finished cell."""

    @dataclasses.dataclass(frozen=True)
    class Later(type(BASE.train)):
        brand_new: int = 0

    later = Later(**dataclasses.asdict(BASE.train))
    assert dataclasses.replace(BASE, train=later).key == BASE.key
    assert dataclasses.replace(BASE, train=dataclasses.replace(later, brand_new=1)).key != BASE.key


@pytest.mark.parametrize("name", OUTER)
def test_a_key_changes_with_every_field_of_the_cell(name):
    assert dataclasses.replace(BASE, **{name: changed(getattr(BASE, name), None)}).key != BASE.key


@pytest.mark.parametrize("name", registry.models())
def test_a_key_changes_with_every_setting_of_the_mixer(name):
    cell = one(f"model={name}")
    for key, value in cell.settings.items():
        other = 3 if value is None else changed(value, None)
        assert dataclasses.replace(cell, settings={**cell.settings, key: other}).key != cell.key


def test_a_key_does_not_depend_on_how_processes_share_a_model():
    """A run goes on with another number of them, spread in another way."""
    assert dataclasses.replace(BASE, train=dataclasses.replace(BASE.train, parallel="fsdp")).key == BASE.key


@pytest.mark.parametrize("name", ["model_ref", "command"])
def test_a_key_does_not_depend_on_how_the_cell_was_reached(name):
    assert dataclasses.replace(BASE, **{name: "other"}).key == BASE.key


def test_a_key_is_16_hex_digits():
    assert len(BASE.key) == 16
    assert set(BASE.key) <= set("0123456789abcdef")


def test_a_key_does_not_depend_on_the_order_of_words_or_settings():
    words = ["model=gla", "gla.num_heads=2", "gla.expand_k=1.0", "lr=1e-3", "conv=2"]
    assert one(*words).key == one(*reversed(words)).key
    shuffled = dict(reversed(BASE.settings.items()))
    assert dataclasses.replace(BASE, settings=shuffled).key == BASE.key


def test_a_key_does_not_depend_on_the_rest_of_the_run():
    alone = one("model=hgrn2", "d_model=32", "seed=1")
    assert alone.key in {c.key for c in cells(ALL_MODELS, "d_model=16,32", "seed=0,1", "gla.num_heads=1,2")}


def test_keys_are_equal_across_processes_and_hash_seeds():
    script = """
        from hgrn2_bench.plan import make_plan
        for words in (["preset=test", "forget_bias=0,1"], ["preset=paper", "d_model=64", "lr=1e-3,1e-2"]):
            for cell in make_plan(["suite=mqar", *words], "cpu").cells:
                print(cell.key, cell.command)
    """
    run = [sys.executable, "-c", textwrap.dedent(script)]
    outputs = [
        subprocess.run(run, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": seed}, check=True, timeout=60).stdout
        for seed in ("1", "2")
    ]
    here = [*cells("forget_bias=0,1"), *cells("preset=paper", "d_model=64", "lr=1e-3,1e-2")]
    assert outputs[0] == outputs[1] == "".join(f"{c.key} {c.command}\n" for c in here)


def test_a_files_content_is_in_the_key_and_its_place_is_not(tmp_path):
    texts = {"a.py": MINE, "moved/b.py": MINE, "c.py": MINE.replace("size: int = 1", "size: int = 1  # a remark")}
    found = {}
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        found[name] = one(f"model={path}:Mine")
    assert found["a.py"].key == found["moved/b.py"].key != found["c.py"].key
    assert found["a.py"].command != found["moved/b.py"].command


def test_a_changed_file_gives_another_key(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(MINE)
    before = one(f"model={path}:Mine").key
    path.write_text(MINE + "\n# changed\n")
    assert one(f"model={path}:Mine").key != before


# storing a cell and running it again

SWEPT = [
    ("model=hgrn2,gla", "d_model=16,32", "lr=1e-5,3e-4,1", "seed=0,1"),
    ("hgrn2.expand_ratio=null,8", "hgrn2.variant=fla,paper", "model=hgrn2"),
    ("gla.num_heads=1,2", "gla.expand_k=0.25", "gla.conv=2,4", "conv=0"),
    ("conv=0,4", "hgrn2.conv=2"),
    ("random_fill=true,false", "power_a=0.01,1", "generator=reference"),
    ("seq_len=20,24", "num_pairs=3"),
    ("vocab_size=8,64", "train_examples=64"),
    ("forget_bias=0,3", "lower_bound=none,exclusive"),
    ("backend=reference,chunked",),
    ("backend=auto", "dtype=float32,bfloat16"),
    ("seed=range(2)", "hgrn2.seed=5"),
    ("tie_embeddings=true,false", "norm=rmsnorm", "positions=none,learned", "stop_at=0.5"),
    (*PAPER, "positions=none,learned"),
    (*PAPER, "attention.positions=none,rope", "batch_size=4"),
    (*PAPER, "select=validation", "epochs=1,2"),
    ("preset=paper", "task=len512_kv64,len64_kv4", "d_model=512", "lr=1e-2"),
]


@pytest.mark.parametrize("preset", MQAR.presets)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_command_of_a_preset_gives_its_cell_again(remembered, with_fla, preset, device):
    words = [f"preset={preset}"] if device == "cpu" else [f"preset={preset}", ALL_MODELS, *(["lr=1e-5,1e-2"] if preset == "paper" else [])]
    found = cells(*words, device=device)
    assert found
    for cell in found:
        assert [c.key for c in again(cell)] == [cell.key], cell.command


def test_every_command_of_a_preset_with_sweeps_of_two_gives_its_cell_again(monkeypatch):
    toy(monkeypatch, ("lr=1e-3,1e-2", "hgrn2.expand_ratio=8,16", "conv=2", "hgrn2.conv=0,4"), ("batch_size=8,16",))
    found = cells()
    assert len(found) == 16
    for cell in found:
        assert [c.key for c in again(cell)] == [cell.key], cell.command


@pytest.mark.parametrize("words", SWEPT, ids=" ".join)
def test_every_command_of_a_sweep_gives_its_cell_again(remembered, words):
    found = cells(*words)
    assert len(found) > 1
    for cell in found:
        assert [c.key for c in again(cell)] == [cell.key], cell.command


@pytest.mark.parametrize(
    "name", ["plain", "a, b", "null", "12", "1e3", "True", "it's", r"back\slash", "a=b", "", " ", "[x]", "$x", r"\'", "é"]
)
def test_a_command_with_a_users_file_and_odd_text_gives_its_cell_again(mine, name):
    written = "'" + name.replace("\\", "\\\\").replace("'", r"\'") + "'"
    if name == r"back\slash":
        written = "'back\\slash'"  # Hydra escapes a backslash only before a quote
    found = cells(f"model={quoted(f'{mine}:Mine')}", f"Mine.name={written}", "Mine.depth=null,2", "Mine.kind=b")
    assert len(found) == 2
    for cell in found:
        assert cell.settings["name"] == name
        assert [c.key for c in again(cell)] == [cell.key], cell.command


def test_a_command_names_no_more_than_was_typed_or_swept():
    (cell,) = cells("model=hgrn2", "lr=1e-3")
    assert cell.command == "python -m hgrn2_bench run suite=mqar preset=test task=len16_kv2 model=hgrn2 seed=0 lr=0.001 --device cpu"


@pytest.mark.parametrize("words", [(), (ALL_MODELS, "hgrn2.expand_ratio=null,8"), PAPER], ids=["test", "swept", "paper"])
def test_cells_survive_json(words):
    for cell in cells(*words):
        stored = json.loads(json.dumps(cell.to_json(), allow_nan=False))
        back = Cell.from_json(stored)
        assert back == cell
        assert back.key == cell.key
        assert type(back.data) is MQAR.data_schema
        assert (type(back.model_config), type(back.train)) == (ModelConfig, TrainConfig)


def test_cells_of_another_program_version_are_refused():
    stored = one("model=hgrn2").to_json()
    with pytest.raises(TypeError, match="num_passes"):
        Cell.from_json(stored | {"data": stored["data"] | {"num_passes": 2}})
    with pytest.raises(ConfigError, match="Unknown suite"):
        Cell.from_json(stored | {"suite": "mqra"})


def test_fields_are_under_the_names_a_user_types():
    fields = one("model=gla", "gla.num_heads=2", "lr=1e-2", "conv=2").fields()
    assert (fields["gla.num_heads"], fields["lr"], fields["conv"], fields["seq_len"]) == (2, 1e-2, 2, 16)
    typed = [f"{key}={written(value)}" for key, value in fields.items()]
    assert one("model=gla", *typed).key == one("model=gla", "gla.num_heads=2", "lr=1e-2", "conv=2").key


def test_planning_imports_nothing_heavy():
    script = """
        import sys
        from hgrn2_bench.plan import make_plan
        assert make_plan(["suite=mqar", "preset=paper"], "cpu").cells
        heavy = {"torch", "fla", "pandas", "triton", "scipy", "numpy", "baselines.gla", "hgrn2_bench.hgrn2"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)


def test_a_model_beside_others_has_one_cell_each_and_the_users_words_win():
    usual = ("suite=mqar", "preset=test", "seed=0", "d_model=16")
    found = plan_beside("gla", ("hgrn2", "attention"), usual, ("d_model=32", "gla.num_heads=2"), "cpu")
    assert [(cell.model, cell.model_config.d_model) for cell in found] == [("gla", 32), ("hgrn2", 32), ("attention", 32)]
    assert found[0].settings["num_heads"] == 2
    assert [cell.model for cell in plan_beside("attention", ("hgrn2", "attention"), usual, (), "cpu")] == ["attention", "hgrn2"]
    for word in ("seed=0,1", "gla.num_heads=1,2"):
        with pytest.raises(ConfigError, match="one setting at a time"):
            plan_beside("gla", ("hgrn2",), usual, (word,), "cpu")
