"""A schedule: who sends which part of the array to whom, in which step, written once as data.

Everything else reads it: `Schedule.run` carries it out on MPI ranks, `messages` and `bytes_sent` count it, `time`
costs it, `simulate` sends it through a fabric, `draw` and `animate` show it, `check` proves it right or wrong.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nurion_utils._checks import whole_number

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.animation import FuncAnimation
    from matplotlib.figure import Figure
    from mpi4py import MPI

    from nurion_utils.allreduce.fattree import FatTree


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

    def __eq__(self, other: object) -> bool:
        return sorted(self) == sorted(other) if isinstance(other, Step) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(sorted(self)))

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


@dataclass(frozen=True)
class Link:
    """What a message costs: ``alpha_s + n * beta_s_per_byte``, and ``n * gamma_s_per_byte`` to reduce its n bytes."""

    alpha_s: float
    beta_s_per_byte: float
    gamma_s_per_byte: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (isinstance(value, int | float | np.number) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number from 0 up, not {value!r}")


class ScheduleError(ValueError):
    """A schedule that would not compute the allreduce; the message says at which step, rank and chunk, and why."""


@dataclass(frozen=True)
class Schedule:
    """An allreduce of an array, cut into `chunks` nearly equal parts, over `ranks` ranks.

    Two schedules are equal when their steps are, whatever they are called.  Chunk c of an array of n elements is
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
        if not isinstance(other, Schedule):
            return NotImplemented
        return (self.ranks, self.chunks, self.steps) == (other.ranks, other.chunks, other.steps)

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
        """A number that differs between schedules, so that ranks can find out whether they follow the same one."""
        number = zlib.crc32(repr((self.ranks, self.chunks)).encode())
        for step in self.steps:  # equal steps give equal rows, in whatever order their transfers were written
            rows = np.array([step.source, step.destination, step.chunk, step.count, step.reduce], np.int64)
            rows = rows[:, np.lexsort(rows)]
            number = zlib.crc32(rows.tobytes(), zlib.crc32(repr(len(step)).encode(), number))
        return number

    # -- counting ---------------------------------------------------------------------------------------------

    def actions(self, rank: int) -> tuple[Action, ...]:
        """What `rank` does, step by step; steps in which it has nothing to do are left out."""
        if rank not in self._actions:
            if isinstance(rank, bool) or rank not in range(self.ranks):
                raise ValueError(f"this schedule has ranks 0 to {self.ranks - 1}, not {rank!r}")
            self._actions[rank] = tuple(self._find_actions(rank))
        return self._actions[rank]

    @cached_property
    def _actions(self) -> dict[int, tuple[Action, ...]]:
        return {}

    def _find_actions(self, rank: int) -> Iterator[Action]:
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
                yield Action(*action)

    def messages(self, rank: int) -> int:
        """How many messages `rank` sends; empty ones count, because they are sent too."""
        return sum(action.send_to is not None for action in self.actions(rank))

    def bytes_sent(self, rank: int, size_bytes: int, itemsize: int = 1) -> int:
        """How many bytes `rank` sends when the array has `size_bytes` in elements of `itemsize` bytes each.

        Whole elements travel, so where the chunks cannot be of equal length, ranks send slightly different amounts.
        """
        itemsize, size_bytes = whole_number(itemsize, "itemsize"), whole_number(size_bytes, "size_bytes", least=0)
        if size_bytes % itemsize:
            raise ValueError(f"{size_bytes} bytes are no whole number of elements of {itemsize} bytes")
        n = size_bytes // itemsize
        sent = (action.send for action in self.actions(rank))
        return itemsize * sum(stop * n // self.chunks - start * n // self.chunks for start, stop in sent)

    # -- costing ----------------------------------------------------------------------------------------------

    def time(self, size_bytes: float, link: Link) -> float:
        """Seconds on links that nobody shares: the sum over all steps of the slowest transfer in each.

        The alpha-beta-gamma model (Thakur, Rabenseifner, Gropp 2005); reduces after receiving, and cuts the array
        into equal chunks.
        """
        n = size(size_bytes)
        if not isinstance(link, Link):
            raise ValueError(f"link must be a Link(alpha_s, beta_s_per_byte), not {link!r}")

        def slowest(transfers: frozenset[tuple[float, bool]]) -> float:
            rates = (share * (link.beta_s_per_byte + reduce * link.gamma_s_per_byte) for share, reduce in transfers)
            return link.alpha_s + n * max(rates)

        return math.fsum(steps * slowest(transfers) for transfers, steps in self._kinds_of_step.items())

    @cached_property
    def _kinds_of_step(self) -> Counter[frozenset[tuple[float, bool]]]:
        """How many steps there are with the same shares of the array under way, reduced or copied."""
        kinds = {}  # steps of a ring share their columns, so there are few of them to look at
        found = Counter()
        for step in filter(len, self.steps):
            key = id(step.count), id(step.reduce)
            if key not in kinds:
                kinds[key] = frozenset({(count / self.chunks, reduce) for *_, count, reduce in step})
            found[kinds[key]] += 1
        return found

    def simulate(self, size_bytes: float, fabric: FatTree, placement: np.ndarray | None = None) -> pd.DataFrame:
        """Send every step through a fabric with shared links; see `fabric.simulate`."""
        from nurion_utils.allreduce.fattree import simulate

        return simulate(self, size_bytes, fabric, placement)

    # -- the other readers ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Prove that every rank ends with every contribution exactly once; see `checking.check`."""
        if "_checked" not in vars(self):
            from nurion_utils.allreduce.checking import check

            check(self)
            vars(self)["_checked"] = True  # a schedule never changes

    def run(self, comm: MPI.Comm, array: np.ndarray, op: str = "sum", trace: list[dict] | None = None) -> None:
        """Carry it out in place on the ranks of `comm`; see `running.run`."""
        from nurion_utils.allreduce.running import run

        run(self, comm, array, op, trace)

    def draw(self) -> Figure:
        """Who holds what after each step; see `drawing.draw`."""
        from nurion_utils.allreduce.draw import draw

        return draw(self)

    def animate(self) -> FuncAnimation:
        """The same as a moving picture; see `drawing.animate`."""
        from nurion_utils.allreduce.draw import animate

        return animate(self)


def size(size_bytes: Any) -> float:
    number = isinstance(size_bytes, int | float | np.number) and not isinstance(size_bytes, bool)
    if not (number and 0 <= size_bytes < 1e18):
        raise ValueError(f"size_bytes must be a number of bytes from 0 up, not {size_bytes!r}")
    return float(size_bytes)
