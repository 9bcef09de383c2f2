"""Allreduce from the inside: algorithms as schedules, and everything that reads a schedule.

>>> from nurion_utils import allreduce
>>> ring = allreduce.ring(4)
>>> ring.messages(rank=0), ring.bytes_sent(rank=0, size_bytes=1000)
(6, 1500)
>>> allreduce.check(ring)  # raises ScheduleError if the schedule is wrong
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
