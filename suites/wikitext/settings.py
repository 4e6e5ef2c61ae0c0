"""The keys of the wikitext suite: which text, cut into which tokens, and how it is trained and scored on. Imports no torch."""

from dataclasses import dataclass

from hgrn2_bench.config import choice, require
from hgrn2_bench.markov_recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class WikitextConfig:
    """The suite's own keys."""

    dataset: str = choice("wikitext103", "imdb", "text", "markov")
    """WikiText-103 in any of its forms, the IMDB reviews, any text files, or a generated source of known entropy."""
    tokenizer: str = choice("gpt2", "word", "bytes", "model")
    """`model`: the `tokenizer.json` in the folder of a trained model. Of a generated source none is used: its symbols are the tokens."""
    fingerprint: str = ""
    """Of the files that were read; planning puts it here."""
    block: int = 512
    """Tokens of a training sample, and of a scored block; every token of a split is predicted exactly once."""
    train_tokens: int = 0
    """Of the training split the first so many; 0: all."""
    eval_tokens: int = 0
    """Of every scored split the first so many; 0: all."""
    window: int = 0
    """Old tokens that a block of `block` also holds, which are not scored: perplexity in this window is a metric of its own. 0: none."""
    carry: bool = True
    """Score also with the state carried over from block to block, for models that have one of fixed size."""
    curve: int = 0
    """Longest context of the loss by position, in tokens: a multiple of `block` beyond training length; 0: none."""
    transfer: bool = False
    """Score also the validation and test split of WikiText's .tokens files in the data folder, as the same tokenizer sees them."""
    symbols: int = 64
    facts: int = 0
    document: int = 256
    """Of a generated source: its symbols, the facts (pairs of a key and its value) at a document's start, and its mean tokens."""

    def __post_init__(self) -> None:
        require(self.block >= 2, f"block={self.block} must be at least 2 tokens")
        for name in ("train_tokens", "eval_tokens", "window", "curve"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        require(self.window < self.block, f"window={self.window} leaves no new token in a block of {self.block}")
        whole = self.curve % self.block == 0
        require(whole, f"curve={self.curve} must be a multiple of block={self.block}")
        drawn = self.dataset == "markov"
        for name in ("symbols", "facts", "document"):
            value = getattr(self, name)
            idle = f"{name}={value} has no effect on dataset={self.dataset}: presets smoke and test are not for text; try preset=short"
            require(drawn or value == getattr(type(self), name), idle)
        self.recipe()
        require(not (drawn and self.transfer), "transfer=true: a generated source has no words to transfer to")
        words = "transfer=true: tokenizer=word has the words of its own training text only; use tokenizer=gpt2 or bytes"
        require(not (self.transfer and self.tokenizer == "word"), words)

    def recipe(self) -> Recipe:
        """Of a generated source."""
        return Recipe(self.symbols, self.facts, self.document)
