"""The queues of a parallel file system worked out, instead of waited for.

>>> lustre = ParallelFileSystem(targets=8, target_mb_per_s=500, metadata_ops_per_s=10_000)
>>> epoch = Workload(readers=64, steps=10, files_per_step=1, file_bytes=8 * 10**6, compute_s=0.129)
>>> round(summarise(simulate(lustre, epoch), epoch)["accelerator_utilisation"], 2)
0.41
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nurion_utils.storage.model import METADATA, ParallelFileSystem, Workload

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["reader", "step", "request_s", "ready_s", "wait_s", "begin_s", "end_s", "target", "failed"]


def simulate(system: ParallelFileSystem, workload: Workload) -> pd.DataFrame:
    """Play an epoch on a parallel file system.

    When a request times out, its read fails as with EIO, and with it the job: nothing after that moment is in the
    table, and what was under way then has no ``end_s``.

    A row per reader and step: reader, step, request_s, ready_s, wait_s (the reader was stalled for its input), begin_s,
    end_s (with the wait for others), failed, and target: the one whose piece came last, or failed; -1 is the metadata
    server.
    """
    import pandas as pd

    first, reader = workload.first_targets(system), np.arange(workload.readers)
    free_s = np.zeros(system.targets + 1)  # the last one is the metadata server: METADATA is -1
    request_s, end_s, job_ends_s, steps = np.zeros(workload.readers), 0.0, np.inf, []
    for step in range(workload.steps):
        # Nobody asks for a step before all have asked for the one before: they meet in between.
        order = np.argsort(request_s, kind="stable")
        back = np.argsort(order)
        served = _serve(system, workload, request_s[order], first[step, order], free_s)
        ready_s, target, fails_s = (column[back] for column in served)
        begin_s = np.maximum(end_s, ready_s)
        end_s = begin_s.max() + workload.compute_s
        steps.append(np.broadcast_arrays(reader, step, target, request_s, ready_s, begin_s, end_s, fails_s))
        job_ends_s = min(job_ends_s, fails_s.min())
        request_s = begin_s if workload.prefetch else np.full_like(begin_s, end_s)
        if request_s.min() >= job_ends_s:
            break
    names = ["reader", "step", "target", "request_s", "ready_s", "begin_s", "end_s", "fails_s"]
    columns = map(np.concatenate, zip(*steps, strict=True))
    return tabulate(pd.DataFrame(dict(zip(names, columns, strict=True))))


def _serve(
    system: ParallelFileSystem, workload: Workload, at_s: np.ndarray, first: np.ndarray, free_s: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Send bursts that are asked for one after the other through the queues; `first` has a row of files for each.

    Returns when each burst is read, the target that came last or failed, and when it failed (infinite if not).
    """
    opened = np.full(first.size, METADATA, np.int8), np.full(first.size, 1 / system.metadata_ops_per_s)
    opened_s, open_fails_s = _queue(np.repeat(at_s, workload.files_per_step), *opened, free_s, system.timeout_s)
    shares = system.shares(workload.file_bytes)
    shares = shares[shares > 0]
    target = ((first.reshape(-1, 1).astype(np.int32) + np.arange(len(shares))) % system.targets).ravel()
    work_s = np.tile(shares / system.target_mb_per_s / 1e6, first.size)
    done_s, fails_s = _queue(np.repeat(opened_s, len(shares)), target, work_s, free_s, system.timeout_s)

    done, fails, targets = (of_piece.reshape(len(at_s), -1) for of_piece in (done_s, fails_s, target))
    open_fails_s, fails_s = open_fails_s.reshape(len(at_s), -1).min(axis=1), fails.min(axis=1)
    piece = np.where(fails_s < np.inf, fails.argmin(axis=1), done.argmax(axis=1))
    of_piece = np.take_along_axis(targets, piece[:, None], axis=1)[:, 0]
    at_metadata = (open_fails_s <= fails_s) & (open_fails_s < np.inf)
    return done.max(axis=1), np.where(at_metadata, METADATA, of_piece), np.minimum(open_fails_s, fails_s)


def _queue(
    asked_s: np.ndarray, target: np.ndarray, work_s: np.ndarray, free_s: np.ndarray, timeout_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """When each request is done, and when it fails (infinite if not), first come first served at each target.

    Request i is done at ``work before and with it + max over j <= i of (arrival of j - work before j)``. `free_s` of
    each target becomes the end of its last one.
    """
    order = np.argsort(target.astype(np.min_scalar_type(-len(free_s))), kind="stable")
    by_target, work = target[order], work_s[order]
    heads = np.flatnonzero(np.diff(by_target, prepend=METADATA - 1))  # the first in each queue
    lengths = np.diff(heads, append=len(order))
    before_s = np.cumsum(work) - work
    before_s -= np.repeat(before_s[heads], lengths)
    idle_s = asked_s[order] - before_s
    idle_s[heads] = np.maximum(idle_s[heads], free_s[by_target[heads]])
    # One accumulation for all queues: lift each above the one before.
    apart_s = np.repeat(np.arange(len(heads)) * (np.ptp(idle_s) + 1), lengths)
    turn_s = np.empty_like(asked_s)
    turn_s[order] = np.maximum.accumulate(idle_s + apart_s) - apart_s + before_s
    done_s, gives_up_s = turn_s + work_s, asked_s + timeout_s
    np.maximum.at(free_s, target, done_s)
    return done_s, np.where(turn_s > gives_up_s, gives_up_s, np.inf)


def tabulate(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `simulate`, from its columns and ``fails_s``: the job ends with the first of these moments."""
    table = table.sort_values(["reader", "step"], ignore_index=True)
    fails_s = table.pop("fails_s").fillna(np.inf)
    ends_s = fails_s.min()
    table = table[(table["request_s"] < ends_s).to_numpy()]
    table["failed"] = fails_s[table.index] <= min(ends_s, np.finfo(float).max)
    for name in ("ready_s", "begin_s", "end_s"):
        table[name] = table[name].where(table[name] <= ends_s)
    table.loc[table["failed"], "end_s"] = ends_s
    before_s = table.groupby("reader")["end_s"].shift(fill_value=0.0)
    table["wait_s"] = table["begin_s"].where(~table["failed"], ends_s) - before_s
    return table.reset_index(drop=True)[COLUMNS]


def summarise(table: pd.DataFrame, workload: Workload) -> dict[str, float]:
    """What an epoch came to; `table` is one of `simulate` or `EmulatedFileSystem.run`.

    ``epoch_s`` (to the last reader's end, or the failure), ``throughput_gb_per_s``, ``accelerator_utilisation``
    (compute time over total time, as MLPerf Storage defines it).
    """
    epoch_s = float(table["end_s"].max())
    steps = (table["end_s"].notna() & ~table["failed"]).sum() / workload.readers
    gigabytes = table["ready_s"].notna().sum() * workload.files_per_step * workload.file_bytes / 1e9
    return {
        "epoch_s": epoch_s,
        "throughput_gb_per_s": float(gigabytes / epoch_s),
        "accelerator_utilisation": float(steps * workload.compute_s / epoch_s),
    }
