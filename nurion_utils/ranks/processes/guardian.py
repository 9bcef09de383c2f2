"""The process that owns a world's processes, and outlives nobody.

It runs on the standard library alone (``python -I -S``), starts the controller and the ranks, and adopts whatever
they leave behind (Linux' "child subreaper"). Its standard input is a pipe held open by the notebook kernel: however
that ends, the pipe closes, and the guardian kills all below it, and removes shared memory and the run directory.
As the first process of new namespaces it builds what is to be in them, such as virtual nodes, before.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
prctl = ctypes.CDLL(None).prctl


def end_with_parent() -> None:
    """Have Linux kill this process when its parent ends: the last resort, should the guardian be killed."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Process ids of all living descendants of `pid`, nearest first."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", encoding="ascii", errors="replace") as file:
                    state, parent = file.read().rsplit(")", 1)[1].split()[:2]
            except OSError:
                continue  # it ended while we looked
            if state != "Z":
                children.setdefault(int(parent), []).append(int(entry))
    found, queue = [], [pid]
    while queue:
        queue.extend(children.get(queue[0], []))
        found.extend(children.get(queue.pop(0), []))
    return found


def shared_memory_of(pids: list[int]) -> set[str]:
    """Paths under /dev/shm that the processes have open or mapped."""
    paths = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            paths |= mapped_by(pid)
            paths.update(os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd"))
    return {path for path in paths if path.startswith("/dev/shm/")}


def mapped_by(pid: int) -> set[str]:
    """Paths under /dev/shm that the process has mapped; a name that is gone already ends in "(deleted)"."""
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
        return {line.split(maxsplit=5)[5].rstrip("\n") for line in file if " /dev/shm/" in line}


def remove(paths: set[str]) -> None:
    """Remove files, as far as they are still there."""
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)


def kill_everything_below() -> None:
    """SIGKILL descendants until none is left, then remove the shared memory they had."""
    if os.getpid() == 1:  # of a namespace: its processes are all others, and its shared memory goes with it
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        reap(options=0)
        return
    segments: set[str] = set()
    while pids := descendants(os.getpid()):
        # They stop first: what a process makes between a look at it and its end would stay.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(0.01)
            segments |= shared_memory_of(pids)
        reap()
    reap(options=0)  # waits for those that are still falling
    remove(segments)


def reap(options: int = os.WNOHANG) -> dict[int, int]:
    """Collect ended children, adopted ones included: in a container perhaps nobody would after us. Gives statuses."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, options))[0]:
            ended[found[0]] = os.waitstatus_to_exitcode(found[1])
    return ended


def start(run_directory: str, name: str, command: list[str], env: dict[str, str]) -> int:
    """Start a command, with its log and who it is in the run directory; gives its pid."""
    with open(os.path.join(run_directory, f"{name}.log"), "wb") as log:
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    with open(os.path.join(run_directory, f"{name}.process"), "w") as file:
        here = {"namespace": os.readlink("/proc/self/ns/pid"), "node": os.uname().nodename}
        json.dump({"pid": process.pid, **here}, file)
    return process.pid


def main() -> None:
    run_directory, owner = sys.argv[1], int(sys.argv[2])  # a forked child of the kernel would keep the pipe open
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a Ctrl-C meant for the notebook must not end the clean-up
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    farewell = ""
    try:
        path = os.path.join(run_directory, "lock")  # in use until this process ends, also by SIGKILL
        lock = os.open(f"{path}.new", os.O_CREAT | os.O_WRONLY, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(f"{path}.new", path)  # under its name it is never seen without the lock
        request = json.loads(sys.stdin.buffer.raw.readline())
        farewell = request["farewell"]
        building = subprocess.Popen(
            ["sh", "-ec", request["build"]], env=request["env"], stdin=subprocess.DEVNULL, stdout=sys.stderr
        )
        if {sys.stdin, owner} & {*select.select([sys.stdin, owner, os.pidfd_open(building.pid)], [], [])[0]}:
            return  # nobody waits for it any more
        if building.wait():
            return  # it has said why
        names = {start(run_directory, *each, request["env"]): each[0] for each in request["commands"].items()}
        while not select.select([sys.stdin, owner], [], [], 0.5)[0]:
            for pid, status in reap().items():
                if pid in names:
                    with open(os.path.join(run_directory, f"{names[pid]}.ended"), "w") as file:
                        file.write(str(status))
    finally:
        kill_everything_below()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it concerns other machines, which may not answer
            subprocess.run(["sh", "-c", farewell], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=20)
        shutil.rmtree(run_directory, ignore_errors=True)


if __name__ == "__main__":
    main()
