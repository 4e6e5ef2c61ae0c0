"""Whether the hub can be reached: asked once, so that a machine without a network does not wait for every task's retries."""

import contextlib
import functools
import importlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

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
def reachable_only() -> Iterator[bool]:
    """Where the hub does not answer, only what was downloaded before is looked at; whether it answers."""
    if reaches_hub():
        yield True
        return
    modules: list[Any] = [importlib.import_module(name) for name in ("huggingface_hub.constants", "datasets.config")]
    kept = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield False
    finally:
        for module, value in zip(modules, kept, strict=True):
            module.HF_HUB_OFFLINE = value
