"""What rows say of their match (see `hgrn2_bench.matching`): the target, how far it was missed, and when no table may be made of them."""

from collections.abc import Sequence

from hgrn2_bench.results import Row

MATCH_KEYS = ("match", "match_target", "match_len", "match_tolerance")
"""Settings of a whole table; rows written before these existed were not matched."""
WIDTHS = ("d_model", "channel_width")
"""Settings that `match=params` solves for each model."""


def match_of(row: Row) -> tuple[str, int, int]:
    """In what a row's models were made equal (`none`, `params`, `state`), to what target, and after how many tokens."""
    return row.settings.get("match", "none"), row.settings.get("match_target", 0), row.settings.get("match_len", 0)


def matched(row: Row) -> str:
    """The match in words; empty for a row without one."""
    kind, target, length = match_of(row)
    words = {
        "params": f"matched to {target} non-embedding parameters",
        "state": f"matched to {target} bytes of state after {length} tokens",
    }
    return words.get(kind, "")


def sized_by(row: Row) -> tuple[str, ...]:
    """Shared settings in which models may differ because their match sized them."""
    return WIDTHS if match_of(row)[0] == "params" else ()


def miss(row: Row) -> float | None:
    """By what share of the target a row's model misses it; None where the model could not be built."""
    share: float | None = row.effective.get("match_residual")
    return share


def percent(share: float | None) -> str:
    """`+1.25%`; a dash for none."""
    return "–" if share is None else f"{share:+.2%}"


def note(rows: Sequence[Row]) -> str:
    """The match of a table's rows, the largest miss among them, what their runs tolerate, and by which settings the models were sized."""
    worst = _worst(rows)
    tolerated = " or ".join(sorted({f"{row.settings['match_tolerance']:g}" for row in rows}))
    by = sorted({f"{row.model} {row.effective['match_by']}" for row in rows if row.effective.get("match_by")})
    told = f"{matched(worst)}: largest miss {percent(miss(worst))} ({worst.model}), match_tolerance {tolerated}"
    return f"{told}; {'; '.join(by)}" if by else told


def refusal(rows: Sequence[Row]) -> str:
    """Why rows make no table: one misses its target by more than its own run tolerates. Empty where none does."""
    missed = [row for row in rows if matched(row) and abs(miss(row) or 0) > row.settings["match_tolerance"]]
    if not missed:
        return ""
    worst = _worst(missed)
    return (
        f"refused: {worst.model} has {worst.effective['match_reached']} for a target of {match_of(worst)[1]}, a miss of "
        f"{percent(miss(worst))}, beyond match_tolerance={worst.settings['match_tolerance']:g}; the rows are kept"
    )


def _worst(rows: Sequence[Row]) -> Row:
    return max(rows, key=lambda row: abs(miss(row) or 0))
