"""Where code runs: MPI ranks that a notebook starts, uses, and never leaves behind.

>>> from nurion_utils import ranks
>>> with ranks.start(4) as world:  # doctest: +SKIP
...     world.run(lambda: __import__("mpi4py.MPI").MPI.COMM_WORLD.allreduce(1))
[4, 4, 4, 4]
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
