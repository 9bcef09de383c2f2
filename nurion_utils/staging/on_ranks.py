"""Stage on MPI ranks: each copies its share, or, where everyone needs everything, hands it on round the ring."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
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
)
from nurion_utils.staging.plans import File, StageError, StagePlan, refused
from nurion_utils.staging.preflight import prepare

T = TypeVar("T")

BLOCK_BYTES, BLOCK_FILES = 8 << 20, 256  # what goes round the ring at once
Block = list[tuple[int, int, int]]  # of each piece: which file of the plan, offset and length in bytes


def stage_on_ranks(ranks: Any, source: str, destination: str, replicate: bool, verify: bool) -> session.Report:
    """`stager.stage` on a World, or on all ranks of a communicator, which call this together."""
    from nurion_utils.ranks import RankError, World

    if isinstance(ranks, World):
        prepare(source, destination.replace("{rank}", "0"), ranks.n, replicate)  # refused before ranks are asked
        try:
            result = ranks.run(_on_rank, None, source, destination, replicate, verify)[0]
        except RankError as error:
            raise _lost(str(error), source, destination, ranks.n if replicate else 0) from None
    else:
        result = _on_rank(ranks, source, destination, replicate, verify)
    if isinstance(result, StageError):
        raise result
    return result


def _lost(error: str, source: str, destination: str, copies: int) -> StageError:
    """What to say of ranks that were lost: the files that are missing now."""
    failures = {}
    for rank in range(copies or 1):
        place = destination.replace("{rank}", str(rank)) if copies else destination
        for file in prepare(source, place, 1, False).plan.files:
            failures[f"{place}: {file.path}" if copies > 1 else file.path] = "not staged when the ranks were lost"
    first = next(iter(failures), "none")
    return StageError(
        f"{error.splitlines()[0]}; {len(failures):,} files were not staged (the first: {first!r}), all others are in "
        "place; restart the ranks, and a further run copies only what is missing",
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
        job = together(prepare if leads else _nothing, source, destination, comm.size, replicate)
        if not replicate:
            job = comm.bcast(job)
        plan, mended_files = job.plan, 0
        with contextlib.ExitStack() as stack:
            together(stack.enter_context, session.begin(job) if leads else contextlib.nullcontext())
            together(stack.enter_context, shared_lock(plan.destination))
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
            together(session.finish if leads else _nothing, plan, {path: why for path, why in failures.items() if why})
            return comm.bcast(session.report(plan, began, verify, mended_files))
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
    """The part of a rank that has none."""


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

    blocks = [list(_blocks(files, plan.share(rank))) for rank in range(comm.size)]
    tell = meter(sum(file.size for file in files), "staging", "B")
    reader, receiver = _Reader(plan), _together(comm, True, _Receiver, plan, mine)
    buffers = [np.empty(BLOCK_BYTES, np.uint8) for _ in range(2)]
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
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
        reader.close()
        receiver.close()
    return receiver.writer.failures


def _blocks(files: Sequence[File], share: Sequence[int]) -> Iterator[Block]:
    """The share of a rank in blocks: small files together, long ones in parts."""
    block, block_bytes = [], 0
    for i in share:
        for offset in range(0, max(files[i].size, 1), BLOCK_BYTES):
            length = min(files[i].size - offset, BLOCK_BYTES)
            if block_bytes + length > BLOCK_BYTES or len(block) == BLOCK_FILES:
                yield block
                block, block_bytes = [], 0
            block.append((i, offset, length))
            block_bytes += length
    if block:
        yield block


def _pieces(block: Block, buffer: np.ndarray) -> Iterator[tuple[int, int, memoryview]]:
    """Of each piece of a block that `buffer` holds: which file, its offset, and its bytes."""
    at = 0
    for i, offset, length in block:
        yield i, offset, memoryview(buffer[at : at + length])
        at += length


class _Reader:
    """Reads this rank's blocks; says of each piece what went wrong, if anything, and at a file's end its hash."""

    def __init__(self, plan: StagePlan):
        self.plan = plan
        self.current: tuple | None = None  # descriptor and hash of the file that is being read

    def read(self, block: Block, buffer: np.ndarray) -> list[str | Exception | None]:
        return [self._piece(self.plan.files[i], offset, view) for i, offset, view in _pieces(block, buffer)]

    def _piece(self, file: File, offset: int, view: memoryview) -> str | Exception | None:
        done = 0
        try:
            if offset == 0:
                self.close()
                path = os.path.join(self.plan.source, file.path)
                self.current = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), xxhash.xxh3_128()
            if self.current is None:  # it could not be opened: said with the first piece
                return None
            descriptor, hasher = self.current
            while done < len(view) and (length := os.preadv(descriptor, [view[done:]], offset + done)):
                done += length
            hasher.update(view)
            if done == len(view) and offset + done < file.size:
                return None
            require_unchanged(descriptor, file, offset + done)
            return hasher.hexdigest()
        except (OSError, Changed) as error:
            return error

    def close(self) -> None:
        if self.current is not None:
            os.close(self.current[0])
            self.current = None


class _Receiver:
    """Writes the blocks that come by, those of files that this rank lacks."""

    def __init__(self, plan: StagePlan, wanted: set[str]):
        self.plan, self.wanted, self.open = plan, wanted, {}
        self.writer = Writer(plan.destination)

    def take(self, block: Block, buffer: np.ndarray, status: list[str | Exception | None]) -> None:
        for (i, offset, view), said in zip(_pieces(block, buffer), status, strict=True):
            file = self.plan.files[i]
            if file.path not in self.wanted or file.path in self.writer.failures:
                continue
            try:
                if isinstance(said, Exception):
                    raise said
                if offset == 0:
                    self.open[i] = self.writer.create(file)
                self.open[i].write(view)
                if said:
                    if self.open[i].hasher.hexdigest() != said:
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
