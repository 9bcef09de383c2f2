"""A world: started ranks, as a notebook uses them.

The ranks are ipyparallel engines started by ``mpiexec``, so ``%%px`` cells work as well. Promised beyond that:

* nothing hangs: a watcher thread sees a rank die, raise or return while others wait for it, and says which one;
* nothing leaks: a guardian process ends everything whatever happens to the kernel;
* nobody else gets in: loopback only, messages signed, files private to the user and the run;
* nothing is mixed up: calls from several threads take turns, so that all ranks meet them in the same order.
"""

from __future__ import annotations

import os
import shutil
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Self, TypeVar, Unpack

from nurion_utils import sites
from nurion_utils._checks import whole_number
from nurion_utils.ranks import notebook
from nurion_utils.ranks.calls import call, pickle_call
from nurion_utils.ranks.engine import cores_by_rank, is_complete
from nurion_utils.ranks.environment import rank_environment
from nurion_utils.ranks.failures import RankError
from nurion_utils.ranks.interrupts import close_for, no_interrupt_lost
from nurion_utils.ranks.launchers import allocation, lab, placing
from nurion_utils.ranks.launchers.local import START_TIMEOUT_S, LocalRanks, Placement
from nurion_utils.ranks.launchers.placing import Wanted
from nurion_utils.ranks.launchers.remote import RemoteRanks
from nurion_utils.ranks.watching import Watcher

T = TypeVar("T")


def start(
    n: int,
    env: dict[str, str] | None = None,
    cores_per_rank: int | None = None,
    rate_mbit: float | None = None,
    site: str | None = None,
    **wanted: Unpack[Wanted],
) -> World:
    """Start `n` MPI ranks and wait until they answer; ``%%px`` cells then run on them.

    In a job of Slurm or PBS Pro they start on the job's nodes, elsewhere on this machine, unless `site` names a machine
    with a scheduler: then a job is submitted, and this waits until it runs. ValueError, before anything is started, for
    what is not possible; RankError if the ranks do not start.

    Parameters
    ----------
    n
        Number of ranks; on this machine at most ``ranks.max_ranks`` of site "local". More ranks than cores share the
        cores.
    env
        Environment variables for the ranks, on top of the defaults of `rank_environment`. Horovod waits for ever for
        a rank that leaves out a collective and does not return; with ``{"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "60"}``
        an error names it within two minutes.
    cores_per_rank
        Cores of each rank's own; by default an equal share of all. Fewer let a small world stand for a part of
        a larger one, as measuring scaling needs.
    rate_mbit
        If given, each rank sits on a virtual node of its own, with all cores and a link that can send, and at the same
        time receive, so many 10^6 bits per second, 1 to 10,000; two cores keep up with 8 nodes at 100. NodesError if
        this machine does not permit it.
    site
        Name of a site (``python -m nurion_utils.sites``): "local" for this machine, whatever it is.
    **wanted
        Of a job: ``nodes``, as many as ranks unless told otherwise; for a new one ``minutes`` of walltime (60),
        ``queue``, further ``options`` of its scheduler, and ``wait_s``, after which it is given up.
    """
    with no_interrupt_lost():
        whole_number(n, "the number of ranks")
        for name, value in (env or {}).items():
            if not (isinstance(name, str) and isinstance(value, str)):
                raise ValueError(f"environment variables are strings, not {name!r}: {value!r}")
        job = allocation.current()
        if rate_mbit is None and (site or (job and not job.is_here)) and site != "local":
            there = sites.load(site or ("slurm" if job.scheduler == "Slurm" else "pbs"))
            if there.scheduler is None:
                raise ValueError(
                    f"site {there.name!r} has no scheduler: take one that has, such as 'slurm', or 'local'"
                )
            mine = job if job and job.scheduler == there.scheduler.kind else None
            asked = placing.request(n, there, cores_per_rank, mine, wanted, env or {})
            if asked.batch and shutil.which(submits := asked.batch.submit[0]) is None:
                raise ValueError(
                    f"{submits} is not found here: ranks of site {there.name!r} start from its login nodes, or in its "
                    "jobs; without site= they start on this machine"
                )
            return World(n, partial(RemoteRanks, asked), None)
        if wanted:
            raise ValueError(f"{next(iter(wanted))} is for ranks of a job: name its site, as site='slurm'")
        cores = sorted(os.sched_getaffinity(0))[: job.cores if job else None]
        return _on_this_machine(n, env or {}, cores, cores_per_rank, rate_mbit)


