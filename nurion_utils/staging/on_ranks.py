"""Stage on MPI ranks: each copies its share, or, where everyone needs everything, hands it on round the ring."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import xxhash

from nurion_utils.ranks import meter
from nurion_utils.staging import session
from nurion_utils.staging.copying import (
    Changed,
    Writer,
    copy_share,
    require_unchanged,
    shared_lock,
    verify_share,
    write_all,
)
from nurion_utils.staging.plans import File, StageError, refused
from nurion_utils.staging.preflight import Job, prepare

T = TypeVar("T")

BLOCK_BYTES, BLOCK_FILES = 8 << 20, 256  # what goes round the ring at once


def stage_on_ranks(ranks: Any, source: str, destination: str, replicate: bool, verify: bool) -> session.Report:
    """`stager.stage` on a World, or on all ranks of a communicator, which call this together."""
    from nurion_utils.ranks import RankError, World

    if not isinstance(ranks, World):
        result = _on_rank(ranks, source, destination, replicate, verify)
    else:
        prepare(source, destination.replace("{rank}", "0"), ranks.n, replicate)  # refused before ranks are asked

        def on_rank() -> Any:
            from mpi4py import MPI

            from nurion_utils.staging import on_ranks

            return on_ranks._on_rank(MPI.COMM_WORLD, source, destination, replicate, verify)

        try:
            result = ranks.run(on_rank)[0]
        except RankError as error:
            where = [destination.replace("{rank}", str(rank)) for rank in range(ranks.n if replicate else 1)]
            failures = {}
            for place in dict.fromkeys(where):
                plan = prepare(source, place, 1, False).plan  # what is there now
                names = {file.path if len(where) == 1 else f"{place}: {file.path}": file for file in plan.files}
                failures |= dict.fromkeys(names, "not staged when the ranks were lost")
            first = next(iter(failures), "none")
            raise StageError(
                f"{str(error).splitlines()[0]}; {len(failures):,} files were not staged (the first: {first!r}), all "
                "others are in place; restart the ranks, and a further run copies only what is missing",
                failures or {"the manifest": "not written"},
            ) from None
    if isinstance(result, StageError):
        raise result
    return result


def _on_rank(comm: Any, source: str, destination: str, replicate: bool, verify: bool) -> session.Report | StageError:
    """The same result on all ranks."""
    began = time.perf_counter()
    hosts = comm.allgather(socket.gethostname())
    if replicate and len(set(hosts)) < len(hosts) and "{rank}" not in destination:
        return StageError("ranks that share a node would write the same files; put {rank} into the destination")
    if replicate:
        destination = destination.replace("{rank}", str(comm.rank))
    try:
        plans = replicate or comm.rank == 0
        job = _together(comm, replicate, prepare if plans else _nothing, source, destination, comm.size, replicate)
        if not replicate:
            job = comm.bcast(job)
        return _carry_out(comm, job, replicate, verify, began)
    except StageError as error:  # the same on all ranks
        return error


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


def _nothing(*_: Any) -> None:
    """The part of a rank that has none, and what is told of too little to be shown."""


def _carry_out(comm: Any, job: Job, replicate: bool, verify: bool, began: float) -> session.Report:
    writes, plan = replicate or comm.rank == 0, job.plan
    with contextlib.ExitStack() as stack:
        _together(comm, replicate, stack.enter_context, session.begin(job) if writes else contextlib.nullcontext())
        _together(comm, replicate, stack.enter_context, shared_lock(plan.destination))
        if replicate:
            failures = _pass_on(comm, job)
        else:
            mine = [plan.files[i] for i in plan.share(comm.rank)]
            tell = meter(sum(file.size for file in mine), "staging", "B")
            copied = _together(comm, False, copy_share, plan.source, plan.destination, mine, job.present, tell)
            failures = _merged(comm, copied)
        mended_files = 0
        if verify:
            mended, again = _together(comm, replicate, _verified, comm, job, replicate)
            failures |= mended if replicate else _merged(comm, mended)
            mended_files = comm.allreduce(again)
        _together(comm, replicate, session.finish if writes else _nothing, job, failures)
        return comm.bcast(session.report(job, began, verify, mended_files))


def _verified(comm: Any, job: Job, replicate: bool) -> tuple[dict[str, str], int]:
    """Read this rank's part again, and copy again what is damaged; what stays wrong, and how many were mended."""
    plan, records = job.plan, session.staged_records(job)
    mine = list(records.items()) if replicate else list(records.items())[comm.rank :: comm.size]
    damaged = verify_share(plan.destination, mine, meter(sum(record[0] for _, record in mine), "verifying", "B"))
    again = [file for file in (*plan.files, *plan.staged) if file.path in damaged]
    failures = copy_share(plan.source, plan.destination, again, [], _nothing)
    known = session.staged_records(job)
    mended = [(file.path, known[file.path]) for file in again if file.path in known]
    return failures | verify_share(plan.destination, mended, _nothing), len(again)


def _merged(comm: Any, failures: dict[str, str]) -> dict[str, str]:
    return {path: why for each in comm.allgather(failures) for path, why in each.items()}


