"""Measure schedules against each other and against MPI's own allreduce, fit their costs, predict other sizes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nurion_utils._checks import require_columns, whole_number
from nurion_utils.allreduce.schedule import Link, Schedule, size

if TYPE_CHECKING:
    import pandas as pd
    from mpi4py import MPI

    from nurion_utils.ranks import World

BLOCK_S = 0.004  # short allreduces are repeated until a block of them can be timed
MOST_CALLS = 300


def measure(
    world: World, contenders: Mapping[str, Schedule | None], sizes_bytes: Sequence[int], repeats: int = 5
) -> pd.DataFrame:
    """Time allreduces of float32 arrays on the ranks of `world`, the contenders in turn.

    Parameters
    ----------
    contenders
        Schedules by name; None stands for MPI's own Allreduce, in place as well.
    sizes_bytes
        Lengths of the array in bytes, multiples of 4.

    Returns
    -------
    pandas.DataFrame
        One row per block: contender, ranks, size_bytes, repeat, time_s (of one allreduce on the slowest rank).
    """
    import pandas as pd

    require(contenders, world.n, sizes_bytes, repeats)

    def on_rank(*arguments: Any) -> list[dict]:
        from mpi4py import MPI

        return observe(MPI.COMM_WORLD, *arguments)

    return pd.DataFrame(world.run(on_rank, dict(contenders), list(sizes_bytes), repeats)[0])


def require(contenders: Any, n_ranks: int, sizes_bytes: Any, repeats: Any) -> None:
    """Refuse what cannot be measured, before any rank is asked to."""
    if not isinstance(contenders, Mapping) or not contenders:
        raise ValueError('contenders are a dictionary such as {"ring": allreduce.ring(4), "native": None}')
    for name, schedule in contenders.items():
        if not isinstance(schedule, Schedule | None):
            raise ValueError(f"contender {name!r} must be a schedule, or None for MPI's own, not {schedule!r}")
        if schedule is not None and schedule.ranks != n_ranks:
            raise ValueError(f"contender {name!r} is for {schedule.ranks} ranks, and there are {n_ranks}")
        if schedule is not None:
            schedule.check()
    if isinstance(sizes_bytes, str) or not isinstance(sizes_bytes, Sequence) or not len(sizes_bytes):
        raise ValueError(f"sizes_bytes must be a list of lengths in bytes, not {sizes_bytes!r}")
    for each in sizes_bytes:
        if whole_number(each, "a size in bytes") % 4:
            raise ValueError(f"sizes must be multiples of 4 bytes, the length of a float32, not {each}")
    whole_number(repeats, "repeats")


def observe(
    comm: MPI.Comm, contenders: Mapping[str, Schedule | None], sizes_bytes: Sequence[int], repeats: int
) -> list[dict]:
    """The part of `measure` that every rank of `comm` runs; the rows are the same on all of them."""
    from mpi4py import MPI

    rows = []
    for size_bytes in sizes_bytes:
        numbers = [np.arange(size_bytes // 4) % 7 + rank for rank in (0, comm.rank)]
        expected = (comm.size * numbers[0] + sum(range(comm.size))).astype(np.float32)
        array, calls = np.empty(size_bytes // 4, np.float32), {}

        def block(schedule: Schedule | None, calls: int, array: np.ndarray = array) -> float:
            comm.Barrier()
            begin_s = time.perf_counter()
            for _ in range(calls):
                if schedule is None:
                    comm.Allreduce(MPI.IN_PLACE, array)
                else:
                    schedule.run(comm, array)
            return comm.allreduce(time.perf_counter() - begin_s, op=MPI.MAX) / calls

        for name, schedule in contenders.items():
            array[:] = numbers[1]
            block(schedule, 1)
            if not np.array_equal(array, expected):  # small integers: exact in float32, in whatever order
                raise RuntimeError(f"{name} on {comm.size} ranks gives a wrong sum of {size_bytes} bytes")
            array[:] = 0
            calls[name] = int(np.clip(BLOCK_S / block(schedule, 1), 1, MOST_CALLS))
        for repeat in range(repeats):
            for name, schedule in contenders.items():
                time_s = block(schedule, calls[name])
                key = {"contender": name, "ranks": comm.size, "size_bytes": size_bytes}
                rows.append({**key, "repeat": repeat, "time_s": time_s})
    return rows


def fit(table: pd.DataFrame, contenders: Mapping[str, Schedule | None]) -> dict[str, Link]:
    """Each contender's alpha and beta from measured times, by least squares of the relative errors.

    A time is taken to be ``steps * alpha + size * volume * beta``, with the steps and the volume (the part of the
    array that is under way, summed over the steps) of the contender's schedule.  What reducing costs is in beta.
    MPI's own allreduce, None, counts as one step and one volume.
    """
    from scipy.optimize import nnls

    require_columns(table, ["contender", "size_bytes", "time_s"])
    links = {}
    for name, schedule in contenders.items():
        rows = table[table["contender"] == name]
        if "ranks" in table and schedule is not None:
            rows = rows[rows["ranks"] == schedule.ranks]
        elif "ranks" in table and rows["ranks"].nunique() > 1:
            raise ValueError(f"the rows of {name!r} are of several numbers of ranks; choose those of one")
        times = rows.groupby("size_bytes")["time_s"].median()
        if len(times) < 2:
            raise ValueError(f"a fit needs two sizes or more, and the table has {len(times)} of contender {name!r}")
        if schedule is not None and not schedule.steps or not (times > 0).all():
            raise ValueError(f"a fit needs steps and times above 0, which contender {name!r} has not")
        terms = np.array([[1.0, n] for n in times.index]) * _terms(schedule)
        scale = terms.max(axis=0)  # or the two columns differ by so much that nnls gives one up
        solution, _ = nnls(terms / scale / times.to_numpy()[:, None], np.ones(len(times)))
        links[name] = Link(*map(float, solution / scale))
    return links


def predict(link: Link, schedule: Schedule | None, size_bytes: float) -> float:
    """Seconds, by the model that `fit` fits."""
    steps, volume = _terms(schedule)
    return steps * link.alpha_s + size(size_bytes) * volume * link.beta_s_per_byte


def _terms(schedule: Schedule | None) -> tuple[float, float]:
    return (1.0, 1.0) if schedule is None else (schedule.time(0, Link(1, 0)), schedule.time(1, Link(0, 1)))
