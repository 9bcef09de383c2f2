"""Pictures of parallel file systems and of the published cases; every function takes a table and returns a figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nurion_utils._checks import require_columns
from nurion_utils.storage.model import METADATA, ParallelFileSystem
from nurion_utils.style import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, VERMILION, legend_above, log2_axis

# Told apart without colour too.
LINES = [
    {"color": colour, "ls": dash, "marker": marker, "ms": 5}
    for colour, dash, marker in zip(
        (BLUE, VERMILION, GREEN, ORANGE, PINK), ("-", "--", "-.", ":", (0, (5, 1))), "os^Dv", strict=True
    )
]
OUTCOMES = {
    "runs": {"color": BLUE, "marker": "o"},
    "read timed out": {"color": VERMILION, "marker": "X"},
    "dies": {"color": ORANGE, "marker": "P"},
    "out of memory": {"color": BLACK, "marker": "s"},
}
BAND = {
    "both run": {"fc": BLUE, "hatch": "", "ec": "white"},
    "the larger fails": {"fc": ORANGE, "hatch": "//", "ec": "white"},
    "both fail": {"fc": GREY, "hatch": "..", "ec": "white"},
}
MOST_REQUESTS = 3000
MOST_ROWS = 40  # requests are drawn below each other, and begin again at the top after so many


def queues(log: pd.DataFrame) -> Figure:
    """Who waits where: a panel for each queue, in which each request waits (pale) and is then served (dark).

    The log is that of `EmulatedFileSystem.log`, or the part of it that is of interest; up to 3,000 requests.
    """
    _require(log, ["target", "queued_s", "start_s", "end_s", "failed"])
    if len(log) > MOST_REQUESTS:
        raise ValueError(f"a drawing has room for {MOST_REQUESTS} requests, and this log has {len(log)}; choose some")
    targets, origin_s = sorted(log["target"].unique()), log["queued_s"].min()
    size = (8, 1.1 * len(targets) + 0.9)
    figure, axes = plt.subplots(len(targets), figsize=size, sharex=True, layout="constrained", squeeze=False)
    for axis, target in zip(axes.flat, targets, strict=True):
        rows = log[log["target"] == target]
        y = np.arange(len(rows)) % MOST_ROWS
        queued_s, end_s = rows["queued_s"] - origin_s, rows["end_s"] - origin_s
        start_s = (rows["start_s"] - origin_s).where(~rows["failed"], end_s)
        axis.barh(y, start_s - queued_s, left=queued_s, height=0.9, color="#CCCCCC")
        axis.barh(y, end_s - start_s, left=start_s, height=0.9, color=BLUE)
        failed = rows["failed"].to_numpy(bool)
        axis.plot(end_s[failed], y[failed], "x", color=VERMILION, ms=5)
        axis.set(yticks=[], ylim=(min(MOST_ROWS, len(rows)) - 0.3, -0.7))
        axis.set_ylabel("metadata" if target == METADATA else f"target {target}", rotation=0, ha="right", va="center")
    axes[-1, 0].set_xlabel("time, s")
    kinds = [Patch(fc="#CCCCCC", label="waits its turn"), Patch(fc=BLUE, label="is served")]
    if log["failed"].any():
        kinds.append(plt.Line2D([], [], ls="", marker="x", color=VERMILION, label="times out"))
    legend_above(figure, 3, handles=kinds)
    return figure


def throughput(table: pd.DataFrame, system: ParallelFileSystem) -> Figure:
    """Throughput against readers, with the bandwidth of all targets together as the ceiling.

    The table has the columns readers, throughput_gb_per_s, and kind (such as "measured" and "simulated"); several rows
    of one kind with the same readers are shown as their median and range.
    """
    _require(table, ["readers", "throughput_gb_per_s", "kind"])
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for (kind, rows), line in zip(table.groupby("kind", sort=False), LINES, strict=False):
        mb_per_s = rows.groupby("readers")["throughput_gb_per_s"].agg(["median", "min", "max"]) * 1e3
        spread = [mb_per_s["median"] - mb_per_s["min"], mb_per_s["max"] - mb_per_s["median"]]
        axis.errorbar(mb_per_s.index, mb_per_s["median"], spread, capsize=3, label=kind, **line)
    ceiling = system.bandwidth_gb_per_s * 1e3
    axis.axhline(ceiling, color=BLACK, lw=1, ls=(0, (1, 1)))
    label = f"{system.targets} targets of {system.target_mb_per_s:g} MB/s"
    axis.annotate(label, (0.01, ceiling), xycoords=("axes fraction", "data"), va="bottom")
    log2_axis(axis, table["readers"])
    axis.set(xlabel="readers", ylabel="throughput, MB/s")
    axis.set_ylim(0, max(ceiling, 1e3 * table["throughput_gb_per_s"].max()) * 1.15)
    axis.legend(loc="lower right")
    return figure


def epochs(table: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Epoch time against nodes, of `cases.scaling`, and on the same axes where the published runs of CosmoFlow ended.

    Published step times become epochs of as many samples; a vertical line is a number of nodes that could not be
    passed.
    """
    _require(table, ["storage", "nodes", "step_s", "epoch_s"])
    _require(published, ["case", "storage", "nodes", "quantity", "value", "outcome"])
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (name, rows), line in zip(table.groupby("storage", sort=False), LINES, strict=False):
        axis.plot(rows["nodes"], rows["epoch_s"], label=f"{name} (simulated)", **line)
    samples = (table["epoch_s"] * table["nodes"] / table["step_s"]).median()
    cosmoflow = published[published["case"] == "CosmoFlow"]
    steps = cosmoflow[(cosmoflow["quantity"] == "step time") & (cosmoflow["nodes"] >= table["nodes"].min())]
    star = {"ls": "", "marker": "*", "ms": 14, "mfc": "white", "mec": BLACK}
    epoch_s = steps["value"] * samples / steps["nodes"]
    axis.plot(steps["nodes"], epoch_s, label="published, communication included", **star)
    for row in cosmoflow[(cosmoflow["quantity"] == "largest job") & (cosmoflow["outcome"] != "runs")].itertuples():
        axis.axvline(row.value, color=BLACK, lw=1, ls=(0, (1, 2)))
        words, place = f"{row.storage} could not \ngo past {row.value:g} ", {"ha": "right", "va": "top", "fontsize": 9}
        axis.text(row.value, 0.97, words, transform=axis.get_xaxis_transform(), **place)
    log2_axis(axis, table["nodes"])
    axis.set(yscale="log", xlabel="nodes", ylabel=f"epoch of {samples:,.0f} samples, s")
    axis.legend(loc="lower left", fontsize=9)
    return figure


