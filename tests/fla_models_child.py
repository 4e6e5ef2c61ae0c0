"""fla's own HGRN2 language model beside ours, in Triton's interpreter: `TRITON_INTERPRET=1 python fla_models_child.py FOLDER REPORT`.

Writes {case: {comparison: relative error of the logits}}, or the traceback of a case that failed; and what lm-eval's own `hf` model says of
the requests of ITEMS and TEXTS, where lm-eval is installed.
"""

import json
import sys
import traceback
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from fla_cases import prepare_interpreter
from torch import Tensor, nn

from hgrn2_bench import checkpoints, fla_models, registry
from hgrn2_bench.checkpoints import Card
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.language import LanguageModel

T, V = 65, 40  # more than 64 tokens, where fla's chunk kernel runs
BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "expand_ratio": 16,
    "vocab_size": V,
    "intermediate_size": 24,
    "fuse_cross_entropy": False,
}
CASES: dict[str, dict[str, Any]] = {
    "as published": {"norm_eps": 1e-2},
    "tied, short convolutions, heads given": {"tie_word_embeddings": True, "use_short_conv": True, "expand_ratio": None, "num_heads": 2},
    "no lower bound, unfused": {"use_lower_bound": False, "fuse_norm": False, "fuse_swiglu": False, "num_hidden_layers": 1},
}
LONG = "When the door of the old house opened at last, nobody who stood there in the rain said a word. "
ITEMS = [
    *(("Question: How is a jar opened?\nAnswer:", ending) for ending in (" Turn its lid.", " Turn it over and wait.")),
    *((f"{LONG}The one who opened it", ending) for ending in (" smiled.", " was not the one for whom they had come.")),
    *((f"So {name} went home because it", " was late.") for name in ("Ann", "the others")),
    ("aaaa", "aaa"),
    (LONG + "And she shut the", " door"),
    ("", "No context"),
    (LONG * 2, " rain"),
]
"""Contexts and continuations on both sides of 64 tokens; the last one is longer than the model reads."""
TEXTS = [LONG * 2, "Short."]
MAX_LEN = 160


def logits_of(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens_BT).logits if not isinstance(model, LanguageModel) else model.head(model(tokens_BT))


def error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def compare(fields: dict[str, Any], folder: Path) -> dict[str, float]:
    from fla.models import HGRN2Config, HGRN2ForCausalLM

    torch.manual_seed(0)
    theirs = HGRN2ForCausalLM(HGRN2Config(**BASE | fields)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokens_BT = torch.randint(V, (1, T))
    want = logits_of(theirs, tokens_BT)
    theirs.save_pretrained(folder / "theirs", max_shard_size="20KB")
    ours = checkpoints.load(folder / "theirs")
    fla_models.save(ours, folder / "back")
    back = HGRN2ForCausalLM.from_pretrained(folder / "back").eval()
    return {"ours": error(logits_of(ours, tokens_BT), want), "and back": error(logits_of(back, tokens_BT), want)}


def export(folder: Path) -> dict[str, float]:
    """A model made here, in fla."""
    from fla.models import HGRN2ForCausalLM

    torch.manual_seed(0)
    words = {"lower_bound": "inclusive", "channel_mixer": "glu", "glu_bias": False, "norm": "rmsnorm", "tie_embeddings": True}
    config = ModelConfig(d_model=32, num_layers=2, embed_std=1.0, **words)
    ours = LanguageModel(config, registry.load("hgrn2"), {"variant": "fla", "expand_ratio": 16}, "chunked", V, T).eval()
    tokens_BT = torch.randint(V, (1, T))
    fla_models.save(ours, folder)
    theirs = HGRN2ForCausalLM.from_pretrained(folder).eval()
    theirs.config.fuse_cross_entropy = False
    return {"theirs": error(logits_of(theirs, tokens_BT), logits_of(ours, tokens_BT))}


def exported(folder: Path) -> Path:
    """A model that was saved here with the tokenizer of bytes, as a user takes it to fla: `folder/fla`."""
    torch.manual_seed(0)
    words = {"lower_bound": "inclusive", "channel_mixer": "glu", "glu_bias": False, "norm": "rmsnorm", "tie_embeddings": True}
    config = ModelConfig(d_model=32, num_layers=2, embed_std=1.0, **words)
    model = LanguageModel(config, registry.load("hgrn2"), {"variant": "fla", "expand_ratio": 16}, "chunked", 256, MAX_LEN)
    checkpoints.save(model, Card("hgrn2", {"variant": "fla", "expand_ratio": 16}, {"tokenizer": "bytes"}), folder / "ours")
    fla_models.save(checkpoints.load(folder / "ours"), folder / "fla", folder / "ours")
    return folder / "fla"


def asked(model: Any) -> dict[str, Any]:
    """What a model of lm-eval's answers to all requests."""
    from zeroshot_lms import Request

    return {
        "items": model.loglikelihood([Request(pair) for pair in ITEMS], disable_tqdm=True),
        "texts": model.loglikelihood_rolling([Request((text,)) for text in TEXTS], disable_tqdm=True),
    }


def scored(folder: Path) -> dict[str, Any]:
    """The answers of lm-eval's own `hf` model, which runs fla's."""
    from lm_eval.models.huggingface import HFLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return asked(HFLM(pretrained=str(exported(folder)), device="cpu", dtype="float32", batch_size=1))


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    runs = {name: lambda fields=fields, name=name: compare(fields, folder / name) for name, fields in CASES.items()}
    runs |= {"made here": lambda: export(folder / "made here")}
    runs |= {"scored": lambda: scored(folder / "scored")} if find_spec("lm_eval") else {}
    for name, run in runs.items():
        try:
            found[name] = run()
        except Exception:
            found[name] = traceback.format_exc()
    from fla.models import HGRN2Config

    theirs = HGRN2Config().to_dict() | {"num_heads": None}  # which it computes
    found["other defaults"] = [name for name, value in fla_models.DEFAULTS.items() if theirs.get(name) != value]
    found["shards"] = len(list((folder / "as published" / "theirs").glob("*.safetensors")))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    import fla.models  # noqa: F401  before the interpreter is prepared: it patches what is imported

    prepare_interpreter()
    Path(sys.argv[2]).write_text(json.dumps(report(Path(sys.argv[1]))))
