"""Allreduce from the inside: algorithms as schedules, and everything that reads a schedule.

>>> from nurion_utils import allreduce
>>> ring = allreduce.ring(4)
>>> ring.messages(rank=0), ring.bytes_sent(rank=0, size_bytes=1000)
(6, 1500)
>>> ring.check()  # raises ScheduleError if the schedule is wrong
"""

from nurion_utils._lazy import load_on_use

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
    "compare_backends": "comparing",
    "LabError": "network",
}
_MODULES = ["algorithms", "backends", "checking", "comparing", "drawing", "epochs", "fabric", "fusion"]
_MODULES += ["measuring", "network", "running", "schedule", "shared", "timeline"]
__all__, __getattr__, __dir__ = load_on_use(__name__, _MODULES, _MODULE_OF)
