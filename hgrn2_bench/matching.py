"""Fair matching: the models of a run made equal in parameters or in state. The second step of a plan; imports torch only to count.

    match=params    non-embedding parameters of the whole model (embeddings and head depend on width and vocabulary alone)
    match=state     bytes that decoding holds for one sequence after `match_len` tokens, in the types held, over all layers

The target is the size of the run's first model, at the same point of every shared sweep, or the number `match_target`. Each other model
gets the value of one setting with which it comes nearest:

    params    `channel_width`, where blocks have a channel mixer; where they have none, or no width comes within the tolerance, `d_model`
    state     the setting that the mixer declares as its `state_setting`

`d_model` is the one width that every mixer has: its streams, heads and gates all grow with it in their published proportions, while a
setting such as `expand` would change those proportions. It also widens the embeddings, which are not counted.

Whole numbers are tried (a ratio such as `expand_k` in steps of 1 / d_model), and only those that model and mixer accept: the nearest wins,
of two equally near the smaller. A value that the user gives is kept. Whatever misses the target by more than `match_tolerance` is refused.
"""

import dataclasses
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from hgrn2_bench import registry
from hgrn2_bench.config import MAX_WIDTH, written
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.plan import Cell, Plan, swept

if TYPE_CHECKING:
    from hgrn2_bench.model import Backbone

SHORTEST_GAP = 1024
"""The search gives up after so many illegal numbers in a row, or twice the width: what divides a width has no longer gaps."""


@dataclass(frozen=True)
class Solution:
    """What a worker finds for a cell: values by the names that a user types, and the size reached, None where the code has a fault."""

    values: Mapping[str, Any] = field(default_factory=dict)
    reached: int | None = None
    match_len: int = 0
    fault: str = ""


Solver = Callable[[Sequence[tuple[Cell, tuple[str, ...]]]], Mapping[str, Solution]]
"""Cells, each with the settings that may change, to a solution for each cell's key."""


@dataclass(frozen=True)
class Match:
    """One matched cell, and how it was matched."""

    cell: Cell
    """With its values resolved."""
    how: str
    reached: int | None

    @property
    def residual(self) -> float | None:
        """By how much the target is missed, relative to it."""
        return None if self.reached is None else residual(self.reached, self.cell.matching.match_target)

    @property
    def missed(self) -> bool:
        """Whether it is missed by more than the tolerance."""
        return self.residual is not None and abs(self.residual) > self.cell.matching.match_tolerance


def residual(reached: int, target: int) -> float:
    """(reached - target) / target."""
    return (reached - target) / target


def settings_of(cell: Cell) -> tuple[str, ...]:
    """The settings that matching may change, in the order tried, under the names a user types."""
    if cell.matching.match == "params":
        wide = cell.model_config.channel_mixer in ("mlp", "glu")
        return ("channel_width", "d_model") if wide else ("d_model",)
    own = registry.model(cell.model_ref).facts.get("state_setting", "")
    return (f"{cell.model}.{own}",) if own else ()


# Planning, torch-free


def resolve(plan: Plan, solve: Solver) -> tuple[Plan, list[Match]]:
    """The plan with every matched cell resolved, cells that become equal merged, and how each was matched.

    ConfigError where a target cannot be told, or where a solution is illegal.
    """
    asked = [cell for cell in plan.cells if cell.matching.match != "none"]
    if not asked:
        return plan, []
    targets = _targets(plan, asked, solve)
    aimed = [cell.changed({"match_target": targets[cell.key]}) for cell in asked]
    solutions = _solve_alike([(cell, _free(cell, plan.given)) for cell in aimed], solve)
    matches = {cell.key: _match(aim, solutions[aim.key], plan.given) for cell, aim in zip(asked, aimed, strict=True)}
    resolved = [matches[cell.key].cell if cell.key in matches else cell for cell in plan.cells]
    return dataclasses.replace(plan, cells=tuple({cell.key: cell for cell in resolved}.values())), list(matches.values())


