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
from nurion_utils.staging.copying import Record, is_copy, is_of, read_records, verify_share
from nurion_utils.staging.plans import RECORDS, File, StageError, StagePlan, bytes_text, count, deal, is_within, refused
from nurion_utils.staging.preflight import Job, is_ours, look, prepare, require_safe

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
    mended_files : int
        Those that had been damaged then, and were copied anew.
    """

    files: int
    bytes: int
    copied_files: int
    copied_bytes: int
    time_s: float
    verified: bool
    mended_files: int = 0

    def __str__(self) -> str:
        there = self.files - self.copied_files
        mended = f", {self.mended_files:,} found damaged and copied anew" if self.mended_files else ""
        verified = f", all read again{mended or ' and right'}" if self.verified else ""
        return (
            f"{self.files:,} files, {bytes_text(self.bytes)}: {self.copied_files:,} copied "
            f"({bytes_text(self.copied_bytes)}), {there:,} already there, {self.time_s:.1f} s, "
            f"{bytes_text(self.copied_bytes / self.time_s)}/s{verified}"
        )


def plan(
    source: str | os.PathLike, destination: str | os.PathLike, ranks: int = 1, everyone: bool = False
) -> StagePlan:
    """What `stage` would do, after all its checks; touches nothing.

    Raises
    ------
    StageError
        As `stage` does before it begins.
    """
    return prepare(os.fspath(source), os.fspath(destination), ranks, everyone).plan


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
    name only when it is whole. Regular files, folders and links within the source are copied, with their modes; so are
    the modification times of files, as finely as the destination's file system keeps them. Owners, extended
    attributes, hard links, and the times of folders and links are not. A folder that is there already gets the mode
    of the source's, but keeps its set-group-id and sticky bits. What is left of another staging in the source,
    ``.nurion-stage`` and ``.nurion-part-*``, is not data and stays behind.  The manifest with the hashes lies in
    ``.nurion-stage`` at the destination; files that are there already, and on record, are not copied again.
    Source files over 1 MiB are not kept in the page cache.

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
    from nurion_utils.staging import replicate  # MPI loads only where there are ranks

    return replicate.stage_on_ranks(ranks, source, destination, everyone, verify)


def purge(destination: str | os.PathLike) -> int:
    """Remove what `stage` put into `destination`, and nothing else; returns the number of files and links removed.

    Files that were changed after they had been staged, and others' files, stay.

    Raises
    ------
    StageError
        Nothing was staged there, or it lies where removing a file would delete the original.
    """
    # The path as it was given: what lies behind a link may no longer look like a burst buffer.
    require_safe(os.fspath(destination))
    destination = os.path.realpath(os.fspath(destination))
    if not os.path.isdir(os.path.join(destination, RECORDS)):
        raise StageError(f"nothing was staged to {destination!r}: it has no {RECORDS}")
    with refused("removed"):
        return _purge(destination)


def _purge(destination: str) -> int:
    removed, modes = 0, {}

    def open_up(folder: str) -> None:
        """A folder that is read-only, as the source's was, gives up its files only when it is writable."""
        if not os.access(folder, os.W_OK | os.X_OK) and folder not in modes:
            modes[folder] = stat.S_IMODE(os.stat(folder).st_mode)
            os.chmod(folder, modes[folder] | 0o700)

    with _lock(destination):
        records = read_records(destination)
        folders = set()
        for path, known in records.items():
            full = os.path.join(destination, path)
            # no record, however it came about, may lead out of the destination
            if ".." in path.split("/") or not is_within(os.path.realpath(os.path.dirname(full)), destination):
                continue
            with contextlib.suppress(OSError):
                if is_ours(full, os.lstat(full), known):
                    open_up(os.path.dirname(full))
                    os.unlink(full)
                    removed += 1
            if copying.FOLDER in known:
                folders.add(path)
            while path := os.path.dirname(path):
                folders.add(path)
        for leftover in look(destination, sorted(folders | {""}))[1]:
            open_up(os.path.dirname(os.path.join(destination, leftover)))
            os.unlink(os.path.join(destination, leftover))
        for name in os.listdir(os.path.join(destination, RECORDS)):
            os.unlink(os.path.join(destination, RECORDS, name))
    for folder in [RECORDS, *sorted(folders, key=lambda path: -path.count("/")), ""]:
        full = os.path.join(destination, folder)
        with contextlib.suppress(OSError):  # others' files are in it
            if folder:
                open_up(os.path.dirname(full))
            os.rmdir(full)
    for folder, mode in modes.items():
        with contextlib.suppress(OSError):  # it has gone
            os.chmod(folder, mode)
    return removed


