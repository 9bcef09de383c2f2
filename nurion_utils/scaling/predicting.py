"""Predictions for any number of nodes, with intervals, and what they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nurion_utils import sites
from nurion_utils._checks import whole_number
from nurion_utils.scaling.calibrating import Calibration, Place, calibrate
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
    of a step. Times and efficiency are medians, in parts as by the most probable figures; columns with _low and _high
    in their names are the ends of 95 % of runs. ``status`` is the weakest among the inputs, ``narrows`` the figure that
    would narrow the interval most if it were known, and ``narrows_share`` by which share of the variance.
    """
    import pandas as pd

    place = sites.load(site) if isinstance(site, str) else site
    nodes = _nodes(place, nodes)
    known = calibration or calibrate(None, place, workload)
    if known.site and (name := getattr(place, "name", None)) not in (None, known.site):
        raise ValueError(f"this calibration is of site {known.site!r}: calibrate on {name!r} to predict for it")
    batch = workload.batches(nodes)

    def drawn(what: str, nodes: np.ndarray) -> np.ndarray:
        return np.log(outputs(known.possible(), workload, known.targets, nodes, batch, what))

    step, alone = drawn("step_s", nodes), drawn("step_s", np.ones_like(nodes))
    parts = step_parts(known.values(), workload, known.targets, nodes, batch)
    columns = {"nodes": nodes.astype(int), "batch_per_rank": batch} | _ends("step", "_s", step, known)
    total = sum(parts.values())
    columns |= {f"{name}_s": columns["step_s"] * part / total for name, part in parts.items()}
    if workload.samples is not None:
        steps, epoch = workload.steps(nodes, batch), drawn("epoch_s", nodes)
        parts = {name: steps * part for name, part in parts.items()}
        parts["listing"] = known.values()["listing_s"] * workload.all_samples(nodes)
        total = sum(parts.values())
        columns |= {"steps": steps.astype(int)} | _ends("epoch", "_s", epoch, known)
        columns |= {"listing_s": columns["epoch_s"] * parts["listing"] / total}
        columns |= {"node_hours": nodes * columns["epoch_s"] / 3600}
    columns |= {"samples_per_s": nodes * workload.ranks_per_node * batch / columns["step_s"]}
    columns |= _ends("efficiency", "", alone - step, known)
    shares = {name: part / total for name, part in parts.items()}
    losses = np.array([share for name, share in shares.items() if name != "compute"])
    names = np.array([name for name in shares if name != "compute"])
    columns["limits"] = np.where(losses.max(axis=0) < LITTLE, "computing", names[losses.argmax(axis=0)])
    columns |= {f"{name}_share": share for name, share in shares.items()}
    columns |= _doubt(step if workload.samples is None else epoch, known)
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


def _ends(name: str, unit: str, drawn: np.ndarray, known: Calibration) -> dict[str, np.ndarray]:
    """The median of an output whose logarithms are drawn, and the ends of the interval with 95 % of runs."""
    median = np.exp(np.median(drawn, axis=0))
    low, high = np.exp(np.quantile(drawn + known.noise(), [0.025, 0.975], axis=0))
    return {f"{name}{unit}": median, f"{name}_low{unit}": low, f"{name}_high{unit}": high}


def _doubt(drawn: np.ndarray, known: Calibration) -> dict[str, np.ndarray]:
    """The figure that explains most of the variance of an output, and how much: its squared correlation."""
    causes = np.hstack([known.draws[:, :-1], known.noise()])
    causes, results = (each - each.mean(axis=0) for each in (causes, drawn + known.noise()))
    products = (causes.T @ results) ** 2
    explained = products / (causes**2).sum(axis=0)[:, None] / (results**2).sum(axis=0)
    words = np.array([*(prior.words for prior in PRIORS.values()), "the scatter of runs"])
    return {"narrows": words[explained.argmax(axis=0)], "narrows_share": explained.max(axis=0)}
