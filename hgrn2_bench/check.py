"""One mixer looked at in about a minute: the contract, what it costs, its speed here, and a small task it learns beside others.

The cells of a plan say what to build: the first is the mixer's own, the others are of the models that stand beside it. The contract is
held against the last layer of each kind that the mixer's layers have, costs and speed are means over its layers.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hgrn2_bench import contract, engine, registry
from hgrn2_bench.config import written
from hgrn2_bench.console import Monitor, names
from hgrn2_bench.contract import BrokenPromiseError, DoesNotApplyError, Subject, loss_of
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.executor import LocalExecutor, default_workers
from hgrn2_bench.lines import beats_floors, floors_of
from hgrn2_bench.model import mixer_spec
from hgrn2_bench.plan import Cell
from hgrn2_bench.render import count
from hgrn2_bench.results import Row

SHAKE = 0.02
SPEED_SHAPE = (8, 128)
"""B, T: sequences and tokens of a timed pass."""
LONGEST = max(contract.LONG, SPEED_SHAPE[1])
ROUNDS = 15
PASS, FAIL, SKIPPED = "pass", "FAIL", "skipped"

CONTRACT: dict[str, Callable[[Subject], str]] = {
    "shape": contract.shape,
    "gradients": contract.gradients,
    "causality": contract.causality,
    "determinism": contract.determinism,
    "decoding": contract.decoding,
    "two chunks": contract.two_chunks,
    "padding": contract.padding,
    "bfloat16": contract.autocast,
    "batch": contract.batch_independence,
    "state": contract.state_bytes,
    "backends": contract.backends,
}
COSTS = ("parameters", "FLOPs", "speed", "learning")


@dataclass(frozen=True)
class Finding:
    """The outcome of one check, and what it found in a sentence."""

    name: str
    outcome: str
    text: str
    kind: str = ""
    """The kind of layer it is about, where the mixer's layers are not all alike."""

    def __str__(self) -> str:
        """One line."""
        text = f"{self.kind}: {self.text}" if self.kind else self.text
        return f"{self.name:<13}{self.outcome:<9}{' '.join(text.split())}"


def judge(name: str, check: Callable[[], str], kind: str = "") -> Finding:
    """Run one check; whatever it raises is its finding, so that the next one still runs."""
    try:
        return Finding(name, PASS, check(), kind)
    except DoesNotApplyError as reason:
        return Finding(name, SKIPPED, str(reason), kind)
    except BrokenPromiseError as fault:
        return Finding(name, FAIL, str(fault), kind)
    except Exception as error:  # the mixer's own code may raise anything
        return Finding(name, FAIL, _raised(error), kind)


def _raised(error: Exception) -> str:
    return f"raised {type(error).__name__}: {error}"


def run_checks(cells: Sequence[Cell]) -> Iterator[Finding]:
    """Every check in turn. ConfigError where the mixer's file cannot be imported, or where settings are illegal."""
    torch.set_num_threads(1)  # as cells have
    mine, *others = cells
    layers = layers_of(mine)
    for other in others:
        for subject in layers_of(other):
            subject.build()  # a width that they refuse is no fault of the mixer's
    built = _built(layers, mine)
    yield built
    if built.outcome != PASS:
        yield from (Finding(name, SKIPPED, "the mixer cannot be built") for name in (*CONTRACT, *COSTS))
        return
    kinds = {subject.facts.label: subject for subject in layers}
    for name, check in CONTRACT.items():
        yield from (judge(name, functools.partial(check, subject), kind) for kind, subject in kinds.items())
    for name, cost in zip(COSTS, (_parameters, _flops, _speed, _learning), strict=True):
        yield judge(name, functools.partial(cost, mine, others))


def print_checks(cells: Sequence[Cell]) -> bool:
    """Print a line for every check as it ends, and the verdict; whether none failed."""
    findings = []
    for finding in run_checks(cells):
        print(finding, flush=True)
        findings.append(finding)
    print(verdict(cells[0].model, findings))
    return all(finding.outcome != FAIL for finding in findings)


def verdict(mixer: str, findings: Sequence[Finding]) -> str:
    """The last line: how many checks failed, and which."""
    failed = [finding.name + f" of {finding.kind}" * bool(finding.kind) for finding in findings if finding.outcome == FAIL]
    skipped = sum(finding.outcome == SKIPPED for finding in findings)
    left_out = f", {skipped} skipped" if skipped else ""
    passed = len(findings) - len(failed) - skipped
    if failed:
        return f"{mixer}: {len(failed)} of {len(findings)} checks FAILED ({', '.join(failed)}); {passed} passed{left_out}"
    return f"{mixer}: all is well; {passed} checks passed{left_out}"


def layers_of(cell: Cell) -> list[Subject]:
    """The cell's mixer in every layer that is its own. ConfigError where its file cannot be imported."""
    try:
        cls = registry.load(cell.model_ref)
    except ConfigError:
        raise
    except Exception as error:  # importing a user's file runs it
        raise ConfigError(f"model={cell.model_ref}: cannot import it: {type(error).__name__}: {error}") from None
    config = cell.model_config
    if config.scan not in ("causal", "both"):
        raise ConfigError(f"scan={config.scan} needs images: check looks at scan=causal and scan=both")
    spec = mixer_spec(config, config.num_layers - 1, cell.backend, cell.settings, LONGEST)
    return [Subject(cls, replace(spec, layer=layer), SHAKE, cell.device) for layer in range(spec.first, config.num_layers)]


