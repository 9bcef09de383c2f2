"""Where code runs: MPI ranks that a notebook starts, uses, and never leaves behind.

>>> from nurion_utils import ranks
>>> with ranks.start(4) as world:
...     world.run(lambda: __import__("mpi4py.MPI").MPI.COMM_WORLD.allreduce(1))
[4, 4, 4, 4]

The ranks are ipyparallel engines started by ``mpiexec``, so ``%%px`` cells work as well. Three promises go
beyond a plain ``ipyparallel.Cluster``:

* nothing hangs: a watcher thread sees a rank die, or raise while others wait for it, and says which one;
* nothing leaks: a guardian process (`nurion_utils.ranks.guardian`) ends everything whatever happens to the kernel;
* nobody else gets in: loopback only, messages signed, files private to the user and the run.
"""

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import InvalidStateError
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from nurion_utils.ranks import failures
from nurion_utils.ranks.engine import call, cores_by_rank, is_complete, pickle_call, rank_environment
from nurion_utils.ranks.failures import RankError
from nurion_utils.ranks.notebook import ProgressBar, no_interrupt_lost, progress, register_magics

__all__ = ["RankError", "World", "progress", "rank_environment", "start"]

T = TypeVar("T")

START_TIMEOUT_S = 120.0
GRACE_S = 3.0  # how long ranks may go on after one has raised, before they count as waiting for it
TICK_S = 0.1
STOPPED_AT_WORK = RankError("this world was stopped while its ranks were at work")


