"""What a call on all ranks costs by itself, and what looking after it adds to one through ipyparallel."""

import time
from collections.abc import Callable

import pandas as pd
from blocks import alternate

from nurion_utils import ranks


def measure(n_ranks: int, pairs: int = 9, block_s: float = 1.0) -> pd.DataFrame:
    """Time a call that does nothing, on the same engines; see `blocks.alternate` for the table."""
    with ranks.start(n_ranks) as world:
        view = world.client[:]

        def contender(call: Callable[[Callable], object]) -> Callable[[], float]:
            count = max(1, round(block_s / _per_call(call, 3)))
            return lambda: _per_call(call, count)

        return alternate({"run": contender(world.run), "apply_sync": contender(view.apply_sync)}, pairs)


def _per_call(call: Callable[[Callable], object], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call(nothing)
    return (time.perf_counter() - begin) / count


def nothing() -> None:
    """What is called: by value, as a function of a notebook's cell."""


nothing.__module__ = "__main__"
