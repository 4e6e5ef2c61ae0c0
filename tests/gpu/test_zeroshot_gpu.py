"""Zero-shot scoring of a 340M HGRN2 in fla's format beside lm-eval's own `hf` model on the same folder: equal scores, and the speed.

Items have the shapes of HellaSwag (a context of about 60 tokens, four endings of about 25) and PIQA (about 15, two of about 20), of drawn
words; each side runs at its own best batch size, and both take turns.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_marks import WITH_FLA

pytestmark = [*WITH_FLA, pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval")]

V, D, LAYERS, WIDTH, LENGTH = 32_000, 1024, 24, 2816, 2048
SHAPES = {"HellaSwag": (60, 12, 4, 25, 8), "PIQA": (15, 5, 2, 20, 8)}
"""Tokens of a context and how they spread, choices, tokens of one and how they spread."""
ITEMS, ROUNDS = 400, 5
BATCH_SIZES = (16, 32, 64, 128, 256, 512)
LEAST = {"HellaSwag": 1.6, "PIQA": 1.0}


def words_tokenizer(size: int = V) -> Any:
    """Words `w2`, `w3`, ... are tokens 2, 3, ...; `<s>` and `</s>` the first two."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, size)}, unk_token="w2"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def write(folder: Path) -> None:
    """The model, of random weights, and its tokenizer."""
    from hgrn2_bench import fla_models, registry
    from hgrn2_bench.config import ModelConfig
    from hgrn2_bench.language import LanguageModel

    words = {"lower_bound": "inclusive", "norm": "rmsnorm", "channel_mixer": "glu", "channel_width": WIDTH, "glu_bias": False}
    config = ModelConfig(d_model=D, num_layers=LAYERS, embed_std=0.05, tie_embeddings=True, **words)
    torch.manual_seed(0)
    model = LanguageModel(config, registry.load("hgrn2"), {"variant": "fla", "expand_ratio": 128}, "chunked", V, LENGTH)
    source = folder.with_name("tokenizer")
    words_tokenizer().save_pretrained(source)
    fla_models.save(model, folder, source)


@dataclasses.dataclass
class Request:
    """What both sides read of an instance."""

    args: tuple[str, str]
    task_name: str = "drawn"
    doc_id: int = 0
    idx: int = 0


def drawn(shape: str, items: int = ITEMS, vocab: int = V) -> list[list[Request]]:
    """The requests of each item."""
    context, spread, choices, ending, ending_spread = SHAPES[shape]
    draw = np.random.default_rng(0)

    def text(mean: int, around: int) -> str:
        return " ".join(f"w{i}" for i in draw.integers(2, vocab, size=max(3, int(draw.normal(mean, around)))))

    found = []
    for doc in range(items):
        before = text(context, spread)
        found.append([Request((before, " " + text(ending, ending_spread)), shape, doc, idx) for idx in range(choices)])
    return found


class Side:
    """One of the two, scoring with a batch size."""

    def __init__(self, model: Any, set_batch_size: Callable[[int], None]) -> None:
        self.model, self.set_batch_size = model, set_batch_size

    def __call__(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = self.model.loglikelihood(requests, disable_tqdm=True)
        return found


def ours(folder: Path, dtype: str, device: str = "cuda") -> Side:
    from suites.zeroshot.lm import BenchLM

    model = BenchLM(folder, device=device, dtype=dtype)

    def set_batch_size(size: int) -> None:
        model.options = dataclasses.replace(model.options, batch_size=size)
        model.scorer.limits = model.options.limits(model.reader)

    return Side(model, set_batch_size)


def theirs(folder: Path, dtype: str, device: str = "cuda") -> Side:
    from lm_eval.models.huggingface import HFLM

    from hgrn2_bench.ops import fla

    fla.register_language_models()
    model = HFLM(pretrained=str(folder), device=device, dtype=dtype, batch_size=16, max_length=LENGTH)
    return Side(model, lambda size: setattr(model, "batch_size_per_gpu", size))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("zeroshot") / "hgrn2"
    write(found)
    return found


def flat(items: Sequence[Sequence[Request]]) -> list[Request]:
    return [request for item in items for request in item]


def worst(items: list[list[Request]], mine: list[tuple[float, bool]], other: list[tuple[float, bool]]) -> tuple[float, float]:
    """The largest difference in nats a token, and the share of items of which both choose one ending."""
    tokens = [len(request.args[1].split()) for request in flat(items)]
    differences = [abs(a[0] - b[0]) / n for a, b, n in zip(mine, other, tokens, strict=True)]
    chosen = [np.array([score for score, _ in side]).reshape(len(items), -1).argmax(1) for side in (mine, other)]
    return max(differences), float((chosen[0] == chosen[1]).mean())


@pytest.mark.parametrize("shape", SHAPES)
def test_items_score_as_with_lm_evals_own_model(folder: Path, shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    items = drawn(shape, 60)
    mine, other = (side(folder, "float32") for side in (ours, theirs))
    for side in (mine, other):
        side.set_batch_size(32)
    difference, agreement = worst(items, mine(flat(items)), other(flat(items)))
    told = f"largest difference {difference:.2g} nats a token, same choice in {agreement:.1%}; {mine.model.told()['invariance']}"
    with capsys.disabled():
        print(f"\n{shape}, float32: {told}")
    assert difference < 1e-2  # kernels round to TF32 inside, ours with another beginning of each chunk
    assert agreement >= 0.98


def seconds(side: Side, requests: Sequence[Request]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    side(requests)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def best_batch_size(side: Side, requests: Sequence[Request]) -> tuple[int, dict[int, float]]:
    """The fastest, each measured after a run that compiles and tunes; sizes that do not fit are left out."""
    found = {}
    for size in BATCH_SIZES:
        side.set_batch_size(size)
        try:
            side(requests)
            found[size] = min(seconds(side, requests) for _ in range(2))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return min(found, key=lambda size: found[size]), found


@pytest.mark.parametrize("shape", SHAPES)
def test_items_are_scored_faster_than_by_lm_evals_own_model(folder: Path, shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    items = drawn(shape)
    requests, sides = flat(items), [ours(folder, "bfloat16"), theirs(folder, "bfloat16")]
    told = []
    for side in sides:
        best, found = best_batch_size(side, requests)
        side.set_batch_size(best)
        told.append(f"{best} of {dict(zip(found, (round(ITEMS / s) for s in found.values()), strict=True))}")
    rounds = []
    for turn in range(ROUNDS):
        order = (0, 1) if turn % 2 else (1, 0)
        taken = {number: seconds(sides[number], requests) for number in order}
        rounds.append((taken[0], taken[1]))
    rates = [ITEMS / statistics.median(times) for times in zip(*rounds, strict=True)]
    ratio = statistics.median(other / mine for mine, other in rounds)
    difference, agreement = worst(items, *(side(requests) for side in sides))
    speed = f"ours {rates[0]:.0f} items/s (batch {told[0]}), hf {rates[1]:.0f} (batch {told[1]}), ratio {ratio:.2f}"
    equality = f"largest difference {difference:.2g} nats a token, same choice in {agreement:.1%}"
    with capsys.disabled():
        print(f"\n{shape}, {ITEMS} items, bfloat16, {torch.cuda.get_device_name()}: {speed}; {equality}")
    assert difference < 0.15  # bfloat16's rounding; lm-eval's own model also rounds every log p to it
    assert agreement >= 0.95
    assert ratio >= LEAST[shape]
