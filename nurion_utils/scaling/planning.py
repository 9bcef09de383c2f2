"""How many nodes to ask for: inside a site's rules, the cheapest job and the fastest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from nurion_utils import jobs, sites
from nurion_utils._checks import positive, whole_number
from nurion_utils.scaling.calibrating import Calibration
from nurion_utils.scaling.predicting import predict
from nurion_utils.scaling.workloads import Workload


@dataclass(frozen=True)
class Plan:
    """One job, which `job` makes of it."""

    site: sites.Site
    queue: str | None
    nodes: int
    ranks_per_node: int
    global_batch: float
    hours: float  # as predicted
    walltime_hours: float  # the upper end of the interval, which the job asks for
    node_hours: float  # as predicted

    def job(self, what: jobs.Notebook | Any, **settings: Any) -> jobs.Job:
        """The job that runs `what`; `settings` are further ones of `jobs.Job`."""
        size = {"nodes": self.nodes, "ranks_per_node": self.ranks_per_node, "hours": self.walltime_hours}
        return jobs.Job(what, self.site, queue=self.queue, **size, **settings)


def plan(
    workload: Workload,
    site: sites.Site | str,
    epochs: float,
    calibration: Calibration | None = None,
    most_batch: int | None = None,
) -> dict[str, Plan]:
    """The plans "cheapest" (fewest node-hours) and "fastest" for so many epochs, each in one job of the site.

    `most_batch` limits the samples per step of all ranks together (a `Recipe` has its batch and epochs). A queue is
    the site's usual one where that has the time, or else the one that allows least. ValueError if no number of nodes
    is in time; what the site does not say does not limit.
    """
    place = sites.load(site) if isinstance(site, str) else site
    epochs, queues = positive(epochs, "epochs"), _queues(place)
    nodes = _sizes(place, workload, max(most_nodes for _, _, most_nodes in queues), most_batch)
    table = predict(place, workload, nodes, calibration)
    hours, walltime = (epochs * table[name].to_numpy() / 3600 for name in ("epoch_s", "epoch_high_s"))
    plans = []
    for i, n in enumerate(nodes.tolist()):
        queue = next((name for name, most, most_nodes in queues if walltime[i] <= most and n <= most_nodes), "")
        if queue != "":
            batch = n * workload.ranks_per_node * table["batch_per_rank"][i]
            size = (n, workload.ranks_per_node, float(batch))
            plans.append(Plan(place, queue, *size, float(hours[i]), float(walltime[i]), float(n * hours[i])))
    if not plans:
        most = max(most for _, most, _ in queues)
        raise ValueError(
            f"{epochs:g} epochs of {workload.name!r} take at least {walltime.min():.3g} hours on {place.name!r} and a "
            f"queue allows at most {most:g}: plan fewer epochs in each job"
        )
    return {
        "cheapest": min(plans, key=lambda each: (each.node_hours, each.hours)),
        "fastest": min(plans, key=lambda each: (each.hours, each.nodes)),
    }


def _queues(place: sites.Site) -> list[tuple[str | None, float, float]]:
    """Name, most hours and most nodes of the queues with the usual nodes; the usual queue first."""
    if (scheduler := place.scheduler) is None:
        raise ValueError(f"site {place.name!r} has no scheduler: take one that has, such as 'nurion'")
    usual, first = next(iter(place.partitions), None), scheduler.job_queue
    known = {name: queue for name, queue in place.queues.items() if queue.partition in (None, usual)}
    if first not in known:
        known = {first: None} | known
    limits = [
        (
            name,
            getattr(queue, "most_hours", None) or scheduler.most_hours or math.inf,
            getattr(queue, "most_nodes", None) or math.inf,
        )
        for name, queue in known.items()
    ]
    return sorted(limits, key=lambda limit: (limit[0] != first, limit[1]))


def _sizes(place: sites.Site, workload: Workload, queue_nodes: float, most_batch: int | None) -> np.ndarray:
    """All numbers of nodes that site, queues and batches allow."""
    there = place.node.count if place.partitions else None
    if not math.isfinite(most := min(queue_nodes, there or math.inf)):
        raise ValueError(f"site {place.name!r} does not say how many nodes it has: add their count to its partitions")
    nodes = np.arange(1, int(most) + 1)
    least = workload.ranks_per_node  # of a batch, for each node
    if workload.global_batch is not None:
        nodes = nodes[nodes * least <= workload.global_batch]
    if most_batch is not None:
        batch = workload.global_batch or nodes * workload.ranks_per_node * workload.batch
        nodes = nodes[np.broadcast_to(batch, nodes.shape) <= whole_number(most_batch, "most_batch")]
    if place.partitions and place.node.memory_usable_gb:
        held = workload.batches(nodes.astype(float)) * workload.ranks_per_node * workload.activation_bytes
        nodes = nodes[held <= place.node.memory_usable_gb * 1e9]
    if not len(nodes):
        raise ValueError(
            f"no number of nodes gives {workload.name!r} such a batch: allow a larger one, or a smaller share"
        )
    return nodes