def _built(layers: Sequence[Subject], cell: Cell) -> Finding:
    """Whether the mixer can be constructed; illegal settings are the user's words, and ConfigError passes through."""
    try:
        for subject in layers:
            subject.build()
    except ConfigError:
        raise
    except Exception as error:
        return Finding("build", FAIL, _raised(error))
    own = ", ".join(f"{key} {written(value)}" for key, value in cell.settings.items())
    plain, conv = layers[0].is_plain, cell.model_config.conv
    kind = "a plain module, which is not given the short convolution" if plain else f"a Mixer, conv {conv}"
    return Finding("build", PASS, f"{cell.model} with d_model {cell.model_config.d_model}{f', {own}' if own else ''}: {kind}")


def _beside(cells: Sequence[Cell], value: Callable[[Cell], str]) -> str:
    """`hgrn2 1.2k, attention 3.4k`."""
    return ", ".join(f"{cell.model} {value(cell)}" for cell in cells)


def _parameters(cell: Cell, others: Sequence[Cell]) -> str:
    def size(each: Cell) -> float:
        layers = layers_of(each)
        return sum(p.numel() for subject in layers for p in subject.facts.parameters()) / len(layers)

    if not (mine := size(cell)):
        raise DoesNotApplyError("it has no parameters")
    return f"{count(mine)} in one layer's mixer ({_beside(others, lambda each: count(size(each)))})"


def _flops(cell: Cell, others: Sequence[Cell]) -> str:
    def cost(each: Cell) -> float | None:
        return engine.describe(each, engine.build(each)).train_flops_per_token

    if layers_of(cell)[0].is_plain or (mine := cost(cell)) is None:
        raise DoesNotApplyError("what it computes beside its matrices is not known")
    contract.require(0 < mine < float("inf"), f"op_flops gives {mine:g} training FLOPs per token")
    return f"{count(mine)} training FLOPs per token of the whole small model ({_beside(others, lambda each: count(cost(each)))})"


def _speed(cell: Cell, others: Sequence[Cell]) -> str:
    B, T = SPEED_SHAPE
    rate = dict(zip([c.key for c in (cell, *others)], speeds([layers_of(c) for c in (cell, *others)]), strict=True))
    mine = rate[cell.key]
    rest = ", ".join(f"{mine / rate[each.key]:.2g} times {each.model}'s {count(rate[each.key])}" for each in others)
    return f"{count(mine)} tokens/s forward and backward of one layer's mixer at B={B}, T={T} on {cell.device}: {rest}"


def speeds(models: Sequence[Sequence[Subject]]) -> list[float]:
    """Tokens per second through a layer of each model, forward and backward, mean over its layers.

    The median of rounds in which all models take turns, after one warm-up.
    """
    times: list[list[float]] = [[] for _ in models]
    work = [[(subject.build().train(), subject.inputs(*SPEED_SHAPE).requires_grad_(), subject) for subject in layers] for layers in models]
    for _ in range(ROUNDS + 1):
        for found, layers in zip(times, work, strict=True):
            device = layers[0][2].device
            started = _now(device)
            for mixer, x, subject in layers:
                loss_of(mixer(x, subject.context())).backward()
            found.append((_now(device) - started) / len(layers))
    return [SPEED_SHAPE[0] * SPEED_SHAPE[1] / statistics.median(found[1:]) for found in times]


def _now(device: str) -> float:
    """Seconds, when the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train(cells: Sequence[Cell]) -> list[Row]:
    """The test row of every cell, trained in worker processes; nothing is kept."""
    found: dict[str, Row] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalExecutor(min(len(cells), default_workers(cells[0].device))) as executor,
        Monitor({cell.key: 1.0 for cell in cells}, names(cells)) as monitor,
    ):
        for event in executor.run(cells, Path(folder)):
            monitor.hear(event)
            if event.kind == "done":
                found[event.cell.key] = next(row for row in event.content[0] if row.split == "test")
    return [found[cell.key] for cell in cells]


def _learning(cell: Cell, others: Sequence[Cell]) -> str:
    mine, *rest = train([cell, *others])
    if mine.value is None:
        raise BrokenPromiseError(f"{mine.status} after {mine.steps} steps of {mine.task}: {mine.reason}")
    beside = ", ".join(f"{row.model} {row.status if row.value is None else f'{row.value:.3f}'}" for row in rest)
    floors = ", ".join(f"{name} {value:.3f}" for name, value in floors_of(mine).items())
    told = f"{mine.metric} {mine.value:.3f} on {mine.task} after {mine.steps} steps (floors: {floors}; {beside})"
    if beats_floors(mine.value, mine):
        return f"{told}: it learned"
    if any(row.value is not None and beats_floors(row.value, row) for row in rest):
        raise BrokenPromiseError(f"{told}: not learned, in a budget in which others learn it")
    raise DoesNotApplyError(f"{told}: in this budget none of them learns it")
