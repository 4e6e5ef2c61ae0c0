"""The keys of the zeroshot suite: which task, how its items are scored, and on what a model trained in place learns. Imports no torch."""

from dataclasses import dataclass

from hgrn2_bench.config import choice, require
from hgrn2_bench.markov_recipe import Recipe

SMOKE = "smoke"
"""The group of tasks that are made when they are run."""
BOS_RULES = ("auto", "always", "never")
TRUNCATIONS = ("left", "skip")
LEAST_VALUES = 5
"""Different values that a question of these tasks may offer."""


@dataclass(frozen=True, kw_only=True)
class ZeroshotConfig:
    """The suite's own keys."""

    lm_task: str = SMOKE
    """lm-eval's name of a task or group; a group is one cell. `smoke`: questions on a generated source with facts."""
    limit: int = 0
    """Of each task the first so many items; 0: all."""
    fewshot: int = -1
    """Solved items before each question; -1: as many as the task itself asks for."""
    bos: str = choice(*BOS_RULES)
    """Whether the token that stood before a text in training stands before each request: `auto` as the tokenizer or lm-eval says."""
    truncation: str = choice(*TRUNCATIONS)
    """What becomes of an item that is longer than the model can read: its beginning is cut off, or it is left out. Both are counted."""
    max_length: int = 0
    """Tokens that a model reads at most; 0: as many as it was trained on, or as its folder says."""
    weighting: str = choice("items", "tasks")
    """Of a group's score: the mean over all items (as lm-eval), or over its tasks."""
    check: bool = True
    """Compare scores of items alone and in batches before the rest is scored."""
    fingerprint: str = ""
    """Of the files that were read; planning puts it here."""
    symbols: int = 32
    facts: int = 4
    document: int = 64
    """Of the source that a model trained in place learns: see `hgrn2_bench.markov`."""
    block: int = 64
    """Tokens of a training sample."""
    train_tokens: int = 0
    """Of the training text the first so many; 0: all."""

    def __post_init__(self) -> None:
        for name in ("limit", "max_length", "train_tokens"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        require(self.fewshot >= -1, f"fewshot={self.fewshot} must be at least 0, or -1 for the task's own number")
        if self.lm_task != SMOKE:
            for name in ("symbols", "facts", "document", "block", "train_tokens"):
                value = getattr(self, name)
                require(value == getattr(type(self), name), f"{name}={value} has no effect on lm_task={self.lm_task}: nothing is trained")
            return
        require(self.fewshot < 1, f"fewshot={self.fewshot}: the tasks of lm_task={SMOKE} have no solved items")
        require(self.block >= 2, f"block={self.block} must be at least 2 tokens")
        values = self.symbols - 1 - self.facts
        few = f"symbols={self.symbols} with facts={self.facts} leave {values} values; questions need {LEAST_VALUES}"
        require(self.facts >= 2, f"facts={self.facts} must be at least 2: a question offers the value of another fact")
        self.recipe()
        require(values >= max(LEAST_VALUES, self.facts + 1), few)

    def recipe(self) -> Recipe:
        """Of the generated source."""
        return Recipe(self.symbols, self.facts, self.document)
