"""Figures of predictions; every function takes a table and returns a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nurion_utils._checks import require_columns
from nurion_utils.style import BLUE, GREEN, GREY, ORANGE, PINK, VERMILION, legend_above, log2_axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_PARTS = {"compute": BLUE, "communication": VERMILION, "waiting": ORANGE, "input": GREEN, "listing": PINK}


def draw_fidelity(table: pd.DataFrame) -> Figure:
    """Predicted against published, as ratios, one line per figure of `fidelity` that was not fitted."""
    import matplotlib.pyplot as plt

    require_columns(table, ["id", "nodes", "published", "ours", "low", "high", "tolerance_percent", "use"])
    rows = table[(table["use"] == "test") & table["ours"].notna()].reset_index(drop=True)
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.22 * len(rows)), layout="constrained")
    for i, row in enumerate(rows.itertuples()):
        share = row.tolerance_percent / 100
        axis.barh(i, 2 * share, left=1 - share, height=0.9, color=GREY, alpha=0.4, label="" if i else "tolerance")
    ratio, low, high = (rows[name] / rows["published"] for name in ("ours", "low", "high"))
    for name, passes, marker in (("within", True, "o"), ("outside", False, "X")):
        these = rows["passes"] == passes
        bars = [(ratio - low)[these], (high - ratio)[these]]
        colour = BLUE if passes else VERMILION
        axis.errorbar(ratio[these], rows.index[these], xerr=bars, fmt=marker, color=colour, label=name, capsize=2)
    axis.set_xscale("log")
    axis.axvline(1, color="black", lw=0.8)
    axis.set_xticks([0.5, 0.7, 1, 1.4, 2], ["0.5", "0.7", "1", "1.4", "2"], minor=False)
    axis.minorticks_off()
    axis.set_yticks(rows.index, [f"{row.id}, {row.nodes:.0f}" for row in rows.itertuples()])
    axis.set(xlabel="predicted / published, with 95 % of runs", ylabel="series, nodes", ylim=(len(rows) - 0.4, -0.6))
    legend_above(figure, 3)
    return figure


def draw_shares(table: pd.DataFrame) -> Figure:
    """What an epoch, or a step, is made of against the number of nodes; the table is one of `predict`."""
    import matplotlib.pyplot as plt

    parts = [name for name in _PARTS if f"{name}_share" in table]
    require_columns(table, ["nodes", "compute_share"])
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    shares = [100 * table[f"{name}_share"] for name in parts]
    axis.stackplot(table["nodes"], shares, labels=parts, colors=[_PARTS[name] for name in parts])
    log2_axis(axis, [n for n in 2 ** np.arange(14) if table["nodes"].min() <= n <= table["nodes"].max()])
    axis.set(xlabel="nodes", ylabel="share of the time, %", ylim=(0, 100))
    legend_above(figure, len(parts))
    return figure
