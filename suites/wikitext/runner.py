"""Runs one cell of the wikitext suite: its tokens, the loss of a batch, and every metric of a split from the nats of its tokens.

Shape letters: N tokens of a split, B blocks of a batch, T tokens of a block.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hgrn2_bench import checkpoints, markov, registry
from hgrn2_bench.blocks import BlockTask, shape_of
from hgrn2_bench.config import require
from hgrn2_bench.corpus import Corpus, TokenSplit
from hgrn2_bench.engine import Shape
from hgrn2_bench.language import LanguageModel
from hgrn2_bench.plan import Cell
from hgrn2_bench.probes import probe
from hgrn2_bench.protocol import Metric
from hgrn2_bench.trained import Trained
from hgrn2_bench.trainer import DivergedError
from suites.wikitext import texts
from suites.wikitext.evaluation import Nats, Sums, by_position, carried, carried_card, excess, windowed, windowed_card
from suites.wikitext.settings import WikitextConfig

TABLES = ("learned", "sinusoid")
"""Positions that are looked up, and end."""
PROBED_BLOCKS = 8
"""Blocks of the validation split on which a trained model's decays and states are looked at."""


@functools.lru_cache(maxsize=2)
def _corpus(config: WikitextConfig, seed: int, model: Path | None) -> Corpus:
    if config.dataset == "markov":
        return markov.generate(config.recipe(), seed, config.train_tokens, config.eval_tokens)
    return texts.load(config, model)


def corpus_of(cell: Cell) -> Corpus:
    """The tokenised text of a cell; of a generated source the training documents follow from the seed."""
    return _corpus(cell.data, cell.seed, Path(cell.model_ref) if cell.data.tokenizer == "model" else None)


