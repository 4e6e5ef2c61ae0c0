"""Tells lm-eval of the model `hgrn2_bench`, so that `lm_eval --model hgrn2_bench --model_args pretrained=DIR` works.

lm-eval has no entry points for models: a name must be in its registry before the command line looks for it. `zz_hgrn2_bench_lm_eval.pth`,
which is installed beside the packages, calls `install` at every start of Python. That puts one finder before the others, which does nothing
until `lm_eval.models` is imported, and then registers the name as a string. So nothing is imported here but what Python has imported
itself by then.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # `typing`, which has it, would have to be imported
if TYPE_CHECKING:
    from typing import Any

WATCHED = "lm_eval.models"
NAME, TARGET = "hgrn2_bench", "suites.zeroshot.lm:BenchLM"


class Finder:
    """Finds nothing itself: to the loader that others find for `lm_eval.models` it adds what follows the import."""

    def __init__(self) -> None:
        self.busy = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec of the watched module with a loader that registers; None for all others."""
        if name != WATCHED or self.busy:
            return None
        self.busy = True
        try:
            from importlib.util import find_spec

            spec: Any = find_spec(name)
        finally:
            self.busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = Loader(spec.loader)
        return spec


class Loader:
    """Another loader, and after it the registration."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        """All else is the other loader's."""
        return getattr(self.loader, name)

    def create_module(self, spec: Any) -> Any:
        """As the other loader has it."""
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        """Execute the module, then register; a version of lm-eval without such a registry is left alone."""
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        register()


def register() -> None:
    """Put the name into lm-eval's registry, unless it is there."""
    try:
        from lm_eval.api.registry import model_registry
    except ImportError:
        return
    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)


def install() -> None:
    """Watch for the import; or register at once where it has happened."""
    if WATCHED in sys.modules:
        register()
    elif not any(type(finder) is Finder for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
