"""How ranks exchange what is not a gradient: over Horovod, or over MPI where training does without Horovod."""

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np

try:
    import horovod.tensorflow as hvd
except ImportError:  # it cannot be built everywhere
    hvd = None

PIECE_BYTES = 2**30  # MPI and Horovod count in 32 bits, so a message of 2 GiB in bytes is too long for them


@dataclass(frozen=True)
class Communicator:
    """All ranks, with the few names of an mpi4py communicator that training needs; arrays may be of any size."""

    rank: int
    size: int
    allgather: Callable[[Any], list]  # the values of all ranks, in the order of the ranks
    broadcast: Callable[[np.ndarray, int], None]  # of at most `PIECE_BYTES`

    def Bcast(self, array: np.ndarray, root: int) -> None:  # as mpi4py calls it
        """Fill a contiguous array of any type with that of `root`."""
        flat = array.reshape(-1).view(np.uint8)  # bytes: neither Horovod nor MPI knows bfloat16
        for begin in range(0, flat.size, PIECE_BYTES):
            self.broadcast(flat[begin : begin + PIECE_BYTES], root)


def communicator(without_horovod: bool = False) -> Communicator:
    """All ranks over Horovod; over MPI if Horovod is missing, or was not started and is not wanted."""
    if hvd is None or (without_horovod and not hvd.is_initialized()):
        from mpi4py.MPI import COMM_WORLD as world

        return Communicator(world.rank, world.size, world.allgather, world.Bcast)
    if not hvd.is_initialized():
        hvd.init()

    def broadcast(piece: np.ndarray, root: int) -> None:
        piece[...] = hvd.broadcast(piece, root).numpy()

    return Communicator(hvd.rank(), hvd.size(), partial(hvd.allgather_object, name="nurion_allgather"), broadcast)


def is_alone() -> bool:
    """Whether Horovod has nothing to exchange, now and later."""
    # A graph that is traced on one rank of an elastic job may later run on several.
    return hvd.size() == 1 and not int(os.environ.get("HOROVOD_ELASTIC", 0))


def digest(data: bytes) -> int:
    """64 bits that stand for the data."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def outline(variables: Sequence[keras.Variable]) -> list[str]:
    """Name, shape and type of each variable, in words that are the same on all ranks that built the same model.

    Keras numbers the names of layers through, so a rank that has made one layer more has other numbers. What counts
    is which of the layers of a kind comes first.
    """
    parts = [[re.fullmatch(r"(.*?)(?:_(\d+))?", part).groups("0") for part in v.path.split("/")] for v in variables]
    kinds = ["/".join(stem for stem, _ in each) for each in parts]
    numbers = [tuple(int(number) for _, number in each) for each in parts]
    alike: dict[str, list] = {}
    for kind, number in sorted(zip(kinds, numbers, strict=True)):
        alike.setdefault(kind, []).append(number)
    places = [alike[kind].index(number) for kind, number in zip(kinds, numbers, strict=True)]
    return [
        f"{kind}{f' ({place + 1})' if place else ''} of shape {tuple(variable.shape)} and type {variable.dtype}"
        for kind, place, variable in zip(kinds, places, variables, strict=True)
    ]


def require_alike(ranks: Communicator, outlined: list[str]) -> None:
    """ValueError on all ranks, with the first difference, unless `outlined` is the same list on each of them."""
    if len(set(ranks.allgather(digest(repr(outlined).encode())))) == 1:
        return
    everyones = ranks.allgather(outlined)
    other = next(rank for rank, theirs in enumerate(everyones) if theirs != everyones[0])
    place, theirs, ours = first_difference(everyones[other], everyones[0])
    raise ValueError(
        f"all ranks must have the same variables in the same order, but of the {len(everyones[other])} of rank {other} "
        f"number {place} is {theirs}, and of the {len(everyones[0])} of rank 0 it is {ours}"
    )


def first_difference(these: list[str], those: list[str]) -> tuple[int, str, str]:
    """Where two lists that are not equal first differ, and in what."""
    pairs = itertools.zip_longest(these, those, fillvalue="missing")
    return next((place, *pair) for place, pair in enumerate(pairs) if pair[0] != pair[1])
