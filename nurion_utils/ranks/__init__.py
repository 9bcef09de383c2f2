"""Where code runs: MPI ranks that a notebook starts, uses, and never leaves behind.

>>> from nurion_utils import ranks
>>> with ranks.start(4) as world:  # doctest: +SKIP
...     world.run(lambda: __import__("mpi4py.MPI").MPI.COMM_WORLD.allreduce(1))
[4, 4, 4, 4]
"""

from typing import Any

import lazy_loader

from nurion_utils.ranks.interrupts import no_interrupt_lost

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    # The word `ranks.start` alone imports 170 modules, before `start` itself can look after interrupts.
    with no_interrupt_lost():
        return _load(name)