def _stage_here(source: str, destination: str, workers: int | None, verify: bool) -> Report:
    began = time.perf_counter()
    job = prepare(source, destination, 1, False)
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
        arguments = [(job.plan.source, job.plan.destination, share, job.present) for share in shares]
        return carry_out("copy_share", arguments, sum(file.size for file in these), "staging")

    with refused("staged"), begin(job):
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
            mended = [(file.path, known[file.path]) for file in again if file.path in known]
            failures |= verify_share(job.plan.destination, mended, lambda done: None)
        finish(job, failures)
    return report(job, began, verify, len(again) if verify else 0)


def report(job: Job, began: float, verified: bool, mended_files: int) -> Report:
    plan = job.plan
    everything = sum(file.size for file in plan.staged) + plan.bytes
    time_s = time.perf_counter() - began
    files = len(plan.staged) + len(plan.files)
    return Report(files, everything, len(plan.files), plan.bytes, time_s, verified, mended_files)


# -- during ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def begin(job: Job) -> Iterator[None]:
    """Make the folders, and keep others from staging to them."""
    destination = job.plan.destination
    with contextlib.ExitStack() as stack:
        try:
            for folder in sorted(job.plan.directories):  # "" first, then each before what is in it
                path = os.path.join(destination, folder)
                os.makedirs(path, exist_ok=True)
                if not os.access(path, os.W_OK | os.X_OK):  # a read-only folder, from an earlier run
                    os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) | 0o700)
            os.makedirs(os.path.join(destination, RECORDS), exist_ok=True)
            stack.enter_context(_lock(destination))
            for leftover in job.leftovers:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(destination, leftover))
        except OSError as error:
            raise StageError(f"{error.filename!r} cannot be made: {error.strerror}; nothing was copied") from None
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

    command = [sys.executable, "-P", "-m", "nurion_utils.staging.worker", str(os.getpid())]
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
        try:
            found = os.lstat(os.path.join(destination, file.path))
        except OSError:
            failures[file.path] = why
            continue
        ours = [record for record in records.get(file.path, []) if is_of(record, file)]
        if not any(is_copy(record, found.st_size, found.st_mtime_ns) for record in ours):
            failures[file.path] = why
    return failures


@contextlib.contextmanager
def _progress(total: int, title: str) -> Iterator[Callable[[int], None]]:
    """A bar with bytes, rate and time left where somebody watches."""
    from nurion_utils.ranks import somebody_watches

    if not somebody_watches():
        yield lambda done: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=title, unit="B", unit_scale=True) as bar:
        yield bar.update


# -- after -----------------------------------------------------------------------------------------------------


def staged_records(job: Job) -> dict[str, Record]:
    """The latest record of each file of the plan that has one."""
    records = read_records(job.plan.destination)
    result = dict(job.records)
    for file in job.plan.files:
        ours = [record for record in records.get(file.path, []) if is_of(record, file)]
        if ours:
            result[file.path] = ours[-1]
    return result


def finish(job: Job, failures: Mapping[str, str]) -> None:
    """Links, modes of folders, the manifest; raises `StageError` for what failed."""
    plan, problems = job.plan, dict(failures)
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
        others = {path: copying.record_of_link(target) for path, target in plan.links.items()}
        others |= dict.fromkeys(filter(None, plan.directories), copying.FOLDER)
        copying.write_manifest(plan.destination, others, forget=problems)
    except OSError as error:
        problems["the manifest"] = f"{error.strerror}; the journals hold the records"
    for folder, mode in sorted(plan.directories.items(), reverse=True):
        with contextlib.suppress(OSError):
            full = os.path.join(plan.destination, folder)
            # What the folder's owner has set on it stays: in a project's folder new files get the project's group.
            os.chmod(full, mode | stat.S_IMODE(os.stat(full).st_mode) & 0o7000)
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
