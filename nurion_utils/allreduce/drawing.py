"""Pictures of schedules and of what they measured; every function takes the data and returns a figure."""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Patch

from nurion_utils import style
from nurion_utils._checks import require_columns
from nurion_utils.allreduce.checking import walk
from nurion_utils.allreduce.schedule import Schedule

MOST_RANKS = 16  # more do not fit a page
MOST_PANELS = 30
REDUCE, COPY = style.VERMILION, style.BLUE  # told apart by their dashes too
BUSY, WAIT = style.BLUE, style.GREY


def draw(schedule: Schedule) -> Figure:
    """Who holds what: one panel before the first and one after each step, a row per rank, a column per chunk.

    The number in a cell says how many ranks' contributions are in it, the shade as well. Arrows beside a panel are
    the transfers that led to it: solid where they were reduced, dashed where they were copied.
    """
    states = _states(schedule)
    if len(states) > MOST_PANELS:
        raise ValueError(f"a drawing has room for {MOST_PANELS - 1} steps, and this schedule has {len(states) - 1}")
    columns = min(len(states), max(2, 26 // (schedule.chunks + 2)))
    rows = -(-len(states) // columns)
    size = (columns * (0.36 * schedule.chunks + 1.1), rows * (0.36 * schedule.ranks + 0.75))
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(states) :]:
        axis.axis("off")
    for i, (axis, held) in enumerate(zip(axes.flat, states, strict=False)):
        _panel(axis, schedule, i, held)
        axis.title.set_size(9)
        if i % columns == 0:
            axis.set_ylabel("rank", fontsize=8)
        axis.set_xlabel("chunk", fontsize=8)
    _legend(figure)
    return figure


class Animation(FuncAnimation):
    """An animation that notebooks and pages show as an animated PNG, which needs no script."""

    def _repr_png_(self) -> bytes:
        with tempfile.TemporaryDirectory() as directory:
            self.save(Path(directory) / "frames.png", writer="pillow", fps=1)
            return (Path(directory) / "frames.png").read_bytes()


def animate(schedule: Schedule) -> Animation:
    """The panels of `draw` one after the other; the value of a notebook cell, it plays there."""
    states = _states(schedule)
    size = (0.5 * schedule.chunks + 2.2, 0.45 * schedule.ranks + 1.4)
    figure, axis = plt.subplots(figsize=size, layout="constrained")

    def frame(i: int) -> None:
        axis.clear()
        _panel(axis, schedule, i, states[i])
        axis.set_title(f"{schedule.name}, {axis.get_title()}", fontsize=10)
        axis.set(xlabel="chunk", ylabel="rank")

    _legend(figure)
    animation = Animation(figure, frame, frames=[*range(len(states)), len(states) - 1], init_func=lambda: None)
    plt.close(figure)  # or the notebook shows its first frame as well
    return animation


def draw_trace(trace: pd.DataFrame) -> Figure:
    """What each rank did when in one run: exchanging or waiting, and reducing.

    `trace` has the rows that `run` put into its ``trace`` on all ranks: ``rank, step, begin_s, received_s, end_s``.
    """
    require_columns(trace, ["rank", "step", "begin_s", "received_s", "end_s"])
    if trace.empty:
        raise ValueError("there is nothing to draw: the trace is empty, as that of one rank is")
    start_s = trace["begin_s"].min()
    n_ranks = int(trace["rank"].max()) + 1
    figure, axis = plt.subplots(figsize=(7.5, 0.5 * n_ranks + 1.2), layout="constrained")
    for row in trace.itertuples():
        exchange_ms, reduce_ms = (row.received_s - row.begin_s) * 1e3, (row.end_s - row.received_s) * 1e3
        at_ms = (row.begin_s - start_s) * 1e3
        axis.barh(row.rank, exchange_ms, left=at_ms, height=0.7, color=WAIT, edgecolor="black", lw=0.4)
        axis.barh(row.rank, reduce_ms, left=at_ms + exchange_ms, height=0.7, color=BUSY, hatch="//", lw=0)
        axis.annotate(row.step, (at_ms + exchange_ms / 2, row.rank), ha="center", va="center", fontsize=7)
    axis.set(xlabel="time, ms", ylabel="rank", yticks=range(n_ranks))
    axis.invert_yaxis()
    exchange = Patch(fc=WAIT, ec="black", lw=0.4, label="send and receive (number of the step)")
    kinds = [exchange, Patch(fc=BUSY, hatch="//", label="reduce")]
    style.legend_above(figure, ncols=2, handles=kinds, fontsize=8)
    return figure


def _states(schedule: Schedule) -> list[np.ndarray]:
    """How many contributions each rank holds of each chunk, before the first and after each step."""
    if max(schedule.ranks, schedule.chunks) > MOST_RANKS:
        raise ValueError(f"a drawing has room for {MOST_RANKS} ranks and as many chunks, and this is {schedule!r}")
    return [np.array([[bits.bit_count() for bits in chunks] for chunks in held]) for held in walk(schedule)]


def _panel(axis: Axes, schedule: Schedule, number: int, held: np.ndarray) -> None:
    axis.set_title(f"after step {number - 1}" if number else "before")
    axis.imshow(held, cmap="Greys", vmin=-schedule.ranks * 0.25, vmax=schedule.ranks * 2, aspect="auto")
    for (rank, chunk), n in np.ndenumerate(held):
        complete = n == schedule.ranks
        axis.text(chunk, rank, str(n), ha="center", va="center", fontsize=8, weight="bold" if complete else "normal")
    axis.set_xticks(range(schedule.chunks), range(schedule.chunks), fontsize=7)
    axis.set_yticks(range(schedule.ranks), range(schedule.ranks), fontsize=7)
    axis.set_xlim(-0.5, schedule.chunks + 0.9)  # room for the arrows on the right
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    transfers = set(schedule.steps[number - 1]) if number else set()
    for transfer in transfers:
        there_and_back = any(t[:2] == transfer[1::-1] for t in transfers)  # one arrow with two heads
        down = transfer.destination > transfer.source
        if there_and_back and not down:
            continue
        x, (gap, bend) = schedule.chunks - 0.4, (0.12, -0.4) if down else (-0.12, 0.4)
        look = {"color": REDUCE, "ls": "-"} if transfer.reduce else {"color": COPY, "ls": (0, (3, 1.5))}
        look |= {"connectionstyle": f"arc3,rad={bend}", "arrowstyle": "<|-|>" if there_and_back else "-|>"}
        ends = (x, transfer.source + gap), (x, transfer.destination - gap)
        axis.add_patch(FancyArrowPatch(*ends, mutation_scale=7, shrinkA=0, shrinkB=0, **look))


def _legend(figure: Figure) -> None:
    copied = Line2D([], [], color=COPY, ls=(0, (3, 1.5)), label="copied")
    kinds = [Line2D([], [], color=REDUCE, label="reduced"), copied]
    figure.legend(handles=kinds, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
