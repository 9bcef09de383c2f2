"""Horovod's timeline as a table: what each tensor waited for, how it travelled, and how much of it delayed the steps.

>>> table = timeline.read("timeline.json")  # doctest: +SKIP
>>> compute["start_s"] -= table.attrs["epoch_s"]  # doctest: +SKIP
>>> timeline.steps(table, compute)  # doctest: +SKIP

Times of computing are in seconds since 1970, by time.time() or tf.timestamp(); the second line puts them on the clock
of the timeline.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
