"""One rank of a network lab: it runs what the notebook sends, and answers; and what `Lab.measure` sends."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import signal
import time
from multiprocessing.connection import Client
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nurion_utils.ranks.engine import call
from nurion_utils.ranks.launchers.lab_host import SHM, SOCKET

if TYPE_CHECKING:
    from nurion_utils.allreduce.schedule import Schedule


def main() -> None:
    """One rank: run what the notebook sends, and answer."""
    rank = int(os.environ["PMI_RANK"])
    own = f"{SHM}/rank{rank}"
    if worker := os.fork():
        # This half only writes down how the rank ended, then stays: were mpiexec to see it end, it would kill the
        # other ranks before anyone could ask them where they stood.
        status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        Path(f"{own}.status").write_text(str(status))
        os.utime(f"{own}.status", ns=2 * (time.time_ns(),))  # finer than the file system's clock: who was first?
        while True:
            signal.pause()
    log = open(f"{own}.log", "wb", buffering=0)  # noqa: SIM115 (open for the process' life)
    os.dup2(log.fileno(), 1)  # what a rank prints would else travel through the network that is measured
    os.dup2(log.fileno(), 2)
    stacks = open(f"{own}.stack", "wb", buffering=0)  # noqa: SIM115
    faulthandler.enable(log, all_threads=False)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)

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