def _pass_on(comm: Any, job: Job) -> dict[str, str]:
    """Read each file on one rank, and hand it on to all: in step s, rank r sends on what it got in step s - 1."""
    mine = {file.path for file in job.plan.files}
    # what one rank lacks, all see pass: a rank that has it hands it on
    wanted = {path for paths in comm.allgather(mine) for path in paths}
    files = tuple(file for file in sorted((*job.plan.files, *job.plan.staged)) if file.path in wanted)
    plan = dataclasses.replace(job.plan, files=files, staged=(), reader=())
    if len(set(comm.allgather(hash_of(files)))) > 1:
        raise StageError("the source changed while the ranks looked at it; stage again when nobody writes to it")
    adopted = [file for file in job.plan.files if file.path in job.present]
    failures = copy_share(plan.source, plan.destination, adopted, job.present, _nothing)
    mine -= set(job.present)

    blocks = [list(_blocks(plan.files, plan.share(rank))) for rank in range(comm.size)]
    tell = meter(sum(file.size for file in files), "staging", "B")
    reader, receiver = _Reader(plan), _together(comm, True, _Receiver, plan, mine)
    buffers = [np.empty(BLOCK_BYTES, np.uint8) for _ in range(2)]
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    umask = os.umask(0)
    try:
        for turn in range(max(map(len, blocks))):
            here = [each[turn] if turn < len(each) else [] for each in blocks]
            status = reader.read(here[comm.rank], buffers[0])
            receiver.take(here[comm.rank], buffers[0], status)
            tell(sum(length for _, _, length in here[comm.rank]))
            for step in range(comm.size - 1):
                sent, received = here[(comm.rank - step) % comm.size], here[(comm.rank - step - 1) % comm.size]
                status = comm.sendrecv(status, right, source=left)
                lengths = [sum(length for _, _, length in block) for block in (sent, received)]
                outgoing, incoming = (buffer[:n] for buffer, n in zip(buffers, lengths, strict=True))
                comm.Sendrecv(outgoing, right, recvbuf=incoming, source=left)
                receiver.take(received, buffers[1], status)
                tell(lengths[1])
                buffers.reverse()
    finally:
        os.umask(umask)
        reader.close()
        receiver.close()
    return failures | receiver.writer.failures


def hash_of(files: Sequence[File]) -> str:
    return xxhash.xxh3_128_hexdigest(repr(files).encode("utf-8", "surrogateescape"))


def _blocks(files: Sequence[File], share: Sequence[int]) -> Any:
    """The share of a rank in blocks: lists of (file, offset, length), small files together, long ones in parts."""
    block, room = [], BLOCK_BYTES
    for i in share:
        offset = 0
        while True:
            length = min(files[i].size - offset, room)
            block.append((i, offset, length))
            offset, room = offset + length, room - length
            if not room or len(block) == BLOCK_FILES:
                yield block
                block, room = [], BLOCK_BYTES
            if offset == files[i].size:
                break
    if block:
        yield block


class _Reader:
    """Reads this rank's blocks, and says of each segment whether it went well, and at a file's end its hash."""

    def __init__(self, plan: Any):
        self.plan, self.open = plan, {}

    def read(self, block: list[tuple[int, int, int]], buffer: np.ndarray) -> list[tuple[bool, str]]:
        at, status = 0, []
        for i, offset, length in block:
            status.append(self._segment(i, offset, memoryview(buffer[at : at + length])))
            at += length
        return status

    def _segment(self, i: int, offset: int, view: memoryview) -> tuple[bool, str]:
        file = self.plan.files[i]
        try:
            if offset == 0:
                path = os.path.join(self.plan.source, file.path)
                self.open[i] = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), xxhash.xxh3_128()
            if i not in self.open:
                return False, "an earlier part could not be read"
            descriptor, hasher = self.open[i]
            done = 0
            while done < len(view) and (length := os.preadv(descriptor, [view[done:]], offset + done)):
                done += length
            hasher.update(view)
            end = offset + len(view) == file.size
            if done < len(view) or end:
                require_unchanged(descriptor, file, offset + done)
            if end:
                os.close(self.open.pop(i)[0])
                return True, hasher.hexdigest()
            return True, ""
        except (OSError, Changed) as error:
            if i in self.open:
                os.close(self.open.pop(i)[0])
            return False, getattr(error, "strerror", None) or str(error)

    def close(self) -> None:
        for descriptor, _ in self.open.values():
            os.close(descriptor)


class _Receiver:
    """Writes the blocks that come by, those of files that this rank lacks."""

    def __init__(self, plan: Any, wanted: set[str]):
        self.plan, self.wanted, self.open = plan, wanted, {}
        self.writer = Writer(plan.destination)

    def take(self, block: list[tuple[int, int, int]], buffer: np.ndarray, status: list[tuple[bool, str]]) -> None:
        at = 0
        for (i, offset, length), (good, words) in zip(block, status, strict=True):
            file = self.plan.files[i]
            if file.path in self.wanted and file.path not in self.writer.failures:
                self._segment(i, file, offset, memoryview(buffer[at : at + length]), good, words)
            at += length

    def _segment(self, i: int, file: File, offset: int, view: memoryview, good: bool, words: str) -> None:
        try:
            if not good:
                raise Changed(words)
            if offset == 0:
                self.open[i] = *self.writer.create(file), xxhash.xxh3_128()
            descriptor, temporary, hasher = self.open[i]
            hasher.update(view)
            write_all(descriptor, view)
            if offset + len(view) == file.size:
                if hasher.hexdigest() != words:
                    raise Changed("damaged on its way between the ranks: its checksum differs")
                del self.open[i]
                self.writer.finish(descriptor, temporary, file, words)
        except (OSError, Changed) as error:
            if i in self.open:
                self.writer.discard(*self.open.pop(i)[:2])
            self.writer.fail(file.path, error)

    def close(self) -> None:
        for descriptor, temporary, _ in self.open.values():
            self.writer.discard(descriptor, temporary)
        self.writer.publish()
        self.writer.close()
