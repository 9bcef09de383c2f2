"""The algorithms, each one function that lists its steps; all of them for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from nurion_utils._checks import whole_number
from nurion_utils.allreduce.schedule import Schedule, Step


def naive(ranks: int) -> Schedule:
    """Rank 0 takes the whole array from one rank after the other, adds it up, and sends it back to each in turn."""
    ranks = whole_number(ranks, "ranks")
    others = np.arange(1, ranks)
    inwards = [_step(rank, 0, 0, 1, True) for rank in others]
    outwards = [_step(0, rank, 0, 1, False) for rank in others]
    return Schedule("naive", ranks, 1, (*inwards, *outwards))


def tree(ranks: int) -> Schedule:
    """Up and down a binomial tree: in each step half of those who still hold a sum hand it to a neighbour."""
    ranks = whole_number(ranks, "ranks")
    everyone = np.arange(ranks)
    up = list(_binomial(everyone, everyone, 1))
    return Schedule("tree", ranks, 1, (*up, *map(_reversed, reversed(up))))


def ring(ranks: int) -> Schedule:
    """Every rank passes chunks to its right neighbour: once round to add them up, once more to hand them out.

    Patarasuk and Yuan (2009): 2 (P-1) / P of the array per rank, and no algorithm can do with less.
    """
    ranks = whole_number(ranks, "ranks")
    everyone = np.arange(ranks)
    right = (everyone + 1) % ranks
    one, yes, no = (np.full(ranks, value) for value in (1, True, False))
    wheel = np.tile(everyone, 3)  # wheel[P - s + r] is (r - s) % P: a window into it costs no memory
    rounds = range(ranks, 1, -1)
    reduce_scatter = [Step(everyone, right, wheel[at : at + ranks], one, yes) for at in rounds]
    allgather = [Step(everyone, right, wheel[at + 1 : at + 1 + ranks], one, no) for at in rounds]
    return Schedule("ring", ranks, ranks, (*reduce_scatter, *allgather))


def recursive_doubling(ranks: int) -> Schedule:
    """Partners at distance 1, 2, 4, ... exchange the whole array: few steps, many bytes (Thakur et al. 2005)."""
    ranks = whole_number(ranks, "ranks")
    core, before, after = _fold(ranks, chunks=1)
    place = np.arange(len(core))
    steps = [_step(core, core[place ^ distance], 0, 1, True) for distance in _powers_below(len(core))]
    return Schedule("recursive doubling", ranks, 1, (*before, *steps, *after))


def rabenseifner(ranks: int) -> Schedule:
    """Partners exchange halves, quarters, ... and then put them together again: few steps and few bytes.

    Rabenseifner's algorithm as MPICH has it (Thakur et al. 2005): reduce-scatter by recursive halving, allgather by
    recursive doubling.
    """
    ranks = whole_number(ranks, "ranks")
    core, before, after = _fold(ranks, chunks=2 ** (ranks.bit_length() - 1))
    place, first, halves, joins = np.arange(len(core)), np.zeros(len(core), int), [], []
    for distance in _powers_below(len(core)):
        partner, half = core[place ^ distance], len(core) // (2 * distance)
        upper = (place & distance) // distance  # 1 for those who keep the upper half of what they have
        halves.append(_step(core, partner, first + (1 - upper) * half, half, True))
        first = first + upper * half
        joins.append(_step(core, partner, first, half, False))
    return Schedule("Rabenseifner", ranks, len(core), (*before, *halves, *reversed(joins), *after))


def hierarchical(ranks: int, ranks_per_node: int) -> Schedule:
    """Up a tree inside each node, around a ring of the nodes' first ranks, and down the trees again."""
    ranks, ranks_per_node = whole_number(ranks, "ranks"), whole_number(ranks_per_node, "ranks_per_node")
    everyone = np.arange(ranks)
    leaders = everyone[::ranks_per_node]
    right, between = np.roll(leaders, -1), ring(len(leaders))
    up = list(_binomial(everyone, everyone % ranks_per_node, between.chunks))
    around = [Step(leaders, right, step.chunk, step.count, step.reduce) for step in between.steps]
    return Schedule("hierarchical", ranks, between.chunks, (*up, *around, *map(_reversed, reversed(up))))


# Those that need to know the number of ranks only.
ALGORITHMS: dict[str, Callable[[int], Schedule]] = {
    make.__name__: make for make in (naive, tree, ring, recursive_doubling, rabenseifner)
}


def _binomial(ranks: np.ndarray, place: np.ndarray, chunks: int) -> Iterator[Step]:
    """Steps that bring the sum over ranks with consecutive places from 0 on to the rank at place 0."""
    for distance in _powers_below(int(place.max()) + 1):
        senders = ranks[place % (2 * distance) == distance]
        yield _step(senders, senders - distance, 0, chunks, True)


def _fold(ranks: int, chunks: int) -> tuple[np.ndarray, list[Step], list[Step]]:
    """A power of two of the ranks; the step in which the others hand them their arrays, and the step back."""
    power = 2 ** (ranks.bit_length() - 1)
    extra = ranks - power
    out = np.arange(0, 2 * extra, 2)
    core = np.concatenate([out + 1, np.arange(2 * extra, ranks)])
    before = [_step(out, out + 1, 0, chunks, True)] if extra else []
    return core, before, [_reversed(step) for step in before]


def _powers_below(limit: int) -> list[int]:
    return [2**i for i in range((limit - 1).bit_length())]


def _reversed(step: Step) -> Step:
    """The same transfers backwards, as copies: what handed sums in hands results out."""
    return _step(step.destination, step.source, step.chunk, step.count, False)


def _step(source, destination, chunk, count, reduce: bool) -> Step:
    columns = np.broadcast_arrays(np.atleast_1d(source), destination, chunk, count, reduce)
    return Step(*(column.copy() for column in columns))
