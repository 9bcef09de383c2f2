"""Arguments that are refused in the same words everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def whole_number(value: Any, name: str, least: int = 1) -> int:
    """`value` as an int; ValueError unless it is a whole number from `least` up."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be a whole number from {least} up, not {value!r}")
    return int(value)


def positive(value: Any, name: str) -> float:
    """`value` as a float; ValueError unless it is a finite number above 0."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not (number and 0 < value < math.inf):
        raise ValueError(f"{name} must be a number above 0, not {value!r}")
    return float(value)


def require_columns(table: pd.DataFrame, names: Sequence[str]) -> None:
    """ValueError unless the table has these columns."""
    if missing := [name for name in names if name not in table]:
        raise ValueError(f"the table needs the columns {', '.join(names)}; it lacks {', '.join(missing)}")
