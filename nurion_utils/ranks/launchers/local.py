"""Ranks on this machine: MPICH's launcher below a guardian, and what a world needs to know of their processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nurion_utils._checks import one_of
from nurion_utils.ranks import failures
from nurion_utils.ranks.environment import own_environment
from nurion_utils.ranks.failures import RankError
from nurion_utils.ranks.processes import Guarded, controller, kernel
from nurion_utils.ranks.processes.guardian import descendants

START_TIMEOUT_S = 120.0
LAST_S = 0.3  # a node's first process is the last one that is seen to end
HERE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Placement:
    """Where the processes run and how the ranks are started; unless told otherwise, here and by forking.

    The command `around` runs the guardian, which first has a shell carry out `build`. With `sockets` clients connect
    through files and not through ports, from wherever the run directory is seen. `progress_s` is how often a rank
    between two calls lets MPI go on.
    """

    around: tuple[str, ...] = ()
    build: Callable[[Path], str] = lambda directory: ""  # given the run directory
    # MPICH's launcher for one machine: it forks the ranks itself and, unlike Hydra, opens no port
    mpiexec: tuple[str, ...] = (str(Path(sys.prefix) / "bin" / "mpiexec.gforker"),)
    env: Mapping[str, str] = field(default_factory=dict)
    sockets: bool = False
    progress_s: float = 0.0


class LocalRanks:
    """Ranks on these `shares` of the cores, and their controller; all that they leave goes with `resources`.

    In `directory` they write what clients connect with, and a log, a status and a stack for each rank.
    """

    def __init__(
        self, shares: list[list[int]], env: dict[str, str], place: Placement, resources: contextlib.ExitStack
    ) -> None:
        self.n, self._resources = len(shares), resources
        self.names = [*(f"rank{rank}" for rank in range(self.n)), "controller"]  # of processes and their files
        self._processes: dict[str, int] = {}  # pidfds: unlike pids they are never another process'
        self._nodes: dict[str, list[str]] = {}  # the ranks of each virtual node
        self._deadline_s = time.monotonic() + START_TIMEOUT_S
        self._guarded = Guarded(resources, place.around, {**own_environment(), **place.env})
        self.directory, self.end = self._guarded.directory, self._guarded.end
        self.connection_file = self.directory / "profile" / "security" / "ipcontroller-client.json"
        own = {"IPYTHONDIR": str(self.directory / "ipython"), "TMPDIR": str(self.directory)}
        environment = {**own_environment(), **own, **env}
        self._guarded.begin(self._commands(shares, place), environment, place.build(self.directory))

    def _commands(self, shares: list[list[int]], place: Placement) -> dict[str, list[str]]:
        connecting = controller.in_files if place.sockets else controller.on_this_machine
        engines = [
            *[*place.mpiexec, "-n", str(self.n)],
            # -P: this package's modules must not be importable as `ranks` or `training`
            *[sys.executable, "-P", str(HERE / "engine.py"), str(self.directory), json.dumps(shares)],
            str(place.progress_s),
        ]
        return {"controller": connecting(self.directory), "mpiexec": engines}

    def require_starting(self) -> None:
        """Pause for a moment, or raise RankError when waiting for the ranks has become useless."""
        if (words := self._guarded.why_it_ended()) is not None:
            raise RankError(f"the ranks could not be started\n{words}")
        if ended := sorted(file.stem for file in self.directory.glob("rank*.status")):
            raise RankError(f"the ranks did not start: {failures.ended(ended, self.directory)}")
        if self._guarded.has_ended("mpiexec"):
            raise RankError(f"the ranks did not start{failures.last_output(['mpiexec', *self.names], self.directory)}")
        if time.monotonic() > self._deadline_s:
            output = failures.last_output(self.names, self.directory)
            raise RankError(f"the ranks did not start within {START_TIMEOUT_S:.0f} s{output}")
        time.sleep(0.02)

    def hold(self) -> None:
        """Once all ranks have answered: hold on to their processes, to see them end and to signal them."""
        guardian = self._guarded.process.pid
        here = dict(map(_identity, [guardian, *descendants(guardian)]))
        for name in [*self.names, "mpiexec"]:
            said = json.loads((self.directory / f"{name}.process").read_text())
            if (said["namespace"], said["pid"]) not in here:
                raise RankError(f"the ranks did not start: {failures.ended([name], self.directory)}")
            self._hold(name, here[said["namespace"], said["pid"]])
            if name.startswith("rank") and said["node"] != os.uname().nodename:
                self._nodes.setdefault(said["node"], []).append(name)
                (self.directory / f"{name}.node").write_text(said["node"])
                if said["node"] not in self._processes:
                    self._hold(said["node"], here[said["namespace"], 1])
        launcher = self._processes.pop("mpiexec")
        if self._nodes:  # it would end all ranks at once when it loses a node, and nobody could tell where they were
            signal.pidfd_send_signal(launcher, signal.SIGSTOP)

    def _hold(self, name: str, pid: int) -> None:
        self._processes[name] = os.pidfd_open(pid)
        self._resources.callback(os.close, self._processes[name])

    def unplug(self, node: str) -> None:
        """End a virtual node's first process, and with it all others there."""
        one_of(node, "node", self._nodes)
        signal.pidfd_send_signal(self._processes[node], signal.SIGKILL)

    def dead(self) -> list[str]:
        """Names of the processes that have ended; those of a node that is lost alone, if it is why others ended."""
        ended = self._ended()
        if ended and self._nodes:
            time.sleep(LAST_S)
            for node in {*self._ended()} & {*self._nodes}:
                for name in self._nodes[node]:
                    with contextlib.suppress(OSError):  # we are being stopped
                        (self.directory / f"{name}.status").write_text(failures.LOST)
                return self._nodes[node]
        return ended

    def _ended(self) -> list[str]:
        poller = select.poll()
        for descriptor in self._processes.values():
            poller.register(descriptor, select.POLLIN)
        ended = [descriptor for descriptor, _ in poller.poll(0)]
        return [name for name, descriptor in self._processes.items() if descriptor in ended]

    def signal(self, rank: int, number: signal.Signals) -> None:
        with contextlib.suppress(OSError):  # it has ended
            signal.pidfd_send_signal(self._processes[f"rank{rank}"], number)

    def state(self, rank: int) -> str:
        """What Linux says of a rank's process, in words."""
        held = Path(f"/proc/self/fdinfo/{self._processes[f'rank{rank}']}").read_text()
        return kernel.state(int(re.search(r"^Pid:\s+(-?\d+)", held, re.MULTILINE)[1]))


def _identity(pid: int) -> tuple[tuple[str, int], int]:
    """What a process, `pid` here, knows itself by: its namespace and its number in it; nothing if it has ended."""
    with contextlib.suppress(OSError):
        numbers = re.search(r"^NSpid:.*?(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return (os.readlink(f"/proc/{pid}/ns/pid"), int(numbers[1])), pid
    return ("", pid), pid
