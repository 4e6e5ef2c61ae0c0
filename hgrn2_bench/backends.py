"""Which implementation of its recurrence a cell runs. Imports no torch."""

import importlib.util

from hgrn2_bench import registry
from hgrn2_bench.errors import ConfigError

BACKENDS = ("reference", "chunked", "fla")


def resolve_backend(name: str, device: str, *mixers: registry.Model) -> str:
    """Turn `auto` into the backend that every row records; ConfigError where the choice cannot run. Never falls back quietly.

    All mixers of a cell must have it, but for those without a recurrence: they run beside any, and without one the first decides.
    """
    recurrent = [each for each in mixers if each.facts.get("family")]
    offers = {each.name: tuple(each.facts.get("backends", BACKENDS)) for each in recurrent or mixers[:1]}
    common = [backend for backend in next(iter(offers.values())) if all(backend in offered for offered in offers.values())]
    if name == "auto" and common:
        name = "fla" if device == "cuda" and "fla" in common else "chunked" if "chunked" in common else common[0]
    for each, offered in offers.items():
        if name not in (*offered, "auto"):
            raise ConfigError(f"backend={name}: {each} has only {', '.join(offered)}")
    if name == "auto":
        raise ConfigError(f"no backend is common to {', '.join(offers)}")
    if name == "fla" and device != "cuda":
        raise ConfigError("backend=fla needs a CUDA device; use backend=chunked")
    if name == "fla" and importlib.util.find_spec("fla") is None:
        raise ConfigError("CUDA runs need fla: pip install flash-linear-attention, or pass backend=chunked")
    return name
