"""One rank of a network lab: it runs what the notebook sends, and answers; and what `Lab.measure` sends."""

from __future__ import annotations

import contextlib
import functools
import time
from multiprocessing.connection import Client
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nurion_utils.ranks.calls import call
from nurion_utils.ranks.engine import note_output, stay_outside
from nurion_utils.ranks.environment import identity
from nurion_utils.ranks.launchers.lab_host import SHM, SOCKET

if TYPE_CHECKING:
    from nurion_utils.allreduce.schedule import Schedule


def main() -> None:
    """One rank: run what the notebook sends, and answer."""
    rank = identity().rank
    own = f"{SHM}/rank{rank}"
    stay_outside(Path(f"{own}.status"))
    note_output(Path(own))  # what a rank prints would else travel through the network that is measured

    from mpi4py import MPI

    notebook = Client(SOCKET)
    notebook.send(rank)
    with contextlib.suppress(EOFError):
        while True:
            pause_s = 0.001
            # The last bytes that this rank has sent may need MPI's help to leave it, and others wait for them.
            while not notebook.poll(pause_s):
                MPI.COMM_WORLD.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG)
                pause_s = min(1.1 * pause_s, 0.05)
            notebook.send(call(notebook.recv_bytes()))


# -- measuring ----------------------------------------------------------------------------------------------------


def wire_bytes() -> int:
    """What this host has sent since it was built, as its interface counts."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("eth0:"))


def timed(name: str, schedule: Schedule | None, size_bytes: int) -> float:
    """Seconds that this rank needs for one allreduce, from when all have met."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    mine, total = arrays(size_bytes, comm.rank, comm.size)
    array = mine.copy()
    if schedule is None:
        comm.Barrier()
        begin_s = time.perf_counter()
        comm.Allreduce(MPI.IN_PLACE, array)
    else:
        steps: list[dict] = []
        schedule.run(comm, array, trace=steps)  # ranks meet in it, to find out whether they agree
        begin_s = steps[0]["begin_s"]
    time_s = time.perf_counter() - begin_s
    if not np.array_equal(array, total):
        raise ArithmeticError(f"{name} gave a wrong sum in {np.sum(array != total)} of {array.size} elements")
    return time_s


@functools.lru_cache(maxsize=1)
def arrays(size_bytes: int, rank: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """This rank's array and the sum over ranks: whole numbers, whose sum is exact in whatever order."""
    total = np.zeros(size_bytes // 4, np.float32)
    for each in range(ranks):
        array = np.random.default_rng([size_bytes, each]).integers(0, 100, total.size, np.uint8).astype(np.float32)
        total += array
        if each == rank:
            mine = array
    return mine, total


if __name__ == "__main__":
    main()
