"""Horovod's allreduce over several backends, measured side by side.

>>> from nurion_utils import allreduce
>>> table = backends.compare_backends([2**22, 2**26], ranks=2)
>>> allreduce.comparing.ratios(table)
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from nurion_utils import ranks, recordings
from nurion_utils._checks import positive, require_columns, whole_number
from nurion_utils.backends.horovod import Backend, BackendError, init, named, shutdown
from nurion_utils.ranks import RankError, World
from nurion_utils.ranks.launchers.lab import Lab
from nurion_utils.ranks.launchers.lab import start as start_lab

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

BLOCK_S = 0.03  # short allreduces are repeated until a block of them can be timed
MOST_CALLS = 50
TIMEOUT_S = 300.0
# the first line of a RankError when ranks died, now or before
DIED = re.compile(r"(^|because )(rank \d+|the controller) (was ended by|left its process|died)")


def compare_backends(
    sizes_bytes: Sequence[int],
    ranks: int = 2,
    backends: Sequence[str] | Mapping[str, Backend] = ("MPI", "Gloo", "oneCCL ring"),
    repeats: int = 7,
    *,
    cycles_ms: Sequence[float] = (1.0,),
    env: Mapping[str, str] | None = None,
    rate_mbit: float | None = None,
) -> pd.DataFrame:
    """Time Horovod's allreduce of one float32 tensor over several backends, which take turns.

    The ranks are started here and ended here; backends that cannot take turns in one process have ranks of their own.
    While one is measured, Horovod is shut down on the others. Each backend first reduces with Horovod's timeline on,
    which says what really carried the tensor; the sums are compared with the exact ones.

    Parameters
    ----------
    sizes_bytes
        Lengths of the tensor, multiples of 4.
    ranks
        Ranks per backend.
    backends
        Names in `BACKENDS`, or backends of your own by name.
    repeats
        Turns that each backend gets.
    cycles_ms
        Values of Horovod's cycle time; each backend is measured with every one in each turn.
    env
        Further environment variables for the ranks, such as `KEEP_MEMORY`; not with `rate_mbit`.
    rate_mbit
        If given, the ranks sit in a network lab (`nurion_utils.allreduce.lab`) with links of that rate, in Mbit/s.

    Returns
    -------
    pandas.DataFrame
        One row per observation: ``backend, ranks, cycle_ms, size_bytes, repeat``; ``time_s``, of the slowest rank;
        ``bus_bandwidth_gb_per_s``, ``2 (P-1)/P * size / time`` as NVIDIA's nccl-tests define it, which a perfect ring
        keeps constant whatever the number of ranks; ``absent``: why this backend could not be measured (its rows have
        no time then), else empty.

    Raises
    ------
    ValueError
        An argument is not possible; nothing was started.
    BackendError
        Horovod used another operation than the backend stands for.
    RankError, LabError
        A rank raised, such as for a wrong sum, or ranks died twice; or there can be no lab here.
    """
    import pandas as pd

    chosen = named(backends)
    if isinstance(sizes_bytes, str) or not isinstance(sizes_bytes, Sequence) or not len(sizes_bytes):
        raise ValueError(f"sizes_bytes must be a list of lengths in bytes, not {sizes_bytes!r}")
    sizes = [whole_number(size, "a size in bytes", 4) for size in sizes_bytes]
    if bad := [size for size in sizes if size % 4]:
        raise ValueError(f"sizes must be multiples of 4 bytes, the length of a float32, not {bad[0]}")
    ranks, repeats = whole_number(ranks, "ranks", 2), whole_number(repeats, "repeats")
    if isinstance(cycles_ms, str) or not isinstance(cycles_ms, Sequence) or not len(cycles_ms):
        raise ValueError(f"cycles_ms must be a list of cycle times in ms, such as [1.0], not {cycles_ms!r}")
    cycles = [positive(cycle, "a cycle time in ms") for cycle in cycles_ms]
    if len(set(sizes)) < len(sizes) or len(set(cycles)) < len(cycles):
        raise ValueError("a size or a cycle time is given twice; give each once, and more repeats")

    rows = []
    with Groups(chosen, ranks, env, rate_mbit, most_bytes=20 * max(sizes)) as groups:
        for repeat, name in groups.turns(repeats):
            for cycle in cycles:
                for times in groups.run(name, timed, chosen[name], sizes, cycle)[:1]:
                    rows += [(name, ranks, cycle, size, repeat, t, "") for size, t in zip(sizes, times, strict=True)]
        for name, why in groups.absent.items():
            rows += [(name, ranks, cycle, size, -1, np.nan, why) for cycle in cycles for size in sizes]
    columns = ["backend", "ranks", "cycle_ms", "size_bytes", "repeat", "time_s", "absent"]
    table = pd.DataFrame(rows, columns=columns)
    table.insert(6, "bus_bandwidth_gb_per_s", 2e-9 * (ranks - 1) / ranks * table["size_bytes"] / table["time_s"])
    return table


def ratios(table: pd.DataFrame, of: str = "MPI") -> pd.DataFrame:
    """How many times as fast as `of` each backend is: one row per backend, ranks, cycle time and size.

    Parameters
    ----------
    table
        What `compare_backends` returned.
    of
        The backend that the others are compared with, turn by turn.

    Returns
    -------
    pandas.DataFrame
        ``backend, ranks, cycle_ms, size_bytes, speedup`` (median over the turns), ``low, high`` (quartiles),
        ``least, most``, ``turns``.
    """
    require_columns(table, ["backend", "ranks", "cycle_ms", "size_bytes", "repeat", "time_s"])
    measured, keys = table.dropna(subset="time_s"), ["ranks", "cycle_ms", "size_bytes"]
    if of not in set(measured["backend"]):
        raise ValueError(f"the table has no time of {of!r}, only of {', '.join(sorted(set(measured['backend'])))}")
    if measured.duplicated(["backend", *keys, "repeat"]).any():
        raise ValueError("the table has several times of the same turn; choose the rows of one memory or one rate")
    base = measured.loc[measured["backend"] == of, [*keys, "repeat", "time_s"]].rename(columns={"time_s": "base_s"})
    pairs = measured[measured["backend"] != of].merge(base, on=[*keys, "repeat"])
    pairs["speedup"] = pairs["base_s"] / pairs["time_s"]
    grouped = pairs.groupby(["backend", *keys])["speedup"]
    return grouped.agg(
        speedup="median",
        low=lambda values: values.quantile(0.25),
        high=lambda values: values.quantile(0.75),
        least="min",
        most="max",
        turns="size",
    ).reset_index()


def recorded() -> pd.DataFrame:
    """What `compare_backends` measured elsewhere: its columns, ``memory`` ("freed" or "kept") and ``source``."""
    return recordings.load("backends")


class Groups:
    """Ranks on which backends have been proved to run, until the end of a ``with`` statement.

    Backends share ranks where they can take turns in one process. Ranks that die are replaced.

    Attributes
    ----------
    absent : dict of str to str
        Backends that cannot be run, and why.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend],
        n_ranks: int,
        env: Mapping[str, str] | None = None,
        rate_mbit: float | None = None,
        most_bytes: int = 0,
    ):
        if env and rate_mbit is not None:
            raise ValueError("ranks of a network lab take no env: leave out env or rate_mbit")
        if not isinstance(env or {}, Mapping):
            raise ValueError(f"env must be a dictionary of environment variables, not {env!r}")
        if rate_mbit is not None:
            positive(rate_mbit, "rate_mbit")
        self.absent: dict[str, str] = {}
        self._backends = backends
        world = partial(ranks.start, n_ranks, env=dict(env or {}))
        self._start = world if rate_mbit is None else partial(start_lab, n_ranks, rate_mbit)
        # the longest that a call may take: `most_bytes` go through each link in it
        self._timeout_s = TIMEOUT_S + (0 if rate_mbit is None else 8e-6 * most_bytes * n_ranks / rate_mbit)
        self._stack = contextlib.ExitStack()
        self._groups: dict[str, World | Lab] = {}  # by name of the backend

    def __enter__(self) -> Self:
        oneccl = next((backend for backend in self._backends.values() if backend.operations == "CCL"), None)
        shared: dict[Any, World | Lab] = {}
        with contextlib.ExitStack() as stack:  # closes what was opened if something raises
            self._stack = stack
            for name, backend in self._backends.items():
                alike = backend.operations == "MPI" and not backend.env
                host = oneccl if alike else backend  # in whose processes it runs
                key = host and (host.operations, *sorted(host.env.items()))
                for _ in range(2):  # ranks may also die by accident
                    if key not in shared:
                        shared[key] = stack.enter_context(self._start())
                    self._admit(name, shared[key])
                    if name in self._groups:
                        break
                    shared.pop(key)  # it may have taken its ranks with it
                    if not DIED.search(self.absent[name]):
                        break
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def turns(self, repeats: int) -> Iterator[tuple[int, str]]:
        """Repeat and name of who is next: each backend once in every repeat, another one first each time."""
        names = list(self._groups)
        for repeat in range(repeats):
            for turn in range(len(names)):
                if (name := names[(turn + repeat) % len(names)]) in self._groups:
                    yield repeat, name

    def run(self, name: str, function: Callable[..., T], *args: Any) -> list[T]:
        """Run ``function(*args)`` on the ranks of a backend, on new ones if they died.

        Returns
        -------
        list
            Results in rank order; empty if new ranks could not run the backend, now or before, see `absent`.

        Raises
        ------
        RankError
            The function raised, did not end in time, or the new ranks died as well.
        """
        if name not in self._groups:
            return []
        lost = self._groups[name]
        try:
            return lost.run(function, *args, timeout_s=self._timeout_s)
        except RankError as error:
            if not DIED.search(str(error).splitlines()[0]):
                raise
        lost.__exit__(None, None, None)  # its connections, too, or they would try its ports, now others', for ever
        fresh = self._stack.enter_context(self._start())
        for other in [other for other, group in self._groups.items() if group is lost]:
            self._admit(other, fresh)
        if name not in self._groups:
            return []
        return self._groups[name].run(function, *args, timeout_s=self._timeout_s)

    def _admit(self, name: str, group: World | Lab) -> None:
        """Have the group run the backend from now on, if it does."""
        backend = self._backends[name]
        self._groups.pop(name, None)
        self.absent.pop(name, None)
        try:
            found = group.run(_what_runs, backend, timeout_s=self._timeout_s)[0]
        except RankError as error:
            self.absent[name] = str(error).splitlines()[0]
            return
        if found != backend.activity:
            raise BackendError(f"Horovod carried the tensor with {found}, not with {backend.activity}, for {name!r}")
        self._groups[name] = group


