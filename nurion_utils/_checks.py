"""Arguments that are refused in the same words everywhere."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Hashable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


def whole_number(
    value: Any, name: str, least: int = 1, most: int | None = None, error: type[Exception] = ValueError
) -> int:
    """`value` as an int; `error` unless it is a whole number from `least` up, and to `most` if that is given."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        limits = f"from {least:,} up" if most is None else f"from {least:,} to {most:,}"
        raise error(f"{name} must be a whole number {limits}, not {value!r}")
    return int(value)


def number(
    value: Any,
    name: str,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    error: type[Exception] = ValueError,
) -> float:
    """`value` as a float; `error` unless it is finite, more than `above`, at least `least` and at most `most`."""
    limits = {"above": above, "from": least, "up to": most}
    try:
        valid = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        valid = False
    valid = valid and (above is None or value > above) and (least is None or value >= least)
    if not valid or (most is not None and value > most):
        words = " ".join(f"{word} {limit:,}" for word, limit in limits.items() if limit is not None)
        raise error(f"{name} must be a {'' if words else 'finite '}number {words}".rstrip() + f", not {value!r}")
    return float(value)


def positive(value: Any, name: str, error: type[Exception] = ValueError) -> float:
    """`value` as a float; `error` unless it is a finite number above 0."""
    return number(value, name, above=0, error=error)


def one_of(value: Any, name: str, allowed: Collection[Any], error: type[Exception] = ValueError) -> Any:
    """`value`; `error` unless it is one of `allowed`."""
    if not isinstance(value, Hashable) or value not in list(allowed):
        raise error(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
    return value


def require_columns(table: pd.DataFrame, names: Sequence[str]) -> None:
    """ValueError unless the table has these columns."""
    if missing := [name for name in names if name not in table]:
        raise ValueError(f"the table needs the columns {', '.join(names)}; it lacks {', '.join(missing)}")
