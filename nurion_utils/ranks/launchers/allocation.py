"""What a job of a scheduler was given, as the processes in it are told: nodes, and cores on each."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nurion_utils.ranks.failures import RankError

PACKED = re.compile(r"([^,\[]+)(?:\[([^\]]*)\])?(?:,|$)")


@dataclass(frozen=True)
class Allocation:
    """The nodes of job `id`, in order, and the cores that it has on each of them."""

    scheduler: str  # as a site's description calls it
    id: str
    nodes: tuple[str, ...]
    cores: int

    @property
    def is_here(self) -> bool:
        """Whether it is this machine alone."""
        return len(self.nodes) == 1 and self.nodes[0].split(".")[0] == socket.gethostname().split(".")[0]


def current(environment: Mapping[str, str] = os.environ) -> Allocation | None:
    """The job in which this process runs, if any; RankError if what its scheduler says makes no sense."""
    try:
        if "SLURM_JOB_ID" in environment:
            return _slurm(environment)
        if "PBS_JOBID" in environment:
            return _pbs(environment)
    except (KeyError, ValueError, OSError) as error:
        raise RankError(
            f"the scheduler's variables do not say which nodes this job has ({type(error).__name__}: {error}): start "
            "the notebook inside the job, with the environment that the scheduler gives it"
        ) from None
    return None


def _slurm(environment: Mapping[str, str]) -> Allocation:
    cores = min(int(each.partition("(")[0]) for each in environment["SLURM_JOB_CPUS_PER_NODE"].split(","))
    return Allocation("Slurm", environment["SLURM_JOB_ID"], unpacked(environment["SLURM_JOB_NODELIST"]), cores)


def _pbs(environment: Mapping[str, str]) -> Allocation:
    lines = Path(environment["PBS_NODEFILE"]).read_text().split()
    if not lines:
        raise ValueError("PBS_NODEFILE is empty")
    return Allocation("PBS Pro", environment["PBS_JOBID"], tuple(dict.fromkeys(lines)), int(environment["NCPUS"]))


def unpacked(names: str) -> tuple[str, ...]:
    """Names of nodes as Slurm packs them.

    >>> unpacked("n[1-3,07],login")
    ('n1', 'n2', 'n3', 'n07', 'login')
    """
    found = []
    for stem, ranges in PACKED.findall(names):
        for each in ranges.split(",") if ranges else [""]:
            first, _, last = each.partition("-")
            width = len(first)
            numbers = range(int(first), int(last or first) + 1) if each else []
            found += [f"{stem}{number:0{width}}" for number in numbers] if each else [stem]
    return tuple(found)
