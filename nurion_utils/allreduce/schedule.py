"""A schedule: who sends which part of the array to whom, in which step, written once as data.

Everything else reads it, and a schedule knows none of its readers: `run` carries it out on MPI ranks, `time` costs it,
`simulate` sends it through a fat tree, `draw` and `animate` show it, `check` proves it right or wrong.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from nurion_utils._checks import whole_number


class Transfer(NamedTuple):
    """One message: `count` chunks from `chunk` on, either reduced into what the destination has or copied over it."""

    source: int
    destination: int
    chunk: int
    count: int = 1
    reduce: bool = True


@dataclass(frozen=True, eq=False, repr=False)
class Step:
    """Transfers that go on at the same time, all with the values from before the step.

    The columns are read-only arrays of one entry per transfer, because a step of a large machine has thousands;
    iterate over a step to see its transfers one by one.
    """

    source: np.ndarray
    destination: np.ndarray
    chunk: np.ndarray
    count: np.ndarray
    reduce: np.ndarray

    @classmethod
    def of(cls, transfers: Iterable[Transfer]) -> Step:
        """A step of these transfers."""
        transfers = list(transfers)
        for transfer in transfers:
            if not isinstance(transfer, Transfer):
                raise ValueError(f"a step is made of Transfer(source, destination, chunk), not {transfer!r}")
            for name in ("source", "destination", "chunk", "count"):
                whole_number(getattr(transfer, name), f"{name} of a transfer", least=0)
        *numbers, reduce = zip(*transfers, strict=True) if transfers else [()] * 5
        return cls(*(np.array(column, np.int64) for column in numbers), np.array(reduce, bool))

    def __post_init__(self) -> None:
        for column in vars(self).values():
            column.flags.writeable = False

    def __setstate__(self, columns: dict[str, np.ndarray]) -> None:
        vars(self).update(columns)
        self.__post_init__()  # arrays forget on their way that they were read-only

    def __iter__(self) -> Iterator[Transfer]:
        columns = (self.source, self.destination, self.chunk, self.count, self.reduce)
        return map(Transfer._make, zip(*(column.tolist() for column in columns), strict=True))

    def __len__(self) -> int:
        return len(self.source)

    def __str__(self) -> str:
        shown = []
        for t in self:
            chunks = f"{t.chunk}" if t.count == 1 else f"{t.chunk}-{t.chunk + t.count - 1}"
            shown.append(f"{t.source} {'+' if t.reduce else '='}> {t.destination} [{chunks}]")
        return "   ".join(shown)


class Action(NamedTuple):
    """What one rank does in one step; a peer is None where it has nothing to send or to receive.

    A range of chunks is its first and the one after its last.
    """

    step: int
    send_to: int | None
    send: tuple[int, int]
    receive_from: int | None
    receive: tuple[int, int]
    reduce: bool


class ScheduleError(ValueError):
    """A schedule that would not compute the allreduce; the message says at which step, rank and chunk, and why."""


@dataclass(frozen=True)
class Schedule:
    """An allreduce of an array, cut into `chunks` nearly equal parts, over `ranks` ranks.

    Two schedules are equal when their steps are, whatever they are called. Chunk c of an array of n elements is
    ``array[c * n // chunks : (c + 1) * n // chunks]``, so every length works; chunks may be empty.
    """

    name: str
    ranks: int
    chunks: int
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        for what in ("ranks", "chunks"):
            object.__setattr__(self, what, whole_number(getattr(self, what), what))
        object.__setattr__(self, "steps", tuple(self.steps))
        if wrong := [step for step in self.steps if not isinstance(step, Step)]:
            raise TypeError(f"steps must be made with Step.of([Transfer(...), ...]), not {wrong[0]!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return self.fingerprint

    def __repr__(self) -> str:
        return f"<{self.name} on {self.ranks} ranks: {len(self.steps)} steps, {self.chunks} chunks>"

    def __str__(self) -> str:
        width = len(str(len(self.steps)))
        lines = [f"{self.name} on {self.ranks} ranks, {self.chunks} chunks   (+> reduces, => copies)"]
        return "\n".join([*lines, *(f"step {i:{width}}   {step}" for i, step in enumerate(self.steps))])

    @cached_property
    def fingerprint(self) -> int:
        """A number that schedules share if they are equal, so that ranks can find out whether they follow the same."""
        digest = hashlib.blake2b(repr((self.ranks, self.chunks)).encode(), digest_size=16)
        for step in self.steps:  # equal steps give equal rows, in whatever order their transfers were written
            rows = np.array([step.source, step.destination, step.chunk, step.count, step.reduce], np.int64)
            digest.update(repr(len(step)).encode())
            digest.update(rows[:, np.lexsort(rows)].tobytes())
        return int.from_bytes(digest.digest())

    def actions(self, rank: int) -> tuple[Action, ...]:
        """What `rank` does, step by step; steps in which it has nothing to do are left out."""
        rank, actions = whole_number(rank, "rank", least=0, most=self.ranks - 1), []
        for number, step in enumerate(self.steps):
            sent, received = (np.flatnonzero(column == rank) for column in (step.source, step.destination))
            if len(sent) > 1 or len(received) > 1:
                raise ScheduleError(
                    f"step {number}: rank {rank} {'sends' if len(sent) > 1 else 'receives'} more than one message, "
                    "so that a partner would wait for it for ever; give each message a step of its own"
                )
            action = [number, None, (0, 0), None, (0, 0), False]
            for i in sent:
                action[1:3] = int(step.destination[i]), (int(step.chunk[i]), int(step.chunk[i] + step.count[i]))
            for i in received:
                action[3:5] = int(step.source[i]), (int(step.chunk[i]), int(step.chunk[i] + step.count[i]))
                action[5] = bool(step.reduce[i])
            if len(sent) or len(received):
                actions.append(Action(*action))
        return tuple(actions)

    def messages(self, rank: int) -> int:
        """How many messages `rank` sends; empty ones count, because they are sent too."""
        return sum(action.send_to is not None for action in self.actions(rank))

    def bytes_sent(self, rank: int, size_bytes: int, itemsize: int = 1) -> int:
        """How many bytes `rank` sends when the array has `size_bytes` in elements of `itemsize` bytes each.

        Whole elements travel, so where the chunks cannot be of equal length, ranks send slightly different amounts.
        """
        itemsize, size_bytes = whole_number(itemsize, "itemsize"), whole_number(size_bytes, "size_bytes", least=0)
        if size_bytes % itemsize:
            raise ValueError(f"size_bytes must be a multiple of the {itemsize} bytes of an element, not {size_bytes}")
        n = size_bytes // itemsize
        sent = (action.send for action in self.actions(rank))
        return itemsize * sum(stop * n // self.chunks - start * n // self.chunks for start, stop in sent)

    @cached_property
    def kinds_of_step(self) -> Counter[frozenset[tuple[float, bool]]]:
        """How many steps there are with the same shares of the array under way, reduced or copied."""
        kinds = {}  # steps of a ring share their columns, so there are few of them to look at
        found = Counter()
        for step in filter(len, self.steps):
            key = id(step.count), id(step.reduce)
            if key not in kinds:
                kinds[key] = frozenset({(count / self.chunks, reduce) for *_, count, reduce in step})
            found[kinds[key]] += 1
        return found
