"""A shared file system and a job that reads from it, written down once as data, and their simulator.

>>> lustre = Storage(targets=8, target_mb_per_s=500, metadata_per_s=10_000)
>>> epoch = Workload(readers=64, steps=10, files_per_step=1, file_bytes=8 * 10**6, compute_s=0.129)
>>> round(summarise(simulate(lustre, epoch), epoch)["accelerator_utilisation"], 2)
0.41

A read waits twice, first come first served each time: its *open* at the metadata server, then its pieces at the
storage targets (Lustre's OSTs) that its stripes lie on, one request for all of the file's bytes on a target.
`nurion_utils.storage.emulate` plays the same queues in real time, for real readers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from nurion_utils import sites
from nurion_utils._checks import positive, whole_number

if TYPE_CHECKING:
    import pandas as pd

METADATA = -1  # stands for the metadata server where a target is named
COLUMNS = ["reader", "step", "request_s", "ready_s", "wait_s", "begin_s", "end_s", "target", "failed"]


@dataclass(frozen=True)
class Storage:
    """A shared file system.

    Attributes
    ----------
    targets, target_mb_per_s
        Storage targets, and 10^6 bytes that each delivers in a second.
    metadata_per_s
        Opens that the metadata server answers in a second, for all readers together.
    stripe_count, stripe_bytes
        Over how many targets a file is spread, and in pieces of which size; the defaults are Lustre's.
    timeout_s
        A request whose turn comes later than this after it was made is dropped unserved, and its reader told so;
        100 s is the default of Lustre.  `math.inf` for never.
    client_mb_per_s
        The most that the network of one reader's node takes; None if that is no limit.
    """

    targets: int
    target_mb_per_s: float
    metadata_per_s: float
    stripe_count: int = 1
    stripe_bytes: int = 2**20
    timeout_s: float = 100.0
    client_mb_per_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("targets", "stripe_count", "stripe_bytes"):
            object.__setattr__(self, name, whole_number(getattr(self, name), name))
        for name in ("target_mb_per_s", "metadata_per_s"):
            positive(getattr(self, name), name)
        if self.client_mb_per_s is not None:
            positive(self.client_mb_per_s, "client_mb_per_s")
        if self.timeout_s != math.inf:
            positive(self.timeout_s, "timeout_s")

    @classmethod
    def of_site(cls, site: sites.Site | str, name: str = "scratch") -> Storage:
        """A file system of a site, or its ``"burst_buffer"``, from the site's description.

        What the description does not say about striping and timeouts is as Lustre's defaults.

        Raises
        ------
        nurion_utils.sites.SiteError
            The site has no such storage, or does not say how many targets it has or how many opens a second.
        """
        machine = sites.load(site) if isinstance(site, str) else site
        known = machine.file_systems | ({"burst_buffer": machine.burst_buffer} if machine.burst_buffer else {})
        if name not in known:
            there = " and ".join(map(repr, known)) or "none"
            raise sites.SiteError(f"site {machine.name!r} has no storage {name!r}; what it describes is {there}.")
        part = known[name]
        needed = ["servers" if name == "burst_buffer" else "targets", "metadata_per_s", "bandwidth_gb_per_s"]
        for key in needed:
            if getattr(part, key) is None:
                section = name if name == "burst_buffer" else f"file_systems.{name}"
                raise sites.SiteError(f"site {machine.name!r} does not say {section}.{key}; add it to its description.")
        targets = getattr(part, needed[0])
        return cls(
            targets=targets,
            target_mb_per_s=part.bandwidth_gb_per_s * 1e3 / targets,
            metadata_per_s=part.metadata_per_s,
            stripe_count=part.stripe_count or cls.stripe_count,
            stripe_bytes=round(part.stripe_mib * 2**20) if part.stripe_mib else cls.stripe_bytes,
            timeout_s=part.timeout_s or cls.timeout_s,
        )

    @property
    def bandwidth_gb_per_s(self) -> float:
        """What all targets deliver together."""
        return self.targets * self.target_mb_per_s / 1e3

    def slowed(self, factor: float) -> Storage:
        """The same machine with slower clocks: every rate divided by `factor`, the timeout multiplied by it.

        So that one computer can play a large machine.  With the workload slowed by as much, whatever is a ratio
        keeps its meaning: accelerator utilisation, efficiency, which target is the hottest, which requests time
        out.  Times are `factor` times, bandwidths and rates one `factor`-th of the machine's.
        """
        positive(factor, "factor")
        client = self.client_mb_per_s
        return replace(
            self,
            target_mb_per_s=self.target_mb_per_s / factor,
            metadata_per_s=self.metadata_per_s / factor,
            timeout_s=self.timeout_s * factor,
            client_mb_per_s=None if client is None else client / factor,
        )

    def shares(self, length: int, offset: int = 0) -> np.ndarray:
        """Bytes of ``[offset, offset + length)`` of a file on its first target, the one after it, and so on."""
        first = np.arange(min(self.stripe_count, self.targets)) * self.stripe_bytes  # where each one's stripes begin
        cycle = len(first) * self.stripe_bytes

        def up_to(position: int) -> np.ndarray:
            return position // cycle * self.stripe_bytes + np.clip(position % cycle - first, 0, self.stripe_bytes)

        return up_to(offset + length) - up_to(offset)


@dataclass(frozen=True)
class Workload:
    """One epoch of a training job: each reader (a node) reads files and computes on them, step by step.

    Attributes
    ----------
    files_per_step, file_bytes
        Files that each reader opens together, as one burst, and the bytes of each; no file is read twice.
    compute_s
        What a step computes; emulated by waiting, as MLPerf Storage does.
    prefetch
        Steps read ahead, one after the other, while earlier ones are computed (tf.data's ``prefetch``); 0 for none.
    synchronous
        Whether readers meet at the end of every step, as an allreduce makes them.
    placement, seed
        Where the first stripe of a file lies: on a random target, on the next ones in turn, or all on target 0.
    """

    readers: int
    steps: int
    files_per_step: int
    file_bytes: int
    compute_s: float
    prefetch: int = 0
    synchronous: bool = True
    placement: Literal["random", "even", "one"] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"readers": 1, "steps": 1, "files_per_step": 1, "file_bytes": 1, "prefetch": 0, "seed": 0}
        for name, value in least.items():
            object.__setattr__(self, name, whole_number(getattr(self, name), name, value))
        if self.compute_s != 0:
            positive(self.compute_s, "compute_s")
        if not isinstance(self.synchronous, bool):
            raise ValueError(f"synchronous must be True or False, not {self.synchronous!r}")
        if self.placement not in ("random", "even", "one"):
            raise ValueError(f"placement must be 'random', 'even' or 'one', not {self.placement!r}")

    def slowed(self, factor: float) -> Workload:
        """The same job on nodes that compute `factor` times as long; see `Storage.slowed`."""
        positive(factor, "factor")
        return replace(self, compute_s=self.compute_s * factor)

    def first_targets(self, storage: Storage) -> np.ndarray:
        """The target of each file's first stripe, shape (steps, readers, files_per_step)."""
        shape, small = (self.steps, self.readers, self.files_per_step), np.min_scalar_type(storage.targets)
        if self.placement == "one":
            return np.zeros(shape, small)
        if self.placement == "random":
            return np.random.default_rng(self.seed).integers(0, storage.targets, shape, small)
        width = np.count_nonzero(storage.shares(self.file_bytes))
        return (np.arange(math.prod(shape)) * width % storage.targets).astype(small).reshape(shape)


class _Served(NamedTuple):
    """What became of the requests of some readers, in order of arrival; ``fails_s`` is infinite if nothing did."""

    opened_s: np.ndarray  # by file
    target: np.ndarray  # by piece
    done_s: np.ndarray  # by piece
    ready_s: np.ndarray  # by reader, like those below
    last: np.ndarray
    fails_s: np.ndarray
    failing: np.ndarray


def simulate(storage: Storage, workload: Workload) -> pd.DataFrame:
    """Play an epoch on a shared file system.

    When a request times out, its read fails as with EIO, and with it the job: nothing after that moment is in the
    table, and what was under way then has no ``end_s``.

    Returns
    -------
    pandas.DataFrame
        One row per reader and step: reader, step, request_s, ready_s, wait_s (the reader was stalled for its
        input), begin_s, end_s (with the wait for others, where readers meet), failed, and target: the one whose
        piece came last, or failed; -1 is the metadata server.
    """
    n, steps, prefetch = workload.readers, workload.steps, workload.prefetch
    first = workload.first_targets(storage)
    request, ready, begin, end, fails = (np.full((n, steps), np.nan) for _ in range(5))
    target = np.full((n, steps), METADATA)
    free_s, opens_free_s, link_free_s = np.zeros(storage.targets), 0.0, np.zeros(n)
    link_s = 0.0
    if storage.client_mb_per_s:
        link_s = workload.files_per_step * workload.file_bytes / storage.client_mb_per_s / 1e6
    step, due_s = np.zeros(n, int), np.zeros(n)  # of each reader's next request; not a number: not yet known
    met, barrier_s = 0, 0.0  # steps after which all have met
    job_ends_s, most = np.inf, n
    while (waiting := np.flatnonzero(due_s < job_ends_s)).size:
        who = waiting[np.argsort(due_s[waiting], kind="stable")][:most]
        at_s = due_s[who]
        served = _serve(storage, workload, at_s, first[step[who], who], opens_free_s, free_s)
        link = np.maximum(link_free_s[who], at_s) + link_s
        ready_s = np.maximum(served.ready_s, link)
        # No request follows from one of these before its data are there: those that come until then are in order,
        # and nobody can still get between them. What was computed for later ones is thrown away.
        follows_s = np.minimum.accumulate(ready_s + (0 if prefetch else workload.compute_s))
        late = np.flatnonzero(at_s[1:] > follows_s[:-1])
        count = late[0] + 1 if late.size else len(who)
        most = min(n, max(256, 4 * count))
        files = count * workload.files_per_step
        pieces = files * (len(served.target) // len(served.opened_s))
        opens_free_s = served.opened_s[files - 1]
        np.maximum.at(free_s, served.target[:pieces], served.done_s[:pieces])
        who, at = who[:count], (who[:count], step[who[:count]])
        link_free_s[who] = link[:count]
        request[at], ready[at], fails[at] = at_s[:count], ready_s[:count], served.fails_s[:count]
        target[at] = np.where(served.fails_s < np.inf, served.failing, served.last)[:count]
        job_ends_s = min(job_ends_s, served.fails_s[:count].min())
        if workload.synchronous:
            while met < steps and not np.isnan(ready[:, met]).any():
                begin[:, met] = np.maximum(barrier_s, ready[:, met])
                end[:, met] = barrier_s = begin[:, met].max() + workload.compute_s
                met += 1
        else:
            before_s = np.where(at[1] > 0, end[who, at[1] - 1], 0.0)
            begin[at] = np.maximum(before_s, ready[at])
            end[at] = begin[at] + workload.compute_s
        step[who] += 1
        due_s[who] = np.nan
        who = np.flatnonzero(np.isnan(due_s) & (step < steps))
        due_s[who] = (ready if prefetch else end)[who, step[who] - 1]
        full = who[step[who] >= prefetch] if prefetch else who[:0]  # a step is read when one of these has been taken
        due_s[full] = np.maximum(due_s[full], begin[full, step[full] - prefetch])
    reader, number = np.divmod(np.arange(n * steps), steps)
    columns = {"request_s": request, "ready_s": ready, "begin_s": begin, "end_s": end, "fails_s": fails}
    columns = {name: column.ravel() for name, column in columns.items()}
    return tabulate({"reader": reader, "step": number, **columns, "target": target.ravel()})


def _serve(
    storage: Storage, workload: Workload, at_s: np.ndarray, first: np.ndarray, opens_free_s: float, free_s: np.ndarray
) -> _Served:
    """Send the bursts of some readers through the queues; `first` has a row of files for each.

    In a queue, request i is done at ``work before and with it + max over j <= i of (arrival of j - work before j)``.
    """
    readers, files = first.shape
    open_s = 1 / storage.metadata_per_s
    asked_s, before_s = np.repeat(at_s, files), np.arange(first.size) * open_s
    turn_s = before_s + np.maximum(opens_free_s, np.maximum.accumulate(asked_s - before_s))
    opened_s = turn_s + open_s
    fails_s = np.where(turn_s > asked_s + storage.timeout_s, asked_s + storage.timeout_s, np.inf)

    shares = storage.shares(workload.file_bytes)
    shares = shares[shares > 0]
    target = ((first.reshape(-1, 1).astype(np.int32) + np.arange(len(shares))) % storage.targets).ravel()
    order = np.argsort(target.astype(np.min_scalar_type(storage.targets)), kind="stable")
    asked_s = np.repeat(opened_s, len(shares))
    work_s = np.tile(shares / storage.target_mb_per_s / 1e6, first.size)[order]
    new = np.diff(target[order], prepend=-1) > 0
    queue, heads = np.cumsum(new) - 1, np.flatnonzero(new)
    before_s = np.cumsum(work_s) - work_s
    before_s -= before_s[heads][queue]
    idle_s = asked_s[order] - before_s
    idle_s[heads] = np.maximum(idle_s[heads], free_s[target[order][heads]])
    apart_s = queue * (np.ptp(idle_s) + 1)  # one accumulation for all queues: lift each above the one before
    turn_s, done_s = np.empty_like(asked_s), np.empty_like(asked_s)
    turn_s[order] = np.maximum.accumulate(idle_s + apart_s) - apart_s + before_s
    done_s[order] = turn_s[order] + work_s
    piece_fails_s = np.where(turn_s > asked_s + storage.timeout_s, asked_s + storage.timeout_s, np.inf)

    done, fails = done_s.reshape(readers, -1), piece_fails_s.reshape(readers, -1)
    rows = np.arange(readers)
    last, failing = done.argmax(axis=1), fails.argmin(axis=1)
    open_fails_s, piece_fails_s = fails_s.reshape(readers, -1).min(axis=1), fails[rows, failing]
    by_reader = target.reshape(readers, -1)
    return _Served(
        opened_s=opened_s,
        target=target,
        done_s=done_s,
        ready_s=done[rows, last],
        last=by_reader[rows, last],
        fails_s=np.minimum(open_fails_s, piece_fails_s),
        failing=np.where(open_fails_s <= piece_fails_s, METADATA, by_reader[rows, failing]),
    )


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


def summarise(table: pd.DataFrame, workload: Workload) -> dict[str, float | int | None]:
    """What an epoch came to; `table` is one of `simulate` or `SharedStore.run`.

    Returns
    -------
    dict
        ``epoch_s`` (to the last reader's end, or the failure), ``throughput_gb_per_s``, ``input_wait_s`` (what a
        step took beyond its compute, on average), ``accelerator_utilisation`` (compute time over total time, as
        MLPerf Storage defines it), ``failed_at`` (the step in which the job failed, or None).
    """
    epoch_s = table["end_s"].max()
    done = table["end_s"].notna() & ~table["failed"]
    steps = done.sum() / workload.readers
    gigabytes = table["ready_s"].notna().sum() * workload.files_per_step * workload.file_bytes / 1e9
    failed = table.loc[table["failed"], "step"]
    return {
        "epoch_s": float(epoch_s),
        "throughput_gb_per_s": float(gigabytes / epoch_s),
        "input_wait_s": float(epoch_s / steps - workload.compute_s) if steps else math.inf,
        "accelerator_utilisation": float(steps * workload.compute_s / epoch_s),
        "failed_at": int(failed.min()) if len(failed) else None,
    }
