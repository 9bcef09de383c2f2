"""Predictions for any number of nodes, with intervals, and what they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nurion_utils import sites
from nurion_utils._checks import whole_number
from nurion_utils.scaling.calibrating import NAMES, Calibration, Place, calibrate
from nurion_utils.scaling.terms import PRIORS, outputs, step_parts
from nurion_utils.scaling.workloads import STATUSES, Workload

if TYPE_CHECKING:
    import pandas as pd

# What is less than this share of the time limits nothing.
LITTLE = 0.05


def predict(
    site: Place, workload: Workload, nodes: int | Sequence[int], calibration: Calibration | None = None
) -> pd.DataFrame:
    """What a step and an epoch take on each number of nodes, and of what they are made.

    Without a `calibration` it is what is known before anything is measured. ValueError for a number of nodes that is
    not one, or more than the site has.

    Returns a row per number of nodes: nodes, batch_per_rank, and of a step compute_s, communication_s (exposed),
    waiting_s (for the slowest rank), input_s, step_s. Where the samples of an epoch are known also steps, listing_s,
    epoch_s and node_hours of it. Then samples_per_s, efficiency (of a node beside one alone with the same batch),
    limits (the largest part but computing, unless all are small), and a column NAME_share for each part of an epoch, or
    of a step. ``step_low_s``, ``step_high_s``, ``epoch_low_s`` and ``epoch_high_s`` hold 95 % of runs. ``status`` is
    the weakest among the inputs, ``narrows`` the figure that would narrow the interval most if it were known, and
    ``narrows_share`` by which share of the variance.
    """
    import pandas as pd

    place = sites.load(site) if isinstance(site, str) else site
    nodes = _nodes(place, nodes)
    known = calibration or calibrate(None, place, workload)
    batch, values = workload.batches(nodes), known.values()
    parts = step_parts(values, workload, known.targets, nodes, batch)
    step = sum(parts.values())
    columns = {"nodes": nodes.astype(int), "batch_per_rank": batch}
    columns |= {f"{name}_s": part for name, part in parts.items()} | {"step_s": step}
    columns |= interval("step_s", known, workload, nodes, batch)
    of_all, whole, told = parts, step, "step_s"
    if workload.samples is not None:
        steps, listing = workload.steps(nodes, batch), values["listing_s"] * workload.all_samples(nodes)
        of_all = {name: steps * part for name, part in parts.items()} | {"listing": listing}
        whole, told = sum(of_all.values()), "epoch_s"
        columns |= {"steps": steps.astype(int), "listing_s": listing, "epoch_s": whole}
        columns |= interval("epoch_s", known, workload, nodes, batch) | {"node_hours": nodes * whole / 3600}
    alone = step_parts(values, workload, known.targets, np.ones_like(nodes), batch)
    columns |= {"samples_per_s": nodes * workload.ranks_per_node * batch / step}
    columns |= {"efficiency": sum(alone.values()) / step}
    shares = {name: part / whole for name, part in of_all.items()}
    losses = {name: share for name, share in shares.items() if name != "compute"}
    most = np.array(list(losses))[np.argmax(list(losses.values()), axis=0)]
    columns["limits"] = np.where(np.max(list(losses.values()), axis=0) < LITTLE, "computing", most)
    columns |= {f"{name}_share": share for name, share in shares.items()} | doubt(told, known, workload, nodes, batch)
    columns["status"] = max([*known.statuses.values(), workload.status], key=STATUSES.index)
    return pd.DataFrame(columns)


def _nodes(place: Place, nodes: int | Sequence[int]) -> np.ndarray:
    most = place.node.count if isinstance(place, sites.Site) and place.partitions else None
    asked = np.atleast_1d(nodes)
    if not asked.size:
        raise ValueError("nodes must be one number or more")
    for each in asked if asked.dtype.kind not in "iu" else (asked.min(), asked.max()):
        whole_number(each.item() if isinstance(each, np.generic) else each, "nodes", most=most)
    return asked.astype(float)


def sensitivity(what: str, known: Calibration, workload: Workload, nodes: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """How the logarithm of an output follows that of each figure: (figures, nodes)."""
    delta, rows = 1e-4, []
    for i in range(len(NAMES)):
        ends = []
        for sign in (1, -1):
            mean = known.mean.copy()
            mean[i] += sign * delta
            values = dict(zip(NAMES, np.exp(mean), strict=True))
            ends.append(np.log(outputs(values, workload, known.targets, nodes, batch, what)))
        rows.append((ends[0] - ends[1]) / (2 * delta))
    return np.array(rows)


def interval(
    what: str, known: Calibration, workload: Workload, nodes: np.ndarray, batch: np.ndarray
) -> dict[str, np.ndarray]:
    """The ends of the interval that holds 95 % of runs, by their columns' names."""
    possible = np.log(outputs(known.possible(), workload, known.targets, nodes, batch, what))
    scattered = np.random.default_rng(0).standard_normal(len(possible)) * np.exp(known.draws[:, -1])
    low, high = np.exp(np.quantile(possible + scattered[:, None], [0.025, 0.975], axis=0))
    name, _, unit = what.rpartition("_")
    return {f"{name}_low_{unit}": low, f"{name}_high_{unit}": high}


def doubt(
    what: str, known: Calibration, workload: Workload, nodes: np.ndarray, batch: np.ndarray
) -> dict[str, np.ndarray]:
    """The figure that would narrow the interval most if it were known, and by which share of the variance."""
    slopes = sensitivity(what, known, workload, nodes, batch)
    covariances = known.covariance @ slopes  # of each figure with the output
    gains = covariances**2 / np.diag(known.covariance)[:, None]
    gains = np.vstack([gains, np.full(len(nodes), known.scatter**2)])
    total = np.einsum("in,in->n", slopes, covariances) + known.scatter**2
    words = np.array([*(prior.words for prior in PRIORS.values()), "the scatter of runs"])
    most = gains.argmax(axis=0)
    return {"narrows": words[most], "narrows_share": gains.max(axis=0) / total}
