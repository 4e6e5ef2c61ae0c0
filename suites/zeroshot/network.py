"""What lm-eval may fetch: data where the hub answers, asked once so that nobody waits for every task's retries; never code."""

import contextlib
import functools
import importlib
import os
import sys
import types
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, NoReturn

ENDPOINT = "HF_ENDPOINT"
WITHIN_S = 5.0


@functools.cache
def reaches_hub() -> bool:
    """Whether the hub, or the mirror that HF_ENDPOINT names, answers at all, and the environment does not forbid to ask."""
    hub: Any = importlib.import_module("huggingface_hub.constants")
    datasets: Any = importlib.import_module("datasets.config")
    if hub.HF_HUB_OFFLINE or datasets.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(os.environ.get(ENDPOINT, "https://huggingface.co"), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=WITHIN_S).close()
    except urllib.error.HTTPError:
        return True  # an answer, if not a kind one
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def reachable_only() -> Iterator[None]:
    """Where the hub does not answer, only what was downloaded before is looked at."""
    if reaches_hub():
        yield
        return
    modules: list[Any] = [importlib.import_module(name) for name in ("huggingface_hub.constants", "datasets.config")]
    kept = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, kept, strict=True):
            module.HF_HUB_OFFLINE = value


@contextlib.contextmanager
def no_code() -> Iterator[None]:
    """Metrics of package evaluate are code from the hub: a task that loads one gets an error instead."""
    name = "evaluate"
    module: Any = sys.modules.get(name)
    kept = module.load if module else None
    if module is None:
        module = sys.modules[name] = types.ModuleType(name)  # the real one takes seconds to import
    module.load = _refuse
    try:
        yield
    finally:
        if kept is None:
            sys.modules.pop(name, None)
        else:
            module.load = kept


def _refuse(metric: str, *_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(f"its metric {metric} is code from the hub, and this suite runs none")
