"""PBS Pro, told and asked by its own commands; see `commands` for what they answer."""

from __future__ import annotations

import getpass
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nurion_utils.schedulers.commands import SchedulerError, State, run, submitted

FINISHED, UNKNOWN = 35, 153  # what qstat and qdel return for such a job
OVER_WALLTIME, DELETED = -29, 91  # an exit status and a substate


def submit(
    script: str | os.PathLike[str], options: Sequence[str] = (), directory: str | os.PathLike[str] | None = None
) -> str:
    """Submit a script from a directory, this one unless given; returns the job's id."""
    return submitted(["qsub", *options, script], directory)


def state(id: str) -> State:
    """How a job is doing."""
    code, said = run(["qstat", "-f", "-F", "json", id])
    if code == FINISHED:  # now only its history is known, where one is kept
        code, said = run(["qstat", "-x", "-f", "-F", "json", id])
        if code != 0:
            return State("gone")
    if code == UNKNOWN:
        return State("gone")
    if code != 0:
        raise SchedulerError(f"PBS cannot be asked after job {id}: {said}")
    try:
        found = json.loads(said, strict=False).get("Jobs", {})
    except json.JSONDecodeError as error:
        raise SchedulerError(f"what qstat says of job {id} is not JSON: {error}") from None
    return _state(next(iter(found.values()))) if found else State("gone")


def cancel(id: str) -> None:
    """End a job; one that has ended already is left alone."""
    code, said = run(["qdel", id])
    if code not in (0, FINISHED, UNKNOWN):
        raise SchedulerError(f"job {id} was not cancelled: {said}")


def waiting(queue: str | None) -> int:
    """How many jobs of this user's wait in a queue, or in all."""
    code, said = run(["qselect", "-u", getpass.getuser(), "-s", "HQW", *(["-q", queue] if queue else [])])
    return len(said.split()) if code == 0 else 0


def launcher_environment(launcher: str) -> dict[str, str]:
    """What makes MPICH's mpiexec reach a job's nodes through PBS, as it cannot by ssh; others do so by themselves."""
    if os.path.basename(launcher.split()[0]) != "mpiexec":
        return {}
    script = Path(__file__).with_name("pbs_rsh.sh")
    # `rsh`, because before a host it puts what is said here, and nothing else.
    return {"HYDRA_LAUNCHER": "rsh", "HYDRA_LAUNCHER_EXEC": "/bin/sh", "HYDRA_LAUNCHER_EXTRA_ARGS": str(script)}


def _state(job: Mapping[str, Any]) -> State:
    letter, status, reason = job.get("job_state", ""), job.get("Exit_status"), job.get("comment", "")
    if letter in ("F", "X"):
        name = "cancelled" if job.get("substate") == DELETED else "failed" if status != 0 else "done"
        reason = "over its walltime" if status == OVER_WALLTIME else reason
    elif letter in ("R", "E", "B", "S", "U"):
        name = "running"
    else:
        name = "never" if "Can Never Run" in reason else "waiting"
    expected = job.get("estimated", {}).get("start_time") if name == "waiting" else None
    nodes = tuple(dict.fromkeys(re.findall(r"([^/+]+)/", job.get("exec_host", ""))))
    return State(name, reason, _seconds(job.get("stime") or expected), status, nodes)


def _seconds(when: str | int | None) -> float | None:
    """PBS writes times as ``Fri Nov 27 04:03:02 2026``, or as seconds."""
    if when is None or isinstance(when, int):
        return when
    try:
        return time.mktime(time.strptime(when))
    except ValueError:
        return None
