"""A small network on one machine: hosts joined by a switch, with links as slow as one likes, and MPI across them.

>>> from nurion_utils.ranks.launchers import lab
>>> with lab.start(4, rate_mbit=100) as network:  # doctest: +SKIP
...     table = network.run(work)

Each rank has a network of its own (Linux' network namespaces) and a cable to a switch, whose rate is limited both ways.
So one sees what algorithms differ in: bytes on the wire. It needs no rights where the kernel allows user namespaces.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from nurion_utils._checks import number, whole_number
from nurion_utils.ranks import failures
from nurion_utils.ranks.calls import call, pickle_call
from nurion_utils.ranks.engine import note_output, stay_outside
from nurion_utils.ranks.environment import identity
from nurion_utils.ranks.failures import Failure, RankError
from nurion_utils.ranks.interrupts import close_for
from nurion_utils.ranks.launchers import lab_host

T = TypeVar("T")

MAX_RANKS = 32
GRACE_S = 3.0  # how long ranks may go on after one has raised, before they count as waiting for it
TICK_S = 0.1


class LabError(RankError):
    """The lab cannot be opened here, or a rank in it raised, died or was late; the message says which and why."""


def start(n: int, rate_mbit: float = 100.0) -> Lab:
    """Build a network of `n` hosts with one MPI rank each; use it in a ``with`` statement.

    ValueError, before anything is started, for other numbers; LabError, with what is missing, if this machine does not
    allow it.

    Parameters
    ----------
    n
        2 to 32; more ranks than cores share the cores, which shows in the time of small messages.
    rate_mbit
        What each host can send, and at the same time receive, in 10^6 bits per second, 1 to 10,000. 2 cores keep
        up with 8 hosts at 100.
    """
    n = whole_number(n, "the number of ranks in a lab", least=2, most=MAX_RANKS)
    return Lab(n, number(rate_mbit, "rate_mbit", least=1, most=10_000))


class Lab(contextlib.AbstractContextManager):
    """An open lab of `n` hosts with one rank each, on links of `rate_mbit` Mbit/s each way; `start` makes one."""

    def __init__(self, n: int, rate_mbit: float):
        self.n, self.rate_mbit = n, rate_mbit
        self._ended = ""  # why this lab is of no more use
        self._resources = contextlib.ExitStack()  # what must be closed, also when nobody calls close()
        weakref.finalize(self, close_for, os.getpid(), self._resources)
        try:
            self._connections, self._pids, self._directory = lab_host.start(n, rate_mbit, self._resources)
        except BaseException as error:
            self.close()
            if isinstance(error, RankError):
                raise LabError(str(error)) from None
            raise

    def run(self, function: Callable[..., T], *args: Any, timeout_s: float | None = None) -> list[T]:
        """Run ``function(*args)`` on every rank and return the results in rank order, as `World.run` does.

        On the ranks ``mpi4py.MPI.COMM_WORLD`` is the lab. What they print is not shown: return it. LabError if a rank
        raised, died, or was not ready after `timeout_s`. The lab can be used further where all ranks came back from
        the call; else it is closed, and the error says where each rank was.
        """
        import cloudpickle

        pickled = pickle_call(function, args, timeout_s)
        if self._ended:
            raise LabError(f"{self._ended}; open a new one with lab.start({self.n}, {self.rate_mbit:g})")
        try:
            return [cloudpickle.loads(answer.pop()) for answer in self._ask(pickled, timeout_s)]
        except BaseException as error:
            if not isinstance(error, LabError):
                # The ranks are still at it, and would answer the next question with this one.
                self.close(f"this lab was closed by a {type(error).__name__} while its ranks were at work")
            raise

    def close(self, why: str = "this lab has been closed") -> None:
        """End the ranks and remove the network. Calling it again does no harm."""
        self._ended = self._ended or why
        self._resources.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Lab of {self.n} ranks on links of {self.rate_mbit:g} Mbit/s: {self._ended or 'open'}>"

    def _ask(self, pickled: bytes, timeout_s: float | None) -> list[list[bytes]]:
        """Have all ranks run something and collect their answers, or say in one error what went wrong."""
        deadline = time.monotonic() + (timeout_s or float("inf"))
        answers: dict[int, list[bytes] | Failure] = {}
        raised_at, log = None, failures.HorovodsLog(self._directory)
        for connection in self._connections:
            with contextlib.suppress(OSError):  # it has died, as we shall hear
                connection.send_bytes(pickled)
        while waiting := [rank for rank in range(self.n) if rank not in answers]:
            ready = multiprocessing.connection.wait([self._connections[rank] for rank in waiting], TICK_S)
            dead = []
            for rank in waiting:
                if self._connections[rank] in ready:
                    try:
                        answers[rank] = self._connections[rank].recv()
                    except (EOFError, OSError):
                        dead.append(rank)
            failed = {rank: answer for rank, answer in sorted(answers.items()) if isinstance(answer, Failure)}
            waiting = [rank for rank in waiting if rank not in answers and rank not in dead]
            if dead:
                dead = self._deaths() or dead
                self._break(failures.ended([f"rank{dead[0]}"], self._directory), waiting, dead)
            if failed and waiting:
                raised_at = raised_at or time.monotonic()
                if time.monotonic() - raised_at > GRACE_S:
                    self._break(failures.raised(failed, self.n, log), waiting)
            if waiting and time.monotonic() > deadline:
                self._break(f"{failures.numbered(waiting)} did not finish within {timeout_s:g} s", waiting)
        if failed:
            raise LabError(failures.raised(failed, self.n, log))
        return [answers[rank] for rank in range(self.n)]

    def _deaths(self) -> list[int]:
        """The ranks that have died, the first one first: others that talk with it soon follow, for MPICH crashes."""
        time.sleep(TICK_S)
        ends = sorted(self._directory.glob("rank*.status"), key=lambda file: file.stat().st_mtime_ns)
        return [int(file.stem.removeprefix("rank")) for file in ends]

    def _break(self, reason: str, waiting: list[int], died: Iterable[int] = ()) -> None:
        """Close the lab and say why, and where the ranks were that were still at work."""
        for rank in waiting:
            with contextlib.suppress(OSError):
                os.kill(self._pids[rank], signal.SIGUSR1)  # faulthandler writes down where it stands
        deaths = self._deaths()
        stacks = failures.where([rank for rank in waiting if rank not in deaths], self._directory)
        self.close(f"this lab has ended because {reason.splitlines()[0]}")
        again = f"lab.start({self.n}, {self.rate_mbit:g})"
        raise LabError(f"{reason}{stacks}\nAll ranks have been ended; open a new lab with {again}.", died=died)


def main() -> None:
    """One rank: run what the notebook sends, and answer."""
    rank = identity().rank
    own = Path(lab_host.SHM, f"rank{rank}")
    stay_outside(Path(f"{own}.status"))
    note_output(own)  # what a rank prints would else travel through the network that is measured

    from mpi4py import MPI

    notebook = multiprocessing.connection.Client(lab_host.SOCKET)
    notebook.send(rank)
    with contextlib.suppress(EOFError):
        while True:
            pause_s = 0.001
            # The last bytes that this rank has sent may need MPI's help to leave it, and others wait for them.
            while not notebook.poll(pause_s):
                MPI.COMM_WORLD.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG)
                pause_s = min(1.1 * pause_s, 0.05)
            notebook.send(call(notebook.recv_bytes()))


if __name__ == "__main__":
    main()
