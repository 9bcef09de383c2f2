"""How ranks exchange what is no gradient: over Horovod, or over MPI where training does without Horovod."""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    import horovod.tensorflow as hvd
except ImportError:  # it cannot be built everywhere
    hvd = None


def communicator(without_horovod: bool = False) -> Any:
    """All ranks, behind mpi4py's names; MPI's own if Horovod is missing, or was not started and is not wanted."""
    if hvd is None or (without_horovod and not hvd.is_initialized()):
        from mpi4py.MPI import COMM_WORLD

        return COMM_WORLD
    if not hvd.is_initialized():
        hvd.init()
    return _HorovodWorld()


class _HorovodWorld:
    """Horovod's ranks, with the four names of an mpi4py communicator that the callbacks need."""

    rank = property(lambda self: hvd.rank())
    size = property(lambda self: hvd.size())

    def allgather(self, value: Any) -> list:
        return hvd.allgather_object(value)

    def Bcast(self, array: np.ndarray, root: int) -> None:  # noqa: N802
        array[...] = hvd.broadcast(array, root).numpy()
