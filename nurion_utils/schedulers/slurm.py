"""Slurm, told and asked by its own commands; see `commands` for what they answer."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from datetime import datetime

from nurion_utils.schedulers.commands import SchedulerError, State, run, submitted

# A job with such a reason waits until it is cancelled. Others, as Resources, pass.
NEVER = re.compile(
    r"Partition(NodeLimit|TimeLimit|Config)|BadConstraints|Invalid(Account|QOS)|DependencyNeverSatisfied|MaxMemPerLimit"
    r"|(QOS|Assoc)\w*Max\w*Per(Job|Node)\w*|(QOS|Assoc)MaxWallDuration\w*"
)
NAMES = {"PENDING": "waiting", "COMPLETED": "done", "CANCELLED": "cancelled"}
FAILED = {"FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED"}
REQUEUED = {"REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
FIELDS = ("JobState", "Reason", "StartTime", "ExitCode", "NodeList")


def submit(
    script: str | os.PathLike[str], options: Sequence[str] = (), directory: str | os.PathLike[str] | None = None
) -> str:
    """Submit a script from a directory, this one unless given; returns the job's id."""
    return submitted(["sbatch", "--parsable", *options, script], directory).partition(";")[0]


def state(id: str) -> State:
    """How a job is doing."""
    code, said = run(["scontrol", "show", "job", "--oneliner", id])
    if code == 0:
        found = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", said))
        return _state(*(found.get(key, "") for key in FIELDS))
    if "Invalid job id" not in said:
        raise SchedulerError(f"Slurm cannot be asked after job {id}: {said}")
    if shutil.which("sacct"):  # which answers only where accounts are kept
        code, said = run(["sacct", "-X", "-n", "-P", "-j", id, "-o", "State,Reason,Start,ExitCode,NodeList"])
        if code == 0 and said.count("|") == 4:
            return _state(*said.split("|"))
    return State("gone")


def cancel(id: str) -> None:
    """End a job; one that has ended already is left alone."""
    code, said = run(["scancel", id])
    if code != 0 and "Invalid job id" not in said:
        raise SchedulerError(f"job {id} was not cancelled: {said}")


def waiting(queue: str | None) -> int:
    """How many jobs of this user's wait in a queue, or in all."""
    code, said = run(["squeue", "--me", "-h", "-r", "-t", "PENDING", "-o", "%i", *(["-p", queue] if queue else [])])
    return len(said.split()) if code == 0 else 0


def _state(word: str, reason: str, start: str, exit_code: str, nodes: str) -> State:
    word, reason = word.split()[0], "" if reason in ("None", "") else reason  # sacct: "CANCELLED by 0"
    name = NAMES.get(word, "failed" if word in FAILED else "waiting" if word in REQUEUED else "running")
    if name == "waiting" and NEVER.fullmatch(reason):
        name = "never"
    if name == "failed" and word != "FAILED":
        reason = f"{word} {reason}".strip()
    starts_at = datetime.fromisoformat(start).timestamp() if re.match(r"\d{4}-", start) else None
    ended = name in ("done", "failed", "cancelled")
    status, signal = (int(part) for part in (re.findall(r"\d+", exit_code) + ["0", "0"])[:2])
    return State(name, reason, starts_at, (status or 128 * bool(signal) + signal) if ended else None, _hosts(nodes))


def _hosts(nodes: str) -> tuple[str, ...]:
    if nodes in ("", "(null)", "None assigned"):
        return ()
    return tuple(run(["scontrol", "show", "hostnames", nodes])[1].split())
