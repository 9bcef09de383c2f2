"""Start ranks on this machine under Horovod's elastic mode, and see them through to the end."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any
from urllib.request import urlopen

import cloudpickle
from horovod.runner.common.util.hosts import INVALID_SLOT_INFO, SlotInfo
from horovod.runner.elastic.rendezvous import GET_RANK_AND_SIZE
from horovod.runner.gloo_run import create_run_env_vars, create_slot_env_vars
from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

from nurion_utils.ranks.calls import pickle_call
from nurion_utils.ranks.environment import own_environment, rank_environment
from nurion_utils.ranks.failures import RankError, how_it_ended

TICK_S = 0.05
GRACE_S = 2.0  # how long other ranks may still raise after one has
# A rank that is no neighbour of the lost one notices only by waiting this long in vain.
GLOO_TIMEOUT_S = 10

# The rank ends with the thread that started it, from before its slow imports on.
START = (
    "import os, sys; from nurion_utils.ranks.processes.guardian import end_with_parent; end_with_parent(); "
    "os.getppid() == int(sys.argv[1]) or os._exit(1); "
    "from nurion_utils.ranks.launchers.elastic import _work; _work()"
)


def elastic_launch(
    function: Callable, *args: Any, ranks: int = 4, min_ranks: int = 2, timeout_s: float | None = 600.0
) -> list[Any]:
    """Run ``function(*args)`` on new ranks of this machine, and go on without those that die.

    The ranks talk over Gloo and the loopback interface. What they print is kept for error messages only.
    A rank that is killed counts as a lost node. One that raises has a mistake, which ends the launch.
    Returned are the results of the ranks that lived to the end, in rank order.

    Parameters
    ----------
    function, args
        Runs on every rank, with Horovod initialised; it makes an `ElasticState` and calls a function made with
        `elastic_run`. Sent with cloudpickle.
    ranks, min_ranks
        Ranks to start with, and fewest ranks to go on with.
    timeout_s
        Longest time in all, in seconds; None waits without limit.

    Raises
    ------
    TypeError, ValueError
        The function cannot be sent, or the numbers make no sense; nothing was started.
    RankError
        A rank raised (with the tracebacks of all that did), fewer than `min_ranks` are left, or time is up. No rank is
        left running then, nor if this process itself is killed.

    Notes
    -----
    Horovod's own elastic driver listens on all interfaces and unpickles what anybody sends there; this one does not.
    But Gloo asks nobody who they are, and listens on the loopback interface while the launch lasts.

    Survivors notice a loss at once or within 10 s. A further one while they reconnect ends them all: Horovod aborts.
    """
    if not 1 <= min_ranks <= ranks:
        raise ValueError(f"min_ranks must be from 1 to ranks={ranks}, not {min_ranks}")
    payload = pickle_call(function, args, timeout_s)
    rendezvous = Rendezvous([f"rank{i}" for i in range(ranks)])
    workers: dict[str, _Worker] = {}
    try:
        for host, slot in rendezvous.slots.items():
            workers[host] = _Worker(payload, rendezvous.port, slot)
        return _follow(workers, rendezvous, min_ranks, timeout_s or math.inf)
    finally:
        for worker in workers.values():
            worker.close()
        rendezvous.close()


def _follow(workers: dict[str, _Worker], rendezvous: Rendezvous, min_ranks: int, timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[str, Any] = {}
    errors: dict[str, list[str]] = {}
    lost: list[str] = []
    while rendezvous.living:
        for host in [host for host in rendezvous.living if workers[host].process.poll() is not None]:
            slot, outcome = rendezvous.slots[host], workers[host].outcome()
            who = f"rank {slot.rank} of {slot.size}"
            if outcome is None:
                lost.append(f"{who} {workers[host].end()}")
            elif outcome[0]:
                results[host] = outcome[1]
            else:  # and the others are often about to raise the same
                deadline = min(deadline, time.monotonic() + GRACE_S)
                errors.setdefault(outcome[1], []).append(who)
            rendezvous.remove(host, go_on=not errors)
        left = len(rendezvous.living)
        late = time.monotonic() > deadline
        failure = ""
        if errors and (late or not left):
            failure = "\n".join(f"{', '.join(sorted(who))} failed:\n{what}" for what, who in errors.items())
        elif late:
            failure = f"{left} of {len(workers)} ranks did not finish within {timeout_s:g} s"
        elif left + len(results) < min_ranks and not errors:
            failure = f"{left + len(results)} of {len(workers)} ranks are left, fewer than min_ranks={min_ranks}"
        if failure:
            raise RankError("\n".join([failure, *lost]))
        time.sleep(TICK_S)
    return [results[host] for host in workers if host in results]


class _Worker:
    """A process that runs the function as one rank; all its files are nameless, so none can be left behind."""

    def __init__(self, payload: bytes, port: int, slot: SlotInfo) -> None:
        threads = max(1, len(os.sched_getaffinity(0)) // slot.size)
        settings = {
            **rank_environment(threads),
            **create_run_env_vars("127.0.0.1", ["lo"], port, elastic=True),
            **create_slot_env_vars(slot),
            "HOROVOD_GLOO_TIMEOUT_SECONDS": GLOO_TIMEOUT_S,
            "no_proxy": ",".join(filter(None, ["127.0.0.1", os.environ.get("no_proxy")])),
        }
        self._log, self._task = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self._task_bytes = self._task.write(payload)  # the outcome comes behind it
        self._task.seek(0)
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(os.getpid())],
            stdin=self._task,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=own_environment() | {name: str(value) for name, value in settings.items()},
            start_new_session=True,
        )

    def outcome(self) -> tuple[bool, Any] | None:
        """(True, result) or (False, what went wrong), or None from a rank that was killed."""
        self._task.seek(self._task_bytes)
        if data := self._task.read():
            return cloudpickle.loads(data)
        return None if self.process.returncode < 0 else (False, self.end())

    def end(self) -> str:
        """How the process ended, and its last output."""
        self._log.seek(0)
        return f"{how_it_ended(self.process.returncode)}\n{self._log.read()[-2000:].decode(errors='replace')}".strip()

    def close(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._log.close()
        self._task.close()


def _work() -> None:
    """On a rank: run what standard input holds, and write down in the same file, behind it, what came of it."""
    try:
        function, args = cloudpickle.load(sys.stdin.buffer)
        import horovod.tensorflow as hvd  # only here: the process that launches has no use for TensorFlow

        _take_place()
        hvd.init()
        data = cloudpickle.dumps((True, function(*args)))
        hvd.shutdown()
    except BaseException:  # sys.exit() of one rank too must not pass for its end
        data = cloudpickle.dumps((False, traceback.format_exc()))
    with open(0, "ab") as file:
        file.write(data)
    sys.stdout.flush()
    os._exit(0)  # TensorFlow would take seconds to put itself away


def _take_place() -> None:
    """Ask for a rank before connecting, as Horovod does any later time: one lost while importing is not missed."""
    address, port, host = (
        os.environ[f"HOROVOD_{name}"] for name in ("GLOO_RENDEZVOUS_ADDR", "GLOO_RENDEZVOUS_PORT", "HOSTNAME")
    )
    with urlopen(f"http://{address}:{port}/{GET_RANK_AND_SIZE}/{host}:0") as response:
        numbers = response.read().decode().split(",")
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    os.environ.update({f"HOROVOD_{name}": number for name, number in zip(names, numbers, strict=True)})


class Rendezvous:
    """Tells ranks who they are, whenever all that live ask. To Horovod each is a host: losing one costs no other."""

    def __init__(self, hosts: list[str], address: str = "127.0.0.1") -> None:
        self.living = list(hosts)
        self.slots: dict[str, SlotInfo] = {}
        self._asking: set[str] = set()
        self._changed = threading.Condition()
        rendezvous = self

        class Handler(RendezvousHandler):
            def _get_value(self, scope: str, key: str) -> bytes | None:
                if scope != GET_RANK_AND_SIZE:
                    return super()._get_value(scope, key)
                return rendezvous._next_slot(key.partition(":")[0]).to_response_string().encode()

        self._server = RendezvousHTTPServer((address, 0), Handler, 0)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a rank that died while it asked
        self.address, self.port = self._server.server_address
        with self._changed:
            self._deal()
        self._thread = threading.Thread(target=self._server.serve_forever, args=(TICK_S,), daemon=True)
        self._thread.start()

    def _deal(self) -> None:
        size = len(self.living)
        # In order of age: rank 0, whose state the others take over, must be one that has a state.
        self.slots |= {host: SlotInfo(host, rank, 0, rank, size, 1, size) for rank, host in enumerate(self.living)}
        self._server.init([self.slots[host] for host in self.living])
        self._asking.clear()
        self._changed.notify_all()

    def _next_slot(self, host: str) -> SlotInfo:
        with self._changed:
            self._asking.add(host)
            if self._asking == set(self.living):
                self._deal()
            self._changed.wait_for(lambda: host not in self._asking)
            return self.slots[host] if host in self.living else INVALID_SLOT_INFO

    def remove(self, host: str, go_on: bool) -> None:
        """Count a process that has ended no longer among the living."""
        with self._changed:
            self.living.remove(host)
            self._asking.discard(host)
            self._changed.notify_all()
            if go_on and self._asking and self._asking == set(self.living):
                self._deal()

    def close(self) -> None:
        with self._changed:
            self.living.clear()
            self._asking.clear()
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
