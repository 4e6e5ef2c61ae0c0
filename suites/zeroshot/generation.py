"""Greedy continuations of prompts, one token at a time from the states that the prompts left.

Prompts of one length go through a model together; where states have a fixed size, those of all lengths then step together.

Shape letters: B rows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hgrn2_bench.errors import ConfigError, unknown
from hgrn2_bench.trainer import DivergedError
from suites.zeroshot.scoring import NOT_A_NUMBER

MAX_GEN_TOKENS = 256
"""Where a request does not say; as in lm-eval."""
LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of one setting; the first that is given counts, as in lm-eval."""
WITHOUT_EFFECT = ("temperature", "top_p", "top_k", "num_beams")
"""Settings that greedy decoding does not look at, where `do_sample` is not true; `num_beams` only where it is 1."""


@dataclass(frozen=True)
class Settings:
    """What a request says beside its prompt."""

    until: tuple[str, ...]
    most: int
    """New tokens."""


def settings_of(words: Mapping[str, Any]) -> Settings:
    """The settings of a request. ConfigError, one line, for sampling, beams, and what is not known."""
    words = dict(words)
    until = words.pop("until", None) or []
    lengths = [words.pop(key, None) for key in LENGTH_KEYS]
    most = int(next((given for given in lengths if given is not None), MAX_GEN_TOKENS))
    temperature, sampled = float(words.get("temperature") or 0.0), words.pop("do_sample", None)
    if sampled or (sampled is None and temperature > 0):
        raise ConfigError("generate_until is greedy here: do_sample=true and a temperature above 0 are not supported")
    if words.get("num_beams", 1) != 1:
        raise ConfigError(f"generate_until is greedy here: num_beams={words['num_beams']} is not supported")
    for name in words:
        if name not in WITHOUT_EFFECT:
            raise unknown("setting of generate_until", name, ["until", "do_sample", *LENGTH_KEYS, *WITHOUT_EFFECT])
    return Settings((until,) if isinstance(until, str) else tuple(until), most)


class Stepper(Protocol):
    """What decoding asks of a model; see `suites.zeroshot.reading`."""

    can_join: bool

    @property
    def device(self) -> torch.device:
        """Where ids are wanted."""

    def begin(self, ids_BT: Tensor, capacity: int) -> tuple[Tensor, Any]:
        """Logits (B, V) after prompts of one length, and their states."""

    def follow(self, ids_B: Tensor, states: Any) -> tuple[Tensor, Any]:
        """The same after one more token of each row."""

    def joined(self, states: Sequence[Any]) -> Any:
        """The rows of several batches in one."""


def batches(prompts: Sequence[Sequence[int]], rows: int, can_join: bool) -> list[list[int]]:
    """Numbers of the prompts that step together, longest prompts first: at most `rows`, of one length unless states can be joined."""
    held: list[list[int]] = []
    for number in sorted(range(len(prompts)), key=lambda number: -len(prompts[number])):
        last = held[-1] if held else []
        fits = last and len(last) < rows and (can_join or len(prompts[last[0]]) == len(prompts[number]))
        if fits:
            last.append(number)
        else:
            held.append([number])
    return held


@torch.no_grad()
def generate(model: Stepper, prompts: Sequence[Sequence[int]], most: int, is_done: Callable[[list[int]], bool]) -> list[list[int]]:
    """The most probable next tokens of every prompt, at most `most` each; a row ends with the token that makes it done.

    DivergedError where the model gives no numbers.
    """
    lengths = sorted({len(prompt) for prompt in prompts})
    parts, order = [], []
    for length in lengths:
        numbers = [number for number, prompt in enumerate(prompts) if len(prompt) == length]
        order += numbers
        parts.append(model.begin(torch.tensor([list(prompts[n]) for n in numbers], device=model.device), length + most))
    logits_BV = torch.cat([logits for logits, _ in parts])
    if torch.isnan(logits_BV).any():
        raise DivergedError(NOT_A_NUMBER)
    states = parts[0][1] if len(parts) == 1 else model.joined([states for _, states in parts])
    found: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for step in range(most):
        ids_B = logits_BV.argmax(-1)
        for row, token in enumerate(ids_B.tolist()):
            if row in open_rows:
                found[order[row]].append(token)
                if is_done(found[order[row]]):
                    open_rows.discard(row)
        if not open_rows or step == most - 1:
            break
        logits_BV, states = model.follow(ids_B, states)
    return found


def cut_at(text: str, until: Sequence[str]) -> str:
    """The text before the first of the strings that end it."""
    for end in until:
        text = text.split(end)[0] if end else text
    return text
