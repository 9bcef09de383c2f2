"""The published cases: CosmoFlow on Cori, and the batch sweep on Nurion, beside what `storage` makes of them.

>>> node_limit(300), node_limit(800)  # nodes that Nurion's Lustre and its burst buffer could feed, by their bandwidth
(4838, 12903)

Both cases ended far below the limit that bandwidth alone sets, and the cause of neither is published.  What is
here are hypotheses: a model and the settings under which it ends where the real runs did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from nurion_utils import recordings, sites
from nurion_utils._checks import positive, whole_number
from nurion_utils.storage.model import Storage, Workload, simulate, summarise

if TYPE_CHECKING:
    import pandas as pd

# CosmoFlow: one sample, what a node computes on it, and the rate of both (Nurion paper; arXiv 1808.04728)
SAMPLE_BYTES = 8 * 10**6
COMPUTE_S = 0.129
NODE_MB_PER_S = 62.0
SAMPLES_PER_FILE = 64  # remembered
CORI_MEASURED_MB_PER_S = 347_000 * 2**20 / 1e6  # late in its life, all targets of its Lustre together (NERSC)
# Nurion's test: 512 nodes, ImageNet-11k.  That a KNL node trains about 60 images/s is remembered.
NODES = 512
IMAGE_BYTES = 92_000
IMAGES_PER_S = 60.0
BATCHES = (16, 32, 64, 128, 256, 512, 1024)
# 512 images fit into 82 GB and 1024 do not, so one takes 80 to 160 MB (fixed costs ignored); this is the middle.
ACTIVATIONS_MB = 120.0
STEPS = 12  # simulated where an epoch has more; they differ little


def published() -> pd.DataFrame:
    """Published figures, a row for each: case, machine, storage, nodes, batch_per_node, quantity, value, outcome, ...

    Raises
    ------
    FileNotFoundError
        The package was installed without its repository.
    """
    return recordings.load("published_io")


# -- how many nodes ---------------------------------------------------------------------------------------------------


def node_limit(bandwidth_gb_per_s: float, node_mb_per_s: float = NODE_MB_PER_S) -> int:
    """Nodes that a storage can feed if nothing but its mean bandwidth counts."""
    return int(positive(bandwidth_gb_per_s, "bandwidth_gb_per_s") * 1e3 // positive(node_mb_per_s, "node_mb_per_s"))


def hottest_target_limit(storage: Storage, file_bytes: int = SAMPLE_BYTES, compute_s: float = COMPUTE_S) -> int:
    """Nodes, each reading one file a step, for which the hottest target takes as long as the step computes.

    With N files on K targets at random and ``x = N / K``, the hottest has about ``x + sqrt(2 x ln K)`` (the maximum
    of K nearly normal counts of variance x); solved for x where that many take `compute_s`.
    """
    _require_whole_files(storage, file_bytes)
    most = positive(compute_s, "compute_s") * storage.target_mb_per_s * 1e6 / file_bytes
    spread = math.sqrt(2 * math.log(storage.targets))
    return int(storage.targets * ((math.sqrt(spread**2 + 4 * most) - spread) / 2) ** 2)


def simulated_limit(
    storage: Storage, file_bytes: int = SAMPLE_BYTES, compute_s: float = COMPUTE_S, steps: int = 50, seed: int = 0
) -> int:
    """The same limit, found by simulating: the most nodes whose input takes no longer than a step computes, on average.

    Files are opened as well as read here.
    """
    _require_whole_files(storage, file_bytes)
    positive(compute_s, "compute_s")
    patient = replace(storage, timeout_s=math.inf)

    def reading_s(nodes: int) -> float:
        workload = Workload(nodes, steps, 1, file_bytes, compute_s=0.0, seed=seed)
        return simulate(patient, workload)["end_s"].max() / steps

    low, high = 0, max(1, int(compute_s * storage.bandwidth_gb_per_s * 1e9 / file_bytes) + 1)  # none beyond the mean
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reading_s(middle) <= compute_s else (low, middle)
    return low


def _require_whole_files(storage: Storage, file_bytes: int) -> None:
    if np.count_nonzero(storage.shares(whole_number(file_bytes, "file_bytes"))) > 1:
        raise ValueError(
            f"this limit is for files on one target each, and {file_bytes} bytes are on several; use stripe_count=1"
        )


def cori(targets: int = 64, samples_per_file: int = SAMPLES_PER_FILE) -> dict[str, Storage]:
    """Cori's Lustre with data on all its targets and on some, new and as measured later, and its burst buffer, by name.

    That CosmoFlow's data lay on 64 targets is remembered, not published in what we have.  As a file has many
    samples, each of which is a read here, the metadata servers answer for so many more of them.
    """
    lustre, buffer = (Storage.of_site("cori", name) for name in ("scratch", "burst_buffer"))
    lustre = replace(lustre, metadata_per_s=lustre.metadata_per_s * samples_per_file)
    measured = replace(lustre, target_mb_per_s=CORI_MEASURED_MB_PER_S / lustre.targets)
    return {
        f"Lustre, {lustre.targets} targets": lustre,
        f"Lustre, {lustre.targets} targets as measured": measured,
        f"Lustre, {targets} targets": replace(lustre, targets=targets),
        f"Lustre, {targets} targets as measured": replace(measured, targets=targets),
        "burst buffer": replace(buffer, metadata_per_s=buffer.metadata_per_s * samples_per_file),
    }


def scaling(
    storages: Mapping[str, Storage],
    nodes: Sequence[int],
    samples: int = 2**18,
    file_bytes: int = SAMPLE_BYTES,
    compute_s: float = COMPUTE_S,
) -> pd.DataFrame:
    """An epoch of `samples` files, each node reading one a step while it computes on the one before.

    Input only: what the nodes have to say to each other is not in it.

    Returns
    -------
    pandas.DataFrame
        One row per storage and number of nodes: storage, nodes, step_s, epoch_s, efficiency (the part of a step that
        computes), demand_over_peak (of the bandwidth, were there no waiting), failed_at.
    """
    import pandas as pd

    rows = []
    for (name, storage), n in product(storages.items(), nodes):
        step_s, failed_at = _step(storage, n, file_bytes, compute_s)
        demand_gb_per_s = n * file_bytes / compute_s / 1e9
        rows.append(
            {
                **{"storage": name, "nodes": n, "step_s": step_s, "epoch_s": samples / n * step_s},
                **{"efficiency": compute_s / step_s, "demand_over_peak": demand_gb_per_s / storage.bandwidth_gb_per_s},
                "failed_at": failed_at,
            }
        )
    return pd.DataFrame(rows)


def _step(storage: Storage, nodes: int, file_bytes: int, compute_s: float) -> tuple[float, int | None]:
    """Seconds of a step in a long epoch that reads one step ahead (not a number if it failed), and where it failed."""
    workload = Workload(nodes, STEPS + 1, 1, file_bytes, compute_s, prefetch=1)
    table = simulate(storage, workload)
    failed_at = summarise(table, workload)["failed_at"]
    ends_s = table.groupby("step")["end_s"].max()
    return (math.nan if failed_at is not None else (ends_s[STEPS] - ends_s[0]) / STEPS), failed_at


# -- how large a batch ------------------------------------------------------------------------------------------------


def nurion(metadata_per_s: float = 1000.0) -> dict[str, Storage]:
    """Nurion's Lustre as described, the same at `metadata_per_s` opens a second, and its burst buffer, by name.

    The description's targets and opens a second are chosen, not published.  So few opens are a guess, too: as of a
    metadata server that others keep busy.
    """
    lustre = Storage.of_site("nurion")
    return {
        "Lustre": lustre,
        f"Lustre, {metadata_per_s:g} opens/s": replace(lustre, metadata_per_s=metadata_per_s),
        "burst buffer": Storage.of_site("nurion", "burst_buffer"),
    }


def batch_sweep(
    storages: Mapping[str, Storage],
    batches: Sequence[int] = BATCHES,
    nodes: int = NODES,
    images_per_s: float = IMAGES_PER_S,
    burst_depth: int = 1,
    activations_mb: float = ACTIVATIONS_MB,
    memory_gb: float | None = None,
) -> pd.DataFrame:
    """Nurion's test again: what becomes of a job whose nodes open `burst_depth` batches of images at once.

    Each image is a file of its own and all nodes begin together: the worst that a loader can do.  The real one's
    format, its depth and the reason for its end are not published.

    Parameters
    ----------
    images_per_s
        That one node trains.
    memory_gb
        Usable on a node; by default Nurion's in cache mode.

    Returns
    -------
    pandas.DataFrame
        One row per storage and batch per node: storage, batch_per_node, demand_gb_per_s (on average), demand_over_peak,
        burst_files, longest_wait_s (until a file is there), activations_gb, outcome ("runs", "read timed out",
        "out of memory"), why.
    """
    import pandas as pd

    memory_gb = sites.load("nurion").node.memory_usable_gb if memory_gb is None else positive(memory_gb, "memory_gb")
    positive(images_per_s, "images_per_s")
    rows = []
    for (name, storage), batch in product(storages.items(), batches):
        workload = Workload(nodes, 1, batch * burst_depth, IMAGE_BYTES, batch * burst_depth / images_per_s)
        table = simulate(storage, workload)
        failed = table["failed"].any()
        activations_gb = batch * activations_mb / 1e3
        demand_gb_per_s = nodes * images_per_s * IMAGE_BYTES / 1e9
        wait_s = math.inf if failed else table["wait_s"].max()
        burst_files = nodes * batch * burst_depth
        if activations_gb > memory_gb:
            outcome, why = "out of memory", f"{activations_gb:.0f} GB of activations in {memory_gb:.0f} GB"
        elif failed:
            who = "an open" if table.loc[table["failed"], "target"].iloc[0] < 0 else "a storage target"
            outcome, why = "read timed out", f"{who} of {burst_files:,} files waited over {storage.timeout_s:g} s"
        else:
            outcome, why = "runs", f"all {burst_files:,} files came within {wait_s:.3g} s"
        rows.append(
            {
                **{"storage": name, "batch_per_node": batch, "demand_gb_per_s": demand_gb_per_s},
                **{"demand_over_peak": demand_gb_per_s / storage.bandwidth_gb_per_s, "burst_files": burst_files},
                **{"longest_wait_s": wait_s, "activations_gb": activations_gb, "outcome": outcome, "why": why},
            }
        )
    return pd.DataFrame(rows)


def timeout_map(
    depths: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    metadata_per_s: Sequence[float] = tuple(np.geomspace(250, 64_000, 33)),
    timeouts_s: Sequence[float] = (20.0, 100.0, 300.0),
    runs_at: int = 128,
    fails_at: int = 256,
    nodes: int = NODES,
) -> pd.DataFrame:
    """Which settings let a job live at one batch per node and die at the next: a band, and how wide it is.

    The last of n opens that come together has its turn after ``(n - 1) / metadata_per_s`` seconds, and times out if
    that is more than the timeout.  Targets are left out: at 92 KB a file they are faster than the opens.

    Returns
    -------
    pandas.DataFrame
        One row per combination: burst_depth, metadata_per_s, timeout_s, wait_runs_s, wait_fails_s (of the last open
        at the two batches), outcome ("both run", "the larger fails", "both fail").
    """
    import pandas as pd

    if not runs_at < fails_at:
        raise ValueError(f"runs_at must be the smaller of the two batches, not {runs_at} beside {fails_at}")
    columns = ["burst_depth", "metadata_per_s", "timeout_s"]
    table = pd.DataFrame(list(product(depths, metadata_per_s, timeouts_s)), columns=columns)
    for name, batch in {"wait_runs_s": runs_at, "wait_fails_s": fails_at}.items():
        table[name] = (table["burst_depth"] * batch * nodes - 1) / table["metadata_per_s"]
    failures = (table[["wait_runs_s", "wait_fails_s"]].gt(table["timeout_s"], axis=0)).sum(axis=1)
    table["outcome"] = failures.map({0: "both run", 1: "the larger fails", 2: "both fail"})
    return table


# -- whether staging pays ---------------------------------------------------------------------------------------------


def break_even_epochs(stage_s: float, epoch_slow_s: float, epoch_fast_s: float) -> float:
    """Epochs after which copying first has paid; infinite if epochs are no shorter for it, rounding aside."""
    for name, value in {"stage_s": stage_s, "epoch_slow_s": epoch_slow_s, "epoch_fast_s": epoch_fast_s}.items():
        if not value >= 0:
            raise ValueError(f"{name} must be a number of seconds from 0 up, not {value!r}")
    shorter = epoch_fast_s < epoch_slow_s and not math.isclose(epoch_fast_s, epoch_slow_s)
    return stage_s / (epoch_slow_s - epoch_fast_s) if shorter else math.inf


def break_even(
    slow: Storage,
    fast: Storage,
    nodes: Sequence[int],
    data_tb: Sequence[float],
    file_bytes: int = SAMPLE_BYTES,
    compute_s: float = COMPUTE_S,
) -> pd.DataFrame:
    """Whether to stage data of several sizes from `slow` to `fast`, on several numbers of nodes.

    Staging goes at the smaller of the two bandwidths, which is the best case.  It and the epochs grow with the data
    alike, so the number of epochs depends on the nodes alone.

    Returns
    -------
    pandas.DataFrame
        One row per number of nodes and size: nodes, data_tb, stage_s, epoch_slow_s, epoch_fast_s, epochs (to pay).
    """
    import pandas as pd

    rows = []
    for n in nodes:
        steps_s = [_step(replace(storage, timeout_s=math.inf), n, file_bytes, compute_s)[0] for storage in (slow, fast)]
        for size in data_tb:
            stage_s = size * 1e3 / min(slow.bandwidth_gb_per_s, fast.bandwidth_gb_per_s)
            epochs_s = [size * 1e12 / file_bytes / n * step_s for step_s in steps_s]
            row = {"nodes": n, "data_tb": size, "stage_s": stage_s}
            row |= {"epoch_slow_s": epochs_s[0], "epoch_fast_s": epochs_s[1]}
            rows.append(row | {"epochs": break_even_epochs(stage_s, *epochs_s)})
    return pd.DataFrame(rows)
