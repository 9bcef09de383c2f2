"""Ranks through PBS Pro: what their launcher hears in a job, and how a job is asked for."""

from __future__ import annotations

import os
import shlex

from nurion_utils.ranks.launchers.allocation import Allocation
from nurion_utils.schedulers.pbs import launcher_environment as in_new_job
from nurion_utils.schedulers.pbs import state as state
from nurion_utils.sites import Site

TOLD = ("PBS_NODEFILE", "PBS_NODENUM", "PBS_TASKNUM", "PBS_MOMPORT")  # ranks must not hear it, but pbs_tmrsh must


def in_job(launcher: str, job: Allocation, nodes: int, each: int) -> tuple[str, dict[str, str]]:
    """The command that starts ranks on the first `nodes` of a job, and the environment it wants."""
    env = {name: os.environ[name] for name in TOLD if name in os.environ}
    if mpich := in_new_job(launcher):
        launcher += f" -hosts {','.join(job.nodes[:nodes])}"
    return launcher, {**env, **mpich}


def submission(site: Site, name: str, numbers: dict[str, int], minutes: int, queue: str | None) -> list[str]:
    """The command that submits a job, but for options and script."""
    shape = "{nodes}:ncpus={cores}:mpiprocs={ranks_per_node}:ompthreads={cores_per_rank}".format(**numbers)
    return [
        *["qsub", "-N", name, "-l", f"select={shape}", "-l", "place=scatter"],
        *["-l", f"walltime={minutes // 60:02}:{minutes % 60:02}:00", "-V"],
        # The script keeps its output itself. PBS brings its own when the job has ended, and its folder may be gone.
        *["-j", "oe", "-o", "/dev/null"],
        *(["-q", queue] if queue else []),
    ]


def cancellation(name: str) -> str:
    """A line of shell that ends the jobs of that name."""
    return f"timeout 10 qselect -N {shlex.quote(name)} | timeout 10 xargs -r qdel"
