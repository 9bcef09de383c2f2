"""One staging at its destination: its folders and its lock, the records it leaves, and how it ends."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nurion_utils.staging import records
from nurion_utils.staging.copying import lock
from nurion_utils.staging.plans import RECORDS, File, StageError, StagePlan, bytes_text, count, refused
from nurion_utils.staging.preflight import Prepared
from nurion_utils.staging.records import is_of, read_records


@dataclass(frozen=True)
class Report:
    """What staging did."""

    files: int  # at the destination now, with those that were there already
    bytes: int
    copied_files: int
    copied_bytes: int
    time_s: float  # from the first look at the source to the manifest
    verified: bool  # whether everything was read again
    mended_files: int = 0  # those that had been damaged then, and were copied anew

    def __str__(self) -> str:
        there = self.files - self.copied_files
        mended = f", {self.mended_files:,} found damaged and copied anew" if self.mended_files else ""
        verified = f", all read again{mended or ' and right'}" if self.verified else ""
        return (
            f"{self.files:,} files, {bytes_text(self.bytes)}: {self.copied_files:,} copied "
            f"({bytes_text(self.copied_bytes)}), {there:,} already there, {self.time_s:.1f} s, "
            f"{bytes_text(self.copied_bytes / self.time_s)}/s{verified}"
        )


def report(plan: StagePlan, began: float, verified: bool, mended_files: int) -> Report:
    everything = sum(file.size for file in plan.staged) + plan.bytes
    time_s = time.perf_counter() - began
    files = len(plan.staged) + len(plan.files)
    return Report(files, everything, len(plan.files), plan.bytes, time_s, verified, mended_files)


@contextlib.contextmanager
def begin(job: Prepared) -> Iterator[None]:
    """Make the folders, and keep others from staging to them."""
    destination = job.plan.destination
    with refused("made"):
        for folder in sorted(job.plan.directories):  # "" first, then each before what is in it
            path = os.path.join(destination, folder)
            os.makedirs(path, exist_ok=True)
            if not os.access(path, os.W_OK | os.X_OK):  # a read-only folder, from an earlier run
                os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) | 0o700)
        os.makedirs(os.path.join(destination, RECORDS), exist_ok=True)
    with lock(destination):
        for leftover in job.leftovers:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(destination, leftover))
        yield


def on_record(plan: StagePlan) -> list[tuple[File, str]]:
    """The files of the plan that are on record, with their latest hashes."""
    records, known = read_records(plan.destination), []
    for file in (*plan.files, *plan.staged):
        known += [(file, record[2]) for record in records.get(file.path, []) if is_of(record, file)][-1:]
    return known


def finish(plan: StagePlan, failures: Mapping[str, str]) -> None:
    """Links, modes of folders, the manifest; raises `StageError` for what failed."""
    problems = dict(failures)
    for path, target in plan.links.items():
        full = os.path.join(plan.destination, path)
        try:
            temporary = os.path.join(os.path.dirname(full), ".nurion-part-link")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            os.symlink(target, temporary)
            os.replace(temporary, full)
        except OSError as error:
            problems[path] = error.strerror
    try:
        others = {path: records.record_of_link(target) for path, target in plan.links.items()}
        others |= dict.fromkeys(filter(None, plan.directories), records.FOLDER)
        records.write_manifest(plan.destination, others)
    except OSError as error:
        problems["the manifest"] = f"{error.strerror}; the journals hold the records"
    for folder, mode in sorted(plan.directories.items(), reverse=True):
        with contextlib.suppress(OSError):
            full = os.path.join(plan.destination, folder)
            # What the folder's owner has set on it stays: in a project's folder new files get the project's group.
            os.chmod(full, mode | stat.S_IMODE(os.stat(full).st_mode) & 0o7000)
    if problems:
        shown = "; ".join(f"{path!r}: {why}" for path, why in list(problems.items())[:5])
        more = f"; and {len(problems) - 5:,} more" if len(problems) > 5 else ""
        done = sum(file.path not in problems for file in plan.files)
        raise StageError(
            f"{count(problems)} could not be staged to {plan.destination!r} ({shown}{more}); the other {done:,} are "
            "in place, and a further run copies only what is missing",
            problems,
        )