def _free(cell: Cell, given: frozenset[str]) -> tuple[str, ...]:
    """Those settings that the user gave no value for."""
    return tuple(name for name in settings_of(cell) if not given & {name, f"{cell.model}.{name}"})


def _targets(plan: Plan, asked: Sequence[Cell], solve: Solver) -> dict[str, int]:
    """The target of each cell: its own number, or the size of the first model's cells that agree with it on all that both sweep."""
    points = swept(plan.cells)
    open_cells = [cell for cell in asked if not cell.matching.match_target]
    firsts = [cell for cell in open_cells if cell.model == plan.cells[0].model]
    found = _solve_alike([(cell, ()) for cell in firsts], solve)
    targets = {cell.key: cell.matching.match_target for cell in asked}
    for cell in open_cells:
        mine, place = points[cell.key], (cell.task, cell.dtype)
        agreeing = [f for f in firsts if (f.task, f.dtype) == place and all(mine.get(k, v) == v for k, v in points[f.key].items())]
        if fault := next((found[f.key].fault for f in agreeing if found[f.key].fault), ""):
            raise ConfigError(f"{plan.cells[0].model} cannot be built, so nothing can be matched to it: {fault}")
        sizes = {found[f.key].reached or 0 for f in agreeing}
        if len(sizes) != 1:
            several = " and ".join(map(str, sorted(sizes))) or "none"
            raise ConfigError(
                f"match={cell.matching.match} needs one size of the first model, {plan.cells[0].model}, for each cell of {cell.model}, "
                f"but {cell.task} has {several}: give match_target, or sweep the same values for both"
            )
        targets[cell.key] = sizes.pop()
    if 0 in targets.values():
        raise ConfigError(f"{plan.cells[0].model} has size 0, so nothing can be matched to it: give match_target")
    return targets


def _solve_alike(asked: Sequence[tuple[Cell, tuple[str, ...]]], solve: Solver) -> dict[str, Solution]:
    """Solutions by key, found once for cells that build the same model."""
    groups: dict[str, list[tuple[Cell, tuple[str, ...]]]] = {}
    for cell, free in asked:
        content = {k: v for k, v in cell.to_json().items() if k not in ("seed", "train", "command")}
        groups.setdefault(json.dumps(content, sort_keys=True), []).append((cell, free))
    found = solve([group[0] for group in groups.values()])
    return {cell.key: found[group[0][0].key] for group in groups.values() for cell, _ in group}


def _match(cell: Cell, solution: Solution, given: frozenset[str]) -> Match:
    """The resolved cell; its command gives every value that matching may change, so that running it leaves nothing to solve."""
    aim = {"match_target": cell.matching.match_target} | ({"match_len": solution.match_len} if cell.matching.match == "state" else {})
    solved = cell.changed({**aim, **solution.values})
    fields = solved.fields()
    kept = {name: fields[name] for name in settings_of(cell)}
    solved = dataclasses.replace(solved, command=rewritten(cell.command, {**aim, **kept}))
    what = "parameters" if cell.matching.match == "params" else "state"
    if solution.fault:
        how = f"cannot be built: {solution.fault}"
    elif solution.values:
        how = ", ".join(f"{name}={value:g}" for name, value in solution.values.items())
    elif not kept:
        how = f"no setting of {cell.model} changes its {what}"
    elif not _free(cell, given):
        how = ", ".join(f"{name}={value}" for name, value in kept.items()) + " as given"
    else:
        how = "as it is"
    return Match(solved, how, solution.reached)


