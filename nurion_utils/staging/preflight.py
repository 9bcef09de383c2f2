"""Everything that can be known before a file is touched: what is missing, and whether it could be staged."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nurion_utils.jobs.burst_buffers import guard
from nurion_utils.staging.plans import (
    RECORDS,
    TEMPORARY,
    File,
    StageError,
    StagePlan,
    Tree,
    bytes_text,
    is_within,
    refused,
    scan,
)
from nurion_utils.staging.records import Record, is_copy, is_of, is_time, read_records, record_of_link


@dataclass
class Job:
    """A plan, and what is known about its destination."""

    plan: StagePlan
    records: dict[str, Record]  # of the files that are staged already
    present: set[str]  # at the destination with the right size and time, but on no record
    leftovers: list[str]  # temporary files of killed runs


def prepare(source: str, destination: str, ranks: int, replicate: bool) -> Job:
    """All that can be known before anything is touched; raises `StageError` where that is enough to refuse."""
    require_safe(destination)
    if not source or not destination:
        raise StageError("stage needs the names of two folders, a source and a destination")
    source, destination = os.path.realpath(source), os.path.realpath(destination)
    if is_within(destination, source):
        raise StageError(f"the destination {destination!r} lies in the source {source!r}; choose one outside")
    if is_within(source, destination):
        raise StageError(f"the source {source!r} lies in the destination {destination!r}; choose another destination")
    if os.path.lexists(destination) and not os.path.isdir(destination):
        raise StageError(f"the destination {destination!r} is not a folder; choose another name")
    tree = scan(source)
    with refused("looked at"):
        existing, leftovers = look(destination, tree.directories)
        records = read_records(destination) if existing else {}
        todo, staged, present, known = _compared(tree, existing, records)
        _require_kinds(destination, tree, existing, records)
        _require_room(destination, todo, tree)
    plan = StagePlan(source, destination, tuple(todo), ranks, replicate, tuple(staged), tree.directories, tree.links)
    return Job(plan, known, present, leftovers)


def _compared(
    tree: Tree, existing: dict[str, os.stat_result], records: dict[str, list[Record]]
) -> tuple[list[File], list[File], set[str], dict[str, Record]]:
    """The files to copy, those that are staged, those of the former that lie there on no record, and the records."""
    todo, staged, present, known = [], [], set(), {}
    for file in tree.files:
        found = existing.get(file.path)
        if found is None:
            todo.append(file)
            continue
        if not stat.S_ISREG(found.st_mode):
            raise StageError(f"at the destination {file.path!r} is not a file, but in the source it is; move it away")
        at = (found.st_size, found.st_mtime_ns)
        known_as = [record for record in reversed(records.get(file.path, [])) if is_copy(record, *at)]
        ours = next((record for record in known_as if is_of(record, file)), next(iter(known_as), None))
        if ours and is_of(ours, file):
            known[file.path] = ours
            staged.append(file)
        elif not ours and found.st_size == file.size and is_time(found.st_mtime_ns, file.mtime_ns):
            present.add(file.path)
            todo.append(file)
        elif ours:
            todo.append(file)  # the source has changed since
        else:
            what = "was changed after it had been staged" if file.path in records else "was not staged from here"
            raise StageError(f"at the destination {file.path!r} {what}; move it away, or stage to another folder")
    return todo, staged, present, known


def _require_kinds(
    destination: str, tree: Tree, existing: dict[str, os.stat_result], records: dict[str, list[Record]]
) -> None:
    """Refuse a folder or link in whose place something else lies."""
    for path, found in existing.items():
        if path in tree.directories and not stat.S_ISDIR(found.st_mode):
            raise StageError(f"at the destination {path!r} is not a folder, but in the source it is; move it away")
        if path in tree.links:
            if not stat.S_ISLNK(found.st_mode):
                raise StageError(f"at the destination {path!r} is not a link, but in the source it is; move it away")
            full = os.path.join(destination, path)
            if os.readlink(full) != tree.links[path] and not is_ours(full, found, records.get(path, [])):
                raise StageError(f"at the destination the link {path!r} was not staged from here; move it away")


def is_ours(path: str, found: os.stat_result, records: Sequence[Record]) -> bool:
    """Whether the file or link that was found there is as one of its records says."""
    if stat.S_ISLNK(found.st_mode):
        return record_of_link(os.readlink(path)) in records
    return stat.S_ISREG(found.st_mode) and any(is_copy(record, found.st_size, found.st_mtime_ns) for record in records)


def require_safe(path: str) -> None:
    try:
        guard(path)
    except ValueError as error:
        raise StageError(str(error)) from None


def look(destination: str, folders: Iterable[str]) -> tuple[dict[str, os.stat_result], list[str]]:
    """What lies in those folders of the destination, and what killed runs left there."""
    existing, leftovers = {}, []
    for folder in folders:
        try:
            entries = list(os.scandir(os.path.join(destination, folder)))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise StageError(f"the destination {destination!r} cannot be read: {error.strerror}") from None
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if TEMPORARY.fullmatch(entry.name):
                leftovers.append(path)
            elif path != RECORDS:
                with contextlib.suppress(FileNotFoundError):  # it has gone since it was seen
                    existing[path] = entry.stat(follow_symlinks=False)
    return existing, leftovers


def _require_room(destination: str, files: Sequence[File], tree: Tree) -> None:
    parent = destination
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    ours = parent == destination and os.stat(parent).st_uid == os.geteuid()  # read-only as its source: made writable
    if not ours and not os.access(parent, os.W_OK | os.X_OK):
        raise StageError(f"{parent!r} cannot be written to; choose another destination, or ask for the permission")
    room = os.statvfs(parent)
    # a page for the end of each file, and a line of the manifest
    needed = sum(min(file.size, file.allocated) + 4096 if file.size else 256 for file in files)
    if needed > (free := room.f_bavail * room.f_frsize):
        raise StageError(
            f"{destination!r} has {bytes_text(free)} free, and {bytes_text(needed)} are needed; make room, or choose "
            "another destination"
        )
    inodes = len(files) + len(tree.directories) + len(tree.links) + 8
    if room.f_files and inodes > room.f_favail:  # no limit where f_files is 0
        raise StageError(
            f"{destination!r} has room for {room.f_favail:,} more files, and {inodes:,} are needed; pack them into "
            "fewer, larger ones, or choose another destination"
        )
