"""lm-eval as a guest: its log, bars and warnings stay off the screen, random state is kept, and it does not dawdle."""

import contextlib
import functools
import importlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from hgrn2_bench import seeding

TALKERS = ("lm_eval", "datasets", "evaluate", "huggingface_hub", "httpx", "fsspec", "urllib3")
SEEDS = (0, 1234, 1234)
"""Of random, numpy and torch before tasks are made: lm-eval's own defaults."""
FEWSHOT_SEED = 1234
"""lm-eval's default, by which examples are drawn."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Errors are still raised; what is only logged, drawn or warned of by lm-eval and what it uses is dropped."""
    loggers = [logging.getLogger(name) for name in TALKERS]
    levels = [logger.level for logger in loggers]
    tasks: Any = importlib.import_module("lm_eval.api.task")
    datasets: Any = importlib.import_module("datasets")
    bar, has_bars = tasks.tqdm, datasets.are_progress_bars_disabled() is False
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    tasks.tqdm = _no_bar
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=rf"({'|'.join(TALKERS)})(\.|$)")
            yield
    finally:
        tasks.tqdm = bar
        if has_bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _no_bar(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Also what is printed, for work in which nothing of ours speaks."""
    with quiet(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """A prompt's template is compiled once, not for every item: nine tenths of lm-eval's own time on LAMBADA."""
    environment: Any = importlib.import_module("lm_eval.utils").env
    environment.from_string = functools.cache(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # the class has its own


def seeded() -> contextlib.AbstractContextManager[None]:
    """Random generators as lm-eval's own command seeds them, for a while."""
    return seeding.seeded(*SEEDS)
