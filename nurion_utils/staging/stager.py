"""Stage a folder: plan, check, copy on all ranks, record.  Killed at any moment, the next run copies the rest."""

from __future__ import annotations

import contextlib
import os
import pickle
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nurion_utils.staging import copying
from nurion_utils.staging.copying import verify_share
from nurion_utils.staging.plans import RECORDS, File, StageError, StagePlan, deal, is_within, refused
from nurion_utils.staging.preflight import is_ours, look, prepare, require_safe
from nurion_utils.staging.records import FOLDER, is_copy, is_of, read_records
from nurion_utils.staging.session import Report, begin, finish, lock, report, staged_records

# Below this much work, starting processes takes longer than they save.
SMALL_FILES, SMALL_BYTES = 500, 32 << 20


def plan(
    source: str | os.PathLike, destination: str | os.PathLike, ranks: int = 1, replicate: bool = False
) -> StagePlan:
    """What `stage` would do, after all its checks; touches nothing.

    Raises
    ------
    StageError
        As `stage` does before it begins.
    """
    return prepare(os.fspath(source), os.fspath(destination), ranks, replicate).plan


def stage(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    ranks: Any = None,
    *,
    replicate: bool = False,
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
    replicate
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
    if ranks is None and replicate:
        raise StageError("replicating files needs ranks: give stage a World, or start it with mpiexec")
    if ranks is None:
        return _stage_here(source, destination, workers, verify)
    from nurion_utils.staging import on_ranks  # MPI loads only where there are ranks

    return on_ranks.stage_on_ranks(ranks, source, destination, replicate, verify)


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

    with lock(destination):
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
            if FOLDER in known:
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
