"""Measure schedules against each other and against MPI's own allreduce, on ranks of one machine or on slow links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from nurion_utils import timing
from nurion_utils._checks import whole_number
from nurion_utils.allreduce.algorithms import ALGORITHMS
from nurion_utils.allreduce.checking import check
from nurion_utils.allreduce.cost import Link, time
from nurion_utils.allreduce.schedule import Schedule

if TYPE_CHECKING:
    import pandas as pd

    from nurion_utils.ranks import World

BLOCK_S = 0.004  # short allreduces are repeated until a block of them can be timed
MOST_CALLS = 300
PATIENCE = 10  # on slow links, where a naive allreduce of the same size is the unit


def measure_allreduce(
    world: World, contenders: Mapping[str, Schedule | None], sizes_bytes: Sequence[int], repeats: int = 5
) -> pd.DataFrame:
    """Time allreduces of float32 arrays on all ranks, after the result of each contender has been checked.

    The contenders are schedules by name, which take turns; None stands for MPI's own Allreduce, in place as well.

    Returns one row per block: ``contender, ranks, size_bytes, repeat``, and ``time_s``, of one allreduce on the slowest
    rank. In a world on slow links (``ranks.start(n, rate_mbit=...)``), where a block is a single allreduce, also
    ``rate_mbit``; ``theory_s``, the schedule's time on these links were there no latency, and ``bytes_sent`` by all
    ranks together, as it says (both NaN for MPI's own); ``wire_bytes``, what the nodes' interfaces counted as sent,
    headers and acknowledgements included.

    ValueError, before anything runs, if a contender or a size is not possible; RankError if a rank raised or died, or a
    contender gave a wrong sum.
    """
    import pandas as pd

    _require(contenders, world.n, sizes_bytes, repeats)
    arguments = dict(contenders), list(sizes_bytes), repeats
    if (rate_mbit := world.rate_mbit) is None:
        return pd.DataFrame(world.run(_observe, *arguments, BLOCK_S)[0]).drop(columns="wire_bytes")
    link = Link(0.0, 8e-6 / rate_mbit)
    naive_s = 2 * world.n * sum(sizes_bytes) * link.beta_s_per_byte
    timeout_s = 60 + PATIENCE * len(contenders) * (repeats + 1) * naive_s
    table = pd.DataFrame(world.run(_observe, *arguments, 0.0, timeout_s=timeout_s)[0])
    table.insert(2, "rate_mbit", rate_mbit)
    pairs = [(contenders[row.contender], row.size_bytes) for row in table.itertuples()]
    table.insert(6, "theory_s", [time(s, size, link) if s else np.nan for s, size in pairs])
    sent = [sum(s.bytes_sent(rank, size, 4) for rank in range(world.n)) if s else np.nan for s, size in pairs]
    table.insert(7, "bytes_sent", sent)
    return table


def _require(contenders: Any, n_ranks: int, sizes_bytes: Any, repeats: Any) -> None:
    """Refuse what cannot be measured, before any rank is asked to."""
    if not isinstance(contenders, Mapping) or not contenders:
        raise ValueError('contenders are a dictionary such as {"ring": allreduce.ring(4), "native": None}')
    for name, schedule in contenders.items():
        if schedule is None:
            continue
        if not isinstance(schedule, Schedule):
            raise ValueError(f"contender {name!r} must be a schedule, or None for MPI's own, not {schedule!r}")
        if schedule.ranks != n_ranks:
            raise ValueError(f"contender {name!r} is for {schedule.ranks} ranks, and there are {n_ranks}")
        check(schedule)
    if isinstance(sizes_bytes, str) or not isinstance(sizes_bytes, Sequence) or not len(sizes_bytes):
        raise ValueError(f"sizes_bytes must be a list of lengths in bytes, not {sizes_bytes!r}")
    for each in sizes_bytes:
        if whole_number(each, "a size in bytes") % 4:
            raise ValueError(f"sizes must be multiples of 4 bytes, the length of a float32, not {each}")
    whole_number(repeats, "repeats")


def _observe(
    contenders: dict[str, Schedule | None], sizes_bytes: list[int], repeats: int, block_s: float
) -> list[dict[str, Any]]:
    """The part that every rank runs; the rows are the same on all of them."""
    from mpi4py import MPI

    from nurion_utils.allreduce.running import run

    comm, rows = MPI.COMM_WORLD, []
    timing.block(comm, int)  # opens the connections that every block needs
    for size_bytes in sizes_bytes:
        mine, total = timing.exact_arrays(size_bytes, comm.rank, comm.size)
        array, calls, n_calls = mine.copy(), {}, {}
        for name, schedule in contenders.items():
            native = partial(comm.Allreduce, MPI.IN_PLACE, array)
            calls[name] = call = native if schedule is None else partial(run, schedule, comm, array)
            array[:] = mine
            call()
            if wrong := np.count_nonzero(array != total):
                raise ArithmeticError(f"{name} gave a wrong sum in {wrong} of {array.size} elements")
            array[:] = 0
            n_calls[name] = timing.calls_in(comm, call, block_s, MOST_CALLS) if block_s else 1
        for repeat, name in timing.turns(list(contenders), repeats):
            comm.Barrier()  # or what a rank has yet to send from before would be counted
            before = _wire_bytes()
            time_s = timing.block(comm, calls[name], n_calls[name])
            wire_bytes = comm.allreduce(_wire_bytes() - before)
            key = {"contender": name, "ranks": comm.size, "size_bytes": size_bytes, "repeat": repeat}
            rows.append({**key, "time_s": time_s, "wire_bytes": wire_bytes})
    return rows


def _wire_bytes() -> int:
    """What this node's interface counts as sent; 0 where there is none."""
    import psutil

    interface = psutil.net_io_counters(pernic=True, nowrap=False).get("eth0")
    return interface.bytes_sent if interface else 0


def record_lab() -> pd.DataFrame:
    """What ``data/network_lab.csv`` holds, but for its source."""
    import pandas as pd

    from nurion_utils import ranks

    sizes = [2**10, 2**12, 2**14, 2**16, 2**18, 2**20, 4 * 10**6, 16 * 10**6]
    tables = []
    for n in (2, 4, 8):
        with ranks.start(n, rate_mbit=100) as world:
            contenders = {name: make(n) for name, make in ALGORITHMS.items()} | {"native": None}
            tables.append(measure_allreduce(world, contenders, sizes, repeats=3))
    return pd.concat(tables, ignore_index=True)