def batches(table: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """What becomes of each batch per node on each file system, of `cases.batch_sweep`, above what was published."""
    _require(table, ["storage", "batch_per_node", "outcome"])
    _require(published, ["case", "storage", "batch_per_node", "outcome"])
    nurion = published[published["case"] == "ImageNet-11k"]
    lines = [(f"{name}, modelled", rows) for name, rows in table.groupby("storage", sort=False)]
    lines += [(f"{name}, published", rows) for name, rows in nurion.groupby("storage", sort=False)]
    figure, axis = plt.subplots(figsize=(8, 0.45 * len(lines) + 1.6), layout="constrained")
    for y, (_, rows) in enumerate(lines):
        for batch, outcome in zip(rows["batch_per_node"], rows["outcome"], strict=True):
            axis.plot(batch, y, ls="", ms=11, **OUTCOMES[outcome])
    log2_axis(axis, [batch for _, rows in lines for batch in rows["batch_per_node"]])
    axis.set_yticks(range(len(lines)), [name for name, _ in lines])
    axis.set(xlabel="images per node and step", ylim=(len(lines) - 0.5, -0.5))
    axis.axhline(table["storage"].nunique() - 0.5, color=BLACK, lw=0.6)
    handles = [plt.Line2D([], [], ls="", ms=9, label=outcome, **look) for outcome, look in OUTCOMES.items()]
    legend_above(figure, 4, handles=handles)
    return figure


def timeouts(table: pd.DataFrame) -> Figure:
    """Of `cases.timeout_map`: a panel for each timeout, and in it the band of settings that tell two batches apart."""
    _require(table, ["burst_depth", "metadata_ops_per_s", "timeout_s", "outcome"])
    panels, size = table.groupby("timeout_s"), (3 * table["timeout_s"].nunique() + 1, 4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis, (timeout_s, rows) in zip(axes.flat, panels, strict=True):
        depths, rates = sorted(rows["burst_depth"].unique()), np.sort(rows["metadata_ops_per_s"].unique())
        middles = np.sqrt(rates[:-1] * rates[1:])  # half-way between neighbours on a logarithmic axis
        edges = np.concatenate([[rates[0] ** 2 / middles[0]], middles, [rates[-1] ** 2 / middles[-1]]])
        for outcome, look in BAND.items():
            cells = rows[rows["outcome"] == outcome]
            at = np.searchsorted(rates, cells["metadata_ops_per_s"])
            x = np.searchsorted(depths, cells["burst_depth"])
            axis.bar(x, edges[at + 1] - edges[at], bottom=edges[at], width=1, lw=0, alpha=0.85, **look)
        axis.set(yscale="log", xlabel="batches opened at once", title=f"timeout {timeout_s:g} s")
        axis.set_ylim(edges[0], edges[-1])
        axis.set_xticks(range(len(depths)), depths)
    axes[0, 0].set_ylabel("opens per second")
    legend_above(figure, 3, handles=[Patch(label=outcome, **look) for outcome, look in BAND.items()])
    return figure


def break_even(table: pd.DataFrame, epochs: int = 10) -> Figure:
    """Of `cases.break_even`: time against epochs, with and without staging, a panel for each number of nodes.

    The size is the largest in the table; the lines of another are the same but for the scale.
    """
    _require(table, ["nodes", "data_tb", "stage_s", "epoch_slow_s", "epoch_fast_s", "epochs"])
    rows, at = table[table["data_tb"] == table["data_tb"].max()], np.array([0, epochs])
    size = (3.2 * len(rows), 3.6)
    figure, axes = plt.subplots(1, len(rows), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis, row in zip(axes.flat, rows.itertuples(), strict=True):
        direct_s, staged_s = at * row.epoch_slow_s, row.stage_s + at * row.epoch_fast_s
        axis.plot(at, direct_s / 60, color=VERMILION, ls="--", lw=2, label="from the shared file system")
        axis.plot(at, staged_s / 60, color=BLUE, lw=2, label="staged first")
        if row.epochs <= epochs:
            axis.plot(row.epochs, row.epochs * row.epoch_slow_s / 60, "o", color=BLACK, mfc="white", ms=9)
        pays = "does not pay" if np.isinf(row.epochs) else f"pays after {np.ceil(row.epochs):,.0f} epochs"
        axis.set(xlabel="epochs", xlim=(0, epochs), ylim=(0, None))
        axis.set_title(f"{row.nodes:,} nodes: {pays}", fontsize=10)
    axes[0, 0].set_ylabel(f"time for {rows['data_tb'].iloc[0]:g} TB, min")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    legend_above(figure, 2, handles=handles, labels=labels)
    return figure


def _require(table: pd.DataFrame, names: list[str]) -> None:
    require_columns(table, names)
    if table.empty:
        raise ValueError("there is nothing to draw: the table is empty")
