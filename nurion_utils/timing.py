"""Timing on a machine that others use as well: blocks between barriers, contenders in turn, ratios of neighbours.

Seconds of two runs cannot be compared where the machine has changed in between. So contenders take turns in one run,
each turn gives a ratio, and what is reported is the median of the ratios with its spread.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nurion_utils._checks import require_columns

if TYPE_CHECKING:
    import pandas as pd
    from mpi4py import MPI

T = TypeVar("T")


def block(comm: MPI.Comm, call: Callable[[], Any], calls: int = 1) -> float:
    """Seconds per call of `calls` in a row, on the slowest rank, after all ranks of `comm` have met."""
    from mpi4py import MPI

    comm.Barrier()
    begin_s = time.perf_counter()
    for _ in range(calls):
        call()
    return comm.allreduce(time.perf_counter() - begin_s, op=MPI.MAX) / calls


def calls_in(comm: MPI.Comm, call: Callable[[], Any], block_s: float, most: int) -> int:
    """How many calls fill a block of `block_s` seconds: 1 to `most`, the same on all ranks."""
    return int(np.clip(block_s / block(comm, call), 1, most))


def turns(names: Sequence[T], repeats: int) -> Iterator[tuple[int, T]]:
    """Repeat and name of who is next: each once in every repeat, another one first each time."""
    for repeat in range(repeats):
        for turn in range(len(names)):
            yield repeat, names[(turn + repeat) % len(names)]


@functools.lru_cache(maxsize=1)
def exact_arrays(size_bytes: int, rank: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """A float32 array for `rank` and the sum over all `ranks`: whole numbers, whose sum is exact in whatever order."""
    total = np.zeros(size_bytes // 4, np.float32)
    for each in range(ranks):
        array = np.random.default_rng([size_bytes, each]).integers(0, 100, total.size, np.uint8).astype(np.float32)
        total += array
        if each == rank:
            mine = array
    mine.flags.writeable = total.flags.writeable = False  # they are handed out again
    return mine, total


def ratios(table: pd.DataFrame, of: str, contender: str, by: Sequence[str] = (), value: str = "time_s") -> pd.DataFrame:
    """How many times as fast as `of` each other contender is, turn by turn.

    `table` has one row per measurement: the column `contender` with its name, ``repeat`` with the number of the turn,
    `value` with the time, and the columns `by`, such as a size, in which compared rows agree.

    Returns one row per other contender and `by`: ``speedup`` (median over turns), ``low, high`` (quartiles), ``least,
    most``, ``turns``. ValueError if a column is missing, `of` was not measured, or a turn has several times of one
    contender.
    """
    keys = [*by, "repeat"]
    require_columns(table, [contender, *keys, value])
    measured = table.dropna(subset=value)
    if of not in set(measured[contender]):
        raise ValueError(f"the table has no time of {of!r}, only of {', '.join(sorted(set(measured[contender])))}")
    if measured.duplicated([contender, *keys]).any():
        raise ValueError("the table has several times of the same turn; choose the rows of one measurement")
    base = measured.loc[measured[contender] == of, [*keys, value]].rename(columns={value: "base"})
    pairs = measured[measured[contender] != of].merge(base, on=keys)
    found = pairs.assign(speedup=pairs["base"] / pairs[value]).groupby([contender, *by])["speedup"].describe()
    columns = {"50%": "speedup", "25%": "low", "75%": "high", "min": "least", "max": "most", "count": "turns"}
    return found[[*columns]].rename(columns=columns).astype({"turns": int}).reset_index()


class OtherLoad:
    """How many cores other programs take: those that are neither this process nor started by it."""

    def __init__(self) -> None:
        self._begin_s, self._taken_s = time.perf_counter(), _others_s()

    def cores(self) -> float:
        """Cores taken by others since this was made, on average; other guests of the same host count too."""
        return max(0.0, (_others_s() - self._taken_s) / (time.perf_counter() - self._begin_s))


def _others_s() -> float:
    """CPU time of the machine less that of this process and all below it, in seconds."""
    import psutil

    machine = psutil.cpu_times()
    busy = machine.user + machine.nice + machine.system + machine.irq + machine.softirq + machine.steal
    own = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            own += sum(process.cpu_times()[:4])  # user and system, its own and of its ended children
        except psutil.NoSuchProcess:
            continue  # its parent has its time now
    return busy - own


@dataclass(frozen=True)
class Comparison:
    """The times of two contenders that took turns, as ratios of neighbours."""

    ratios: tuple[float, ...]  # time of the second over that of the first, per pair: above 1 where the first was faster
    others_cores: float  # cores that other programs took meanwhile

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the median of all possible pairs lies, at least 19 times in 20, whatever the noise looks like."""
        ordered, n = sorted(self.ratios), len(self.ratios)
        outside, k = 0.0, 0
        while (outside := outside + math.comb(n, k) / 2**n) <= 0.025:  # the sign test, turned round
            k += 1
        return (ordered[k - 1], ordered[n - k]) if k else (0.0, math.inf)

    @property
    def clear(self) -> bool:
        """Whether the noise leaves no doubt which of the two is faster."""
        low, high = self.interval
        return not low <= 1 <= high

    def __str__(self) -> str:
        low, high = self.interval
        found = f"{self.median:.2f} x (median of {len(self.ratios)} pairs, between {low:.2f} and {high:.2f})"
        if self.clear:
            return found
        return f"too noisy to tell: {found}, and other programs took {self.others_cores:.1f} cores meanwhile"