def _what_runs(backend: Backend) -> str:
    """On every rank: the operation that Horovod's timeline names for an allreduce over `backend`."""
    import horovod.tensorflow as hvd
    import tensorflow as tf
    from mpi4py import MPI

    from nurion_utils.backends import timeline

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "timeline.json")
        init(backend, timeline=file)
        hvd.allreduce(tf.ones(4), op=hvd.Sum, name="what_runs")
        shutdown()
        rows = timeline.read(file) if MPI.COMM_WORLD.rank == 0 else None
    found = rows[rows["phase"] == "wire"]["activity"].unique() if rows is not None else []
    return MPI.COMM_WORLD.bcast(", ".join(sorted(found)))


def timed(backend: Backend, sizes_bytes: list[int], cycle_ms: float) -> list[float]:
    """On every rank: seconds per allreduce of each size, on the slowest rank."""
    from mpi4py import MPI

    comm, times = MPI.COMM_WORLD, []
    init(backend, cycle_ms=cycle_ms)
    for size_bytes in sizes_bytes:
        reduce, tensor, expected = _tensor(size_bytes, comm.rank, comm.size)

        def block(calls: int) -> float:
            comm.Barrier()
            begin_s = time.perf_counter()
            for _ in range(calls):
                result = reduce(tensor)  # noqa: B023 - called within this turn of the loop
            time_s = (time.perf_counter() - begin_s) / calls
            if not np.array_equal(result, expected):  # noqa: B023
                raise ArithmeticError(f"{backend} gave a wrong sum of {size_bytes} bytes")  # noqa: B023
            return comm.allreduce(time_s, op=MPI.MAX)

        block(2)
        times.append(block(int(np.clip(BLOCK_S / block(1), 1, MOST_CALLS))))
    shutdown()
    return times


@lru_cache(maxsize=32)
def _tensor(size_bytes: int, rank: int, n_ranks: int) -> tuple[Callable, Any, np.ndarray]:
    """An allreduce as a TensorFlow function, this rank's tensor, and the sum: whole numbers, so it is exact."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    numbers = [np.random.default_rng([size_bytes, r]).integers(0, 100, size_bytes // 4) for r in range(n_ranks)]
    reduce = tf.function(lambda tensor: hvd.allreduce(tensor, op=hvd.Sum, name=f"bytes_{size_bytes}"))
    return reduce, tf.constant(numbers[rank], tf.float32), sum(numbers).astype(np.float32)
