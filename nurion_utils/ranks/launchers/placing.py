"""Where ranks are to run, from what a notebook asks for and where it runs itself: here, in its job, or in a new one."""

from __future__ import annotations

import os
import secrets
import shlex
import socket
import sys
from collections.abc import Sequence
from typing import TypedDict

from nurion_utils import sites
from nurion_utils._checks import number, positive, whole_number
from nurion_utils.ranks.environment import rank_environment
from nurion_utils.ranks.launchers.allocation import Allocation
from nurion_utils.ranks.launchers.remote import Batch, Request
from nurion_utils.ranks.processes.agent import address_towards


class Wanted(TypedDict, total=False):
    """What ranks of a job can be asked for: see `ranks.start`."""

    nodes: int
    minutes: float
    queue: str
    options: Sequence[str]
    wait_s: float


def request(
    n: int, site: sites.Site, cores_per_rank: int | None, job: Allocation | None, wanted: Wanted, env: dict[str, str]
) -> Request:
    """Ranks on the nodes of `job`, in which this process runs, or of a new one; ValueError if that is not possible."""
    scheduler = site.scheduler
    most = len(job.nodes) if job else site.node.count if site.partitions else None
    nodes = whole_number(wanted.get("nodes", min(n, most or n)), "nodes", most=most)
    if n % nodes:
        raise ValueError(f"{n} ranks cannot be dealt out equally to {nodes} nodes: ask for a multiple of {nodes} ranks")
    each = n // nodes
    cores = job.cores if job else site.node.cores if site.partitions else None
    if cores is None:
        cores = each * whole_number(cores_per_rank or 1, "cores_per_rank")
    share = whole_number(cores_per_rank or max(1, cores // each), "cores_per_rank", most=max(1, cores // each))
    numbers = {"nodes": nodes, "ranks": n, "ranks_per_node": each, "cores_per_rank": share}
    variables = rank_environment(share)
    del variables["UCX_TLS"]  # of one machine; on others MPI finds out best itself
    if job:
        known = {"nodes": job.nodes[:nodes], "address": address_towards(job.nodes[-1])}
        launcher_env = {"PATH": _path(), **LAUNCHER_ENV[scheduler.kind](job, nodes, each)}
    else:
        known, launcher_env = {"address": _own_address(), "batch": _batch(site, numbers, wanted)}, {"PATH": _path()}
    return Request(
        n=n,
        ranks_per_node=each,
        cores=job.cores if job else None,
        launcher=scheduler.launcher.format(**numbers),
        launcher_env=launcher_env,
        env={**variables, **env},
        **known,
    )


def _path() -> str:
    return os.pathsep.join([f"{sys.prefix}/bin", os.environ.get("PATH", os.defpath)])


def _own_address() -> str:
    """Where others reach this machine: by its name, or on its way out where its name means only itself."""
    address = socket.gethostbyname(socket.gethostname())
    return address_towards("192.0.2.1") if address.startswith("127.") else address


def _slurm_env(job: Allocation, nodes: int, each: int) -> dict[str, str]:
    """What mpiexec and srun read of a job; a step, in which the notebook may run, has values of its own for some."""
    names = ",".join(job.nodes[:nodes])
    return {
        **{"SLURM_JOB_ID": job.id, "SLURM_JOB_NODELIST": names, "SLURM_NODELIST": names, "SLURM_OVERLAP": "1"},
        **{"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_NNODES": str(nodes), "SLURM_TASKS_PER_NODE": f"{each}(x{nodes})"},
    }


# The launcher is held when all ranks are there: it would end them all when it loses a node.
SCRIPT = """#!/bin/bash
exec > {shared}/job.out 2>&1
{launch} &
echo "$(uname -n) $!" > {shared}/launcher
wait
"""
LAUNCHER_ENV = {"Slurm": _slurm_env}


def _batch(site: sites.Site, numbers: dict[str, int], wanted: Wanted) -> Batch:
    scheduler = site.scheduler
    minutes, queue = number(wanted.get("minutes", 60), "minutes", above=0), wanted.get("queue", scheduler.job_queue)
    wait_s = wanted.get("wait_s")
    if wait_s is not None:
        positive(wait_s, "wait_s")
    name = f"nurion-{secrets.token_hex(4)}"
    submit = [
        *["sbatch", "--parsable", "--output=/dev/null", f"--job-name={name}", f"--nodes={numbers['nodes']}"],
        *[f"--ntasks-per-node={numbers['ranks_per_node']}", f"--cpus-per-task={numbers['cores_per_rank']}"],
        *[f"--time={max(1, round(minutes))}", *wanted.get("options", [])],
        *([f"{scheduler.queue_option or '--partition'}={queue}"] if queue else []),
    ]
    return Batch(
        kind="slurm",
        name=name,
        submit=tuple(submit),
        script=SCRIPT,
        cancel=f"timeout 10 scancel --jobname={shlex.quote(name)}",
        wait_s=wait_s,
    )
