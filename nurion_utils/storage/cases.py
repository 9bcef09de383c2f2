"""The published cases: CosmoFlow on Cori, and the batch sweep on Nurion, beside what `storage` makes of them.

>>> node_limit(300), node_limit(800)  # nodes that Nurion's Lustre and its burst buffer could feed, by their bandwidth
(4838, 12903)

Both cases ended far below the limit that bandwidth alone sets, and the cause of neither is published. What is here
are hypotheses: a model and the settings under which it ends where the real runs did.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from nurion_utils import sites
from nurion_utils._checks import number, positive
from nurion_utils.storage.model import ParallelFileSystem, Workload
from nurion_utils.storage.simulation import simulate

if TYPE_CHECKING:
    import pandas as pd

# CosmoFlow: one sample, what a node computes on it, and the rate of both (Nurion paper; arXiv 1808.04728)
SAMPLE_BYTES = 8 * 10**6
COMPUTE_S = 0.129
NODE_MB_PER_S = 62.0
SAMPLES_PER_FILE = 64  # remembered
TARGETS = 64  # of Cori's Lustre, that the data lay on; remembered, not published in what we have
EPOCH_SAMPLES = 2**18
STEPS = 12  # simulated where an epoch has more; they differ little
# Nurion's test: 512 nodes, ImageNet-11k. That a KNL node trains about 60 images/s is remembered.
NODES = 512
IMAGE_BYTES = 92_000
IMAGES_PER_S = 60.0
BATCHES = (16, 32, 64, 128, 256, 512, 1024)
# 512 images fit into 82 GB and 1024 do not, so one takes 80 to 160 MB (fixed costs ignored); this is the middle.
ACTIVATIONS_MB = 120.0


def node_limit(bandwidth_gb_per_s: float, node_mb_per_s: float = NODE_MB_PER_S) -> int:
    """Nodes that a file system can feed if nothing but its mean bandwidth counts."""
    return int(positive(bandwidth_gb_per_s, "bandwidth_gb_per_s") * 1e3 // positive(node_mb_per_s, "node_mb_per_s"))


def hottest_target_limit(system: ParallelFileSystem) -> int:
    """Nodes, each reading one sample a step, for which the hottest target takes as long as the step computes.

    With N files on K targets at random and ``x = N / K``, the hottest has about ``x + sqrt(2 x ln K)`` (the maximum
    of K nearly normal counts of variance x); solved for x where that many take as long.
    """
    _require_whole_files(system)
    most = COMPUTE_S * system.target_mb_per_s * 1e6 / SAMPLE_BYTES
    spread = math.sqrt(2 * math.log(system.targets))
    return int(system.targets * ((math.sqrt(spread**2 + 4 * most) - spread) / 2) ** 2)


def simulated_limit(system: ParallelFileSystem, steps: int = 50) -> int:
    """The same limit, found by simulating: the most nodes whose input takes no longer than a step computes.

    Files are opened as well as read here; what counts is the mean of `steps`.
    """
    _require_whole_files(system)
    patient = replace(system, timeout_s=math.inf)

    def reading_s(nodes: int) -> float:
        return simulate(patient, Workload(nodes, steps, 1, SAMPLE_BYTES, compute_s=0.0))["end_s"].max() / steps

    mean = int(COMPUTE_S * system.bandwidth_gb_per_s * 1e9 / SAMPLE_BYTES)  # none beyond it
    return bisect.bisect(range(1, mean + 1), COMPUTE_S, key=reading_s)


def _require_whole_files(system: ParallelFileSystem) -> None:
    if np.count_nonzero(system.shares(SAMPLE_BYTES)) > 1:
        raise ValueError(
            f"this limit is for files on one target, and {SAMPLE_BYTES} bytes are on several; use stripe_count=1"
        )


def cori() -> dict[str, ParallelFileSystem]:
    """Cori's Lustre with data on all its targets and on some, new and as measured later, and its burst buffer, by name.

    As a file has many samples, each of which is a read here, the metadata servers answer for so many more of them.
    """
    lustre = ParallelFileSystem.of_site("cori")
    measured_gb_per_s = sites.load("cori").file_systems["scratch"].bandwidth_measured_gb_per_s
    measured = replace(lustre, target_mb_per_s=measured_gb_per_s * 1e3 / lustre.targets)
    systems = {
        f"Lustre, {targets} targets{words}": replace(system, targets=targets)
        for targets in (lustre.targets, TARGETS)
        for words, system in {"": lustre, " as measured": measured}.items()
    }
    systems["burst buffer"] = ParallelFileSystem.of_site("cori", "burst_buffer")
    opens = {name: system.metadata_ops_per_s * SAMPLES_PER_FILE for name, system in systems.items()}
    return {name: replace(system, metadata_ops_per_s=opens[name]) for name, system in systems.items()}


def scaling(systems: Mapping[str, ParallelFileSystem], nodes: Sequence[int]) -> pd.DataFrame:
    """An epoch of 2**18 samples of CosmoFlow, each node reading one a step while it computes on the one before.

    Input only: what the nodes have to say to each other is not in it.

    A row per file system and number of nodes: storage, nodes, step_s (not a number if a read timed out), epoch_s,
    efficiency (the part of a step that computes), demand_over_peak (of the bandwidth, without waiting).
    """
    table = _combinations(storage=systems, nodes=nodes)
    table["step_s"] = [_step_s(systems[row.storage], row.nodes) for row in table.itertuples()]
    table["epoch_s"] = EPOCH_SAMPLES / table["nodes"] * table["step_s"]
    table["efficiency"] = COMPUTE_S / table["step_s"]
    table["demand_over_peak"] = table["nodes"] * SAMPLE_BYTES / COMPUTE_S / 1e9 / _peak_gb_per_s(table, systems)
    return table


def _combinations(**columns: Iterable) -> pd.DataFrame:
    """A row for each combination of these values."""
    import pandas as pd

    return pd.DataFrame(list(product(*columns.values())), columns=list(columns))


def _peak_gb_per_s(table: pd.DataFrame, systems: Mapping[str, ParallelFileSystem]) -> pd.Series:
    return table["storage"].map({name: system.bandwidth_gb_per_s for name, system in systems.items()})


def _step_s(system: ParallelFileSystem, nodes: int) -> float:
    """Seconds of a step in a long epoch that reads one step ahead; not a number if it failed."""
    table = simulate(system, Workload(nodes, STEPS + 1, 1, SAMPLE_BYTES, COMPUTE_S, prefetch=1))
    ends_s = table.groupby("step")["end_s"].max()
    return math.nan if table["failed"].any() else (ends_s[STEPS] - ends_s[0]) / STEPS


def nurion(metadata_ops_per_s: float = 1000.0) -> dict[str, ParallelFileSystem]:
    """Nurion's Lustre as described, the same with `metadata_ops_per_s`, and its burst buffer, by name.

    The description's targets and metadata operations are chosen, not published. So few operations are a guess, too:
    as of a metadata server that others keep busy.
    """
    lustre = ParallelFileSystem.of_site("nurion")
    return {
        "Lustre": lustre,
        f"Lustre, {metadata_ops_per_s:g} opens/s": replace(lustre, metadata_ops_per_s=metadata_ops_per_s),
        "burst buffer": ParallelFileSystem.of_site("nurion", "burst_buffer"),
    }


def batch_sweep(
    systems: Mapping[str, ParallelFileSystem],
    batches: Sequence[int] = BATCHES,
    nodes: int = NODES,
    activations_mb: float = ACTIVATIONS_MB,
) -> pd.DataFrame:
    """Nurion's test again: what becomes of a job whose nodes open a batch of images (so many per node) at once.

    Each image is a file of its own and all nodes begin together: the worst that a loader can do. The real one's
    format, its depth and the reason for its end are not published. One image takes `activations_mb` of a node's
    memory; what a node has is Nurion's in cache mode.

    A row per file system and batch: storage, batch_per_node, demand_gb_per_s (on average), demand_over_peak,
    burst_files, outcome ("runs", "read timed out", "out of memory").
    """
    most = sites.load("nurion").node.memory_usable_gb * 1e3 / positive(activations_mb, "activations_mb")

    def outcome(name: str, batch: int) -> str:
        epoch = simulate(systems[name], Workload(nodes, 1, batch, IMAGE_BYTES, batch / IMAGES_PER_S))
        return "out of memory" if batch > most else "read timed out" if epoch["failed"].any() else "runs"

    table = _combinations(storage=systems, batch_per_node=batches)
    table["demand_gb_per_s"] = nodes * IMAGES_PER_S * IMAGE_BYTES / 1e9
    table["demand_over_peak"] = table["demand_gb_per_s"] / _peak_gb_per_s(table, systems)
    table["burst_files"] = nodes * table["batch_per_node"]
    table["outcome"] = [outcome(row.storage, row.batch_per_node) for row in table.itertuples()]
    return table


def timeout_map(
    depths: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    metadata_ops_per_s: Sequence[float] = tuple(np.geomspace(250, 64_000, 33)),
    timeouts_s: Sequence[float] = (20.0, 100.0, 300.0),
    runs_at: int = 128,
    fails_at: int = 256,
    nodes: int = NODES,
) -> pd.DataFrame:
    """Which settings let a job live at `runs_at` images per node and die at `fails_at`: a band, and how wide it is.

    Each node opens `depths` batches at once. The last of n files that are opened together has its turn after
    ``(n - 1) / metadata_ops_per_s`` seconds, and times out if that is more than the timeout. Targets are left out: at
    92 KB a file they are faster than the opens.

    A row per combination: burst_depth, metadata_ops_per_s, timeout_s, wait_runs_s, wait_fails_s (of the last file at
    the two batches), outcome ("both run", "the larger fails", "both fail").
    """
    if not runs_at < fails_at:
        raise ValueError(f"runs_at must be the smaller of the two batches, not {runs_at} beside {fails_at}")
    table = _combinations(burst_depth=depths, metadata_ops_per_s=metadata_ops_per_s, timeout_s=timeouts_s)
    for name, batch in {"wait_runs_s": runs_at, "wait_fails_s": fails_at}.items():
        table[name] = (table["burst_depth"] * batch * nodes - 1) / table["metadata_ops_per_s"]
    failures = table[["wait_runs_s", "wait_fails_s"]].gt(table["timeout_s"], axis=0).sum(axis=1)
    table["outcome"] = failures.map({0: "both run", 1: "the larger fails", 2: "both fail"})
    return table


def break_even_epochs(stage_s: float, epoch_slow_s: float, epoch_fast_s: float) -> float:
    """Epochs after which copying first has paid; infinite if epochs are no shorter for it, rounding aside."""
    for name, value in {"stage_s": stage_s, "epoch_slow_s": epoch_slow_s, "epoch_fast_s": epoch_fast_s}.items():
        number(value, name, least=0)
    shorter = epoch_fast_s < epoch_slow_s and not math.isclose(epoch_fast_s, epoch_slow_s)
    return stage_s / (epoch_slow_s - epoch_fast_s) if shorter else math.inf


def break_even(
    slow: ParallelFileSystem, fast: ParallelFileSystem, nodes: Sequence[int], data_tb: Sequence[float]
) -> pd.DataFrame:
    """Whether to stage data of several sizes (10^12 bytes) from `slow` to `fast` for CosmoFlow on so many nodes.

    Staging goes at the smaller of the two bandwidths, which is the best case. It and the epochs grow with the data
    alike, so the number of epochs depends on the nodes alone.

    A row per number of nodes and size: nodes, data_tb, stage_s, epoch_slow_s, epoch_fast_s, epochs (to pay).
    """
    table = _combinations(nodes=nodes, data_tb=data_tb)
    table["stage_s"] = table["data_tb"] * 1e3 / min(slow.bandwidth_gb_per_s, fast.bandwidth_gb_per_s)
    for name, system in {"epoch_slow_s": slow, "epoch_fast_s": fast}.items():
        step_s = table["nodes"].map({n: _step_s(replace(system, timeout_s=math.inf), n) for n in nodes})
        table[name] = table["data_tb"] * 1e12 / SAMPLE_BYTES / table["nodes"] * step_s
    times = table[["stage_s", "epoch_slow_s", "epoch_fast_s"]].itertuples(index=False)
    return table.assign(epochs=[break_even_epochs(*row) for row in times])
