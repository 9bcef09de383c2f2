"""Proof without running: follow every rank's contribution to every chunk through the steps of a schedule."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from nurion_utils.allreduce.schedule import Schedule, ScheduleError, Transfer

# What a rank holds of a chunk is the set of ranks whose contributions are in it, as the bits of one integer.
Holdings = list[list[int]]  # by rank, by chunk


@lru_cache(maxsize=64)  # a schedule never changes
def check(schedule: Schedule) -> None:
    """Prove that after the last step every rank holds every chunk with every rank's contribution exactly once.

    The effort is one operation for each chunk of each transfer: a quarter of a second for a ring of 200 ranks.
    `ScheduleError`, naming step, rank and chunk, for a rank or chunk that does not exist, a message to oneself, two
    messages that a rank would have to send or receive in one step (its partner would wait for ever), a contribution
    reduced twice, a copy that changes nothing, or a chunk that somebody ends without.
    """
    for holdings in walk(schedule):  # noqa: B007 - the last ones count
        pass
    everyone = (1 << schedule.ranks) - 1
    for rank, chunks in enumerate(holdings):
        for chunk, held in enumerate(chunks):
            if held != everyone:
                raise ScheduleError(
                    f"rank {rank} ends without the contribution of {_ranks(everyone & ~held)} to chunk {chunk}"
                )


def walk(schedule: Schedule) -> Iterator[Holdings]:
    """Who holds what: before the first step, and after each step; raises `ScheduleError` as `check` does."""
    held = [[1 << rank] * schedule.chunks for rank in range(schedule.ranks)]
    yield [chunks.copy() for chunks in held]
    for number, step in enumerate(schedule.steps):
        transfers = list(step)
        for transfer in transfers:
            _require_possible(number, transfer, schedule)
        for index, does in ((0, "send"), (1, "receive")):
            peers = [transfer[index] for transfer in transfers]
            if twice := {rank for rank in peers if peers.count(rank) > 1} if len({*peers}) < len(peers) else None:
                raise ScheduleError(
                    f"step {number}: rank {min(twice)} would have to {does} two messages at once; it takes one per "
                    "step, and the second partner waits for ever"
                )
        sent = [held[t.source][t.chunk : t.chunk + t.count] for t in transfers]  # from before the step
        for transfer, values in zip(transfers, sent, strict=True):
            chunks = held[transfer.destination]
            for chunk, new in enumerate(values, start=transfer.chunk):
                old = chunks[chunk]
                if transfer.reduce and old & new:
                    raise ScheduleError(
                        f"step {number}: rank {transfer.destination} would reduce the contribution of "
                        f"{_ranks(old & new)} to chunk {chunk} a second time"
                    )
                if not transfer.reduce and old == new:
                    raise ScheduleError(
                        f"step {number}: rank {transfer.destination} has chunk {chunk} already as rank "
                        f"{transfer.source} sends it"
                    )
                chunks[chunk] = old | new if transfer.reduce else new
        yield [chunks.copy() for chunks in held]


def _require_possible(number: int, transfer: Transfer, schedule: Schedule) -> None:
    if not {transfer.source, transfer.destination} <= set(range(schedule.ranks)):
        raise ScheduleError(f"step {number}: {transfer} names a rank that is not among 0 to {schedule.ranks - 1}")
    if transfer.source == transfer.destination:
        raise ScheduleError(f"step {number}: rank {transfer.source} sends to itself")
    if not 0 <= transfer.chunk < transfer.chunk + transfer.count <= schedule.chunks:
        raise ScheduleError(f"step {number}: {transfer} names a chunk that is not among 0 to {schedule.chunks - 1}")


def _ranks(bits: int) -> str:
    ranks = [str(rank) for rank in range(bits.bit_length()) if bits >> rank & 1]
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks[:8])}{', ...' if ranks[8:] else ''}"