def start(n: int, site: str = "local", env: dict[str, str] | None = None, cores_per_rank: int | None = None) -> "World":
    """Start `n` MPI ranks on this machine and wait until they answer; ``%%px`` cells then run on them.

    Parameters
    ----------
    n
        Number of ranks, at most the site's ``ranks.max_ranks``. More ranks than cores share the cores.
    site
        Name of a description in ``nurion_utils/sites``.
    env
        Environment variables for the ranks, on top of the defaults of `rank_environment`. Horovod waits for ever for
        a rank that leaves out a collective; with ``{"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "60"}`` an error names it
        within two minutes (for less than 60 s, set ``HOROVOD_STALL_CHECK_TIME_SECONDS`` as low).
    cores_per_rank
        Cores of each rank's own; by default an equal share of all. Fewer let a small world stand for a part of
        a larger one, as measuring scaling needs.

    Raises
    ------
    ValueError
        The number of ranks or cores, the site or an environment variable is not possible; nothing was started.
    RankError
        The ranks did not start.
    """
    from nurion_utils import sites

    machine = sites.load(site)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"the number of ranks must be a whole number from 1 up, not {n!r}")
    if site != "local":
        raise ValueError(f"ranks start on this machine only, so use site='local', not {site!r}")
    if n > machine.ranks.max_ranks:
        raise ValueError(f"{n} ranks are more than the {machine.ranks.max_ranks} that site {site!r} allows")
    for name, value in (env or {}).items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise ValueError(f"environment variables are strings, not {name!r}: {value!r}")
    cores = sorted(os.sched_getaffinity(0))
    most = max(1, len(cores) // n)
    if cores_per_rank is not None and cores_per_rank not in range(1, most + 1):
        raise ValueError(f"{n} ranks can have 1 to {most} cores each here, not {cores_per_rank!r}")
    shares = cores_by_rank(n, cores[: n * cores_per_rank] if cores_per_rank else cores)
    # a container may grant the time of fewer cores than it lets us run on
    threads = max(1, min(len(shares[0]), machine.node.cores // n))
    return World(shares, {**rank_environment(threads), **(env or {})})


class World:
    """Started ranks. Use it as a context manager, or call `stop`.

    Attributes
    ----------
    n : int
        Number of ranks.
    client : ipyparallel.Client
        The connection underneath, for everything that ipyparallel offers.
    """

    def __init__(self, shares: list[list[int]], env: dict[str, str]):
        self.n = len(shares)
        self._names = [*(f"rank{rank}" for rank in range(self.n)), "controller"]  # of processes and their files
        self._shares, self._env = shares, env
        self._start()

    def run(self, function: Callable[..., T], *args: Any, timeout_s: float | None = None) -> list[T]:
        """Run ``function(*args)`` on every rank and return the results in rank order.

        Parameters
        ----------
        function, args
            Pickled by value, so functions written in a notebook cell will do.
        timeout_s
            After this time the ranks are stopped and `RankError` says where each one stood.

        Raises
        ------
        TypeError, ValueError
            The function, an argument or the time cannot be used; nothing ran.
        RankError
            A rank raised, died, or was too late; names it and shows its traceback.
        KeyboardInterrupt
            The cell was interrupted; the ranks were interrupted too.
        """
        import cloudpickle

        pickled = pickle_call(function, args, timeout_s)
        self._require_running()
        results = self._wait(self._watch(self._view.apply_async(call, pickled)), timeout_s)
        return [cloudpickle.loads(result.pop()) for result in results]

    def stop(self) -> None:
        """End the ranks and remove everything they left. Calling it again does no harm."""
        self._stopping.set()
        with self._ending:
            self._resources.close()
        if self._watcher is not None:
            self._watcher.join()

    def restart(self) -> Self:
        """Start the same number of ranks afresh; all variables on the ranks are gone."""
        self.stop()
        self._start()
        return self

    @property
    def client(self) -> Any:
        self._require_running()
        return self._client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = self._broken or ("stopped" if self._stopping.is_set() else "running")
        return f"<World of {self.n} ranks: {state}>"

    # -- starting ---------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._broken: str | None = None  # why this world must be restarted
        self._ended: RankError | None = None  # what those hear who still wait for ranks that are gone
        self._ending = threading.RLock()
        self._stopping = threading.Event()
        self._client = self._watcher = None
        self._watched: dict[Any, float | None] = {}  # AsyncResults at work, and when a first rank raised
        self._resources = contextlib.ExitStack()  # what must be closed, also when nobody calls stop()
        weakref.finalize(self, _close, self._resources, os.getpid())
        try:
            with no_interrupt_lost():
                self._launch()
                self._connect()
        except BaseException:
            self.stop()
            raise

    def _launch(self) -> None:
        _remove_stale_run_directories()
        self._directory = Path(tempfile.mkdtemp(prefix="nurion-"))  # mode 0700
        self._resources.callback(shutil.rmtree, self._directory, ignore_errors=True)
        here = Path(__file__).parent
        controller = [
            *[sys.executable, "-P", "-c", "from nurion_utils.ranks.engine import controller; controller()"],
            f"--profile-dir={self._directory / 'profile'}",
            *["--ip=127.0.0.1", "--location=127.0.0.1", "--usethreads", "--nodb", "--log-level=ERROR"],
            # A rank answers calls from its second heartbeat on, so they come quickly; but that a rank is dead
            # is for the watcher to say: a machine too busy for heartbeats must not lose its ranks.
            *["--HeartMonitor.period=200", "--HeartMonitor.max_heartmonitor_misses=1000000000"],
            # Nobody uses the scheduler of tasks, but all ranks connect to its ports: with none there, they would
            # try for ever, and be taken for a peer by whoever is given that port next, such as Gloo.
            *["--TaskScheduler.scheme_name=pure", "--IPController.broadcast_scheduler_depth=0"],
        ]
        engines = [
            # MPICH's launcher for one machine: it forks the ranks itself and, unlike Hydra, opens no port
            *[str(Path(sys.prefix) / "bin" / "mpiexec.gforker"), "-n", str(self.n)],
            # -P: this package's modules must not be importable as `ranks` or `training`
            *[sys.executable, "-P", str(here / "engine.py"), str(self._directory), json.dumps(self._shares)],
        ]
        environment = {
            **os.environ,
            "IPYTHONDIR": str(self._directory / "ipython"),
            "TMPDIR": str(self._directory),
            **self._env,
        }
        self._guardian = subprocess.Popen(
            [sys.executable, "-I", "-S", str(here / "guardian.py"), str(self._directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in a terminal is for the notebook, not for the clean-up
        )
        self._resources.callback(self._guardian.stderr.close)
        self._resources.callback(_end_processes, self._guardian)
        request = {
            "owner": os.getpid(),
            "commands": {"controller": controller, "mpiexec": engines},
            "env": environment,
        }
        self._guardian.stdin.write(json.dumps(request).encode() + b"\n")
        self._guardian.stdin.flush()

    def _connect(self) -> None:
        import ipyparallel  # 0.5 s of imports, while the ranks are starting

        deadline = time.monotonic() + START_TIMEOUT_S
        connection_file = self._directory / "profile" / "security" / "ipcontroller-client.json"
        while not is_complete(connection_file):
            self._check_start(deadline)
        self._client = ipyparallel.Client(str(connection_file), timeout=START_TIMEOUT_S)
        self._client._task_scheme = "none"  # else it would warn, at each end of a rank, that tasks cannot be farmed
        self._resources.callback(self._client.close, linger=0)
        self._resources.callback(_answer_all, self._client, STOPPED_AT_WORK)
        while len(self._client) < self.n:
            self._check_start(deadline)
        self._view = self._client[:]
        self._view.block = True
        self._processes: dict[str, int] = {}  # pidfds: unlike pids they are never another process'
        for name in self._names:
            self._processes[name] = os.pidfd_open(int((self._directory / f"{name}.pid").read_text()))
            self._resources.callback(os.close, self._processes[name])
        self._resources.callback(self._stopping.set)
        self._watcher = threading.Thread(target=_watch, args=[weakref.ref(self)], name="nurion-watcher", daemon=True)
        self._watcher.start()
        register_magics(self)

    def _check_start(self, deadline: float) -> None:
        """Pause for a moment, or raise when waiting for the ranks has become useless."""
        if self._guardian.poll() is not None:
            raise RankError(f"the ranks could not be started\n{self._guardian.stderr.read().decode()}")
        if ended := sorted(file.stem for file in self._directory.glob("rank*.status")):
            raise RankError(f"the ranks did not start: {failures.ended(ended, self._directory)}")
        if time.monotonic() > deadline:
            words = failures.last_words(self._names, self._directory)
            raise RankError(f"the ranks did not start within {START_TIMEOUT_S:.0f} s{words}")
        time.sleep(0.02)

    def _require_running(self) -> None:
        if self._broken:
            raise RankError(f"{self._broken}; call world.restart()")
        if self._stopping.is_set():
            raise RankError("this world has been stopped; call world.restart() or ranks.start() for a new one")

    # -- waiting and watching ---------------------------------------------------------------------------------

    def _watch(self, result: Any) -> Any:
        self._watched[result] = None
        return result

    def _wait(self, result: Any, timeout_s: float | None = None) -> list[Any]:
        """Wait for all ranks; show their progress; turn whatever went wrong into one error."""
        from concurrent.futures import wait

        deadline = time.monotonic() + (timeout_s or float("inf"))
        bar = ProgressBar()
        try:
            while wait(result._children, timeout=TICK_S).not_done:
                bar.update(result)
                if time.monotonic() > deadline:
                    late = failures.unfinished(result)
                    self._break(f"{failures.numbered(late)} did not finish within {timeout_s:g} s", late)
                if self._broken or self._stopping.is_set():  # and it came when the others had been answered
                    with self._ending:
                        _answer_all(self._client, self._ended or STOPPED_AT_WORK)
        except KeyboardInterrupt:
            self._interrupt(result)
            raise
        finally:
            bar.close(result)
        return failures.results(result, self.n)

    def _interrupt(self, result: Any) -> None:
        """Pass a keyboard interrupt on; ranks that sit in a collective cannot take it and are ended."""
        from concurrent.futures import wait

        self._watched.pop(result, None)
        for rank in range(self.n):
            self._signal(rank, signal.SIGINT)
        with contextlib.suppress(KeyboardInterrupt):  # a second one means: do not wait
            wait(result._children, timeout=GRACE_S)
        if late := failures.unfinished(result):
            self._break(f"{failures.numbered(late)} did not react to the interrupt", late)
            raise KeyboardInterrupt(str(self._ended)) from None

    def _look_after(self) -> bool:
        """Notice dead ranks, and ranks that wait for one that raised; False when there is nothing left to watch."""
        poller = select.poll()
        for descriptor in self._processes.values():
            poller.register(descriptor, select.POLLIN)
        ended = [descriptor for descriptor, _ in poller.poll(0)]
        if self._stopping.is_set() or self._broken:
            return False
        if dead := [name for name, descriptor in self._processes.items() if descriptor in ended]:
            self._break("", [rank for rank in range(self.n) if f"rank{rank}" not in dead], dead)
            return False
        for result, since in list(self._watched.items()):
            if not failures.unfinished(result):
                self._watched.pop(result, None)
            elif errors := failures.errors(result):
                if since is None:
                    self._watched[result] = time.monotonic()
                elif time.monotonic() - since > GRACE_S:
                    self._break(failures.raised(errors, self.n), failures.unfinished(result))
                    return False
        return True

    def _break(self, reason: str, waiting: list[int], dead: list[str] | None = None) -> None:
        """End all ranks and answer everything that still waits for them with the reason."""
        with self._ending:
            if self._broken or self._stopping.is_set():
                return
            try:
                for rank in waiting:
                    self._signal(rank, signal.SIGUSR1)  # faulthandler writes down where it stands, whatever it does
                if dead:
                    reason = failures.ended(dead, self._directory)
                stacks = failures.stood(waiting, self._directory)
                time.sleep(0.3)  # ranks send what they printed every 0.2 s: let it arrive
                self._broken = f"this world has ended because {reason.splitlines()[0]}"
                self._ended = RankError(
                    f"{reason}{stacks}\nAll ranks have been ended; call world.restart() to start them afresh."
                )
            finally:
                self._broken = self._broken or "this world has ended"
                self._ended = self._ended or RankError(self._broken)
                _end_processes(self._guardian)
                _answer_all(self._client, self._ended)

    def _signal(self, rank: int, number: signal.Signals) -> None:
        with contextlib.suppress(OSError):  # it has ended
            signal.pidfd_send_signal(self._processes[f"rank{rank}"], number)


def _watch(world: "weakref.ref[World]") -> None:
    """Body of the watcher thread; it holds no world, so that one that nobody uses any more can go."""
    while (watched := world()) is not None and watched._look_after():
        del watched
        time.sleep(TICK_S)


def _close(resources: contextlib.ExitStack, owner: int) -> None:
    if os.getpid() == owner:  # a forked child of the notebook must not end its parent's ranks
        resources.close()


def _answer_all(client: Any, error: RankError) -> None:
    """Let nobody wait any longer for ranks that are gone."""
    for future in list(client._futures.values()):
        with contextlib.suppress(InvalidStateError):  # the rank was quicker
            future.set_result(error)  # a result, as ipyparallel does with errors


def _end_processes(guardian: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(OSError, ValueError):  # it has ended, or was told before
        guardian.stdin.write(b"end\n")  # said aloud: a forked child may keep the pipe open
        guardian.stdin.close()
    guardian.wait()


def _remove_stale_run_directories() -> None:
    """Sweep up after guardians that were killed themselves, the one end they cannot clean up after."""
    for directory in Path(tempfile.gettempdir()).glob("nurion-*"):
        with contextlib.suppress(OSError):
            if directory.stat().st_uid == os.getuid():
                with open(directory / "lock") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused as long as the guardian lives
                    shutil.rmtree(directory)
