"""A small network on one machine: hosts joined by a switch, with links as slow as one likes, and MPI across them.

>>> from nurion_utils import allreduce
>>> from nurion_utils.ranks.launchers import lab
>>> with lab.start(4, rate_mbit=100) as network:
...     table = network.measure({"ring": allreduce.ring(4), "native": None}, sizes_bytes=[2**20])

Ranks of one machine talk through its memory, where no algorithm saves much. Here each rank has a network of its own
(Linux' network namespaces) and a cable to a switch, whose rate is limited in both directions, so that what the
algorithms differ in can be seen: bytes on the wire. It needs no rights where the kernel allows user namespaces.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import signal
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from nurion_utils import recordings
from nurion_utils.allreduce import algorithms, measuring
from nurion_utils.allreduce.schedule import Link, Schedule
from nurion_utils.ranks import failures
from nurion_utils.ranks.calls import pickle_call
from nurion_utils.ranks.failures import Failure, RankError
from nurion_utils.ranks.launchers import lab_host, lab_rank

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

MAX_RANKS = 32
GRACE_S = 3.0  # how long ranks may go on after one has raised, before they count as waiting for it
TICK_S = 0.1
WARM_UP_BYTES = 2**16  # opens the connections between all ranks that talk
CLOSED = "this lab has been closed"


class LabError(RankError):
    """The lab cannot be opened here, or a rank in it raised, died or was late; the message says which and why."""


def start(ranks: int, rate_mbit: float = 100.0) -> Lab:
    """Build a network of `ranks` hosts with one MPI rank each; use it in a ``with`` statement.

    Parameters
    ----------
    ranks
        2 to 32; more ranks than cores share the cores, which shows in the time of small messages.
    rate_mbit
        What each host can send, and at the same time receive, in 10^6 bits per second, 1 to 10,000. 2 cores keep
        up with 8 hosts at 100.

    Raises
    ------
    ValueError
        The number of ranks or the rate is not possible; nothing was started.
    LabError
        This machine does not allow it; says what is missing.
    """
    if isinstance(ranks, bool) or not isinstance(ranks, int | np.integer) or not 2 <= ranks <= MAX_RANKS:
        raise ValueError(f"a lab has 2 to {MAX_RANKS} ranks, not {ranks!r}")
    number = isinstance(rate_mbit, int | float | np.number) and not isinstance(rate_mbit, bool)
    if not (number and 1 <= rate_mbit <= 10_000):
        raise ValueError(f"rate_mbit must be a number from 1 to 10,000 (in Mbit/s), not {rate_mbit!r}")
    return Lab(int(ranks), float(rate_mbit))


class Lab:
    """An open lab; `start` makes one.

    Attributes
    ----------
    ranks : int
        Number of hosts, with one rank each.
    rate_mbit : float
        Rate of each link in each direction, in Mbit/s.
    """

    def __init__(self, ranks: int, rate_mbit: float):
        self.ranks, self.rate_mbit = ranks, rate_mbit
        self._ended = ""  # why this lab is of no more use
        self._resources = contextlib.ExitStack()  # what must be closed, also when nobody calls close()
        weakref.finalize(self, _close, self._resources, os.getpid())
        try:
            self._connections, self._pids, self._directory = lab_host.start(ranks, rate_mbit, self._resources)
        except BaseException as error:
            self.close()
            if isinstance(error, lab_host.Refused):
                raise LabError(str(error)) from None
            raise

    @property
    def link(self) -> Link:
        """What a message costs on these links if it started at once: the theory that measurements are held against."""
        return Link(alpha_s=0.0, beta_s_per_byte=8e-6 / self.rate_mbit)

    def run(self, function: Callable[..., T], *args: Any, timeout_s: float | None = None) -> list[T]:
        """Run ``function(*args)`` on every rank and return the results in rank order.

        On the ranks ``mpi4py.MPI.COMM_WORLD`` is the lab. What they print is not shown: return it.

        Parameters
        ----------
        function, args
            Pickled by value, so functions written in a notebook cell will do.
        timeout_s
            After this time the lab is closed, and `LabError` says where each rank was.

        Raises
        ------
        TypeError, ValueError
            The function, an argument or the time cannot be used; nothing ran.
        LabError
            A rank raised, died, or was too late. Where all ranks came back from the call, the lab can be used further.
        """
        import cloudpickle

        pickled = pickle_call(function, args, timeout_s)
        if self._ended:
            raise LabError(f"{self._ended}; open a new one with lab.start({self.ranks}, {self.rate_mbit:g})")
        try:
            return [cloudpickle.loads(answer.pop()) for answer in self._ask(pickled, timeout_s)]
        except LabError:
            raise
        except BaseException as error:  # the ranks are still at it, and would answer the next question with this one
            self._ended = self._ended or f"this lab was closed by a {type(error).__name__} while its ranks were at work"
            self.close()
            raise

    def measure(
        self, contenders: Mapping[str, Schedule | None], sizes_bytes: Sequence[int], repeats: int = 3
    ) -> pd.DataFrame:
        """Time allreduces of float32 arrays across the network, and check each result.

        Parameters
        ----------
        contenders
            Schedules by name; None stands for MPI's own Allreduce. They take turns within each repeat.
        sizes_bytes
            Lengths of the array, each a multiple of 4.

        Returns
        -------
        pandas.DataFrame
            One row per observation: ``contender, ranks, rate_mbit, size_bytes, repeat``;
            ``time_s``, of the slowest rank, after all have met;
            ``theory_s``, the schedule's time on these links were there no latency (NaN for MPI's own);
            ``bytes_sent``, by all ranks together, as the schedule says (NaN for MPI's own);
            ``wire_bytes``, what the hosts' interfaces counted as sent: headers, acknowledgements and the few small
            messages with which the ranks meet before it come on top.

        Raises
        ------
        ValueError
            A contender or a size is not possible; nothing ran.
        LabError
            As `run`; also when a contender gave a wrong sum.
        """
        import pandas as pd

        measuring.require(contenders, self.ranks, sizes_bytes, repeats)
        for name, schedule in contenders.items():
            self._observe(name, schedule, min(WARM_UP_BYTES, max(sizes_bytes)))
        rows = [
            {"contender": name, "ranks": self.ranks, "rate_mbit": self.rate_mbit, "size_bytes": size, "repeat": repeat}
            | self._observe(name, schedule, size)
            for size in sizes_bytes
            for repeat in range(repeats)
            for name, schedule in contenders.items()
        ]
        return pd.DataFrame(rows)

    def close(self) -> None:
        """End the ranks and remove the network. Calling it again does no harm."""
        self._ended = self._ended or CLOSED
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Lab of {self.ranks} ranks on links of {self.rate_mbit:g} Mbit/s: {self._ended or 'open'}>"

    # -- measuring --------------------------------------------------------------------------------------------------

    def _observe(self, name: str, schedule: Schedule | None, size_bytes: int) -> dict[str, float]:
        # what the schedule works out on first use travels with it, and takes no time on the ranks
        sent = [schedule.bytes_sent(rank, size_bytes, 4) for rank in range(self.ranks)] if schedule else [np.nan]
        naive_s = 2 * self.ranks * size_bytes * self.link.beta_s_per_byte
        before = self.run(lab_rank.wire_bytes)
        times = self.run(lab_rank.timed, name, schedule, int(size_bytes), timeout_s=60 + 10 * naive_s)
        after = self.run(lab_rank.wire_bytes)
        return {
            "time_s": max(times),
            "theory_s": schedule.time(size_bytes, self.link) if schedule else np.nan,
            "bytes_sent": sum(sent),
            "wire_bytes": sum(after) - sum(before),
        }

    # -- the ranks --------------------------------------------------------------------------------------------------

    def _ask(self, pickled: bytes, timeout_s: float | None) -> list[list[bytes]]:
        """Have all ranks run something and collect their answers, or say in one error what went wrong."""
        deadline = time.monotonic() + (timeout_s or float("inf"))
        answers: dict[int, list[bytes] | Failure] = {}
        raised_at = None
        for connection in self._connections:
            with contextlib.suppress(OSError):  # it has died, as we shall hear
                connection.send_bytes(pickled)
        while waiting := [rank for rank in range(self.ranks) if rank not in answers]:
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
                first = (self._deaths() or dead)[0]
                self._break(failures.ended([f"rank{first}"], self._directory), waiting)
            if failed and waiting:
                raised_at = raised_at or time.monotonic()
                if time.monotonic() - raised_at > GRACE_S:
                    self._break(failures.raised(failed, self.ranks), waiting)
            if waiting and time.monotonic() > deadline:
                self._break(f"{failures.numbered(waiting)} did not finish within {timeout_s:g} s", waiting)
        if failed:
            raise LabError(failures.raised(failed, self.ranks))
        return [answers[rank] for rank in range(self.ranks)]

    def _deaths(self) -> list[int]:
        """The ranks that have died, the first one first: others that talk with it soon follow, for MPICH crashes."""
        time.sleep(TICK_S)
        ends = sorted(self._directory.glob("rank*.status"), key=lambda file: file.stat().st_mtime_ns)
        return [int(file.stem.removeprefix("rank")) for file in ends]

    def _break(self, reason: str, waiting: list[int]) -> None:
        """Close the lab and say why, and where the ranks were that were still at work."""
        for rank in waiting:
            with contextlib.suppress(OSError):
                os.kill(self._pids[rank], signal.SIGUSR1)  # faulthandler writes down where it stands
        deaths = self._deaths()
        stacks = failures.where([rank for rank in waiting if rank not in deaths], self._directory)
        self._ended = f"this lab has ended because {reason.splitlines()[0]}"
        self.close()
        again = f"lab.start({self.ranks}, {self.rate_mbit:g})"
        raise LabError(f"{reason}{stacks}\nAll ranks have been ended; open a new lab with {again}.")


def recorded() -> pd.DataFrame:
    """What the lab measured on a machine that allows it: the columns of `Lab.measure`, and ``source``.

    Raises
    ------
    FileNotFoundError
        The package was installed without its repository.
    """
    return recordings.load("network_lab")


def record() -> pd.DataFrame:
    """What ``data/network_lab.csv`` holds, but for its source."""
    import pandas as pd

    makers = [
        *[algorithms.ring, algorithms.naive, algorithms.tree],
        *[algorithms.recursive_doubling, algorithms.rabenseifner],
    ]
    sizes = [2**10, 2**12, 2**14, 2**16, 2**18, 2**20, 4 * 10**6, 16 * 10**6]
    tables = []
    for ranks in (2, 4, 8):
        with start(ranks, rate_mbit=100) as network:
            contenders = {make.__name__: make(ranks) for make in makers} | {"native": None}
            tables.append(network.measure(contenders, sizes, repeats=3))
    return pd.concat(tables, ignore_index=True)


def _close(resources: contextlib.ExitStack, owner: int) -> None:
    if os.getpid() == owner:  # a forked child of the notebook must not end its parent's lab
        resources.close()
