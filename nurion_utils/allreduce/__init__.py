"""Allreduce from the inside: algorithms as schedules, and everything that reads a schedule.

>>> from nurion_utils import allreduce
>>> ring = allreduce.ring(4)
>>> ring.messages(rank=0), ring.bytes_sent(rank=0, size_bytes=1000)
(6, 1500)
>>> ring.check()  # raises ScheduleError if the schedule is wrong
"""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "Link": "schedule",
    "Schedule": "schedule",
    "ScheduleError": "schedule",
    "Step": "schedule",
    "Transfer": "schedule",
    "naive": "algorithms",
    "tree": "algorithms",
    "ring": "algorithms",
    "recursive_doubling": "algorithms",
    "rabenseifner": "algorithms",
    "hierarchical": "algorithms",
    "SharedArray": "shared",
    "FatTree": "fabric",
    "lab": "network",
    "LabError": "network",
}
_MODULES = ["algorithms", "checking", "drawing", "fabric", "measuring", "network", "running", "schedule", "shared"]
__all__ = sorted([*_MODULE_OF, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
