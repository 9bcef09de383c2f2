"""What is to be staged, and which rank reads which file: the plan, written once as data, and its readers."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from nurion_utils._checks import whole_number

if TYPE_CHECKING:
    import pandas as pd

RECORDS = ".nurion-stage"  # folder in a destination that holds the manifest
TEMPORARY = re.compile(r"\.nurion-part-(?:[0-9a-f]{12}-\d+|link)")  # a file that is not whole yet
# What a file costs besides its bytes, expressed in bytes: opening and renaming it takes about as long as copying
# this many. It only has to be of the right order for shares of many small files to be balanced.
FILE_COST_BYTES = 64 * 1024


class StageError(Exception):
    """Refused before anything began, or files that could not be staged: for each, `failures` says by its path why."""

    def __init__(self, message: str, failures: Mapping[str, str] | None = None):
        super().__init__(message)
        self.failures = dict(failures or {})


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Whatever a file system answers meanwhile becomes a `StageError` that names the path and says what was tried."""
    try:
        yield
    except OSError as error:
        raise StageError(f"{error.filename or 'a file'!r} cannot be {what}: {error.strerror or error}") from None


class File(NamedTuple):
    """A regular file: its path below the source, and what it looked like when the plan was made."""

    path: str
    size: int
    mtime_ns: int
    mode: int


class Tree(NamedTuple):
    """Everything below a source folder."""

    files: list[File]
    directories: dict[str, int]  # mode by path; the source itself is ""
    links: dict[str, str]  # target by path


def scan(source: str) -> Tree:
    """Look at everything below `source`; `StageError` for what could not be staged or trusted."""
    if not os.path.isdir(source):
        what = "is not a folder" if os.path.lexists(source) else "does not exist"
        raise StageError(f"the source {source!r} {what}; name the folder that holds the data")
    with refused("looked at"):
        tree, pending = Tree([], {"": stat.S_IMODE(os.stat(source).st_mode)}, {}), [""]
        while pending:
            folder = pending.pop()
            try:
                entries = sorted(os.scandir(os.path.join(source, folder)), key=lambda entry: entry.name)
            except FileNotFoundError:  # it has gone since it was seen
                if not folder:
                    raise
                del tree.directories[folder]
                continue
            for entry in entries:
                if entry.name == RECORDS or TEMPORARY.fullmatch(entry.name):  # of a staging to there, dead or alive
                    continue
                path = f"{folder}/{entry.name}" if folder else entry.name
                try:
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(found.st_mode):
                        # a call less for each of many files that everybody may read
                        if found.st_mode & 0o444 != 0o444 and not os.access(entry.path, os.R_OK):
                            os.lstat(entry.path)  # it may have gone since it was seen
                            raise StageError(f"{path!r} cannot be read: {os.strerror(errno.EACCES)}")
                        tree.files.append(File(path, found.st_size, found.st_mtime_ns, stat.S_IMODE(found.st_mode)))
                    elif stat.S_ISDIR(found.st_mode):
                        tree.directories[path] = stat.S_IMODE(found.st_mode)
                        pending.append(path)
                    elif stat.S_ISLNK(found.st_mode):
                        tree.links[path] = _checked_link(source, path)
                    else:
                        what = "a pipe, a socket or a device"
                        raise StageError(f"{path!r} is {what}; only files, folders and links are staged")
                except FileNotFoundError:  # it has gone since it was seen
                    continue
    return tree


def _checked_link(source: str, path: str) -> str:
    """Target of a symbolic link that means the same in the copy."""
    full = os.path.join(source, path)
    target = os.readlink(full)
    if os.path.isabs(target):
        raise StageError(f"the link {path!r} has the absolute target {target!r}; make it relative, within the source")
    try:
        resolved = os.path.realpath(full, strict=True)
    except OSError as error:
        os.lstat(full)  # it may have gone since it was seen
        why = "goes in a circle" if error.errno == errno.ELOOP else f"leads nowhere ({error.strerror})"
        raise StageError(f"the link {path!r} -> {target!r} {why}; mend or remove it") from None
    if not is_within(resolved, os.path.realpath(source)):
        raise StageError(f"the link {path!r} -> {target!r} leaves the source; put what it points to inside")
    return target


