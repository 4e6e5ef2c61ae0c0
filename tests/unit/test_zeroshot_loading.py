"""Folders and tokenizers that can be scored, and those that are refused."""

import dataclasses
import json
import math
import shutil

import pytest
import torch

pytest.importorskip("lm_eval")
from zeroshot_lms import LENGTH, VOCAB, Request, model_of, own, questions, tokenizer

from hgrn2_bench.errors import ConfigError, DataError
from hgrn2_bench.trainer import DivergedError
from suites.zeroshot import loading
from suites.zeroshot.lm import BenchLM


def test_another_model_s_tokenizer_is_seen():
    model = model_of()
    model_small = dataclasses.replace(model.config, d_model=32)
    from hgrn2_bench import registry
    from hgrn2_bench.language import LanguageModel

    small = LanguageModel(model_small, registry.load("hgrn2"), {}, "chunked", 40, LENGTH).eval()
    with pytest.raises(ConfigError, match="another model's tokenizer"):
        BenchLM(model=small, tokenizer=tokenizer()).loglikelihood([Request(("a", "z"))])


def test_folders_that_cannot_be_loaded_are_named(own_folder, foreign_folder, tmp_path):
    for name, fault in (("nowhere", "no such folder, and no name on"), (str(tmp_path), "config.json is missing")):
        with pytest.raises(DataError, match=fault):
            BenchLM(name)
    bare = own(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="has no tokenizer"):
        loading.load(bare)
    with pytest.raises(ConfigError, match="backend=chunked has no effect"):
        loading.load(foreign_folder, "chunked")


def test_fla_s_other_models_are_known_and_need_a_gpu(foreign_folder, tmp_path, monkeypatch):
    from transformers import AutoConfig, PreTrainedConfig

    from hgrn2_bench.ops import fla

    content = json.loads((foreign_folder / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((foreign_folder / name).read_bytes())
    kind = f"like-gla-{content['model_type']}"
    (tmp_path / "config.json").write_text(json.dumps(content | {"model_type": kind}))
    config = type("LikeGLAConfig", (PreTrainedConfig,), {"model_type": kind})
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(fla, "register_language_models", lambda: AutoConfig.register(kind, config))
    with pytest.raises(ConfigError, match=f"fla's {kind} needs a GPU"):
        loading.load(tmp_path)


def test_weights_that_could_run_code_are_refused(foreign_folder, tmp_path):
    for path in foreign_folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match="no weights as safetensors"):
        loading.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(DataError, match="cannot load it as a causal language model"):
        loading.load(tmp_path)


def test_half_precision_is_only_the_default_on_a_gpu():
    assert loading.dtype_of({"dtype": "bfloat16"}, "auto", "cpu") == torch.float32
    assert loading.dtype_of({"torch_dtype": "bfloat16"}, "auto", "cuda") == torch.bfloat16
    assert loading.dtype_of({}, "auto", "cuda") == torch.float32
    assert loading.dtype_of({"dtype": "bfloat16"}, "float64", "cpu") == torch.float64


def test_positions_beyond_a_table_are_refused(tmp_path):
    folder = own(tmp_path / "model", "attention", positions="learned")
    with pytest.raises(ConfigError, match="max_length=129, but positions=learned knows only 128"):
        BenchLM(folder, device="cpu", max_length=129)


@pytest.mark.parametrize("check", [True, False])
def test_a_model_that_gives_no_numbers_diverged(check):
    model = model_of()
    with torch.no_grad():
        model.embedding.weight[5] = math.nan
    bench = BenchLM(model=model, tokenizer=tokenizer(), check=check)
    for ask in (lambda: bench.loglikelihood(questions()), lambda: bench.generate_until([Request(("x", {"max_gen_toks": 3}))])):
        with pytest.raises(DivergedError, match="probabilities are no numbers"):
            ask()


def test_a_tokenizer_with_more_entries_than_a_model_of_ours_is_another_models(own_folder, tmp_path):
    shutil.copytree(own_folder, tmp_path / "model")
    larger = tokenizer()
    larger.add_tokens(["one more"])
    larger.save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match=f"its tokenizer has {VOCAB + 1} entries and the model {VOCAB}: it is another model's"):
        BenchLM(tmp_path / "model", device="cpu")
