"""Pictures of shared file systems and of the published cases; every function takes a table and returns a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nurion_utils._checks import require_columns
from nurion_utils.storage.model import METADATA, Storage

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, ORANGE, PINK = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
# Told apart without colour too.
STYLES = [(BLUE, "-", "o"), (VERMILION, "--", "s"), (GREEN, "-.", "^"), (ORANGE, ":", "D"), (PINK, (0, (5, 1)), "v")]
OUTCOMES = {
    "runs": (BLUE, "o"),
    "read timed out": (VERMILION, "X"),
    "dies": (ORANGE, "P"),
    "out of memory": ("black", "s"),
}
BAND = {"both run": (BLUE, ""), "the larger fails": (ORANGE, "//"), "both fail": ("#BBBBBB", "..")}
MOST_REQUESTS = 3000


def queues(log: pd.DataFrame, most_rows: int = 40) -> Figure:
    """Who waits where: a panel for each queue, in which each request waits (pale) and is then served (dark).

    Parameters
    ----------
    log
        Of `SharedStore.log`, or the part of it that is of interest; up to 3,000 requests.
    most_rows
        Requests are drawn below each other, and begin again at the top after so many.
    """
    _require(log, ["target", "queued_s", "start_s", "end_s", "failed"])
    if len(log) > MOST_REQUESTS:
        raise ValueError(f"a drawing has room for {MOST_REQUESTS} requests, and this log has {len(log)}; choose some")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    targets = sorted(log["target"].unique())
    origin_s = log["queued_s"].min()
    figure, axes = plt.subplots(
        len(targets), 1, figsize=(8, 1.1 * len(targets) + 0.9), sharex=True, layout="constrained", squeeze=False
    )
    for axis, target in zip(axes.flat, targets, strict=True):
        rows = log[log["target"] == target]
        y = np.arange(len(rows)) % most_rows
        queued_s, end_s = rows["queued_s"] - origin_s, rows["end_s"] - origin_s
        start_s = (rows["start_s"] - origin_s).where(~rows["failed"], end_s)
        axis.barh(y, start_s - queued_s, left=queued_s, height=0.9, color="#CCCCCC")
        axis.barh(y, end_s - start_s, left=start_s, height=0.9, color=BLUE)
        failed = rows["failed"].to_numpy(bool)
        axis.plot(end_s[failed], y[failed], "x", color=VERMILION, ms=5)
        axis.set(yticks=[], ylim=(min(most_rows, len(rows)) - 0.3, -0.7))
        axis.set_ylabel("metadata" if target == METADATA else f"target {target}", rotation=0, ha="right", va="center")
    axes[-1, 0].set_xlabel("time, s")
    kinds = [Patch(fc="#CCCCCC", label="waits its turn"), Patch(fc=BLUE, label="is served")]
    if log["failed"].any():
        kinds.append(plt.Line2D([], [], ls="", marker="x", color=VERMILION, label="times out"))
    figure.legend(handles=kinds, loc="outside upper center", ncols=3, frameon=False)
    return figure


def throughput(table: pd.DataFrame, storage: Storage) -> Figure:
    """Throughput against readers, with the bandwidth of all targets together as the ceiling.

    Parameters
    ----------
    table
        Columns readers, throughput_gb_per_s, and kind (such as "measured" and "simulated"); several rows of one kind
        with the same readers are shown as their median and range.
    """
    _require(table, ["readers", "throughput_gb_per_s", "kind"])
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for (kind, rows), (colour, dash, marker) in zip(table.groupby("kind", sort=False), STYLES, strict=False):
        mb_per_s = rows.groupby("readers")["throughput_gb_per_s"].agg(["median", "min", "max"]) * 1e3
        spread = [mb_per_s["median"] - mb_per_s["min"], mb_per_s["max"] - mb_per_s["median"]]
        axis.errorbar(
            mb_per_s.index, mb_per_s["median"], spread, color=colour, ls=dash, marker=marker, capsize=3, label=kind
        )
    axis.axhline(storage.bandwidth_gb_per_s * 1e3, color="black", lw=1, ls=(0, (1, 1)))
    label = f"{storage.targets} targets of {storage.target_mb_per_s:g} MB/s"
    axis.annotate(label, (0.01, storage.bandwidth_gb_per_s * 1e3), xycoords=("axes fraction", "data"), va="bottom")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(table["readers"].unique()), sorted(table["readers"].unique()))
    axis.set(xlabel="readers", ylabel="throughput, MB/s")
    axis.set_ylim(0, max(storage.bandwidth_gb_per_s, table["throughput_gb_per_s"].max()) * 1.15e3)
    axis.legend(loc="lower right")
    return figure


def epochs(table: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Epoch time against nodes, of `cases.scaling`, and on the same axes where the published runs of CosmoFlow ended.

    Published step times become epochs of as many samples; a vertical line is a number of nodes that could not be
    passed.
    """
    _require(table, ["storage", "nodes", "step_s", "epoch_s"])
    _require(published, ["case", "storage", "nodes", "quantity", "value", "outcome"])
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (name, rows), (colour, dash, marker) in zip(table.groupby("storage", sort=False), STYLES, strict=False):
        axis.plot(
            rows["nodes"], rows["epoch_s"], color=colour, ls=dash, marker=marker, ms=5, label=f"{name} (simulated)"
        )
    samples = (table["epoch_s"] * table["nodes"] / table["step_s"]).median()
    cosmoflow = published[published["case"] == "CosmoFlow"]
    steps = cosmoflow[(cosmoflow["quantity"] == "step time") & (cosmoflow["nodes"] >= table["nodes"].min())]
    axis.plot(
        *(steps["nodes"], steps["value"] * samples / steps["nodes"]),
        **{
            "ls": "",
            "marker": "*",
            "ms": 14,
            "mfc": "white",
            "mec": "black",
            "label": "published, communication included",
        },
    )
    for row in cosmoflow[(cosmoflow["quantity"] == "largest job") & (cosmoflow["outcome"] != "runs")].itertuples():
        axis.axvline(row.value, color="black", lw=1, ls=(0, (1, 2)))
        words, place = f"{row.storage} could not \ngo past {row.value:g} ", {"ha": "right", "va": "top", "fontsize": 9}
        axis.text(row.value, 0.97, words, transform=axis.get_xaxis_transform(), **place)
    axis.set(xscale="log", yscale="log", xlabel="nodes", ylabel=f"epoch of {samples:,.0f} samples, s")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(table["nodes"].unique()), sorted(table["nodes"].unique()), rotation=45)
    axis.legend(loc="lower left", fontsize=9)
    return figure