class Runner(BlockTask):
    """One cell of the suite; see `hgrn2_bench.engine.Runner`."""

    truncated = 0

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell, corpus_of(cell))
        self.config: WikitextConfig = cell.data
        self.data_hash, self.skipped, self.card = self.corpus.hash, self.corpus.skipped, dict(self.corpus.card)
        self.vocabulary = self.corpus.vocabulary
        self.unigram = unigram_perplexities(self.corpus)
        self.extrapolates = cell.model_config.positions not in TABLES

    @staticmethod
    def shape(cell: Cell) -> Shape:
        """Size of the task; text files are tokenised for it, once. ConfigError where training has less text than one block."""
        return shape_of(cell, corpus_of(cell), learns=registry.model(cell.model_ref).trained is None)

    @staticmethod
    def build(cell: Cell) -> LanguageModel:
        """The model of a cell, on the CPU: untrained, or of a folder. An adaptive softmax knows how frequent each id is."""
        corpus = corpus_of(cell)
        if found := registry.model(cell.model_ref).trained:
            refuse_unlike(found, corpus, cell.data)
            return checkpoints.load(found.folder, cell.backend)
        mixer = registry.load(cell.model_ref)
        longest = cell.data.block
        model = LanguageModel(cell.model_config, mixer, cell.settings, cell.backend, corpus.vocab_size, longest)
        if cell.model_config.softmax == "adaptive":
            model.rank(dict(enumerate(np.bincount(corpus.splits["train"].ids_N, minlength=corpus.vocab_size).tolist())))
        return model

    def score(self, model: LanguageModel, split: str) -> float:
        """Minus the mean nats of a split, each block alone."""
        nats_N = finite(windowed(model, self.text(split), self.config.block), split)
        return -float(nats_N.mean(dtype=np.float64))

    def report(self, model: LanguageModel) -> Sequence[Metric]:
        """Every metric of every scored split: those over blocks alone first."""
        return [metric for split in self.corpus.splits if split != "train" for metric in self.metrics(model, split)]

    def metrics(self, model: LanguageModel, split: str) -> list[Metric]:
        """A split's perplexities: each block alone, with a context window, with the state carried; and the loss by position."""
        config, text = self.config, self.text(split)
        nats_N = finite(windowed(model, text, config.block), split)
        found = self._of("", nats_N, split, windowed_card(self.card, "", config.block))
        if config.window:
            nats_N = finite(windowed(model, text, config.block, config.window), split)
            found += self._of("_window", nats_N, split, windowed_card(self.card, "", config.block, config.window))
        if config.carry and model.can_carry:
            nats_N = finite(carried(model, text), split)
            found += self._of("_carried", nats_N, split, carried_card(self.card, ""))
        if config.curve and self.extrapolates:
            found += self._curve(model, split)
        return found

    def _of(self, suffix: str, nats_N: Nats, split: str, card: Mapping[str, str]) -> list[Metric]:
        """The sum of a split's nats, and what follows from it."""
        part = self.corpus.splits[split]
        sums = Sums.of(nats_N, part)
        values = [("perplexity", sums.perplexity, "per token"), ("nats", sums.nats, "nats")]
        values += [("word_perplexity", sums.word_perplexity, "per word"), ("bits_per_byte", sums.bits_per_byte, "bits per byte")]
        if part.optimum_N is not None:
            above = excess(nats_N, part)
            values += [("excess_free", above.free.mean, "nats per token"), ("excess_recalled", above.recalled.mean, "nats per token")]
        floors = {"perplexity": {"unigram": self.unigram[split]}}
        return [
            Metric(split, name + suffix, value, sums.tokens, floors.get(name, {}), unit, card=self._told(card, unit, part))
            for name, value, unit in values
            if value is not None
        ]

    def _told(self, card: Mapping[str, str], unit: str, part: TokenSplit) -> dict[str, str]:
        """The card of one metric, with the optimum where it is known."""
        known = {} if part.optimum_N is None else {"optimum": optimum(part)}
        return {**card, "unit": unit, **known}

    def _curve(self, model: LanguageModel, split: str) -> list[Metric]:
        """The loss by position, a split of its own for each bin."""
        bins, nats_N = by_position(model, self.text(split), self.config.curve, self.config.block)
        finite(nats_N, split)
        card = windowed_card(self.card, "nats per token", self.config.curve)
        return [
            Metric(f"{split}_to_{each.last}", "nats_per_token", each.sums.mean, each.sums.tokens, unit="nats per token", card=card)
            for each in bins
            if each.sums.mean is not None
        ]

    def details(self, model: LanguageModel) -> dict[str, Any]:
        """What the trained model's recurrences do with the first blocks of the validation split."""
        ids_N = self.corpus.splits["validation"].ids_N
        blocks = min(PROBED_BLOCKS, len(ids_N) // self.config.block)
        return probe(model, self.text("validation").pairs(np.arange(blocks) * self.config.block, self.config.block)[0]) if blocks else {}


def refuse_unlike(found: Trained, corpus: Corpus, config: WikitextConfig) -> None:
    """ConfigError, one line, where a trained model was trained on other tokens than the corpus has, or cannot take so long blocks."""
    what = "text" if config.dataset == "markov" else "tokenizer"  # a generated source's symbols mean nothing elsewhere
    theirs, ours = found.card.tokenizer.get(what, ""), corpus.card[what]
    require(theirs in ("", ours), f"{found.folder} was trained with {what} {theirs}; this text has {ours}")
    few = f"{found.folder} has {found.vocab_size} ids, tokenizer={config.tokenizer} of this text has {corpus.vocab_size}"
    require(corpus.vocab_size <= found.vocab_size, few)
    table = found.config.positions in TABLES and config.block > found.max_len
    require(not table, f"block={config.block}: {found.folder} has a table of positions ({found.config.positions}) for {found.max_len}")


def finite(nats_N: Nats, split: str) -> Nats:
    """The same nats. DivergedError where one is not finite."""
    if not np.isfinite(nats_N).all():
        raise DivergedError(f"the loss on {split} data is not finite")
    return nats_N


def unigram_perplexities(corpus: Corpus) -> dict[str, float]:
    """For each scored split the perplexity of the training split's frequencies, each id counted once more, so that none has none."""
    counts_V = np.bincount(corpus.splits["train"].ids_N, minlength=corpus.vocab_size) + 1.0
    nats_V = -np.log(counts_V / counts_V.sum())
    return {name: round(float(np.exp(nats_V[split.ids_N].mean())), 2) for name, split in corpus.splits.items() if name != "train"}


def optimum(split: TokenSplit) -> str:
    """The least perplexity that can be expected of any model, in words."""
    if split.optimum_N is None:
        raise ValueError("the optimum of this text is not known")
    nats = float(split.optimum_N.mean(dtype=np.float64))
    return f"perplexity {np.exp(nats):.4f}, {nats:.4f} nats per token"
