"""Texts to token ids, as lm-eval does it for a model of transformers; in bulk, since a tokenizer is several times faster then."""

from collections.abc import Iterable, Sequence
from typing import Any

from hgrn2_bench.errors import ConfigError, unknown
from suites.zeroshot.settings import BOS_RULES

Encoded = tuple[list[int], list[int]]


class Encoder:
    """A tokenizer with a rule for the token that begins a text.

    `auto`: the tokenizer decides, as under lm-eval's own `hf` model. `always`: that token stands before every text that does not begin
    with it. `never`: no special token is added. With each of them it alone is the context of a continuation that has none.
    """

    def __init__(self, tokenizer: Any, bos: str) -> None:
        """ConfigError for an unknown rule, and for a tokenizer that says neither which token begins a text nor which ends one."""
        if bos not in BOS_RULES:
            raise unknown("bos", bos, BOS_RULES)
        self.tokenizer, self.bos = tokenizer, bos
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        if begin is None and end is None:
            raise ConfigError("the tokenizer names neither a bos_token nor an eos_token: add one of them to its tokenizer_config.json")
        self.prefix_id: int = end if begin is None else begin
        """What stands before a text: the token that begins one, else the one that ends one."""
        self.end_id: int = begin if end is None else end
        self._prefix = str(tokenizer.decode([self.prefix_id]))

    @property
    def told(self) -> str:
        """The rule, in words."""
        rules = {"auto": "as the tokenizer has it", "always": "before every text", "never": "only before what has no context"}
        return f"{self.bos}: token {self.prefix_id} {rules[self.bos]}"

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """The ids of one text; `special` overrides the rule."""
        return self.encode_all([text], special)[text]

    def encode_all(self, texts: Iterable[str], special: bool | None = None) -> dict[str, list[int]]:
        """The ids of every text."""
        found: dict[str, list[int]] = {}
        plain: list[str] = []
        usual: list[str] = []
        for text in dict.fromkeys(texts):
            begun = bool(self._prefix) and text.startswith(self._prefix)
            as_usual = special is None and self.bos == "auto" and not begun
            (usual if as_usual else plain).append(text)
        if usual:
            found |= zip(usual, self.tokenizer(usual, return_attention_mask=False)["input_ids"], strict=True)
        if plain:
            given = self.tokenizer(plain, return_attention_mask=False, add_special_tokens=bool(special))["input_ids"]
            found |= zip(plain, given, strict=True)
        if special is None and self.bos == "always":
            found = {text: ids if ids[:1] == [self.prefix_id] else [self.prefix_id, *ids] for text, ids in found.items()}
        return found

    def pairs(self, texts: Sequence[tuple[str, str]]) -> list[Encoded]:
        """The ids of contexts and continuations.

        White space at a context's end belongs to the continuation; both are encoded as one text, and what is beyond the context's own ids
        is the continuation. Without a context the continuation follows the token that begins texts, which it may itself begin with.
        """
        moved = [_moved(*pair) for pair in texts]
        whole = self.encode_all(text for context, continuation in moved for text in (context, context + continuation) if context)
        alone = self.encode_all((continuation for context, continuation in moved if not context), special=False)
        found = []
        for context, continuation in moved:
            if context:
                ids = whole[context]
                found.append((ids or [self.prefix_id], whole[context + continuation][len(ids) :]))
            else:
                ids = alone[continuation]
                found.append(([self.prefix_id], ids[1:] if ids[:1] == [self.prefix_id] else ids))
        return found

    def rolling(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts of which every token is scored, after the token that begins them."""
        found = self.encode_all(texts, special=None if self.bos == "auto" else False)
        return [found[text] for text in texts]

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of ids; special tokens are left out unless asked for."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))

    @property
    def end(self) -> str:
        """The token that ends a text, as text."""
        return str(self.tokenizer.decode([self.end_id]))


def _moved(context: str, continuation: str) -> tuple[str, str]:
    """Trailing white space of the context is put before the continuation."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