def refusal(matches: Sequence[Match]) -> str:
    """One line about the cell that misses its target most, where that is more than its tolerance; empty where none does."""
    missed = sorted((m for m in matches if m.missed), key=lambda m: -abs(m.residual or 0))
    if not missed:
        return ""
    worst, aim, first = missed[0], missed[0].cell.matching, matches[0].cell.model
    what = "non-embedding parameters" if aim.match == "params" else "bytes of state"
    others = sorted({m.cell.model for m in missed} - {worst.cell.model})
    return (
        f"{worst.cell.model} ({worst.how}) has {worst.reached} {what}, {worst.residual:+.1%} of the target {aim.match_target} in "
        f"{worst.cell.task}, beyond match_tolerance={aim.match_tolerance:g}"
        + (f"; {', '.join(others)} too" if others else "")
        + f": leave such models out, or what was given for them ({first}.key=value holds for {first} only), "
        "or state a larger match_tolerance"
    )


def announce(matches: Sequence[Match], file: TextIO) -> None:
    """Print target, reached size and residual of every model. ConfigError where one misses its target, so that nothing trains in vain."""
    if matches:
        print(f"{report(matches)}\n", file=file, flush=True)
    if refused := refusal(matches):
        raise ConfigError(refused)


def report(matches: Sequence[Match]) -> str:
    """Target, reached size and residual of every model, as a table."""
    from tabulate import tabulate

    lines: dict[tuple[str, ...], None] = {}
    for match in matches:
        setup, gap = match.cell.matching, match.residual
        what = "non-embedding parameters" if setup.match == "params" else f"bytes of state after {setup.match_len} tokens"
        sizes = (str(setup.match_target), str(match.reached or "–"), "–" if gap is None else f"{gap:+.2%}")
        lines[match.cell.task, match.cell.model, what, match.how, *sizes] = None
    names = ["task", "model", "match", "by", "target", "reached", "residual"]
    return tabulate(list(lines), names, tablefmt="github", disable_numparse=True)


# Counting and solving, in a worker


def size(cell: Cell, model: "Backbone") -> int:
    """What the cell's match counts, of a built model."""
    from hgrn2_bench import engine, measure

    if cell.matching.match == "params":
        return measure.parameters(model)[1]
    size = measure.state_bytes(model, cell.matching.match_len, engine.itemsize(cell))
    if size is None:
        raise ConfigError(f"match=state has nothing to match: scan={cell.model_config.scan} has no decoding, and so no state")
    return size


def facts(cell: Cell, model: "Backbone") -> dict[str, Any]:
    """What sizes a built model, the size reached and the residual, for its rows; nothing for a cell without a match."""
    if cell.matching.match == "none":
        return {}
    if not cell.matching.match_target:
        raise ConfigError(f"match={cell.matching.match} has no target yet: hgrn2_bench.matching.resolve gives a plan its targets")
    reached = size(cell, model)
    fields = cell.fields()
    by = ", ".join(f"{name}={'null' if fields[name] is None else fields[name]}" for name in settings_of(cell))
    return {"match_by": by, "match_reached": reached, "match_residual": round(residual(reached, cell.matching.match_target), 6)}


def solve(cell: Cell, free: Sequence[str]) -> Solution:
    """The values of `free` settings that bring a cell nearest to its target, none where it has no target yet or is on it.

    ConfigError where the cell is illegal as it is and no value makes it legal.
    """
    from hgrn2_bench import engine

    if cell.matching.match == "state" and not cell.matching.match_len:
        cell = cell.changed({"match_len": engine.runner_class(cell).shape(cell).seq_len})
    target, tolerance = cell.matching.match_target, cell.matching.match_tolerance
    names = free if target else ()
    try:
        best = Solution({}, _size(cell))
    except ConfigError:
        if not names:
            raise
        best = Solution()

    def miss(solution: Solution) -> float:
        return math.inf if solution.reached is None else abs(residual(solution.reached, target))

    for name in names:
        if miss(best) <= (tolerance if best.values else 0):
            break
        found = _solve_one(cell, name)
        if found.reached != best.reached and miss(found) <= miss(best):
            best = found
    if best.reached is None:
        _size(cell)  # says what is wrong
    return dataclasses.replace(best, match_len=cell.matching.match_len)


