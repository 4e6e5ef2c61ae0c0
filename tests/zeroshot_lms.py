"""Small language models in folders, with a tokenizer of bytes, and requests as lm-eval makes them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hgrn2_bench import checkpoints, fla_models, registry
from hgrn2_bench.checkpoints import Card
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.language import LanguageModel

VOCAB, LENGTH = 258, 128


@dataclass
class Request:
    """What `BenchLM` reads of an instance."""

    args: tuple[Any, ...]
    task_name: str | None = None
    doc_id: int | None = None
    idx: int = 0


def tokenizer() -> Any:
    """Bytes, after `<s>` 0 and `</s>` 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def foreign(kind: str, folder: Path) -> Path:
    """A GPT-2 or Llama of transformers."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": VOCAB}
    if kind == "gpt2":
        config = GPT2Config(n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, **ends)
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        config = LlamaConfig(max_position_embeddings=LENGTH, initializer_range=0.2, **sizes, **ends)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def model_of(name: str = "hgrn2", settings: dict[str, Any] | None = None, **words: Any) -> LanguageModel:
    """A model of ours."""
    torch.manual_seed(0)
    given = {"num_layers": 2, "channel_mixer": "glu", "embed_std": 1.0, "tie_embeddings": True} | words
    config = ModelConfig(d_model=32, **given)
    return LanguageModel(config, registry.load(name), settings or {}, "chunked", VOCAB, LENGTH).eval()


def own(folder: Path, name: str = "hgrn2", **words: Any) -> Path:
    """A checkpoint of ours."""
    model = model_of(name, **words)
    checkpoints.save(model, Card(name, {}, {"name": "bytes"}, 1000), folder)
    tokenizer().save_pretrained(folder)
    return folder


def as_fla(folder: Path, source: Path) -> LanguageModel:
    """An HGRN2 as fla's format has it, with the tokenizer of another folder; the model itself is returned."""
    words = {"lower_bound": "inclusive", "glu_bias": False, "norm": "rmsnorm"}
    model = model_of("hgrn2", {"variant": "fla", "expand_ratio": 16}, **words)
    fla_models.save(model, folder, source)
    return model


def questions(task: str = "choices") -> list[Request]:
    """Multiple choice with shared contexts, contexts that are empty or white space, and a shared continuation after different contexts."""
    contexts = ["The sky above the port was the color of", "A word, again and again: " + "again " * 9, "x", "", " ", "What is it? "]
    answers = [" television", " no", " a somewhat longer answer than the others", "z"]
    found = [Request((c, a), task, doc, i) for doc, c in enumerate(contexts) for i, a in enumerate(answers)]
    found += [
        Request((f"The trophy did not fit since the {thing}", " was too big."), task, 90, i) for i, thing in enumerate(["it", "trophy"])
    ]
    return [*found, Request(("long " * 60, " yes"), task, 91)]