def batches(table: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """What becomes of each batch per node on each storage, of `cases.batch_sweep`, above what was published."""
    _require(table, ["storage", "batch_per_node", "outcome"])
    _require(published, ["case", "storage", "batch_per_node", "outcome"])
    import matplotlib.pyplot as plt

    nurion = published[published["case"] == "ImageNet-11k"]
    lines = [(f"{name}, modelled", rows) for name, rows in table.groupby("storage", sort=False)]
    lines += [(f"{name}, published", rows) for name, rows in nurion.groupby("storage", sort=False)]
    figure, axis = plt.subplots(figsize=(8, 0.45 * len(lines) + 1.6), layout="constrained")
    for y, (_, rows) in enumerate(lines):
        for batch, outcome in zip(rows["batch_per_node"], rows["outcome"], strict=True):
            colour, marker = OUTCOMES[outcome]
            axis.plot(batch, y, ls="", color=colour, marker=marker, ms=11)
    axis.set_xscale("log", base=2)
    ticks = sorted({int(batch) for _, rows in lines for batch in rows["batch_per_node"]})
    axis.set_xticks(ticks, ticks)
    axis.set_yticks(range(len(lines)), [name for name, _ in lines])
    axis.set(xlabel="images per node and step", ylim=(len(lines) - 0.5, -0.5))
    axis.axhline(table["storage"].nunique() - 0.5, color="black", lw=0.6)
    for outcome, (colour, marker) in OUTCOMES.items():
        axis.plot([], [], ls="", color=colour, marker=marker, ms=9, label=outcome)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def timeouts(table: pd.DataFrame) -> Figure:
    """Of `cases.timeout_map`: a panel for each timeout, and in it the band of settings that tell two batches apart."""
    _require(table, ["burst_depth", "metadata_per_s", "timeout_s", "outcome"])
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    timeouts_s = sorted(table["timeout_s"].unique())
    figure, axes = plt.subplots(
        1, len(timeouts_s), figsize=(3 * len(timeouts_s) + 1, 4), sharey=True, layout="constrained", squeeze=False
    )
    for axis, timeout_s in zip(axes.flat, timeouts_s, strict=True):
        rows = table[table["timeout_s"] == timeout_s]
        depths, rates = sorted(rows["burst_depth"].unique()), np.sort(rows["metadata_per_s"].unique())
        edges = _edges(rates)
        height = dict(zip(rates, zip(edges[:-1], edges[1:], strict=True), strict=True))
        for outcome, (colour, hatch) in BAND.items():
            cells = rows[rows["outcome"] == outcome]
            low, high = (np.array([height[rate][i] for rate in cells["metadata_per_s"]]) for i in (0, 1))
            x = [depths.index(depth) for depth in cells["burst_depth"]]
            axis.bar(x, high - low, bottom=low, width=1, color=colour, hatch=hatch, ec="white", lw=0, alpha=0.85)
        axis.set_yscale("log")
        axis.set(xlabel="batches opened at once", title=f"timeout {timeout_s:g} s", ylim=(edges[0], edges[-1]))
        axis.set_xticks(range(len(depths)), depths)
    axes[0, 0].set_ylabel("opens per second")
    kinds = [Patch(fc=colour, hatch=hatch, ec="white", label=name) for name, (colour, hatch) in BAND.items()]
    figure.legend(handles=kinds, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _edges(values: np.ndarray) -> np.ndarray:
    """Borders half-way between neighbours on a logarithmic axis."""
    logs = np.log(values)
    middles = (logs[:-1] + logs[1:]) / 2 if len(logs) > 1 else np.array([])
    step = np.diff(logs).mean() / 2 if len(logs) > 1 else 0.1
    return np.exp(np.concatenate([[logs[0] - step], middles, [logs[-1] + step]]))


def break_even(table: pd.DataFrame, epochs: int = 10) -> Figure:
    """Of `cases.break_even`: time against epochs, with and without staging, a panel for each number of nodes.

    The size is the largest in the table; the lines of another are the same but for the scale.
    """
    _require(table, ["nodes", "data_tb", "stage_s", "epoch_slow_s", "epoch_fast_s", "epochs"])
    import matplotlib.pyplot as plt

    rows = table[table["data_tb"] == table["data_tb"].max()]
    figure, axes = plt.subplots(
        1, len(rows), figsize=(3.2 * len(rows), 3.6), sharey=True, layout="constrained", squeeze=False
    )
    at = np.array([0, epochs])
    for axis, row in zip(axes.flat, rows.itertuples(), strict=True):
        direct_s, staged_s = at * row.epoch_slow_s, row.stage_s + at * row.epoch_fast_s
        axis.plot(at, direct_s / 60, color=VERMILION, ls="--", lw=2, label="from the shared file system")
        axis.plot(at, staged_s / 60, color=BLUE, lw=2, label="staged first")
        if row.epochs <= epochs:
            axis.plot(row.epochs, row.epochs * row.epoch_slow_s / 60, "o", color="black", mfc="white", ms=9)
            title = f"pays after {np.ceil(row.epochs):.0f} epochs"
        else:
            title = "does not pay" if np.isinf(row.epochs) else f"pays after {np.ceil(row.epochs):,.0f} epochs"
        axis.set(xlabel="epochs", title=f"{row.nodes:,} nodes: {title}", xlim=(0, epochs), ylim=(0, None))
        axis.title.set_fontsize(10)
    axes[0, 0].set_ylabel(f"time for {rows['data_tb'].iloc[0]:g} TB, min")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def _require(table: pd.DataFrame, names: list[str]) -> None:
    require_columns(table, names)
    if table.empty:
        raise ValueError("there is nothing to draw: the table is empty")
