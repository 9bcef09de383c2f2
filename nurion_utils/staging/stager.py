"""Stage a folder: plan, check, copy on all ranks, record.  Killed at any moment, the next run copies the rest."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nurion_utils.staging import copying
from nurion_utils.staging.back_ends import guard
from nurion_utils.staging.copying import Record, read_records, verify_share
from nurion_utils.staging.plans import (
    RECORDS,
    File,
    StageError,
    StagePlan,
    Tree,
    bytes_text,
    count,
    deal,
    is_within,
    scan,
)  # fmt: skip

# Below this much work, starting processes takes longer than they save.
SMALL_FILES, SMALL_BYTES = 500, 32 << 20


@dataclass(frozen=True)
class Report:
    """What staging did.

    Attributes
    ----------
    files, bytes : int
        At the destination now, with those that were there already.
    copied_files, copied_bytes : int
    time_s : float
        From the first look at the source to the manifest.
    verified : bool
        Whether everything was read again.
    """

    files: int
    bytes: int
    copied_files: int
    copied_bytes: int
    time_s: float
    verified: bool

    def __str__(self) -> str:
        there = self.files - self.copied_files
        verified = ", all read again and right" if self.verified else ""
        return (
            f"{self.files:,} files, {bytes_text(self.bytes)}: {self.copied_files:,} copied "
            f"({bytes_text(self.copied_bytes)}), {there:,} already there, {self.time_s:.1f} s, "
            f"{bytes_text(self.copied_bytes / self.time_s)}/s{verified}"
        )


@dataclass
class _Job:
    """A plan, and what is known about its destination."""

    plan: StagePlan
    records: dict[str, Record]  # of the files that are staged already
    present: set[str]  # at the destination with the right size and time, but on no record
    leftovers: list[str]  # temporary files of killed runs


def plan(
    source: str | os.PathLike, destination: str | os.PathLike, ranks: int = 1, everyone: bool = False
) -> StagePlan:
    """What `stage` would do, after all its checks; touches nothing.

    Raises
    ------
    StageError
        As `stage` does before it begins.
    """
    return _prepare(os.fspath(source), os.fspath(destination), ranks, everyone).plan


def stage(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    ranks: Any = None,
    *,
    everyone: bool = False,
    verify: bool = False,
    workers: int | None = None,
) -> Report:
    """Copy the folder `source` to `destination`, so that it can be trusted.

    Every file is hashed on the way (xxh3, 128 bits: against accidents, not against attackers) and appears under its
    name only when it is whole.  Regular files, folders, links within the source, modes and modification times are
    copied; owners, extended attributes and hard links are not.  The manifest with the hashes lies in
    ``.nurion-stage`` at the destination; files that are there already, and on record, are not copied again.

    Parameters
    ----------
    ranks
        A `nurion_utils.ranks.World` or, in a program that `mpiexec` started, an MPI communicator, on all of whose
        ranks `stage` is called.  None: processes of this machine.
    everyone
        Every rank has a destination of its own, such as a node's own disk, and needs all files.  Each file is read
        once and handed on from rank to rank over MPI.  Where ranks share a node, write ``{rank}`` into `destination`.
    verify
        Read everything at the destination again, and copy again what is damaged.
    workers
        Without ranks, how many processes copy; by default one per core, or none for little data.

    Raises
    ------
    StageError
        Refused, and then nothing was touched; or some files could not be staged, each named in ``failures``, and
        all others are in place.
    """
    source, destination = os.fspath(source), os.fspath(destination)
    if ranks is None and everyone:
        raise StageError("passing files on needs ranks: give stage a World, or start it with mpiexec")
    if ranks is None:
        return _stage_here(source, destination, workers, verify)
    from nurion_utils.staging import passing  # MPI loads only where there are ranks

    return passing.stage_on_ranks(ranks, source, destination, everyone, verify)


def purge(destination: str | os.PathLike) -> int:
    """Remove what `stage` put into `destination`, and nothing else; returns the number of files removed.

    Files that were changed after they had been staged, and others' files, stay.

    Raises
    ------
    StageError
        Nothing was staged there, or it lies where removing a file would delete the original.
    """
    _guard(os.fspath(destination))  # as it was given: what lies behind a link may no longer look like a burst buffer
    destination = os.path.realpath(os.fspath(destination))
    if not os.path.isdir(os.path.join(destination, RECORDS)):
        raise StageError(f"nothing was staged to {destination!r}: it has no {RECORDS}")
    removed = 0
    with _lock(destination):
        records = read_records(destination)
        folders = set()
        for path, known in records.items():
            full = os.path.join(destination, path)
            # no record, however it came about, may lead out of the destination
            if not is_within(os.path.realpath(os.path.dirname(full)), destination):
                continue
            with contextlib.suppress(OSError):
                found = os.lstat(full)
                if stat.S_ISREG(found.st_mode) and (found.st_size, found.st_mtime_ns) in {
                    record[:2] for record in known
                }:
                    os.unlink(full)
                    removed += 1
            while path := os.path.dirname(path):
                folders.add(path)
        for leftover in _look(destination, sorted(folders | {""}))[1]:
            os.unlink(os.path.join(destination, leftover))
        for name in os.listdir(os.path.join(destination, RECORDS)):
            os.unlink(os.path.join(destination, RECORDS, name))
    for folder in [RECORDS, *sorted(folders, key=lambda path: -path.count("/")), ""]:
        with contextlib.suppress(OSError):  # others' files are in it
            os.rmdir(os.path.join(destination, folder))
    return removed


def _stage_here(source: str, destination: str, workers: int | None, verify: bool) -> Report:
    began = time.perf_counter()
    job = _prepare(source, destination, 1, False)
    files, total = job.plan.files, job.plan.bytes
    if workers is None:
        little = len(files) < SMALL_FILES and total < SMALL_BYTES
        workers = 0 if little else len(os.sched_getaffinity(0))

    def carry_out(function: str, shares: Sequence[tuple], size_bytes: int, title: str) -> dict[str, str]:
        with _progress(size_bytes, title) as tell:
            if not workers:
                return getattr(copying, function)(*shares[0], tell)
            return _in_processes(function, shares, tell, job.plan.destination)

    def copy(these: Sequence[File]) -> dict[str, str]:
        places = deal(these, max(workers, 1))
        shares = [[f for f, place in zip(these, places, strict=True) if place == i] for i in range(max(workers, 1))]
        fixed = (job.plan.source, job.plan.destination)
        arguments = [(*fixed, share, [f.path for f in share if f.path in job.present]) for share in shares]
        return carry_out("copy_share", arguments, sum(file.size for file in these), "staging")

    with begin(job):
        failures = copy(files)
        if verify:
            staged = staged_records(job)
            everything = list(staged.items())
            n = max(workers, 1)
            arguments = [(job.plan.destination, everything[i::n]) for i in range(n)]
            damaged = carry_out("verify_share", arguments, sum(r[0] for r in staged.values()), "verifying")
            again = [file for file in (*files, *job.plan.staged) if file.path in damaged]
            failures |= copy(again)
            known = staged_records(job)
            failures |= verify_share(job.plan.destination, [(f.path, known[f.path]) for f in again], lambda done: None)
        finish(job, failures)
    return report(job, began, verify)


def report(job: _Job, began: float, verified: bool) -> Report:
    plan = job.plan
    everything = sum(file.size for file in plan.staged) + plan.bytes
    time_s = time.perf_counter() - began
    return Report(len(plan.staged) + len(plan.files), everything, len(plan.files), plan.bytes, time_s, verified)


# -- before ----------------------------------------------------------------------------------------------------


def _prepare(source: str, destination: str, ranks: int, everyone: bool) -> _Job:
    """All that can be known before anything is touched; raises `StageError` where that is enough to refuse."""
    _guard(destination)
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
    existing, leftovers = _look(destination, tree.directories)
    records = read_records(destination) if existing else {}
    todo, staged, present, known = [], [], set(), {}
    for file in tree.files:
        found = existing.get(file.path)
        if found is None:
            todo.append(file)
            continue
        if not stat.S_ISREG(found.st_mode):
            raise StageError(f"at the destination {file.path!r} is not a file, but in the source it is; move it away")
        at = (found.st_size, found.st_mtime_ns)
        ours = next((record for record in reversed(records.get(file.path, [])) if record[:2] == at), None)
        if at == (file.size, file.mtime_ns):
            if ours:
                known[file.path] = ours
                staged.append(file)
            else:
                present.add(file.path)
                todo.append(file)
        elif ours:
            todo.append(file)  # the source has changed since
        else:
            what = "was changed after it had been staged" if file.path in records else "was not staged from here"
            raise StageError(f"at the destination {file.path!r} {what}; move it away, or stage to another folder")
    for path, found in existing.items():
        if path in tree.directories and not stat.S_ISDIR(found.st_mode):
            raise StageError(f"at the destination {path!r} is not a folder, but in the source it is; move it away")
        if path in tree.links and not stat.S_ISLNK(found.st_mode):
            raise StageError(f"at the destination {path!r} is not a link, but in the source it is; move it away")
    _require_room(destination, todo, tree)
    plan = StagePlan(
        source, destination, tuple(todo), ranks, everyone, tuple(staged), tree.directories, tree.links
    )  # fmt: skip
    return _Job(plan, known, present, leftovers)


def _guard(path: str) -> None:
    try:
        guard(path)
    except ValueError as error:
        raise StageError(str(error)) from None


def _look(destination: str, folders: Sequence[str] | Mapping[str, int]) -> tuple[dict[str, os.stat_result], list[str]]:
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
            if entry.name.startswith(copying.TEMPORARY):
                leftovers.append(path)
            elif path != RECORDS:
                existing[path] = entry.stat(follow_symlinks=False)
    return existing, leftovers


def _require_room(destination: str, files: Sequence[File], tree: Tree) -> None:
    parent = destination
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    if not os.access(parent, os.W_OK | os.X_OK):
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


# -- during ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def begin(job: _Job) -> Iterator[None]:
    """Make the folders, and keep others from staging to them."""
    destination = job.plan.destination
    os.makedirs(os.path.join(destination, RECORDS), exist_ok=True)
    with _lock(destination):
        for leftover in job.leftovers:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(destination, leftover))
        for folder in sorted(job.plan.directories):
            path = os.path.join(destination, folder)
            os.makedirs(path, exist_ok=True)
            if not os.access(path, os.W_OK | os.X_OK):  # a read-only folder, from an earlier run
                os.chmod(path, 0o700)
        yield


@contextlib.contextmanager
def _lock(destination: str) -> Iterator[None]:
    with open(os.path.join(destination, RECORDS, "lock"), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # the copiers hold it too
        except BlockingIOError:
            raise StageError(f"another staging to {destination!r} is at work; wait for it to end") from None
        except OSError:
            pass  # some file systems know no locks
        yield


def _in_processes(
    function: str, shares: Sequence[tuple], tell: Callable[[int], None], destination: str
) -> dict[str, str]:
    """Run a function of `copying` on each share, in processes that end with this one."""
    import selectors

    command = [sys.executable, "-P", "-m", "nurion_utils.staging._worker"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    failures: dict[str, str] = {}
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for share in shares:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = stack.enter_context(subprocess.Popen(command, env=environment, bufsize=-1, **pipes))
            stack.callback(process.kill)  # before waiting for it, when this process is interrupted
            with contextlib.suppress(BrokenPipeError):  # it has ended already: found below
                pickle.dump((function, share, destination), process.stdin)
                process.stdin.close()
            selector.register(process.stdout, selectors.EVENT_READ, (process, share))
        while selector.get_map():
            for key, _ in selector.select():
                process, share = key.data
                try:
                    message = pickle.load(process.stdout)
                except (EOFError, pickle.UnpicklingError):
                    failures |= _lost(process.wait(), share, destination)
                    message = {}
                if isinstance(message, int):
                    tell(message)
                    continue
                failures |= message
                selector.unregister(process.stdout)
    return failures


def _lost(status: int, share: tuple, destination: str) -> dict[str, str]:
    """The files that a process which has died did not copy, or did not verify."""
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    if len(share) == 2:  # what `verify_share` takes
        return {path: f"not read again: the process that did it has died ({how})" for path, _ in share[1]}
    return missing(destination, share[2], f"the process that copied it has died ({how})")


def missing(destination: str, files: Sequence[File], why: str) -> dict[str, str]:
    """Those of `files` that are not in place and on record, each with the reason `why`."""
    records, failures = read_records(destination), {}
    for file in files:
        known = any(record[:2] == (file.size, file.mtime_ns) for record in records.get(file.path, []))
        try:
            found = os.lstat(os.path.join(destination, file.path))
            there = (found.st_size, found.st_mtime_ns) == (file.size, file.mtime_ns)
        except OSError:
            there = False
        if not (known and there):
            failures[file.path] = why
    return failures


@contextlib.contextmanager
def _progress(total: int, title: str) -> Iterator[Callable[[int], None]]:
    """A bar with bytes, rate and time left where somebody watches."""
    from nurion_utils._notebook import somebody_watches

    if not somebody_watches():
        yield lambda done: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=title, unit="B", unit_scale=True) as bar:
        yield bar.update


# -- after -----------------------------------------------------------------------------------------------------


def staged_records(job: _Job) -> dict[str, Record]:
    """The latest record of each file of the plan that has one."""
    records = read_records(job.plan.destination)
    result = dict(job.records)
    for file in job.plan.files:
        ours = [record for record in records.get(file.path, []) if record[:2] == (file.size, file.mtime_ns)]
        if ours:
            result[file.path] = ours[-1]
    return result


def finish(job: _Job, failures: Mapping[str, str]) -> None:
    """Links, modes of folders, the manifest; raises `StageError` for what failed."""
    plan, problems = job.plan, dict(failures)
    for path, target in plan.links.items():
        full = os.path.join(plan.destination, path)
        try:
            if os.path.islink(full) and os.readlink(full) == target:
                continue
            temporary = os.path.join(os.path.dirname(full), f"{copying.TEMPORARY}link")
            os.symlink(target, temporary)
            os.replace(temporary, full)
        except OSError as error:
            problems[path] = error.strerror
    try:
        copying.write_manifest(plan.destination, forget=failures)
    except OSError as error:
        problems["the manifest"] = f"{error.strerror}; the journals hold the records"
    for folder, mode in sorted(plan.directories.items(), reverse=True):
        with contextlib.suppress(OSError):
            os.chmod(os.path.join(plan.destination, folder), mode & 0o777)
    raise_failures(plan, problems)


def raise_failures(plan: StagePlan, failures: Mapping[str, str]) -> None:
    if not failures:
        return
    shown = "; ".join(f"{path!r}: {why}" for path, why in list(failures.items())[:5])
    more = f"; and {len(failures) - 5:,} more" if len(failures) > 5 else ""
    done = len(plan.files) - len(set(failures) & {file.path for file in plan.files})
    raise StageError(
        f"{count(list(failures))} could not be staged to {plan.destination!r} ({shown}{more}); the other {done:,} are "
        "in place, and a further run copies only what is missing",
        failures,
    )
