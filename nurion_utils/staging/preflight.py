"""Everything that can be known before a file is touched: what is missing, and whether it could be staged."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from nurion_utils.jobs.burst_buffers import guard
from nurion_utils.staging import plans
from nurion_utils.staging.plans import RECORDS, File, StageError, StagePlan, bytes_text, is_within, refused, scan
from nurion_utils.staging.records import Record, is_copy, is_of, read_records, record_of_link


class Prepared(NamedTuple):
    """A plan, and the temporary files that killed runs left at its destination."""

    plan: StagePlan
    leftovers: list[str]


def prepare(source: str, destination: str, ranks: int, replicate: bool) -> Prepared:
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
        plan = StagePlan(source, destination, tuple(tree.files), ranks, replicate, (), tree.directories, tree.links)
        _require_ours(plan, existing, records)
        todo, staged = [], []
        for file in plan.files:
            (staged if is_staged(file, existing, records) else todo).append(file)
        _require_room(destination, todo, len(plan.directories) + len(plan.links))
    return Prepared(replace(plan, files=tuple(todo), staged=tuple(staged)), leftovers)


def _require_ours(plan: StagePlan, existing: dict[str, os.stat_result], records: dict[str, list[Record]]) -> None:
    """Refuse to replace anything that was not staged from here, or is of another kind than in the source."""
    kinds = dict.fromkeys(plan.directories, ("folder", stat.S_ISDIR))
    kinds |= dict.fromkeys(plan.links, ("link", stat.S_ISLNK))
    kinds |= dict.fromkeys((file.path for file in plan.files), ("file", stat.S_ISREG))
    for path, found in existing.items():
        if path not in kinds:
            continue
        (kind, is_kind), full = kinds[path], os.path.join(plan.destination, path)
        if not is_kind(found.st_mode):
            raise StageError(f"at the destination {path!r} is not a {kind}, but in the source it is; move it away")
        same = kind == "folder" or (kind == "link" and os.readlink(full) == plan.links[path])
        if not same and not is_ours(full, found, records.get(path, [])):
            what = "was changed after it had been staged" if path in records else "was not staged from here"
            raise StageError(f"at the destination the {kind} {path!r} {what}; move it away, or stage to another folder")


def is_staged(file: File, existing: dict[str, os.stat_result], records: dict[str, list[Record]]) -> bool:
    """Whether the file is in place and on record, as the source has it."""
    found = existing.get(file.path)
    return found is not None and any(is_of(r, file) and is_copy(r, found) for r in records.get(file.path, []))


def is_ours(path: str, found: os.stat_result, records: Sequence[Record]) -> bool:
    """Whether the file or link that was found there is as one of its records says."""
    if stat.S_ISLNK(found.st_mode):
        return record_of_link(os.readlink(path)) in records
    return stat.S_ISREG(found.st_mode) and any(is_copy(record, found) for record in records)


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
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if plans.TEMPORARY.fullmatch(entry.name):
                leftovers.append(path)
            elif path != RECORDS:
                with contextlib.suppress(FileNotFoundError):  # it has gone since it was seen
                    existing[path] = entry.stat(follow_symlinks=False)
    return existing, leftovers


def _require_room(destination: str, files: Sequence[File], others: int) -> None:
    parent = destination
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    ours = parent == destination and os.stat(parent).st_uid == os.geteuid()  # read-only as its source: made writable
    if not ours and not os.access(parent, os.W_OK | os.X_OK):
        raise StageError(f"{parent!r} cannot be written to; choose another destination, or ask for the permission")
    room = os.statvfs(parent)
    # a page for the end of each file, and a line of the manifest
    needed = sum(file.size + 4096 if file.size else 256 for file in files)
    if needed > (free := room.f_bavail * room.f_frsize):
        raise StageError(
            f"{destination!r} has {bytes_text(free)} free, and {bytes_text(needed)} are needed; make room, or choose "
            "another destination"
        )
    inodes = len(files) + others + 8  # 8 for our records
    if room.f_files and inodes > room.f_favail:  # no limit where f_files is 0
        found = f"{destination!r} has room for {room.f_favail:,} more files, and {inodes:,} are needed"
        raise StageError(f"{found}; pack them into fewer, larger ones, or choose another destination")
