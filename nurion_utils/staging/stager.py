"""Stage a folder: plan, check, copy on all ranks, record.  Killed at any moment, the next run copies the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from nurion_utils.staging import copying
from nurion_utils.staging.plans import RECORDS, StageError, StagePlan, is_within, refused
from nurion_utils.staging.preflight import is_ours, is_staged, look, prepare, require_safe
from nurion_utils.staging.records import FOLDER, read_records
from nurion_utils.staging.session import Report, begin, finish, on_record, report

Tell = Callable[[int], None]  # what is called with numbers of bytes that are done
Share = Callable[[str, str, list, Tell], dict[str, str]]  # `copying.copy_share` or `copying.verify_share`
# Below this much work, starting processes takes longer than they save.
SMALL_FILES, SMALL_BYTES = 500, 32 << 20


def plan(
    source: str | os.PathLike, destination: str | os.PathLike, ranks: int = 1, replicate: bool = False
) -> StagePlan:
    """What `stage` would do, after all its checks, which raise the same `StageError`; touches nothing."""
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
    attributes, hard links, holes, and the times of folders and links are not. A folder that is there already gets the
    mode of the source's, but keeps its set-group-id and sticky bits. What is left of another staging in the source,
    ``.nurion-stage`` and ``.nurion-part-*``, is not data and stays behind. The manifest with the hashes lies in
    ``.nurion-stage`` at the destination; files that are there already, and on record, are not copied again; any other
    file in the place of one is refused. Source files over 1 MiB are not kept in the page cache.

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
        all others are in place.  Of disks in nodes that were lost, or whose ranks were, ``failures`` names the nodes.
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

    Files that were changed after they had been staged, and others' files, stay. `StageError` if nothing was staged
    there, or it lies where removing a file would delete the original.
    """
    # The path as it was given: what lies behind a link may no longer look like a burst buffer.
    require_safe(os.fspath(destination))
    destination = os.path.realpath(os.fspath(destination))
    if not os.path.isdir(os.path.join(destination, RECORDS)):
        raise StageError(f"nothing was staged to {destination!r}: it has no {RECORDS}")
    with refused("removed"):
        return _purge(destination)


def _purge(destination: str) -> int:
    removed, folders, modes = 0, set(), {}

    def remove(function: Callable[[str], None], path: str) -> None:
        """A folder that is read-only, as the source's was, gives up what is in it only when it is writable."""
        folder = os.path.dirname(path)
        if not os.access(folder, os.W_OK | os.X_OK):
            modes.setdefault(folder, stat.S_IMODE(os.stat(folder).st_mode))
            os.chmod(folder, modes[folder] | 0o700)
        function(path)

    with copying.lock(destination):
        for path, known in read_records(destination).items():
            full = os.path.join(destination, path)
            # no record, however it came about, may lead out of the destination
            if ".." in path.split("/") or not is_within(os.path.realpath(os.path.dirname(full)), destination):
                continue
            with contextlib.suppress(OSError):
                if is_ours(full, os.lstat(full), known):
                    remove(os.unlink, full)
                    removed += 1
            if FOLDER in known:
                folders.add(path)
            while path := os.path.dirname(path):
                folders.add(path)
        for leftover in look(destination, sorted(folders | {""}))[1]:
            remove(os.unlink, os.path.join(destination, leftover))
        for name in os.listdir(os.path.join(destination, RECORDS)):
            os.unlink(os.path.join(destination, RECORDS, name))
    for folder in [RECORDS, *sorted(folders, reverse=True)]:  # each after what is in it
        with contextlib.suppress(OSError):  # others' files are in it
            remove(os.rmdir, os.path.join(destination, folder))
    with contextlib.suppress(OSError):
        os.rmdir(destination)
    for folder, mode in modes.items():
        with contextlib.suppress(OSError):  # it has gone
            os.chmod(folder, mode)
    return removed


def _stage_here(source: str, destination: str, workers: int | None, verify: bool) -> Report:
    began = time.perf_counter()
    job = prepare(source, destination, 1, False)
    damaged: dict[str, str] = {}
    if workers is None:
        work = job.plan.files + (job.plan.staged if verify else ())
        little = len(work) < SMALL_FILES and sum(file.size for file in work) < SMALL_BYTES
        workers = 0 if little else len(os.sched_getaffinity(0))
    plan = dataclasses.replace(job.plan, ranks=max(workers, 1))
    with refused("staged"), begin(job):
        shares = [[plan.files[i] for i in plan.share(worker)] for worker in range(plan.ranks)]
        with _progress(plan.bytes, "staging") as tell:
            failures = _carry_out(copying.copy_share, plan, shares, workers, tell)
        if verify:
            known = on_record(plan)
            shares = [known[worker :: plan.ranks] for worker in range(plan.ranks)]
            with _progress(sum(file.size for file, _ in known), "verifying") as tell:
                damaged = _carry_out(copying.verify_share, plan, shares, workers, tell)
        finish(plan, {path: why for path, why in (failures | damaged).items() if why})
    return report(plan, began, verify, len(damaged))


def _carry_out(function: Share, plan: StagePlan, shares: list[list], workers: int, tell: Tell) -> dict[str, str]:
    """Call a function of `copying` with each share, in processes that end with this one; without workers here."""
    import selectors

    if not workers:
        return function(plan.source, plan.destination, shares[0], tell)
    command = [sys.executable, "-P", "-m", "nurion_utils.staging.worker", str(os.getpid())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    failures: dict[str, str] = {}
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for share in shares:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = stack.enter_context(subprocess.Popen(command, env=environment, **pipes))
            stack.callback(process.kill)  # before waiting for it, when this process is interrupted
            with contextlib.suppress(BrokenPipeError):  # it has ended already: found below
                pickle.dump((function, (plan.source, plan.destination, share)), process.stdin)
                process.stdin.close()
            selector.register(process.stdout, selectors.EVENT_READ, (process, share))
        while selector.get_map():
            for key, _ in selector.select():
                process, share = key.data
                try:
                    message = pickle.load(process.stdout)
                except (EOFError, pickle.UnpicklingError):
                    message = _lost(process.wait(), plan, function, share)
                if isinstance(message, int):
                    tell(message)
                    continue
                failures |= message
                selector.unregister(process.stdout)
    return failures


def _lost(status: int, plan: StagePlan, function: Share, share: list) -> dict[str, str]:
    """The files that a process which has died did not copy, or did not verify."""
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    if function is copying.verify_share:
        return {file.path: f"not read again: the process that did it has died ({how})" for file, _ in share}
    existing, records = look(plan.destination, plan.directories)[0], read_records(plan.destination)
    missing = [file.path for file in share if not is_staged(file, existing, records)]
    return dict.fromkeys(missing, f"the process that copied it has died ({how})")


@contextlib.contextmanager
def _progress(total: int, title: str) -> Iterator[Tell]:
    """A bar with bytes, rate and time left where somebody watches."""
    from nurion_utils.ranks import somebody_watches

    if not somebody_watches():
        yield lambda done: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=title, unit="B", unit_scale=True) as bar:
        yield bar.update