def _on_this_machine(
    n: int, env: dict[str, str], cores: list[int], cores_per_rank: int | None, rate_mbit: float | None
) -> World:
    machine = sites.load("local")
    if n > machine.ranks.max_ranks:
        raise ValueError(f"{n} ranks are more than the {machine.ranks.max_ranks} that site 'local' allows")
    most = max(1, len(cores) // n)
    if cores_per_rank is not None and cores_per_rank not in range(1, most + 1):
        raise ValueError(f"{n} ranks can have 1 to {most} cores each here, not {cores_per_rank!r}")
    shares = cores_by_rank(n, cores[: n * cores_per_rank] if cores_per_rank else cores)
    # a container may grant the time of fewer cores than it lets us run on
    threads = max(1, min(len(shares[0]), machine.node.cores // n))
    place = Placement()
    if rate_mbit is not None:
        place, shares = lab.placement(n, rate_mbit), [cores] * n
    env = {**rank_environment(threads), **place.env, **env}
    return World(n, partial(LocalRanks, shares, env, place), rate_mbit)


class World(AbstractContextManager):
    """`n` started ranks, on links of `rate_mbit` if not None. Use it as a context manager, or call `stop`."""

    def __init__(
        self, n: int, launch: Callable[[ExitStack], LocalRanks | RemoteRanks], rate_mbit: float | None
    ) -> None:
        self.n, self.rate_mbit, self._launch = n, rate_mbit, launch
        self._turn = threading.RLock()  # held by the thread whose call the ranks are given
        self._start()

    def run(self, function: Callable[..., T], *args: Any, timeout_s: float | None = None) -> list[T]:
        """Run ``function(*args)`` on every rank and return the results in rank order.

        Threads may call it at the same time: their calls are run one after the other. Function and arguments are
        pickled by value, so functions written in a notebook cell will do. After `timeout_s`, not counting what calls
        of other threads take before, the ranks are stopped and `RankError` says where each one was.

        Raises
        ------
        TypeError, ValueError
            The function, an argument or the time cannot be used; nothing ran.
        RankError
            A rank raised, died, was too late, or waits for ranks that have returned; names it and shows its traceback.
        KeyboardInterrupt
            The cell was interrupted; the ranks were interrupted too.
        """
        import cloudpickle

        pickled = pickle_call(function, args, timeout_s)
        with self._turn:
            self._require_running()
            sent = self._watcher.watch(self._view.apply_async(call, pickled))
            results = self._watcher.wait(sent, timeout_s)
        return [cloudpickle.loads(result.pop()) for result in results]

    def stop(self) -> None:
        """End the ranks and remove everything they left. Calling it again does no harm."""
        self._stopped = True
        notebook.give_back_magics(self)
        watcher = self._watcher
        if watcher is None:
            return self._resources.close()
        watcher.stopping.set()
        with watcher.ending:
            self._resources.close()
        watcher.join()

    def restart(self) -> Self:
        """Start the same number of ranks afresh; all variables on the ranks are gone."""
        self.stop()
        with no_interrupt_lost():
            self._start()
        return self

    def unplug(self, node: str) -> None:
        """Have a virtual node vanish with all that runs on it, as if its power had failed: to see what happens then."""
        self._require_running()
        if self.rate_mbit is None:
            raise ValueError("only virtual nodes can be unplugged, those of ranks.start(n, rate_mbit=...)")
        self._processes.unplug(node)

    @property
    def is_running(self) -> bool:
        """Whether the ranks can be called."""
        return not self._stopped and self._watcher is not None and not self._watcher.broken

    @property
    def client(self) -> Any:
        """The `ipyparallel.Client` underneath, with all that it offers. Calls through it take no turns with others."""
        self._require_running()
        return self._client

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = (self._watcher and self._watcher.broken) or ("stopped" if self._stopped else "running")
        links = f" on links of {self.rate_mbit:g} Mbit/s" if self.rate_mbit else ""
        return f"<World of {self.n} ranks{links}: {state}>"

    def _start(self) -> None:
        self._stopped = False
        self._client: Any = None
        self._watcher: Watcher | None = None
        self._resources = ExitStack()  # what must be closed, also when nobody calls stop()
        weakref.finalize(self, close_for, os.getpid(), self._resources)
        try:
            self._connect(self._launch(self._resources))
        except BaseException:
            self.stop()
            raise

    def _connect(self, processes: LocalRanks | RemoteRanks) -> None:
        import cloudpickle  # noqa: F401 (so that the first call, too, finds nothing to import)
        import ipyparallel  # 0.5 s of imports, while the ranks are starting

        self._processes = processes
        while not is_complete(processes.connection_file):
            processes.require_starting()
        self._client = ipyparallel.Client(str(processes.connection_file), timeout=START_TIMEOUT_S)
        self._client._task_scheme = "none"  # else it would warn, at each end of a rank, that tasks cannot be farmed
        self._resources.callback(self._client.close, linger=0)
        while len(self._client) < self.n:
            processes.require_starting()
        self._view = self._client[:]
        self._view.block = True
        processes.hold()
        self._watcher = Watcher(processes, self._client)
        self._resources.callback(self._watcher.stop)
        notebook.register_magics(self)

    def _require_running(self) -> None:
        if self._watcher is not None and self._watcher.broken:
            raise RankError(f"{self._watcher.broken}; call world.restart()")
        if self._stopped:
            raise RankError("this world has been stopped; call world.restart() or ranks.start() for a new one")