def is_within(path: str, folder: str) -> bool:
    """Whether `path`, both absolute and resolved, is `folder` or below it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


@dataclass(frozen=True)
class StagePlan:
    """Which rank reads which file, and whether it passes it on.

    With `replicate` every rank has a destination of its own and needs all files.  Then each is read once, and goes
    round the ring of the ranks: rank r hands what it has read, or was handed by r - 1, to r + 1.
    """

    source: str
    destination: str  # with ``{rank}`` in it where ranks with destinations of their own share one file system
    files: tuple[File, ...]  # to be copied
    ranks: int
    replicate: bool = False
    staged: tuple[File, ...] = ()  # at the destination already
    directories: Mapping[str, int] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole_number(self.ranks, "ranks")

    @classmethod
    def of_sizes(cls, sizes_bytes: Iterable[int], ranks: int, replicate: bool = False) -> StagePlan:
        """A plan of files that need not exist, to be timed and drawn."""
        files = tuple(File(f"file-{i}", size, 0, 0o644) for i, size in enumerate(sizes_bytes))
        return cls("source", "destination", files, ranks, replicate)

    @functools.cached_property
    def reader(self) -> tuple[int, ...]:
        """The rank that reads each of `files`: neighbours in the tree stay together, shares are equal in bytes.

        A file belongs to the rank in whose part of the whole its middle lies, so that a share differs from the mean by
        less than its largest file.
        """
        costs = [file.size + FILE_COST_BYTES for file in self.files]
        ends, total = itertools.accumulate(costs), sum(costs)
        return tuple((2 * end - cost) * self.ranks // (2 * total) for end, cost in zip(ends, costs, strict=True))

    @property
    def bytes(self) -> int:
        """Bytes to be copied."""
        return sum(file.size for file in self.files)

    def share(self, rank: int) -> list[int]:
        """Indices of the files that `rank` reads."""
        return [i for i, reader in enumerate(self.reader) if reader == rank]

    def table(self) -> pd.DataFrame:
        """One row per rank: rank, reads_files, reads_bytes, sends_bytes, receives_bytes, writes_bytes."""
        import numpy as np
        import pandas as pd

        files = pd.DataFrame({"rank": self.reader, "reads_bytes": [file.size for file in self.files]}, dtype=int)
        table = files.groupby("rank")["reads_bytes"].agg(reads_files="count", reads_bytes="sum")
        table = table.reindex(range(self.ranks), fill_value=0).rename_axis("rank").reset_index()
        received = self.replicate * (self.bytes - table["reads_bytes"])
        return table.assign(
            # on its way round the ring a share is not sent back to the rank that read it
            sends_bytes=np.roll(received, -1),
            receives_bytes=received,
            writes_bytes=table["reads_bytes"] + received,
        )

    def time(
        self,
        source_gb_per_s: float,
        link_gb_per_s: float = float("inf"),
        destination_gb_per_s_per_rank: float = float("inf"),
    ) -> float:
        """Seconds, if the slowest of reading, passing on and writing hides the others.

        The source delivers `source_gb_per_s` to all ranks together; the others are what one rank can send and write.
        """
        table = self.table()
        return max(
            self.bytes / 1e9 / source_gb_per_s,
            table["sends_bytes"].max() / 1e9 / link_gb_per_s,
            table["writes_bytes"].max() / 1e9 / destination_gb_per_s_per_rank,
        )

    def __str__(self) -> str:
        rows = self.table()
        lines = [f"{self.source} -> {self.destination}: {count(self.files)}, {bytes_text(self.bytes)} to copy"]
        if self.staged:
            lines[0] += f", {count(self.staged)} already there"
        for row in rows.head(16).itertuples():
            passed = f", passes on {bytes_text(row.sends_bytes)}" if self.replicate else ""
            lines.append(f"  rank {row.rank}: reads {row.reads_files:,} files, {bytes_text(row.reads_bytes)}{passed}")
        if len(rows) > 16:
            lines.append(f"  ... {len(rows) - 16:,} more ranks")
        return "\n".join(lines)


def count(files: Sized) -> str:
    return f"{len(files):,} file{'' if len(files) == 1 else 's'}"


def bytes_text(size_bytes: float) -> str:
    """A number of bytes as people read it, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} PB"
