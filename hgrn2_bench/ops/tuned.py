"""Tuned choices shipped with the package: the best configuration of each kernel on one kind of GPU, found once with all of them tried.

`hgrn2_bench/tuned/<GPU>/` holds a file `<kernel>.json` for each kernel, in fla's own format and read by fla's own loader, and
`made_with.json`. They are used on the GPU, fla and Triton that they were made with, and with exact keys alone (FLA_CACHE_MODE strict): a
key that is in no file is tuned as ever. fla's mode `fuzzy` would give a head dimension the tiles of another one, which may not fit the
GPU's memory. So a kernel takes the same choice in every run, and its sums are formed in the same order.

`python -m hgrn2_bench.ops.tuned` makes the files from the timings that Triton keeps in its cache folder.
"""

import argparse
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hgrn2_bench.ops import autotune

SHIPPED = Path(__file__).parent.parent / "tuned"
MADE_WITH = "made_with.json"
VARIABLES = ("FLA_CONFIG_DIR", "FLA_CACHE_MODE")
"""fla's own; what the user sets in them stands."""


def installed() -> dict[str, str]:
    """GPU, fla and Triton: what a choice is true of."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"gpu": gpu, "fla": _version("flash-linear-attention"), "triton": _version("triton")}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def folder_name(gpu: str) -> str:
    """A GPU's name as fla writes it in paths."""
    return re.sub("[^0-9A-Za-z]+", "_", gpu).strip("_")


def point() -> None:
    """Before fla is imported: name it the choices for this GPU, unless there are none, or the user asks for others or for full tuning.

    Where something else has imported fla, it is too late.
    """
    if "fla" in sys.modules or autotune.is_full() or any(name in os.environ for name in VARIABLES):
        return
    here = installed()
    folder = SHIPPED / folder_name(here["gpu"])
    made = _read(folder / MADE_WITH)
    if made and all(made.get(name) == value for name, value in here.items()):
        os.environ |= {"FLA_CONFIG_DIR": str(folder), "FLA_CACHE_MODE": "strict"}


def in_use() -> Path | None:
    """The shipped folder that fla reads, or None."""
    folder = Path(os.environ.get("FLA_CONFIG_DIR", ""))
    return folder if folder.parent == SHIPPED and os.environ.get("FLA_CACHE_MODE") == "strict" else None


def thoroughness() -> str:
    """For the row: whose choices of configurations fla's kernels take, and what is tried for a key that has none."""
    if folder := in_use():
        return f"tuned for {_read(folder / MADE_WITH).get('gpu', folder.name)}, else {autotune.tried()}"
    own = ", ".join(f"{name} {os.environ[name]}" for name in VARIABLES if name in os.environ)
    return f"{own}, else {autotune.tried()}" if own else autotune.tried()


def fill() -> None:
    """Give the shipped choices to kernels on Triton's own autotuner too, which reads no files: they are put among its finished tunings."""
    folder = in_use()
    if folder is None:
        return
    from triton.runtime.autotuner import Autotuner

    for tuner in autotune.autotuners():
        if type(tuner) is Autotuner:
            for entry in _read(folder / f"{tuner.base_fn.__name__}.json").get("autotune_entries", {}).values():
                config = _config(entry["config"])
                if config in tuner.configs:  # else it is another kernel's of the same name
                    tuner.cache.setdefault(tuple(entry["autotune_key"]), config)


@dataclass(frozen=True)
class Timing:
    """One finished tuning in Triton's cache: a kernel, a key, and the median milliseconds of every configuration tried."""

    kernel: str
    key: tuple[Any, ...]
    median_ms: dict[Any, float]


def timings(cache: Path) -> Iterator[Timing]:
    """Every finished tuning in a cache folder of Triton."""
    for path in sorted(cache.glob("*/*.autotune.json")):
        content = json.loads(path.read_text())
        medians = {_config(config): float(median) for config, (median, *_) in content["configs_timings"]}
        yield Timing(path.name.removesuffix(".autotune.json"), tuple(content["key"]), medians)


