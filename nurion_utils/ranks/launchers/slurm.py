"""Ranks through Slurm: what their launcher hears in a job, and how a job is asked for."""

from __future__ import annotations

import shlex

from nurion_utils.ranks.launchers.allocation import Allocation
from nurion_utils.schedulers.slurm import state as state
from nurion_utils.sites import Site


def in_job(launcher: str, job: Allocation, nodes: int, each: int) -> tuple[str, dict[str, str]]:
    """The command that starts ranks on the first `nodes` of a job, and the environment it wants.

    mpiexec and srun read the latter; a step, in which the notebook may run, has values of its own for some.
    """
    names = ",".join(job.nodes[:nodes])
    return launcher, {
        **{"SLURM_JOB_ID": job.id, "SLURM_JOB_NODELIST": names, "SLURM_NODELIST": names, "SLURM_OVERLAP": "1"},
        **{"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_NNODES": str(nodes), "SLURM_TASKS_PER_NODE": f"{each}(x{nodes})"},
    }


def in_new_job(launcher: str) -> dict[str, str]:
    """The environment that the command wants in a job of its own."""
    return {}


def submission(site: Site, name: str, numbers: dict[str, int], minutes: int, queue: str | None) -> list[str]:
    """The command that submits a job, but for options and script."""
    return [
        *["sbatch", "--parsable", f"--job-name={name}", f"--nodes={numbers['nodes']}"],
        *[f"--ntasks-per-node={numbers['ranks_per_node']}", f"--cpus-per-task={numbers['cores_per_rank']}"],
        *[f"--time={minutes}", "--output=/dev/null"],  # the script keeps its output itself
        *([f"{site.scheduler.queue_option or '--partition'}={queue}"] if queue else []),
    ]


def cancellation(name: str) -> str:
    """A line of shell that ends the jobs of that name."""
    return f"timeout 10 scancel --jobname={shlex.quote(name)}"
