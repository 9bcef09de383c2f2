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

    def chunks(self, i: int) -> tuple[int, int]:
        """The first chunk of transfer `i`, and the one after its last."""
        return int(self.chunk[i]), int(self.chunk[i] + self.count[i])

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
    send_to: int | None = None
    send: tuple[int, int] = (0, 0)
    receive_from: int | None = None
    receive: tuple[int, int] = (0, 0)
    reduce: bool = False


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
                raise ScheduleError(f"step {number}: rank {rank} has two messages; give each a step of its own")
            action = {}
            for i in sent:
                action["send_to"], action["send"] = int(step.destination[i]), step.chunks(i)
            for i in received:
                action["receive_from"], action["receive"] = int(step.source[i]), step.chunks(i)
                action["reduce"] = bool(step.reduce[i])
            if action:
                actions.append(Action(number, **action))
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
    def longest_messages(self) -> Counter[float]:
        """How many steps there are whose longest message is such a share of the array."""
        columns = {id(step.count): step.count for step in self.steps if len(step)}  # few: steps of a ring share theirs
        shares = {key: int(column.max()) / self.chunks for key, column in columns.items()}
        return Counter(shares[id(step.count)] for step in self.steps if len(step))
