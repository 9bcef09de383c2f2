"""Stage on MPI ranks: each copies its share, or, where everyone needs everything, hands it on round the ring."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import xxhash

from nurion_utils.ranks import meter
from nurion_utils.staging import session
from nurion_utils.staging.copying import (
    BUFFER_BYTES,
    Changed,
    Writer,
    advise,
    ahead,
    copy_share,
    lock,
    opened,
    require_unchanged,
    verify_share,
)
from nurion_utils.staging.plans import RECORDS, StageError, StagePlan, refused
from nurion_utils.staging.preflight import prepare

T = TypeVar("T")

BLOCK_BYTES, BLOCK_FILES = 2 << 20, 256  # what goes round the ring at once
# Of each piece: which file of the plan, how many bytes, and with the last ones the file's hash, or what went wrong
Block = list[tuple[int, int, str | Exception | None]]


def stage_on_ranks(ranks: Any, source: str, destination: str, replicate: bool, verify: bool) -> session.Report:
    """`stager.stage` on a World, or on all ranks of a communicator, which call this together."""
    from nurion_utils.ranks import RankError, World

    if isinstance(ranks, World):
        hosts = ranks.run(socket.gethostname) if replicate else []
        try:
            result = ranks.run(_on_rank, None, source, destination, replicate, verify)[0]
        except RankError as error:
            raise _lost(str(error).splitlines()[0], source, destination, hosts) from None
    else:
        result = _on_rank(ranks, source, destination, replicate, verify)
    if isinstance(result, StageError):
        raise result
    return result


def _lost(error: str, source: str, destination: str, hosts: list[str]) -> StageError:
    """What to say of ranks that were lost: the files that are missing now, where they can be seen from here.

    `hosts` are those of ranks with destinations of their own.
    """
    again = "restart the ranks, and a further run copies only what is missing"
    if set(hosts) - {socket.gethostname()}:
        failures = dict.fromkeys(sorted(hosts), f"not known to have all of {destination!r}")
        whole = "what a node has there by now is whole, and which files it lacks cannot be seen from here"
        return StageError(f"{error}; {whole}; {again}", failures)
    failures = {}
    for place in [destination.replace("{rank}", str(rank)) for rank in range(len(hosts))] or [destination]:
        for file in prepare(source, place, 1, False).plan.files:
            failures[f"{place}: {file.path}" if len(hosts) > 1 else file.path] = "not staged when the ranks were lost"
    first = next(iter(failures), "none")
    return StageError(
        f"{error}; {len(failures):,} files were not staged (the first: {first!r}), all others are in place; {again}",
        failures or {"the manifest": "not written"},
    )


def _on_rank(comm: Any, source: str, destination: str, replicate: bool, verify: bool) -> session.Report | StageError:
    """The same result on all ranks."""
    began = time.perf_counter()
    if comm is None:
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
    hosts = comm.allgather(socket.gethostname())
    if replicate and len(set(hosts)) < len(hosts) and "{rank}" not in destination:
        return StageError("ranks that share a node would write the same files; put {rank} into the destination")
    leads = replicate or comm.rank == 0  # plans, makes the folders and writes the manifest
    together = functools.partial(_together, comm, replicate)
    try:
        if replicate:
            destination = destination.replace("{rank}", str(comm.rank))
        job = together(lambda: prepare(source, destination, comm.size, replicate) if leads else None)
        if not replicate:
            job = comm.bcast(job)
        plan, mended_files = job.plan, 0
        with contextlib.ExitStack() as stack:
            together(stack.enter_context, session.begin(job) if leads else contextlib.nullcontext())
            if not replicate:
                _require_shared(comm, plan.destination, hosts)
            together(stack.enter_context, lock(plan.destination, first=False))
            if replicate:
                failures = _pass_on(comm, plan)
            else:
                mine = [plan.files[i] for i in plan.share(comm.rank)]
                tell = meter(sum(file.size for file in mine), "staging", "B")
                failures = _merged(comm, together(copy_share, plan.source, plan.destination, mine, tell))
            if verify:
                known = together(session.on_record, plan)
                known = known if replicate else known[comm.rank :: comm.size]
                tell = meter(sum(file.size for file, _ in known), "verifying", "B")
                damaged = together(verify_share, plan.source, plan.destination, known, tell)
                mended_files = comm.allreduce(len(damaged))
                failures |= damaged if replicate else _merged(comm, damaged)
            still = {path: why for path, why in failures.items() if why}
            together(lambda: session.finish(plan, still) if leads else None)
            return comm.bcast(session.report(plan, began, verify, mended_files))
    except StageError as error:  # the same on all ranks
        return error


def _require_shared(comm: Any, destination: str, hosts: list[str]) -> None:
    """Refuse a destination that is not one place for all ranks, as the disk in each node is not."""
    mark = comm.bcast(os.path.join(destination, RECORDS, f"seen-{uuid.uuid4().hex}"))
    _together(comm, False, lambda: comm.rank or open(mark, "x").close())
    seen = comm.allgather(os.path.exists(mark))
    _together(comm, False, lambda: comm.rank or os.unlink(mark))
    if not all(seen):
        rank = seen.index(False)
        raise StageError(
            f"rank {rank} on {hosts[rank]} does not see {destination!r} of rank 0; choose a folder that all nodes "
            "share, or replicate, for disks of their own"
        )


def _together(comm: Any, replicate: bool, function: Callable[..., T], *args: Any) -> T:
    """``function(*args)`` of this rank, if no rank failed in it; else the first one's failure, raised on all ranks.

    Without it a rank that fails between two collectives would leave the others waiting for ever.
    """
    result, problem = None, None
    try:
        with refused("staged"):
            result = function(*args)
    except StageError as error:
        problem = StageError(f"rank {comm.rank}: {error}" if replicate else str(error), error.failures)
    if problem := next(filter(None, comm.allgather(problem)), None):
        raise problem
    return result


def _merged(comm: Any, failures: dict[str, str]) -> dict[str, str]:
    return {path: why for each in comm.allgather(failures) for path, why in each.items()}


def _pass_on(comm: Any, plan: StagePlan) -> dict[str, str]:
    """Read each file on one rank, and hand it on to all: in step s, rank r sends on what it got in step s - 1."""
    mine = {file.path for file in plan.files}
    # what one rank lacks, all see pass: a rank that has it hands it on
    wanted = {path for paths in comm.allgather(mine) for path in paths}
    files = tuple(file for file in sorted((*plan.files, *plan.staged)) if file.path in wanted)
    seen = xxhash.xxh3_128_hexdigest(repr(files).encode("utf-8", "surrogateescape"))
    if len(set(comm.allgather(seen))) > 1:
        raise StageError("the source changed while the ranks looked at it; stage again when nobody writes to it")
    plan = dataclasses.replace(plan, files=files, staged=())

    tell = meter(plan.bytes, "staging", "B")
    buffers = [np.empty(BLOCK_BYTES, np.uint8) for _ in range(3)]  # to send from, to receive into, to read into
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    with contextlib.ExitStack() as stack:
        receiver = _together(comm, True, lambda: stack.enter_context(contextlib.closing(_Receiver(plan, mine))))
        folder = _together(comm, True, stack.enter_context, opened(plan.source, os.O_DIRECTORY))
        blocks = stack.enter_context(contextlib.closing(_read(plan, folder, comm.rank, buffers)))
        reader = stack.enter_context(ThreadPoolExecutor(1))  # for the source and the links to be busy at once
        coming = reader.submit(next, blocks, [])
        while any(comm.allgather(bool(block := coming.result()))):
            buffers.insert(0, buffers.pop())
            coming = reader.submit(next, blocks, [])
            for step in range(comm.size):
                if step:
                    sent, block = block, comm.sendrecv(block, right, source=left)
                    comm.Sendrecv(buffers[0][: _bytes(sent)], right, recvbuf=buffers[1][: _bytes(block)], source=left)
                    buffers[:2] = buffers[1::-1]
                receiver.take(block, buffers[0])
                tell(_bytes(block))
    return receiver.writer.failures


def _bytes(block: Block) -> int:
    return sum(length for _, length, _ in block)


def _read(plan: StagePlan, folder: int, rank: int, buffers: list[np.ndarray]) -> Iterator[Block]:
    """Blocks of the files that this rank reads, small ones together, long ones in parts; their data in the last buffer.

    The folder is that of the source, opened.
    """
    block, view, share = [], memoryview(buffers[-1]), plan.share(rank)
    with contextlib.closing(ahead(folder, [plan.files[i] for i in share])) as files:
        for i, (file, descriptor) in zip(share, files, strict=True):
            hasher, done, end = xxhash.xxh3_128(), 0, None
            try:
                if isinstance(descriptor, OSError):
                    raise descriptor
                while end is None:
                    if not view or len(block) == BLOCK_FILES:
                        yield block
                        block, view = [], memoryview(buffers[-1])
                    length = os.readv(descriptor, [view])
                    hasher.update(view[:length])
                    done, view = done + length, view[length:]
                    if file.size > BUFFER_BYTES:  # as in `copying`
                        advise(descriptor, done, os.POSIX_FADV_DONTNEED)
                    if not length or done >= file.size:
                        require_unchanged(descriptor, file, done)
                        end = hasher.hexdigest()
                    block.append((i, length, end))
            except (OSError, Changed) as error:
                block.append((i, 0, error))
            finally:
                if isinstance(descriptor, int):
                    os.close(descriptor)
    yield block


class _Receiver:
    """Writes the pieces that come by, those of files that this rank lacks."""

    def __init__(self, plan: StagePlan, wanted: set[str]):
        self.plan, self.wanted, self.open = plan, wanted, {}
        self.writer = Writer(plan.destination)

    def take(self, block: Block, buffer: np.ndarray) -> None:
        rest = memoryview(buffer)
        for i, length, end in block:
            file, view, rest = self.plan.files[i], rest[:length], rest[length:]
            if file.path not in self.wanted or file.path in self.writer.failures:
                continue
            try:
                if isinstance(end, Exception):
                    raise end
                if i not in self.open:
                    self.open[i] = self.writer.create(file)
                self.open[i].write(view)
                if end:
                    if self.open[i].hasher.hexdigest() != end:
                        raise Changed("damaged on its way between the ranks: its checksum differs")
                    self.writer.finish(self.open.pop(i))
            except (OSError, Changed) as error:
                if i in self.open:
                    self.writer.discard(self.open.pop(i))
                self.writer.fail(file.path, error)

    def close(self) -> None:
        for part in self.open.values():
            self.writer.discard(part)
        self.writer.publish()
        self.writer.close()
