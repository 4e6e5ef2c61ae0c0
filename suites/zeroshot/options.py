"""What may be said to `BenchLM` about how a model is loaded and scored, and the limits of a pass that follow."""

from dataclasses import dataclass, fields
from typing import Any

from hgrn2_bench.errors import ConfigError, unknown
from suites.zeroshot.reading import Foreign, Ours
from suites.zeroshot.scoring import Limits
from suites.zeroshot.settings import TRUNCATIONS

MAX_TOKENS = {"cuda": 2**18, "cpu": 2**15}
"""Padded tokens of a pass, whatever the batch size."""
AUTO_TOKENS = {"cuda": 2**16, "cpu": 2**12}
"""The same for `batch_size=auto`."""
PASS_TOKENS = {"cuda": 2**13, "cpu": 2**8}
"""What the launches of a pass cost, in tokens of a small model."""
MULTIPLE = {"cuda": 8, "cpu": 1}
LOGITS = 2**30
"""Of a pass, where a model of transformers makes them all at once."""


@dataclass(frozen=True)
class Options:
    """What `--model_args` may say beside `pretrained`."""

    batch_size: int | str = 8
    """Requests of a pass, or `auto`: as many as a number of tokens allows."""
    device: str | None = None
    dtype: str = "auto"
    backend: str = "auto"
    max_length: int = 0
    bos: str = "auto"
    truncation: str = "left"
    """Of a request that is too long `left` scores the end, `skip` nothing."""
    check: bool = True
    """Compare batch 1 with batch 8 before anything is scored."""
    max_batch_size: int | None = None
    """lm-eval gives it; it has no effect."""

    def __post_init__(self) -> None:
        if self.truncation not in TRUNCATIONS:
            raise unknown("truncation", self.truncation, TRUNCATIONS)

    @classmethod
    def of(cls, words: dict[str, Any]) -> "Options":
        """From words that are not checked yet. ConfigError with the nearest name for an unknown one."""
        known = {field.name for field in fields(cls)}
        for name in words:
            if name == "trust_remote_code" and not words[name]:
                continue
            if name not in known:
                raise unknown("model argument", name, ["pretrained", "store", *known])
        return cls(**{name: value for name, value in words.items() if name in known})

    @property
    def rows(self) -> int:
        """Requests of a pass; 0 for `auto`. ConfigError where the batch size is no number above 0."""
        text = str(self.batch_size)
        if text.startswith("auto"):
            return 0
        if not text.isdecimal() or int(text) < 1:
            raise ConfigError(f"batch_size={text} must be a number of at least 1, or auto")
        return int(text)

    def limits(self, reader: Ours | Foreign) -> Limits:
        """The limits of a pass on this model."""
        kind, most = reader.device.type, MAX_TOKENS if self.rows else AUTO_TOKENS
        return Limits(
            max_length=reader.max_length,
            rows=self.rows,
            tokens=most.get(kind, most["cuda"]),
            positions=max(1, LOGITS // reader.vocab_size),
            pass_tokens=PASS_TOKENS.get(kind, PASS_TOKENS["cuda"]),
            multiple=MULTIPLE.get(kind, MULTIPLE["cuda"]),
        )
