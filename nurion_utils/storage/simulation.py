"""The queues of a parallel file system worked out, instead of waited for.

>>> lustre = ParallelFileSystem(targets=8, target_mb_per_s=500, metadata_ops_per_s=10_000)
>>> epoch = Workload(readers=64, steps=10, files_per_step=1, file_bytes=8 * 10**6, compute_s=0.129)
>>> round(summarise(simulate(lustre, epoch), epoch)["accelerator_utilisation"], 2)
0.41
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nurion_utils.storage.model import METADATA, ParallelFileSystem, Workload

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["reader", "step", "request_s", "ready_s", "wait_s", "begin_s", "end_s", "target", "failed"]


def simulate(system: ParallelFileSystem, workload: Workload) -> pd.DataFrame:
    """Play an epoch on a parallel file system.

    When a request times out, its read fails as with EIO, and with it the job: nothing after that moment is in the
    table, and what was under way then has no ``end_s``.

    Returns
    -------
    pandas.DataFrame
        One row per reader and step: reader, step, request_s, ready_s, wait_s (the reader was stalled for its
        input), begin_s, end_s (with the wait for others, where readers meet), failed, and target: the one whose
        piece came last, or failed; -1 is the metadata server.
    """
    first, epoch = workload.first_targets(system), _Epoch(workload)
    free_s = np.zeros(system.targets + 1)  # the last one is the metadata server: METADATA is -1
    job_ends_s, most = np.inf, workload.readers
    while (waiting := np.flatnonzero(epoch.due_s < job_ends_s)).size:
        who = waiting[np.argsort(epoch.due_s[waiting], kind="stable")][:most]
        at_s = epoch.due_s[who]
        served = _serve(system, workload, at_s, first[epoch.step[who], who], free_s)
        # No request follows from one of these before its data are there: those that come until then are in order,
        # and nobody can still get between them. What was computed for later ones is thrown away.
        follows_s = np.minimum.accumulate(served.ready_s + (0 if workload.prefetch else workload.compute_s))
        late = np.flatnonzero(at_s[1:] > follows_s[:-1])
        count = late[0] + 1 if late.size else len(who)
        most = min(workload.readers, max(256, 4 * count))
        files = count * workload.files_per_step
        pieces = files * (len(served.target) // len(served.opened_s))
        free_s[METADATA] = served.opened_s[files - 1]
        np.maximum.at(free_s, served.target[:pieces], served.done_s[:pieces])
        job_ends_s = min(job_ends_s, served.fails_s[:count].min())
        epoch.advance(who[:count], served)
    return epoch.table()


class _Served(NamedTuple):
    """What became of the requests of some readers, in order of arrival; ``fails_s`` is infinite if nothing did."""

    opened_s: np.ndarray  # by file
    target: np.ndarray  # by piece
    done_s: np.ndarray  # by piece
    ready_s: np.ndarray  # by reader, like those below
    last: np.ndarray
    fails_s: np.ndarray
    failing: np.ndarray


class _Epoch:
    """What is known so far of every reader and step, and when each reader asks next."""

    def __init__(self, workload: Workload) -> None:
        self.workload, shape = workload, (workload.readers, workload.steps)
        self.request, self.ready, self.begin, self.end, self.fails = (np.full(shape, np.nan) for _ in range(5))
        self.target = np.full(shape, METADATA)
        self.step = np.zeros(workload.readers, int)  # of each reader's next request
        self.due_s = np.zeros(workload.readers)  # not a number: not yet known
        self.met, self.barrier_s = 0, 0.0  # steps after which all have met

    def advance(self, who: np.ndarray, served: _Served) -> None:
        """The next requests of these readers, the first in `served`, have been answered."""
        at, count, prefetch = (who, self.step[who]), len(who), self.workload.prefetch
        self.request[at], self.ready[at] = self.due_s[who], served.ready_s[:count]
        self.fails[at] = served.fails_s[:count]
        self.target[at] = np.where(served.fails_s < np.inf, served.failing, served.last)[:count]
        self._compute(at)
        self.step[who] += 1
        self.due_s[who] = np.nan
        who = np.flatnonzero(np.isnan(self.due_s) & (self.step < self.workload.steps))
        self.due_s[who] = (self.ready if prefetch else self.end)[who, self.step[who] - 1]
        full = who[self.step[who] >= prefetch] if prefetch else who[:0]  # a step is read when one of these was taken
        self.due_s[full] = np.maximum(self.due_s[full], self.begin[full, self.step[full] - prefetch])

    def _compute(self, at: tuple[np.ndarray, np.ndarray]) -> None:
        compute_s = self.workload.compute_s
        if not self.workload.synchronous:
            before_s = np.where(at[1] > 0, self.end[at[0], at[1] - 1], 0.0)
            self.begin[at] = np.maximum(before_s, self.ready[at])
            self.end[at] = self.begin[at] + compute_s
            return
        while self.met < self.workload.steps and not np.isnan(self.ready[:, self.met]).any():
            self.begin[:, self.met] = np.maximum(self.barrier_s, self.ready[:, self.met])
            self.end[:, self.met] = self.barrier_s = self.begin[:, self.met].max() + compute_s
            self.met += 1

    def table(self) -> pd.DataFrame:
        reader, step = np.divmod(np.arange(self.target.size), self.workload.steps)
        columns = {"request_s": self.request, "ready_s": self.ready, "begin_s": self.begin, "end_s": self.end}
        columns |= {"fails_s": self.fails, "target": self.target}
        return tabulate({"reader": reader, "step": step} | {name: column.ravel() for name, column in columns.items()})


def _serve(
    system: ParallelFileSystem, workload: Workload, at_s: np.ndarray, first: np.ndarray, free_s: np.ndarray
) -> _Served:
    """Send the bursts of some readers through the queues; `first` has a row of files for each."""
    readers, asked_s = len(at_s), np.repeat(at_s, workload.files_per_step)
    metadata = np.full(first.size, METADATA, np.int8)
    opened_s, open_fails_s = _queue(
        asked_s, np.full(first.size, 1 / system.metadata_ops_per_s), metadata, free_s, system
    )
    shares = system.shares(workload.file_bytes)
    shares = shares[shares > 0]
    target = ((first.reshape(-1, 1).astype(np.int32) + np.arange(len(shares))) % system.targets).ravel()
    work_s = np.tile(shares / system.target_mb_per_s / 1e6, first.size)
    done_s, fails_s = _queue(np.repeat(opened_s, len(shares)), work_s, target, free_s, system)

    done, fails, by_reader = (of_piece.reshape(readers, -1) for of_piece in (done_s, fails_s, target))
    rows, last, failing = np.arange(readers), done.argmax(axis=1), fails.argmin(axis=1)
    open_fails_s, fails_s = open_fails_s.reshape(readers, -1).min(axis=1), fails[rows, failing]
    return _Served(
        opened_s=opened_s,
        target=target,
        done_s=done_s,
        ready_s=done[rows, last],
        last=by_reader[rows, last],
        fails_s=np.minimum(open_fails_s, fails_s),
        failing=np.where(open_fails_s <= fails_s, METADATA, by_reader[rows, failing]),
    )


def _queue(
    asked_s: np.ndarray, work_s: np.ndarray, target: np.ndarray, free_s: np.ndarray, system: ParallelFileSystem
) -> tuple[np.ndarray, np.ndarray]:
    """When each request is done, and when it fails (infinite if not), first come first served at each target.

    Request i is done at ``work before and with it + max over j <= i of (arrival of j - work before j)``.
    """
    order = np.argsort(target.astype(np.min_scalar_type(-system.targets)), kind="stable")
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
    gives_up_s = asked_s + system.timeout_s
    return turn_s + work_s, np.where(turn_s > gives_up_s, gives_up_s, np.inf)


def tabulate(columns: dict[str, Any]) -> pd.DataFrame:
    """The table of `simulate`, from its columns and ``fails_s``: the job ends with the first of these moments."""
    import pandas as pd

    table = pd.DataFrame(columns).sort_values(["reader", "step"], ignore_index=True)
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

    Returns
    -------
    dict
        ``epoch_s`` (to the last reader's end, or the failure), ``throughput_gb_per_s``, ``accelerator_utilisation``
        (compute time over total time, as MLPerf Storage defines it).
    """
    epoch_s = table["end_s"].max()
    done = table["end_s"].notna() & ~table["failed"]
    steps = done.sum() / workload.readers
    gigabytes = table["ready_s"].notna().sum() * workload.files_per_step * workload.file_bytes / 1e9
    return {
        "epoch_s": float(epoch_s),
        "throughput_gb_per_s": float(gigabytes / epoch_s),
        "accelerator_utilisation": float(steps * workload.compute_s / epoch_s),
    }