def _solve_one(cell: Cell, name: str) -> Solution:
    """The nearest value of one setting; without a size where no value is legal."""
    width = cell.model_config.d_model

    def value(n: int) -> float | int:
        return n / width if _is_ratio(cell, name) else n

    def size_with(n: int) -> int | None:
        try:
            return _size(cell.changed({name: value(n)}))
        except (ValueError, AssertionError, RuntimeError):  # ConfigError, and what plain modules refuse a width with
            return None

    found = nearest(size_with, cell.matching.match_target, max(SHORTEST_GAP, 2 * width))
    return Solution() if found is None else Solution({name: value(found[0])}, found[1])


def _is_ratio(cell: Cell, name: str) -> bool:
    """Whether a setting is a ratio to the width rather than a whole number."""
    if "." not in name:
        return False
    kinds = {f.name: f.type for f in dataclasses.fields(registry.model(cell.model_ref).settings)}
    return kinds[name.removeprefix(f"{cell.model}.")] in (float, float | None)


def _size(cell: Cell) -> int:
    """What the match counts, of a model that is built without numbers where its code allows that."""
    import torch

    from hgrn2_bench import engine

    cell = cell.changed({"init": "mixer"})  # sizes do not depend on initial values, and drawing them takes most of the time
    try:
        with torch.device("meta"):
            model = engine.build(cell)
    except RuntimeError:  # a module that reads its own weights while it is built
        model = engine.build(cell)
    return size(cell, model)


def nearest(size_of: Callable[[int], int | None], target: int, gap: int) -> tuple[int, int] | None:
    """The number from 1 to MAX_WIDTH whose size is nearest to `target`, and that size; None where no number is legal.

    `size_of` is None for illegal numbers; the sizes of legal ones are taken to grow or to shrink steadily. Of two equally near numbers
    the smaller is taken. After `gap` illegal numbers in a row no more are taken to be legal.
    """
    search = _Search(size_of, gap)
    low = search.first(1, MAX_WIDTH)
    high = None if low is None else search.first(low + 1, MAX_WIDTH)
    if low is not None and high is not None:
        sign = 1 if search.sizes[high] >= search.sizes[low] else -1

        def passed(n: int) -> bool:
            return sign * (search.sizes[n] - target) >= 0

        while high in search.sizes and not passed(high):  # double until the target is passed, or no number is legal
            low, high = high, search.first(2 * high, MAX_WIDTH) or min(2 * high, MAX_WIDTH)
        while high - low > 1:  # what is legal from `high` on has passed
            middle = (low + high) // 2
            found = search.first(middle, high)
            low, high = (low, middle) if found is None or passed(found) else (found, high)
    near = min(((abs(reached - target), n) for n, reached in search.sizes.items()), default=None)
    return None if near is None else (near[1], search.sizes[near[1]])


class _Search:
    """Numbers tried, each once."""

    def __init__(self, size_of: Callable[[int], int | None], gap: int) -> None:
        self.size_of, self.gap = size_of, gap
        self.sizes: dict[int, int] = {}
        """Of the legal numbers."""
        self.illegal: set[int] = set()

    def first(self, start: int, stop: int) -> int | None:
        """The first legal number in start .. stop - 1; None where `gap` numbers have none."""
        for n in range(start, min(stop, start + self.gap)):
            if n not in self.sizes and n not in self.illegal:
                reached = self.size_of(n)
                if reached is None:
                    self.illegal.add(n)
                else:
                    self.sizes[n] = reached
            if n in self.sizes:
                return n
        return None


def rewritten(command: str, values: Mapping[str, Any]) -> str:
    """A cell's command with these words, each in place of a word of the same name."""
    *words, option, device = shlex.split(command)
    kept = [word for word in words if word.partition("=")[0] not in values]
    return shlex.join([*kept, *(f"{name}={written(value)}" for name, value in values.items()), option, device])
