"""Predictions beside what others measured: each published series by itself, fitted to its ``calibrate`` rows alone."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nurion_utils import recordings, sites
from nurion_utils._checks import require_columns
from nurion_utils.allreduce import Link
from nurion_utils.scaling.calibrating import Place, calibrate
from nurion_utils.scaling.predicting import predict
from nurion_utils.scaling.workloads import PUBLISHED, Workload

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "id", "system", "site", "workload", "software", "image", "nodes", "ranks_per_node", "gpus_per_node",
    "batch_per_rank", "samples_per_epoch", "quantity", "unit", "value", "scatter_percent", "use", "status", "source",
)  # fmt: skip
# What the words of a quantity begin with; of the units the factor to seconds, or to samples a second.
QUANTITIES = {
    "epoch time": "epoch_s", "training part of an epoch": "epoch_s", "time to train": "epoch_s", "step time": "step_s",
    "rate": "samples_per_s",
}  # fmt: skip
UNITS = {"s": 1.0, "ms": 1e-3, "min": 60.0, "h": 3600.0}
RATES = {"samples/s": 1.0}
TOLERANCE_PERCENT = 15.0
# How a published workload is known again, first match first.
_KNOWN = {
    "HEP-CNN with large": "HEP-CNN, large kernels", "HEP-CNN": "HEP-CNN", "cosmoflow": "cosmoflow-benchmark",
    "ResNet-50": "ResNet-50", "DeepCAM": "DeepCAM", "OPT-350M": "OPT-350M", "DLRM": "DLRM",
}  # fmt: skip
# Links of machines without a description here, all remembered: of a node, or of a GPU where GPUs are the nodes.
_LINKS = {
    "Ethernet": Link(20e-6, 1 / 1.2e9), "Summit": Link(5e-6, 1 / 4e9),
    "Piz Daint": Link(5e-6, 1 / 8e9), "JUWELS": Link(5e-6, 1 / 25e9), "DGX A100": Link(5e-6, 1 / 25e9),
    "Slingshot": Link(5e-6, 1 / 100e9),
}  # fmt: skip


def fidelity(extra: str | os.PathLike[str] | None = None) -> pd.DataFrame:
    """Every published figure of `data/published_scaling.csv` beside the model's; see `score` for what it comes to.

    `extra` is a CSV file of further rows with the same columns, of these series or others. A row that cannot be
    predicted stays in the table, with the reason. ValueError for columns that are missing and for unknown units.

    Returns a row per figure: id, quantity, conditions, nodes, published, ours, low, high (95 % of runs), unit,
    error_percent, scatter_percent (the reference's own; NaN if it is not known), tolerance_percent, passes, use,
    limits, limits_share, input_share, narrows, status, source, reason (of a miss).
    """
    import pandas as pd

    table = recordings.load("published_scaling")
    if extra is not None:
        further = pd.read_csv(extra)
        require_columns(further, COLUMNS)
        table = pd.concat([table, further[list(COLUMNS)]], ignore_index=True)
    return pd.concat([_series(rows) for _, rows in table.groupby("id", sort=False)], ignore_index=True)


def score(table: pd.DataFrame) -> dict[str, float]:
    """Of the rows of `fidelity` with use ``test``: median_error_percent, within_tolerance (their share), rows."""
    tests = table[table["use"] == "test"]
    return {
        "median_error_percent": float(tests["error_percent"].abs().median()),
        "within_tolerance": float(tests["passes"].mean()),
        "within_interval": float(((tests["low"] <= tests["published"]) & (tests["published"] <= tests["high"])).mean()),
        "rows": len(tests),
    }


def series(rows: pd.DataFrame) -> tuple[Place, Workload, pd.DataFrame]:
    """The place, the workload and the measurements (as `calibrate` takes them) of the rows of one id."""
    import pandas as pd

    first = rows.iloc[0]
    what = _quantity(first["quantity"])
    known = next((name for words, name in _KNOWN.items() if words.lower() in str(first["workload"]).lower()), None)
    gradient_bytes = {"gradient_bytes": 100e6, "tensors": 100, "batch": 1}
    workload = PUBLISHED[known] if known else Workload(str(first["workload"]), **gradient_bytes)
    measured = pd.DataFrame({"nodes": rows["nodes"].to_numpy()})
    measured["scatter_percent"] = rows["scatter_percent"].to_numpy()
    factors = [_factor(unit, what) for unit in rows["unit"]]
    measured[what] = rows["value"].to_numpy(float) * factors
    ranks = first["ranks_per_node"]
    workload = replace(workload, ranks_per_node=int(ranks) if ranks == ranks else 1)
    workload = _spread(workload, rows)
    measured["batch_per_rank"] = rows["batch_per_rank"].to_numpy()
    measured["batch_per_rank"] = measured["batch_per_rank"].fillna(
        pd.Series(workload.batches(measured["nodes"].to_numpy(float)))
    )
    place = _place(first)
    if isinstance(place, sites.Site) and re.search("lustre|/scratch", f"{first['workload']} {first['source']}", re.I):
        workload = replace(workload, storage="scratch")
    return place, _sized(workload, first, measured, what), measured


def _quantity(words: str) -> str:
    for start, column in QUANTITIES.items():
        if str(words).startswith(start):
            return column
    raise ValueError(f"the quantity must begin with one of {', '.join(QUANTITIES)}, not {words!r}")


def _factor(unit: str, what: str) -> float:
    known = RATES if what == "samples_per_s" else UNITS
    if unit not in known:
        raise ValueError(
            f"the unit of a {'rate' if known is RATES else 'time'} must be one of {', '.join(known)}, not {unit!r}"
        )
    return known[unit]


def _spread(workload: Workload, rows: pd.DataFrame) -> Workload:
    """Weak or strong scaling, as the batches say, or else the words of the workload."""
    batch = rows["batch_per_rank"].dropna()
    together = (rows["batch_per_rank"] * rows["nodes"]).dropna() * workload.ranks_per_node
    words = re.search(r"batch (\d+)", str(rows["workload"].iloc[0]))
    if len(batch) and (len(batch) == 1 or batch.nunique() == 1 or together.nunique() > 1):
        return replace(workload, batch=float(batch.iloc[0]), global_batch=None)
    if len(batch) or words:
        return replace(workload, batch=None, global_batch=float(together.iloc[0] if len(batch) else words[1]))
    return workload


def _sized(workload: Workload, first: pd.Series, measured: pd.DataFrame, what: str) -> Workload:
    """With the samples of an epoch, as given, or as known, or as many as make its steps take a second (chosen)."""
    if what != "epoch_s":
        return workload
    given = re.match(r"([\d.]+)( per node)?", str(first["samples_per_epoch"]))
    if given:
        return replace(workload, samples=float(given[1]), samples_per_node=bool(given[2]))
    if workload.samples is None:
        ranks = measured["nodes"][0] * workload.ranks_per_node
        return replace(workload, samples=measured[what][0] * measured["batch_per_rank"][0] * ranks, status="chosen")
    return workload


def _place(first: pd.Series) -> Place:
    if isinstance(first["site"], str) and first["site"] in sites.names():
        return sites.load(first["site"])
    return next((link for words, link in _LINKS.items() if words in str(first["system"])), None)


def _series(rows: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    table = rows[["id", "quantity", "nodes", "unit", "scatter_percent", "use", "status", "source"]].copy()
    table["conditions"] = [f"{row.system}, {row.workload}, {row.nodes} nodes" for row in rows.itertuples()]
    table["published"] = rows["value"].astype(float)
    place, workload, measured = series(rows)
    fitted = rows["use"].to_numpy() == "calibrate"
    try:
        known = calibrate(measured[fitted] if fitted.any() else None, place, workload)
    except ValueError:
        return table.assign(passes=False, reason="cannot be predicted: no calibrate row")
    ours = [
        predict(place, replace(workload, batch=batch, global_batch=None), int(nodes), known)
        for nodes, batch in zip(measured["nodes"], measured["batch_per_rank"], strict=True)
    ]
    return _judged(table, pd.concat(ours), _quantity(rows["quantity"].iloc[0]))


def _judged(table: pd.DataFrame, ours: pd.DataFrame, what: str) -> pd.DataFrame:
    """The rows of one series with the predictions beside them, in the unit of the published value."""
    factor = 1 / np.array([_factor(unit, what) for unit in table["unit"]])
    name, _, unit = what.rpartition("_")
    low, high = (f"{name}_low_{unit}", f"{name}_high_{unit}") if what != "samples_per_s" else ("rate_low", "rate_high")
    if what == "samples_per_s":
        ours = ours.assign(
            rate_low=ours["samples_per_s"] * ours["step_s"] / ours["step_high_s"],
            rate_high=ours["samples_per_s"] * ours["step_s"] / ours["step_low_s"],
        )
    for column, source in {"ours": what, "low": low, "high": high}.items():
        table[column] = ours[source].to_numpy() * factor
    table["error_percent"] = 100 * (table["ours"] / table["published"] - 1)
    table["tolerance_percent"] = np.fmax(TOLERANCE_PERCENT, 2 * table["scatter_percent"])
    table["passes"] = table["error_percent"].abs() <= table["tolerance_percent"]
    for column in ("limits", "narrows", "narrows_share", "communication_share", "waiting_share", "input_share"):
        table[column] = ours[column].to_numpy()
    table["reason"] = np.where(table["passes"], "", "not known")
    return table
