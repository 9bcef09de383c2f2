"""Where ranks are to run, from what a notebook asks for and where it runs itself: here, in its job, or in a new one."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from typing import TypedDict

from nurion_utils import sites
from nurion_utils._checks import number, positive, whole_number
from nurion_utils.ranks.environment import rank_environment
from nurion_utils.ranks.launchers import pbs, slurm
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
    kind, launcher = site.scheduler.kind, site.scheduler.launcher
    if kind not in SCHEDULERS:
        raise ValueError(f"site {site.name!r} has {kind}: ranks are started through {' or '.join(SCHEDULERS)}")
    most = len(job.nodes) if job else site.node.count if site.partitions else None
    nodes = whole_number(wanted.get("nodes", min(n, most or n)), "nodes", most=most)
    if n % nodes:
        raise ValueError(f"{n} ranks cannot be dealt out equally to {nodes} nodes: ask for a multiple of {nodes} ranks")
    each = n // nodes
    cores = job.cores if job else site.node.cores if site.partitions else None
    if cores is None:
        cores = each * whole_number(cores_per_rank or 1, "cores_per_rank")
    share = whole_number(cores_per_rank or max(1, cores // each), "cores_per_rank", most=max(1, cores // each))
    numbers = {"nodes": nodes, "ranks": n, "ranks_per_node": each, "cores_per_rank": share, "cores": cores}
    launcher = launcher.format(**numbers)
    variables = rank_environment(share)
    del variables["UCX_TLS"]  # of one machine; on others MPI finds out best itself
    if job:
        known = {"address": address_towards(job.nodes[-1])}
        launcher, launcher_env = SCHEDULERS[kind].in_job(launcher, job, nodes, each)
    else:
        known = {"address": _own_address(), "batch": _batch(site, numbers, wanted)}
        launcher_env = SCHEDULERS[kind].in_new_job(launcher)
    return Request(
        n=n,
        ranks_per_node=each,
        cores=job.cores if job else None,
        launcher=launcher,
        launcher_env={"PATH": _path(), **launcher_env},
        env={**variables, **env},
        **known,
    )


def _path() -> str:
    return os.pathsep.join([f"{sys.prefix}/bin", os.environ.get("PATH", os.defpath)])


def _own_address() -> str:
    """Where others reach this machine: by its name, or on its way out where its name means only itself."""
    with contextlib.suppress(OSError):
        if not (address := socket.gethostbyname(socket.gethostname())).startswith("127."):
            return address
    return address_towards("192.0.2.1")


SCHEDULERS = {"Slurm": slurm, "PBS Pro": pbs}
# The launcher is held when all ranks are there: it would end them all when it loses a node.
SCRIPT = """#!/bin/bash
{exports}exec > {shared}/job.out 2>&1 || exit 1
{launch} &
echo "$(uname -n) $!" > {shared}/launcher
wait
"""


def _batch(site: sites.Site, numbers: dict[str, int], wanted: Wanted) -> Batch:
    scheduler = SCHEDULERS[site.scheduler.kind]
    minutes = max(1, round(number(wanted.get("minutes", 60), "minutes", above=0)))
    wait_s = wanted.get("wait_s")
    if wait_s is not None:
        positive(wait_s, "wait_s")
    name = f"nurion-{secrets.token_hex(4)}"  # 15 letters, the most that an older PBS takes
    submit = scheduler.submission(site, name, numbers, minutes, wanted.get("queue", site.scheduler.job_queue))
    return Batch(
        state=scheduler.state,
        submit=(*submit, *_options(site, wanted.get("options", []))),
        script=SCRIPT,
        cancel=scheduler.cancellation(name),
        wait_s=wait_s,
    )


def _options(site: sites.Site, given: Sequence[str]) -> list[str]:
    """Those that are given, after what the site wants beside them."""
    words = []
    for name, option in site.options.items():
        if option.needed not in ("always", "usually") or any(word.startswith(name) for word in given):
            continue
        if option.usual is not None:
            words += [f"{name}={option.usual}"] if name.startswith("--") else [name, *filter(None, [option.usual])]
        elif option.needed == "always":
            raise ValueError(f"jobs on {site.name!r} must have option {name}: give it in options")
    return [*words, *given]
