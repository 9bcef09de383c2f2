"""Ranks on the nodes of a job: started by the site's own launcher, looked after by an agent beside each (`agent`)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nurion_utils.ranks import failures
from nurion_utils.ranks.environment import installation, own_environment
from nurion_utils.ranks.failures import RankError
from nurion_utils.ranks.processes import Guarded, agent, controller
from nurion_utils.ranks.processes.folders import on_all_nodes, write_whole
from nurion_utils.schedulers import SchedulerError, State

START_TIMEOUT_S = 120.0
ASK_EVERY_S = 1.0
JOB_ENDS_S = 5.0
ENGINE = Path(__file__).parents[1] / "engine.py"


@dataclass(frozen=True)
class Batch:
    """How to get nodes: `submit` is the scheduler's command, which prints a job's number; `cancel` is a line of shell.

    `state` says how the job of a number is doing. After `wait_s` without nodes it is given up.
    """

    state: Callable[[str], State]
    submit: tuple[str, ...]
    script: str
    cancel: str
    wait_s: float | None


@dataclass(frozen=True)
class Request:
    """`n` ranks, `ranks_per_node` on each node, with `cores` of each node; `launcher` is the command that starts them.

    `batch` is None inside a job. `address` is where the nodes reach this machine.
    """

    n: int
    ranks_per_node: int
    cores: int | None
    launcher: str
    launcher_env: dict[str, str]
    env: dict[str, str]
    address: str
    batch: Batch | None = None


class RemoteRanks:
    """Ranks on other nodes, and their controller; all that they leave goes with `resources`.

    In `directory` is what clients connect with, and a log, a status and a stack for each rank, as their agents tell.
    """

    def __init__(self, request: Request, resources: contextlib.ExitStack) -> None:
        self.n, self._request = request.n, request
        self.names = [*(f"rank{rank}" for rank in range(self.n)), "controller"]
        self._shared = shared = on_all_nodes()
        resources.callback(shutil.rmtree, shared, ignore_errors=True)
        self._guarded = Guarded(resources, [], own_environment())
        resources.callback(self.end)
        self.directory = self._guarded.directory
        self._job = ""  # its number, once it is in the queue
        self._told, self._asked_s, self._began_s = "", 0.0, time.monotonic()
        self._starting_s: float | None = None if request.batch else self._began_s
        farewell = f"rm -rf {shlex.quote(str(shared))}"
        shared.mkdir(mode=0o700)
        world = {**agent.keys(), "n": self.n, "ranks_per_node": request.ranks_per_node, "cores": request.cores}
        world |= {"launcher": request.launcher, "installation": installation()}
        write_whole(shared / "world.json", json.dumps(world).encode())
        os.mkfifo(self.directory / "commands", mode=0o600)
        rank = shlex.join([sys.executable, "-P", str(ENGINE), "--of", str(shared)])
        write_whole(shared / "rank.sh", f"#!/bin/sh\n{exports(request.env)}exec {rank}\n".encode())
        launch = f"{request.launcher} {shlex.join(['sh', '-c', START, str(shared / 'rank.sh'), sys.executable])}"
        launcher, env = ["sh", "-c", f"exec {launch}"], {**own_environment(), **request.launcher_env}
        if batch := request.batch:
            words = {"launch": launch, "shared": shlex.quote(str(shared)), "exports": exports(request.launcher_env)}
            script = batch.script.format(**words)
            write_whole(shared / "job.sh", script.encode())
            launcher, farewell = [*batch.submit, str(shared / "job.sh")], f"{batch.cancel}; {farewell}"
        commands = {
            "controller": controller.for_nodes(shared, request.address),
            "mirror": [sys.executable, "-P", "-c", MIRROR, str(self.directory), str(shared)],
            "launcher": launcher,
        }
        self._guarded.begin(commands, env, farewell=farewell)

    @property
    def connection_file(self) -> Path:
        with contextlib.suppress(FileNotFoundError):
            chosen = json.loads((self._shared / "chosen.json").read_text())
            return Path(chosen["profile"]) / "security" / "ipcontroller-client.json"
        return self._shared / "not chosen"

    def require_starting(self) -> None:
        """Pause for a moment, or raise RankError when waiting for the ranks has become useless."""
        if (words := self._guarded.why_it_ended()) is not None:
            raise RankError(f"the ranks could not be started\n{words}")
        for fault in sorted(self._shared.glob("rank*.fault")):
            raise RankError(fault.read_text())
        if ended := sorted(file.stem for file in self.directory.glob("rank*.status")):
            raise RankError(f"the ranks did not start: {failures.ended(ended, self.directory)}")
        now_s = time.monotonic()
        if now_s - self._asked_s > ASK_EVERY_S:
            self._asked_s = now_s
            self._look_for_blind_nodes()
            self._ask_launcher() if self._request.batch is None else self._ask_scheduler(self._request.batch)
        if self._starting_s and now_s > self._starting_s + START_TIMEOUT_S:
            raise RankError(f"the ranks did not start within {START_TIMEOUT_S:.0f} s{self._words()}")
        time.sleep(0.05)

    def hold(self) -> None:
        """Once all ranks have answered: are they where they should be?"""
        deadline = time.monotonic() + agent.FIRST_S
        while missing := [rank for rank in range(self.n) if not (self.directory / f"rank{rank}.node").exists()]:
            if time.monotonic() > deadline:
                raise RankError(f"the agents of {failures.numbered(missing)} are not heard of{self._words()}")
            time.sleep(0.02)
        if self._request.batch:
            self._command("0 hold")
            while not self._heard("held") and time.monotonic() < deadline:
                time.sleep(0.02)
        else:
            launcher = json.loads((self.directory / "launcher.process").read_text())["pid"]
            os.kill(launcher, signal.SIGSTOP)
        where = Counter((self.directory / f"rank{rank}.node").read_text() for rank in range(self.n))
        most = self._request.ranks_per_node
        if crowded := [f"{count} on {node}" for node, count in where.items() if count > most]:
            raise RankError(
                f"ranks are not where they should be, {most} on each node, but {', '.join(crowded)}: the launcher "
                f"{self._request.launcher!r} of the site must spread them, as 'mpiexec -ppn {most}' does"
            )

    def dead(self) -> list[str]:
        """Names of the processes that have ended; that of a node that is lost, if it is why others ended."""
        ended = self._ended()
        if ended and len(ended) < self.n:
            time.sleep(0.2)  # the others may follow the first one, which is the one to be named
            self._hear_of_all()
            ended = self._ended()
        if ended:
            self._note_end_of_job()
        return ended[:1] or (["controller"] if self._guarded.has_ended("controller") else [])

    def _ended(self) -> list[str]:
        """The ranks that have ended, those that were lost first, then in that order."""
        status = {name: self.directory / f"{name}.status" for name in self.names[:-1]}
        ended = [name for name, path in status.items() if path.exists()]
        return sorted(ended, key=lambda name: (status[name].read_text() != failures.LOST, status[name].stat().st_mtime))

    def _hear_of_all(self) -> None:
        """Wait until each rank has ended or is heard of once more: those who lose a partner end before it is missed."""
        since_s, deadline = time.time(), time.monotonic() + agent.SILENCE_S + agent.BEAT_S
        silent = {self.directory / name for name in self.names[:-1]}
        with contextlib.suppress(FileNotFoundError):  # we are being stopped
            while silent and time.monotonic() < deadline:
                time.sleep(agent.TICK_S)
                silent -= {name for name in silent if name.with_suffix(".status").exists()}
                silent -= {name for name in silent if name.with_suffix(".node").stat().st_mtime > since_s}

    def signal(self, rank: int, number: signal.Signals) -> None:
        self._command(f"{rank} signal {int(number)}")

    def state(self, rank: int) -> str:
        """What Linux says of a rank's process, in words."""
        told = self.directory / f"rank{rank}.state"
        return told.read_text() if told.exists() else "its node tells nothing of it"

    def end(self) -> None:
        """End all processes, and wait until that is done."""
        deadline = time.monotonic() + agent.LINGER_S
        self._command("all end")
        while self._heard("node") > self._heard("gone") and time.monotonic() < deadline:
            time.sleep(0.02)
        self._guarded.end()

    def _heard(self, what: str) -> int:
        """How many ranks' agents have told that."""
        return len(list(self.directory.glob(f"rank*.{what}")))

    def _note_end_of_job(self) -> None:
        """Ranks may end because their job does, of which a scheduler sometimes knows some seconds later."""
        deadline = time.monotonic() + (JOB_ENDS_S if self._heard("status") == self.n else 0)
        with contextlib.suppress(SchedulerError):
            while self._job and not (state := self._request.batch.state(self._job)).ended:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.2)
            if self._job:
                words = f"job {self._job} has ended ({' '.join(filter(None, [state.name, state.reason]))}): "
                write_whole(self.directory / failures.END_OF_JOB, words.encode())

    def _command(self, line: str) -> None:
        with contextlib.suppress(OSError):  # nobody listens: the mirror has ended
            fifo = os.open(self.directory / "commands", os.O_WRONLY | os.O_NONBLOCK)
            os.write(fifo, f"{line}\n".encode())
            os.close(fifo)

    def _words(self) -> str:
        return failures.last_output([*self.names, "launcher"], self.directory)

    def _look_for_blind_nodes(self) -> None:
        for file in (self.directory / "launcher.log", self._shared / "job.out"):
            with contextlib.suppress(OSError):
                if fault := BLIND.search(file.read_text(errors="replace")):
                    raise RankError(fault[0])

    def _ask_launcher(self) -> None:
        if self._guarded.has_ended("launcher"):
            raise RankError(f"the ranks did not start: the launcher {self._request.launcher!r} ended{self._words()}")

    def _ask_scheduler(self, batch: Batch) -> None:
        if not self._guarded.has_ended("launcher"):
            return  # it is being submitted
        said = (self.directory / "launcher.log").read_text().strip()
        id = said.splitlines()[-1].partition(";")[0] if said else ""
        if not id or " " in id:
            raise RankError(f"{batch.submit[0]} refused the job: {said or 'it gave no number'}")
        self._job = id
        try:
            state = batch.state(id)
        except SchedulerError:
            return  # it does not answer now; the job is not lost
        if state.name == "running":
            self._starting_s = self._starting_s or time.monotonic()
        elif state.name == "never":
            raise RankError(f"job {id} can never run: {state.reason}")
        elif state.ended:
            output = self._shared / "job.out"
            words = f"it wrote nothing: its first node must see {self._shared.parent}, as all nodes must"
            if output.exists():
                words = output.read_text()[-2000:]
            raise RankError(f"job {id} ended before its ranks had started ({state.name} {state.reason})\n{words}")
        waited_s = time.monotonic() - self._began_s
        if batch.wait_s is not None and not self._starting_s and waited_s > batch.wait_s:
            raise RankError(f"job {id} had no nodes within {batch.wait_s:g} s ({state.reason})")
        starts = f", expected to start at {time.strftime('%d %b %H:%M', time.localtime(state.starts_at))}"
        line = f"job {id}: {state.name}{f' ({state.reason})' * bool(state.reason)}{starts * bool(state.starts_at)}"
        if line != self._told and state.name == "waiting" and state.reason:
            print(line, flush=True)
            self._told = line


def exports(env: Mapping[str, str]) -> str:
    """The variables of `env` in lines of shell."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items())


# What a node is first asked to run, with what it must see: the first of these files is run.
START = (
    'for each in "$0" "$@"; do [ -r "$each" ] || { echo "node $(uname -n) does not see $each: the home folder and the '
    'environment must be on file systems that all nodes share" >&2; exit 1; }; done; exec sh "$0"'
)
BLIND = re.compile(r"node \S+ does not see .*")
MIRROR = "from nurion_utils.ranks.processes.agent import mirror; mirror()"
