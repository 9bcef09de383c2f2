"""Small networks, their weights, and what an attempt ends with; on this process or on ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import keras


def perceptron(seed: int = 1, *middle: keras.Layer) -> keras.Model:
    """Six inputs, three outputs; layers in the middle if wanted."""
    import keras

    keras.utils.set_random_seed(seed)
    first, last = keras.layers.Dense(8, "tanh"), keras.layers.Dense(3, name="last")
    return keras.Sequential([keras.Input((6,)), first, *middle, last])


def distance(these: list[np.ndarray], those: list[np.ndarray]) -> float:
    """The largest difference between two lists of arrays."""
    return max(float(np.abs(a.astype("float64") - b).max()) for a, b in zip(these, those, strict=True))


def rank() -> int:
    from mpi4py.MPI import COMM_WORLD

    return COMM_WORLD.rank


def average(array: np.ndarray) -> None:
    """A reducer: averages in place, over MPI."""
    from mpi4py import MPI

    MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, array)
    array /= MPI.COMM_WORLD.size


def outcome(attempt: Callable[[], object]) -> str:
    """The error that an attempt ends with, in one line of its own."""
    try:
        attempt()
        return "no error"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
