"""What was staged, on record at the destination: journals of copiers, and the manifest that they end in."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping

from nurion_utils.staging.plans import RECORDS, File

# Size, the time as the destination's file system keeps it, hash, and the time that the source had: Lustre, for one,
# keeps whole seconds.
Record = tuple[int, int, str, int]
GRANULES_NS = (1, 100, 1000, 10**6, 10**9, 2 * 10**9)  # in which file systems keep times
# What else purge has to know: links, by their targets, and folders, which may be empty.
FOLDER: Record = (-2, 0, "", 0)


def line_of(file: File, kept_ns: int, digest: str) -> str:
    # names that are not UTF-8 become escapes, and come back as they were
    return json.dumps([file.path, file.size, kept_ns, digest, file.mtime_ns]) + "\n"


def is_copy(record: Record, found: os.stat_result) -> bool:
    """Whether a file at the destination has the size and the time of the record, as its file system may show it."""
    size, kept_ns, _, _ = record
    return found.st_size == size and any(found.st_mtime_ns == kept_ns - kept_ns % granule for granule in GRANULES_NS)


def is_of(record: Record, file: File) -> bool:
    """Whether the record is of the file as the source has it."""
    return (record[0], record[3]) == (file.size, file.mtime_ns)


def read_records(destination: str) -> dict[str, list[Record]]:
    """What the manifest and the journals of killed copiers say was staged; the latest of a path comes last."""
    records: dict[str, list[Record]] = {}
    folder = os.path.join(destination, RECORDS)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return records
    # the manifest first: journals are younger
    for name in sorted(names, key=lambda name: name != "manifest.jsonl"):
        if name.endswith(".jsonl"):
            with open(os.path.join(folder, name), encoding="ascii", errors="replace") as lines:
                for line in lines:
                    try:
                        path, size, kept_ns, digest, mtime_ns = json.loads(line)
                        record = int(size), int(kept_ns), digest, int(mtime_ns)
                        records.setdefault(os.fspath(path), []).append(record)
                    except (ValueError, TypeError):  # a line that a killed copier did not finish
                        continue
    return records


def write_manifest(destination: str, others: Mapping[str, Record]) -> None:
    """Put the manifest, all journals and the records of `others` into one new manifest."""
    folder = os.path.join(destination, RECORDS)
    journals = [name for name in os.listdir(folder) if name.startswith("journal-")]
    temporary = os.path.join(folder, "manifest.part")
    with open(temporary, "wb") as out:
        for name in ["manifest.jsonl", *journals]:
            with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, name), "rb") as lines:
                shutil.copyfileobj(lines, out)
                out.write(b"\n")  # after a line that a killed copier did not finish
        out.writelines(f"{json.dumps([path, *record])}\n".encode() for path, record in others.items())
    os.replace(temporary, os.path.join(folder, "manifest.jsonl"))
    for name in journals:
        os.unlink(os.path.join(folder, name))


def record_of_link(target: str) -> Record:
    return -1, 0, target, 0
