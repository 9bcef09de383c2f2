"""Horovod over MPI, Gloo and oneCCL: chosen, compared by what really ran, and read from its timeline.

>>> from nurion_utils import backends  # on every rank
>>> backends.init("oneCCL", timeline="timeline.json")  # doctest: +SKIP
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
