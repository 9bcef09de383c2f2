"""Rows of published figures read as runs: where, of what workload, on how many nodes, and how long they took."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from nurion_utils import sites
from nurion_utils._checks import one_of, positive, whole_number
from nurion_utils.allreduce import Link
from nurion_utils.scaling.calibrating import Place
from nurion_utils.scaling.workloads import PUBLISHED, Workload

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "id", "system", "site", "workload", "software", "image", "nodes", "ranks_per_node", "gpus_per_node",
    "batch_per_rank", "samples_per_epoch", "quantity", "unit", "value", "scatter_percent", "use", "status", "source",
)  # fmt: skip
# What the words of a quantity begin with. How many epochs a training needs is not the model's to know: where the time
# of all is given, only how it follows the nodes is predicted, through the rate.
QUANTITIES = {
    "epoch time": "epoch_s", "training part of an epoch": "epoch_s", "step time": "step_s", "rate": "samples_per_s",
    "time to train": "samples_per_s",
}  # fmt: skip
TIMES = {"s": 1.0, "ms": 1e-3, "min": 60.0, "h": 3600.0}
RATES = {"samples/s": 1.0}
# By which words a published workload is known again; the first that fits.
_KNOWN = {
    "HEP-CNN with large": "HEP-CNN, large kernels", "HEP-CNN": "HEP-CNN", "cosmoflow": "cosmoflow-benchmark",
    "ResNet-50": "ResNet-50", "DeepCAM": "DeepCAM", "OPT-350M": "OPT-350M", "DLRM": "DLRM",
}  # fmt: skip
_UNKNOWN = {"gradient_bytes": 100e6, "tensors": 100, "batch": 1.0}  # chosen: as of many networks
# Links of machines without a description here, all remembered: of a node, or of a GPU where GPUs are the nodes.
_LINKS = {
    "Ethernet": Link(20e-6, 1 / 1.2e9), "Summit": Link(5e-6, 1 / 4e9), "Piz Daint": Link(5e-6, 1 / 8e9),
    "JUWELS": Link(5e-6, 1 / 25e9), "DGX A100": Link(5e-6, 1 / 25e9), "Slingshot": Link(5e-6, 1 / 100e9),
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """The rows of one id and kind of quantity."""

    rows: pd.DataFrame
    place: Place
    workload: Workload
    kind: str  # "epoch_s", "step_s" or "samples_per_s", in which `runs` are
    runs: pd.DataFrame  # as `calibrate` takes them
    factors: np.ndarray  # of each row's unit
    inverse: bool  # whether the times of whole trainings were given: samples divided by a rate

    @classmethod
    def of(cls, rows: pd.DataFrame) -> Series:
        """Read rows; ValueError for a number of nodes or a value that cannot be one."""
        first, kind = rows.iloc[0], quantity(rows["quantity"].iloc[0])
        workload, batch = _workload(rows)
        place, runs = _place(first), rows[["nodes", "scatter_percent"]].reset_index(drop=True)
        for row in rows.itertuples():
            whole_number(int(row.nodes) if row.nodes % 1 == 0 else row.nodes, f"nodes of {row.id}")
            positive(row.value, f"the value of {row.id} on {row.nodes} nodes")
        runs["batch_per_rank"] = batch
        if isinstance(place, sites.Site) and re.search(
            "lustre|/scratch", f"{first['workload']} {first['source']}", re.I
        ):
            workload = replace(workload, storage="scratch")
        inverse = kind == "samples_per_s" and first["unit"] in TIMES
        factors = np.array(
            [_factor(unit, TIMES if inverse or kind != "samples_per_s" else RATES) for unit in rows["unit"]]
        )
        seconds = rows["value"].to_numpy(float) * factors
        if workload.samples is None and (inverse or kind == "epoch_s"):
            # Chosen: as many samples as make a step of the first row take a second.
            samples = seconds[0] * batch[0] * runs["nodes"][0] * workload.ranks_per_node
            workload = replace(workload, samples=samples, status="chosen")
        runs[kind] = workload.samples / seconds if inverse else seconds
        return cls(rows, place, workload, kind, runs, factors, inverse)

    @property
    def system(self) -> str:
        """The machine, as the rows name it."""
        return self.rows["system"].iloc[0]

    @property
    def fitted(self) -> np.ndarray:
        """Which rows a calibration may see."""
        return self.rows["use"].to_numpy() == "calibrate"

    def published(self, values: np.ndarray) -> np.ndarray:
        """Values of the series' kind as their rows give them."""
        return (self.workload.samples / values if self.inverse else values) / self.factors


def quantity(words: str) -> str:
    """The kind of a quantity; ValueError if it is not known."""
    start = next((start for start in QUANTITIES if str(words).startswith(start)), words)
    return QUANTITIES[one_of(start, "the beginning of a quantity", QUANTITIES)]


def _factor(unit: str, units: dict[str, float]) -> float:
    return units[one_of(unit, f"the unit of a {'rate' if units is RATES else 'time'}", units)]


def _workload(rows: pd.DataFrame) -> tuple[Workload, np.ndarray]:
    """What is trained, and the batch of each row: as given, or by the words of the workload, or the usual one."""
    first = rows.iloc[0]
    words = str(first["workload"])
    known = next((name for start, name in _KNOWN.items() if start.lower() in words.lower()), None)
    workload = PUBLISHED[known] if known else Workload(words, **_UNKNOWN)
    ranks = int(first["ranks_per_node"]) if first["ranks_per_node"] > 0 else 1
    workload = replace(workload, ranks_per_node=ranks)
    if together := re.search(r"batch (\d+)", words):
        workload = replace(workload, batch=None, global_batch=float(together[1]))
    elif rows["batch_per_rank"].notna().any():
        workload = replace(workload, batch=float(rows["batch_per_rank"].dropna().iloc[0]), global_batch=None)
    if given := re.match(r"([\d.]+)( per node)?", str(first["samples_per_epoch"])):
        workload = replace(workload, samples=float(given[1]), samples_per_node=bool(given[2]))
    batch = rows["batch_per_rank"].to_numpy(float)
    return workload, np.where(np.isnan(batch), workload.batches(rows["nodes"].to_numpy(float)), batch)


def _place(first: pd.Series) -> Place:
    if first["site"] in sites.names():
        return sites.load(first["site"])
    return next((link for words, link in _LINKS.items() if words in str(first["system"])), None)
