"""The model, on one page: what a step of synchronous training takes on P nodes, term by term.

    compute        step_s + batch x sample_s: what does not and what does grow with the batch
    communication  copies into and out of the buffers + the larger of exposed x allreduce, and what of it is longer
                   than the backward pass
    waiting        waiting x compute x (H(R) - 1): the slowest of R ranks
    input          what reading the next batch takes beyond all that
    epoch          steps x step + listing_s x samples: what every rank does for all samples, not only its own

The allreduce takes ``messages x latency + arrays x bytes / link``, the closed forms of `allreduce`'s schedules (Thakur,
Rabenseifner and Gropp 2005); `exposed` is one number for what the backward pass does not hide, and for what a library
needs beyond the link's own time, which times of steps cannot tell apart. At best two thirds of a step, the backward
pass, hide it, which takes two of the three products that each layer has.

Ranks are late by exponentially distributed times, so the last of R is late by H(R) = 1 + 1/2 + ... + 1/R of the mean
(David and Nagaraja 2003; the shifted exponential of Lee et al. 2018). The mean of one rank belongs to its computing.

Reading is the hottest storage target: N files on K targets are ``x + sqrt(2 x ln K)`` on it, x = N / K (`storage`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from nurion_utils.scaling.workloads import Workload

BACKWARD = 2 / 3  # of a step's computing


class Prior(NamedTuple):
    """What is believed of a figure before anything is measured: its median, and the standard deviation of its log."""

    median: float
    spread: float
    status: str
    words: str


# What differs between machines and programs. The medians of step_s, copy_s_per_byte, exposed, waiting and listing_s are
# about those that make all ``calibrate`` rows of `data/published_scaling.csv` together most probable (empirical Bayes;
# no other rows entered); where a site has a figure, it takes the place of the one here; the rest is chosen.
PRIORS = {
    "sample_s": Prior(0.1, 2.0, "chosen", "the time to compute a sample"),
    "step_s": Prior(0.01, 1.0, "chosen", "the time of a step that does not depend on the batch"),
    "copy_s_per_byte": Prior(5e-11, 1.0, "chosen", "the time to copy gradients"),
    "exposed": Prior(0.3, 1.0, "chosen", "the exposed part of an allreduce"),
    "latency_s": Prior(5e-6, 0.7, "chosen", "the latency of a message"),
    "link_s_per_byte": Prior(1e-10, 0.7, "chosen", "the rate of a link"),
    "waiting": Prior(0.04, 1.0, "chosen", "how late ranks are"),
    "listing_s": Prior(1.5e-5, 1.0, "chosen", "the time of each rank for each sample of an epoch"),
    "read_s_per_byte": Prior(1e-9, 0.7, "chosen", "the rate of a storage target"),
}
# The spread of a figure that a description has, by its status.
SPREADS = {"read": 0.1, "measured": 0.1, "derived": 0.2, "remembered": 0.3, "chosen": 0.7}
# The figures that each term stands on, and what they are where it is left out.
TERMS = {
    "copies": ["copy_s_per_byte"],
    "allreduce": ["exposed", "latency_s", "link_s_per_byte"],
    "waiting": ["waiting"],
    "listing": ["listing_s"],
    "step_s": ["step_s"],
}
NOTHING = Prior(1e-30, 1e-3, "chosen", "nothing")

Nodes = np.ndarray


def _powers(nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
    """The exponent of the largest power of two, and 1 where there are more nodes than that."""
    exponent = np.floor(np.log2(nodes))
    return exponent, (2**exponent < nodes).astype(float)


def _rabenseifner(nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
    exponent, rest = _powers(nodes)
    return 2 * (exponent + rest), 2 * (1 - 0.5**exponent + rest)


def _recursive_doubling(nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
    exponent, rest = _powers(nodes)
    return (steps := exponent + 2 * rest), steps


def _tree(nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
    return (steps := 2 * np.ceil(np.log2(nodes))), steps


# Messages one after the other, and whole arrays that travel in them; the names are those of `allreduce.ALGORITHMS`.
ALGORITHMS: dict[str, Callable[[Nodes], tuple[np.ndarray, np.ndarray]]] = {
    "naive": lambda nodes: (2.0 * (nodes - 1), 2.0 * (nodes - 1)),
    "tree": _tree,
    "ring": lambda nodes: (2.0 * (nodes - 1), 2 * (nodes - 1) / nodes),
    "recursive_doubling": _recursive_doubling,
    "rabenseifner": _rabenseifner,
}


def harmonic(ranks: np.ndarray) -> np.ndarray:
    """1 + 1/2 + ... + 1/R."""
    from scipy.special import digamma

    return digamma(ranks + 1.0) + np.euler_gamma


class Targets(NamedTuple):
    """The storage that is read: how many targets there are, and on how many of them a file lies."""

    count: int
    stripes: int


def step_parts(
    values: Mapping[str, float], workload: Workload, targets: Targets | None, nodes: Nodes, batch: np.ndarray
) -> dict[str, np.ndarray]:
    """Seconds of the parts of a step: compute, communication, waiting, input; arrays of the shape of `nodes`."""
    ranks = nodes * workload.ranks_per_node
    compute = values["step_s"] + batch * values["sample_s"]
    messages, arrays = ALGORITHMS[workload.algorithm](nodes)
    size = workload.gradient_bytes
    allreduce = workload.buffers * messages * values["latency_s"] + arrays * size * values["link_s_per_byte"]
    copies = 2 * size * values["copy_s_per_byte"] * (ranks > 1)
    communication = copies + np.maximum(values["exposed"] * allreduce, allreduce - BACKWARD * compute)
    waiting = values["waiting"] * compute * (harmonic(ranks) - 1)
    reading = _reading(workload, targets, ranks * batch) * values["read_s_per_byte"]
    return {
        "compute": compute,
        "communication": communication,
        "waiting": waiting,
        "input": np.maximum(0, reading - compute - communication - waiting),
    }


def _reading(workload: Workload, targets: Targets | None, files: np.ndarray) -> np.ndarray:
    """Bytes on the hottest target."""
    if targets is None:
        return np.zeros(len(files))
    mean = files * targets.stripes / targets.count
    hottest = np.minimum(files, mean + np.sqrt(2 * mean * np.log(targets.count)))
    return hottest * workload.sample_bytes / targets.stripes


def outputs(
    values: Mapping[str, float], workload: Workload, targets: Targets | None, nodes: Nodes, batch: np.ndarray, what: str
) -> np.ndarray:
    """One of step_s, epoch_s and samples_per_s."""
    step = sum(step_parts(values, workload, targets, nodes, batch).values())
    if what == "epoch_s":
        return workload.steps(nodes, batch) * step + values["listing_s"] * workload.all_samples(nodes)
    return step if what == "step_s" else nodes * workload.ranks_per_node * batch / step
