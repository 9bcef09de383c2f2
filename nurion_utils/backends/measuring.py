"""Horovod's allreduce over several backends, measured side by side.

>>> table = measure_backends([2**22, 2**26], ranks=2)  # doctest: +SKIP
>>> timing.ratios(table, "MPI", "backend", by=["size_bytes"])  # doctest: +SKIP
"""

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import pandas as pd

import nurion_utils.ranks
from nurion_utils import timing
from nurion_utils._checks import positive, whole_number
from nurion_utils.backends.choosing import Backend, BackendError, named, settings
from nurion_utils.backends.process import init, shutdown
from nurion_utils.ranks import RankError, World

T = TypeVar("T")

BLOCK_S = 0.03  # short allreduces are repeated until a block of them can be timed
MOST_CALLS = 50
LONGEST_BYTES = 4 * (2**31 - 1)  # MPI counts numbers with 32 bits
TIMEOUT_S = 300.0


def measure_backends(
    sizes_bytes: Sequence[int],
    ranks: int = 2,
    backends: Sequence[str] | Mapping[str, Backend] = ("MPI", "Gloo", "oneCCL ring"),
    repeats: int = 7,
    *,
    cycles_ms: Sequence[float] = (1.0,),
    env: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Time Horovod's allreduce of one float32 tensor over several backends, which take turns.

    Each backend has ranks of its own, started and ended here. Each first reduces with Horovod's timeline on, which says
    what really carried the tensor: BackendError if that is not what the backend stands for. The sums are compared with
    the exact ones: RankError if one is wrong, a rank raises otherwise, or ranks die twice. ValueError, before anything
    is started, for an argument that is not possible.

    Parameters
    ----------
    sizes_bytes
        Lengths of the tensor, multiples of 4.
    ranks, repeats
        Ranks per backend, and turns that each backend gets.
    backends
        Names in `BACKENDS`, or backends of your own by name.
    cycles_ms
        Values of Horovod's cycle time; each backend is measured with every one in each turn.
    env
        Further environment variables for the ranks, such as `KEEP_MEMORY`.

    Returns
    -------
    pandas.DataFrame
        One row per observation: ``backend, ranks, cycle_ms, size_bytes, repeat``; ``time_s``, of the slowest rank;
        ``bus_bandwidth_gb_per_s``, ``2 (P-1)/P * size / time`` as NVIDIA's nccl-tests define it, which a perfect ring
        keeps constant whatever the number of ranks; ``absent``: why this backend could not be measured (its rows have
        no time then), else empty.
    """
    chosen = named(backends)
    sizes = [whole_number(size, "a size in bytes", 4, LONGEST_BYTES) for size in _each_once(sizes_bytes, "sizes_bytes")]
    if bad := [size for size in sizes if size % 4]:
        raise ValueError(f"sizes must be multiples of 4 bytes, the length of a float32, not {bad[0]}")
    ranks, repeats = whole_number(ranks, "ranks", 2), whole_number(repeats, "repeats")
    cycles = _each_once(cycles_ms, "cycles_ms")
    for cycle in cycles:
        settings(cycle_ms=positive(cycle, "a cycle time in ms"))
    if not isinstance(env or {}, Mapping):
        raise ValueError(f"env must be a dictionary of environment variables, not {env!r}")
    with BackendWorlds(chosen, partial(nurion_utils.ranks.start, ranks, env=dict(env or {}))) as worlds:
        observed = worlds.observe(repeats, timed, sizes, cycles)
    rows = [
        (name, ranks, cycle, size, turn, times[cycle, size] if times else np.nan, why)
        for name, turn, times, why in observed
        for cycle in cycles
        for size in sizes
    ]
    columns = ["backend", "ranks", "cycle_ms", "size_bytes", "repeat", "time_s", "absent"]
    table = pd.DataFrame(rows, columns=columns)
    table.insert(6, "bus_bandwidth_gb_per_s", 2e-9 * (ranks - 1) / ranks * table["size_bytes"] / table["time_s"])
    return table


def _each_once(values: Sequence[T], name: str) -> list[T]:
    if isinstance(values, str | bytes) or not isinstance(values, Sequence) or not len(values):
        raise ValueError(f"{name} must be a list of numbers, such as [1024], not {values!r}")
    if len(set(values)) < len(values):
        raise ValueError(f"a value is given twice in {name}; give each once, and more repeats")
    return list(values)


class BackendWorlds:
    """Ranks for each backend, on which it has been proved to run, until the end of a ``with`` statement.

    ``backends`` are by name, ``start`` starts the ranks of one, and a call has failed after ``timeout_s``. ``absent``
    says of each backend that cannot be run why.
    """

    def __init__(
        self, backends: Mapping[str, Backend], start: Callable[[], World], timeout_s: float = TIMEOUT_S
    ) -> None:
        self.absent: dict[str, str] = {}
        self._backends, self._worlds = backends, {}
        self._start, self._timeout_s = start, timeout_s

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:  # ends the ranks if something raises
            stack.callback(self.__exit__)
            for name, backend in self._backends.items():
                self._worlds[name] = self._start()
                try:
                    found = self.run(name, _what_runs, backend)[0]
                except RankError as error:
                    self.absent[name] = str(error).splitlines()[0]
                    self._worlds.pop(name).__exit__()
                    continue
                if found != backend.activity:
                    raise BackendError(f"Horovod carried the tensor with {found}, not {backend.activity}, for {name!r}")
            stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        for world in self._worlds.values():
            world.__exit__()

    def observe(self, repeats: int, function: Callable[..., T], *args: Any) -> list[tuple[str, int, T | None, str]]:
        """Run ``function(backend, *args)`` over each backend in turn.

        Gives name of the backend, number of the turn, what rank 0 returned, and an empty string; of an absent backend
        its name, -1, None, and why it is absent.
        """
        turns = timing.turns(list(self._worlds), repeats)
        rows = [(name, turn, self.run(name, function, self._backends[name], *args)[0], "") for turn, name in turns]
        return rows + [(name, -1, None, why) for name, why in self.absent.items()]

    def run(self, name: str, function: Callable[..., T], *args: Any) -> list[T]:
        """The results of ``function(*args)`` on the ranks of a backend, by rank; if they die, once more on new ones.

        Raises `RankError` if the function raised, did not end in time, or the new ranks died as well.
        """
        try:
            return self._worlds[name].run(function, *args, timeout_s=self._timeout_s)
        except RankError as error:  # ranks may also die by accident
            if not error.died:
                raise
        self._worlds[name].__exit__()  # its connections, too, or they would try its ports, now others', for ever
        self._worlds[name] = self._start()
        return self._worlds[name].run(function, *args, timeout_s=self._timeout_s)


@contextlib.contextmanager
def written_by_rank_0(name: str):
    """On every rank: a file of rank 0's, of the same name for all, that is removed afterwards."""
    from mpi4py import MPI

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if MPI.COMM_WORLD.rank == 0 else None
        yield Path(MPI.COMM_WORLD.bcast(folder), name)


def _what_runs(backend: Backend) -> str:
    """On every rank: the operation that the timeline names for an allreduce over `backend`; rank 0 knows."""
    import horovod.tensorflow as hvd
    import tensorflow as tf
    from mpi4py import MPI

    from nurion_utils.backends import timeline

    with written_by_rank_0("timeline.json") as file:
        init(backend, timeline=file)
        hvd.allreduce(tf.ones(4), op=hvd.Sum, name="what_runs")
        shutdown()
        if MPI.COMM_WORLD.rank == 0:
            rows = timeline.read(file)
            return ", ".join(sorted(rows[rows["phase"] == "wire"]["activity"].unique()))
    return ""


def timed(backend: Backend, sizes_bytes: list[int], cycles_ms: list[float]) -> dict[tuple[float, int], float]:
    """On every rank: seconds per allreduce on the slowest rank, by cycle time and size."""
    from mpi4py import MPI

    comm, times = MPI.COMM_WORLD, {}
    for cycle_ms in cycles_ms:
        init(backend, cycle_ms=cycle_ms)
        for size_bytes in sizes_bytes:
            reduce, expected = _allreduce(size_bytes, comm.rank, comm.size)
            sums = [reduce()]
            timing.block(comm, reduce, 2)
            times[cycle_ms, size_bytes] = timing.block(comm, reduce, timing.calls_in(comm, reduce, BLOCK_S, MOST_CALLS))
            sums.append(reduce())
            if not all(np.array_equal(each, expected) for each in sums):
                raise ArithmeticError(f"{backend} gave a wrong sum of {size_bytes} bytes")
        shutdown()
    return times


@lru_cache(maxsize=32)
def _allreduce(size_bytes: int, rank: int, n_ranks: int) -> tuple[Callable[[], Any], np.ndarray]:
    """What reduces this rank's tensor by a TensorFlow function, and the exact sum."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    mine, total = timing.exact_arrays(size_bytes, rank, n_ranks)
    reduce = tf.function(lambda tensor: hvd.allreduce(tensor, op=hvd.Sum, name=f"bytes_{size_bytes}"))
    return partial(reduce, tf.constant(mine)), total
