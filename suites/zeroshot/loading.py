"""Trained language models from folders, and their tokenizers.

Folders of ours, and of HGRN2 in the format of flash-linear-attention (fla), are read by `hgrn2_bench.checkpoints` and run on our ops, so
also without a GPU. All others are read by transformers, fla's own models with it where fla is installed: from safetensors alone, and
without code from the folder.
"""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hgrn2_bench import checkpoints, hub, registry, trained, weights
from hgrn2_bench.backends import resolve_backend
from hgrn2_bench.errors import ConfigError, DataError, one_line, unknown
from hgrn2_bench.rows import needed
from hgrn2_bench.text_tokenizers import FILES, tokenizer_files_of
from suites.zeroshot.reading import Foreign, Ours

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
KEYS = ("dtype", "torch_dtype")
"""Where config.json says in which type the weights were published; the first counts."""


def load(folder: Path, backend: str = "auto", device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """The model of a folder, in eval mode, and its tokenizer.

    All weights get the type `dtype`, as in lm-eval's own `hf` model. `auto` is on a GPU the type that config.json names, on a CPU float32:
    half precision is no faster there. ConfigError or DataError, one line, where something is missing or cannot run.
    """
    content = weights.read_config(folder)
    tokenizer = tokenizer_of(folder)
    kind = dtype_of(content, dtype, device)
    if not trained.is_foreign(content):
        resolved = resolve_backend(backend, torch.device(device).type, *_mixers(folder, content))
        return checkpoints.load(folder, resolved, device).to(kind), tokenizer
    if backend != "auto":
        raise ConfigError(f"backend={backend} has no effect on {folder}: transformers runs it; leave backend out")
    _check_foreign(folder, content, device)
    return _foreign(folder, content, kind).to(device).eval(), tokenizer


def is_own_folder(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of ours."""
    return trained.is_own(weights.read_config(folder))


def _mixers(folder: Path, content: dict[str, Any]) -> list[registry.Model]:
    """All mixers of a model of ours, the parts of a hybrid and that of the first layer among them; of fla's folders HGRN2."""
    if not trained.is_own(content):
        return [registry.model(content["model_type"])]
    card = trained.read_card(folder)
    model = registry.model(card.model)
    return [*(model.parts(card.settings) or (model,)), *registry.first_layer(content["model_config"].get("first_layer", "none"))]


def dtype_of(content: dict[str, Any], name: str, device: str) -> torch.dtype:
    """The type of the weights. ConfigError for a name that is none."""
    if name == "auto":
        if torch.device(device).type == "cpu":
            return torch.float32
        name = next((content[key] for key in KEYS if content.get(key) in DTYPES), "float32")
    if name not in DTYPES:
        raise unknown("dtype", name, [*DTYPES, "auto"])
    return DTYPES[name]


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a folder. DataError, one line, where there is none, it is damaged, or has more entries than a model of ours."""
    library, content = needed("transformers", "transformers", f"{folder}: its tokenizer", hub.INSTALL), weights.read_config(folder)
    if trained.is_own(content) and not (folder / FILES[0]).is_file() and tokenizer_files_of(card := trained.read_card(folder).tokenizer):
        return tokenizer_of_card(card)
    if not weights.tokenizer_files(folder):
        raise DataError(f"{folder} has no tokenizer (tokenizer.json): copy the one that the model was trained with there")
    try:
        if trained.is_own(content):
            return _fitting(library.PreTrainedTokenizerFast.from_pretrained(folder), folder, content)
        known = content["model_type"] in library.CONFIG_MAPPING
        config = {} if known else {"config": library.PretrainedConfig.from_dict(content)}  # else it warns of a type that it does not know
        return library.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **config)
    except DataError:
        raise
    except Exception as error:  # the libraries have no narrower one
        raise DataError(f"{folder}: its tokenizer cannot be read ({one_line(error)[:200]}): copy its files again") from None


def _fitting(tokenizer: Any, folder: Path, content: Mapping[str, Any]) -> Any:
    """The tokenizer, where a checkpoint of ours has an id for each of its entries."""
    if len(tokenizer) > content["vocab_size"]:
        wrong = f"{folder}: its tokenizer has {len(tokenizer)} entries and the model {content['vocab_size']}"
        raise DataError(f"{wrong}: it is another model's; copy the one that the model was trained with there")
    return tokenizer


def tokenizer_of_card(card: Mapping[str, str]) -> Any:
    """The tokenizer that the card of a corpus tells, as transformers takes one."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    whole, config = (tokenizer_files_of(card)[name] for name in FILES)
    told = {key: value for key, value in json.loads(config).items() if key != "tokenizer_class"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(whole), **told)


def _check_foreign(folder: Path, content: dict[str, Any], device: str) -> None:
    """Let transformers know fla's models where it needs them. ConfigError for one of those without a GPU, which they cannot do without."""
    library = needed("transformers", "transformers", f"{folder}: a model of type {content['model_type']}", hub.INSTALL)
    if content["model_type"] in library.CONFIG_MAPPING or importlib.util.find_spec("fla") is None:
        return
    from hgrn2_bench.ops import fla

    fla.register_language_models()
    if content["model_type"] in library.CONFIG_MAPPING and torch.device(device).type == "cpu":
        kind = content["model_type"]
        raise ConfigError(f"{folder}: fla's {kind} needs a GPU; of fla's models HGRN2 alone runs without one, on our ops")


def _foreign(folder: Path, content: dict[str, Any], dtype: torch.dtype) -> Any:
    """A model of transformers, on the CPU. DataError, one line, where it has none of this kind or the files are damaged."""
    library = needed("transformers", "transformers", f"{folder}: a model of type {content['model_type']}", hub.INSTALL)
    if not any(folder.glob("*.safetensors")):
        raise DataError(f"{folder} has no weights as safetensors, the one kind that cannot run code: convert them first")
    try:
        return library.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, dtype=dtype)
    except Exception as error:  # a missing class, a field of another kind, a damaged file: each has a class of its own
        raise DataError(f"{folder}: transformers cannot load it as a causal language model ({one_line(error)[:200]})") from None


def reader_of(model: Any, tokenizer: Any, max_length: int = 0) -> Ours | Foreign:
    """How a loaded model is read: at most `max_length` tokens, 0: as many as it says of itself.

    Of ours that is the length of its training samples. ConfigError where its positions are in a table that has fewer.
    """
    if hasattr(model, "hidden"):
        reader = Ours(model)
        reader.max_length = max_length or reader.max_length
        if reader.longest is not None and reader.max_length > reader.longest:
            raise ConfigError(f"max_length={max_length}, but positions={model.config.positions} knows only {reader.longest}")
        return reader
    from lm_eval.models.utils import resolve_max_length

    return Foreign(model, max_length or resolve_max_length(model.config, tokenizer))