def choose(found: Iterable[Timing], tuners: Sequence[Any]) -> tuple[dict[str, dict[tuple[Any, ...], Any]], list[str]]:
    """The best configuration for each key of each kernel, and a line about each tuning that is left out.

    Left out are those that did not try all that a loaded kernel of that name admits, and keys that two kernels of one name share.
    """
    chosen: dict[str, dict[tuple[Any, ...], Timing]] = {}
    ambiguous: set[tuple[str, tuple[Any, ...]]] = set()
    left_out = []
    for timing in found:
        kept = chosen.setdefault(timing.kernel, {})
        if not any(set(timing.median_ms) == _admitted(tuner, timing.key) for tuner in tuners if tuner.base_fn.__name__ == timing.kernel):
            left_out.append(f"{timing.kernel} {list(timing.key)}: {len(timing.median_ms)} configurations are not all that it admits")
        elif timing.key in kept and set(kept[timing.key].median_ms) != set(timing.median_ms):
            ambiguous.add((timing.kernel, timing.key))
        elif timing.key not in kept or min(timing.median_ms.values()) < min(kept[timing.key].median_ms.values()):
            kept[timing.key] = timing
    for kernel, key in sorted(ambiguous, key=str):
        del chosen[kernel][key]
        left_out.append(f"{kernel} {list(key)}: two kernels of this name have this key")
    best = {k: {key: min(t.median_ms, key=t.median_ms.__getitem__) for key, t in kept.items()} for k, kept in chosen.items() if kept}
    return best, left_out


def _admitted(tuner: Any, key: tuple[Any, ...]) -> set[Any]:
    """All configurations that a kernel admits at a key; none where the key does not tell."""
    if tuner.early_config_prune is None:
        return set(tuner.configs)
    try:
        return set(tuner.early_config_prune(tuner.configs, dict(zip(tuner.keys, key, strict=False))))
    except KeyError:
        return set()


def write(chosen: dict[str, dict[tuple[Any, ...], Any]], folder: Path) -> None:
    """Write choices as fla reads them: one file a kernel, an entry under the MD5 of each key's JSON text; and what they are true of.

    Files that were there are removed: they may have been made with other versions.
    """
    import hashlib

    made = installed() | {"date": datetime.now(UTC).date().isoformat()}
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    for kernel, choices in chosen.items():
        entries = {}
        for key, config in choices.items():
            name = hashlib.md5(json.dumps(key, separators=(",", ":"), sort_keys=True).encode()).hexdigest()
            fields = {k: v for k, v in vars(config).items() if k != "pre_hook"}
            entries[name] = {"autotune_key": list(key), "config": fields}
        content = {"kernel_name": kernel, "triton_version": made["triton"], "autotune_entries": entries, "default_config": None}
        (folder / f"{kernel}.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / MADE_WITH).write_text(json.dumps(made, indent=1) + "\n")


def _config(fields: dict[str, Any]) -> Any:
    from triton import Config

    return Config(**fields)


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


def main() -> None:
    """Make the files of this machine's GPU from a cache folder of Triton that nothing but full tuning on this GPU has written to."""
    from hgrn2_bench.ops import fla

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("cache", type=Path, help="what TRITON_CACHE_DIR was")
    cache = parser.parse_args().cache
    here = installed()
    if here["gpu"] == "cpu":
        parser.error("torch sees no GPU, and which configurations a kernel has depends on it")
    fla.load_all()
    chosen, left_out = choose(timings(cache), list(autotune.autotuners()))
    for line in left_out:
        print(f"left out: {line}")
    if not chosen:
        parser.error(f"no tuning in {cache} tried all configurations of its kernel")
    folder = SHIPPED / folder_name(here["gpu"])
    write(chosen, folder)
    print(f"{sum(map(len, chosen.values()))} choices of {len(chosen)} kernels in {folder}; {len(left_out)} tunings left out")


if __name__ == "__main__":
    main()
