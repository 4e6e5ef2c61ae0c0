"""Runs one cell of the zeroshot suite: a trained model, or one that learns a generated source in place, asked by lm-eval.

Shape letters: B blocks of a batch, T tokens of a block.
"""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hgrn2_bench import checkpoints, markov, measure, registry
from hgrn2_bench.blocks import BlockTask, Text, shape_of
from hgrn2_bench.cells import SCORES
from hgrn2_bench.config import require
from hgrn2_bench.corpus import Corpus
from hgrn2_bench.engine import Shape
from hgrn2_bench.language import LanguageModel
from hgrn2_bench.markov_recipe import Recipe
from hgrn2_bench.plan import Cell
from hgrn2_bench.protocol import Metric
from hgrn2_bench.trained import Trained
from hgrn2_bench.trainer import DivergedError
from suites.zeroshot import facts, loading
from suites.zeroshot.catalogue import tasks_folder
from suites.zeroshot.harness import Outcome, evaluate
from suites.zeroshot.lm import BenchLM
from suites.zeroshot.settings import SMOKE, ZeroshotConfig

SCORED_TOKENS = 2**13
"""Of the generated validation text, which says how well the source was learned."""
USUAL_LENGTH = 2048
"""Tokens by which a trained model's state is counted where nothing else says how many."""


@functools.lru_cache(maxsize=2)
def _corpus(recipe: Recipe, seed: int, train_tokens: int) -> Corpus:
    return markov.generate(recipe, seed, train_tokens, SCORED_TOKENS)


def corpus_of(cell: Cell) -> Corpus:
    """What a model learns in place; the training documents follow from the seed."""
    return _corpus(cell.data.recipe(), cell.seed, cell.data.train_tokens)


class Runner(BlockTask):
    """One cell of the suite; see `hgrn2_bench.engine.Runner`."""

    folder: Path | None = None
    """The cell's own, where this process writes."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.config = cell, cell.data
        self.data_hash, self.truncated, self.skipped = "", 0, 0
        self.outcome: Outcome | None = None
        if not cell.checkpoint:
            super().__init__(cell, corpus_of(cell))
            self.card = dict(self.corpus.card)

    @staticmethod
    def shape(cell: Cell) -> Shape:
        """Size of what is learned in place; of a trained model the length that it was made for."""
        if not cell.checkpoint:
            return shape_of(cell, corpus_of(cell))
        found = registry.model(cell.model_ref).trained
        length = cell.data.max_length or (found.max_len if found else 0) or USUAL_LENGTH
        return Shape(length, labels_per_token=1.0, steps_per_epoch=1, tokens_per_epoch=length, step_tokens=length)

    @staticmethod
    def build(cell: Cell) -> Any:
        """The model of a cell, on the CPU: untrained, or of a folder. ConfigError where an untrained one meets a task of lm-eval's own."""
        if found := registry.model(cell.model_ref).trained:
            return loaded(found, cell)
        config: ZeroshotConfig = cell.data
        trained = f"task={config.lm_task} is for trained models: write model=DIR; preset=smoke trains {cell.model} in place"
        require(config.lm_task == SMOKE, trained)
        mixer = registry.load(cell.model_ref)
        return LanguageModel(cell.model_config, mixer, cell.settings, cell.backend, config.symbols, config.block)

    def score(self, model: LanguageModel, split: str) -> float:
        """Minus the mean nats of a split of the source, in whole blocks."""
        return -mean_nats(model, self.text(split), self.block)

    def report(self, model: Any) -> Sequence[Metric]:
        """What lm-eval measures, the task's score first; of a model that learned in place also its perplexity."""
        records = self.folder if self.outcome is None else None  # of further weights of the model no item's record is kept
        self.outcome = self._evaluate(model, records)
        self.data_hash, self.truncated, self.skipped = self.outcome.data_hash, self.outcome.truncated, self.outcome.skipped
        return [*self.outcome.metrics, *([] if self.cell.checkpoint else [self._perplexity(model)])]

    def details(self, _model: Any) -> dict[str, Any]:
        """Which items were right, standard errors, and how scoring went."""
        return dict(self.outcome.details) if self.outcome else {}

    def _evaluate(self, model: Any, records: Path | None) -> Outcome:
        """Ask the model. What was scored of it before a kill is found again by its weights, so that no other weights get its scores."""
        weights = self.cell.checkpoint or measure.weights_hash(model)
        store = self.folder / SCORES / f"{weights[:16]}.jsonl" if self.folder else None
        with tempfile.TemporaryDirectory() as made:
            own = Path(made) if self.config.lm_task == SMOKE else None
            if own:
                facts.write(own, self.config.recipe(), tasks_folder())
            return evaluate(self._lm(model, store), self.config, records, own)

    def _lm(self, model: Any, store: Path | None) -> BenchLM:
        """The model as lm-eval takes it; of others than ours the tokenizer decides what begins a text, as under lm-eval's `hf` model."""
        cell, config = self.cell, self.config
        found = registry.model(cell.model_ref).trained
        return BenchLM(
            model=model,
            tokenizer=loading.tokenizer_of(found.folder) if found else loading.tokenizer_of_card(self.card),
            own=found is None or loading.is_own_folder(found.folder),
            batch_size=cell.train.eval_batch_size,
            device=cell.device,
            dtype="auto" if cell.checkpoint else cell.dtype,
            backend=cell.backend,
            max_length=config.max_length,
            bos=config.bos,
            truncation=config.truncation,
            store=store,
            check=config.check,
        )

    def _perplexity(self, model: LanguageModel) -> Metric:
        """Of the validation text, in whole blocks."""
        text = self.text("validation")
        nats, tokens = mean_nats(model, text, self.block), len(text) // self.block * self.block
        card = {**self.card, "window": f"{self.block} tokens, each block alone"}
        return Metric("validation", "perplexity", float(np.exp(nats)), tokens, unit="per token", higher_is_better=False, card=card)


def loaded(found: Trained, cell: Cell) -> Any:
    """A trained model on the CPU, its weights in the cell's type, as lm-eval's own `hf` model has them."""
    if found.foreign:
        return loading.load(found.folder, "auto", "cpu", cell.dtype)[0]
    return checkpoints.load(found.folder, cell.backend).to(getattr(torch, cell.dtype))


def mean_nats(model: LanguageModel, text: Text, block: int) -> float:
    """Nats per token of a text's whole blocks, each read alone. DivergedError where they are not finite."""
    begins, total = np.arange(len(text) // block) * block, 0.0
    for i in range(0, len(begins), text.batch_size):
        total += float(model.losses(*text.pairs(begins[i : i + text.batch_size], block))[0].double().sum())
    nats = total / max(1, len(begins) * block)
    if not np.isfinite(nats):
        raise DivergedError("the loss on validation data is not finite")
    return nats
