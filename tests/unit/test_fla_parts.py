"""Batches beyond a kernel launch's grid: run in parts, with the results of the whole."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from fla_cases import Case, decay_case, delta_case, low_rank_case, results, slot_case
from torch import Tensor

from hgrn2_bench.ops import families, fla, reference
from hgrn2_bench.ops.families import OpInputs, State

CASES: dict[str, Callable[..., Case]] = {
    "per_channel_decay": partial(decay_case, B=5),
    "scalar_decay": partial(decay_case, scalar=True, B=5),
    "delta_rule": partial(delta_case, B=5),
    "delta_rule without decay": partial(delta_case, decays=False, B=5),
    "diagonal_low_rank": partial(low_rank_case, B=5),
    "gated_slots": partial(slot_case, B=5),
}


def recorded(monkeypatch: pytest.MonkeyPatch, family: str) -> list[int]:
    """Batch sizes that the reference, in the place of the family's kernel, is given."""
    sizes: list[int] = []

    def kernel(inputs: OpInputs, state: State | None) -> tuple[Tensor, State]:
        sizes.append(len(inputs.v_BTHV))  # type: ignore[attr-defined]
        return getattr(reference, family)(inputs, state)

    monkeypatch.setattr(fla, family, fla.in_parts(kernel))
    return sizes


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_parts_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch, case: str, start: bool) -> None:
    inputs, state = CASES[case](9, 8, start=start)
    sizes = recorded(monkeypatch, inputs.family)
    monkeypatch.setattr(fla, "MAX_GRID", 5)  # two heads: two sequences at once
    found = results(inputs, state, "fla")
    assert sizes == [2, 2, 1]
    for name, tensor in results(inputs, state, "reference").items():
        torch.testing.assert_close(found[name], tensor, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_within_the_grid_is_run_whole(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    inputs, state = CASES[case](9, 8)
    sizes = recorded(monkeypatch, inputs.family)
    monkeypatch.setattr(fla, "MAX_GRID", 10)
    results(inputs, state, "fla")
    assert sizes == [5]


@pytest.mark.parametrize(("T", "K"), [(1, 8), (9, 2)])
def test_tokens_and_scanned_heads_are_run_whole(monkeypatch: pytest.MonkeyPatch, T: int, K: int) -> None:
    inputs, state = decay_case(T, K, B=5)
    sizes = recorded(monkeypatch, inputs.family)
    monkeypatch.setattr(fla, "MAX_GRID", 5)
    with torch.no_grad():
        families.run(inputs, "fla", state)
    assert sizes == [5]


def test_every_recurrence_over_heads_is_run_in_parts() -> None:
    guarded = {name for name in families_of_fla() if hasattr(getattr(fla, name), "__wrapped__")}
    assert guarded == families_of_fla() - {"diagonal_scan", "softmax"}


def families_of_fla() -> set[str]:
    records = [each for each in vars(families).values() if isinstance(each, type) and hasattr(each, "family")]
    return {each.family for each in records if hasattr(fla, each.family)}
