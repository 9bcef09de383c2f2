"""Burst-buffer staging: data brought next to the ranks, and what the shared file system would have done instead.

>>> from nurion_utils import staging
>>> staging.stage("/scratch/me/volumes", "/local/nvme/volumes")  # doctest: +SKIP
2,048 files, 17.2 GB: 2,048 copied (17.2 GB), 0 already there, 21.3 s, 0.81 GB/s
"""

from nurion_utils._lazy import load_on_use

_MODULE_OF = {
    "StageError": "plans",
    "StagePlan": "plans",
    "plan": "stager",
    "purge": "stager",
    "stage": "stager",
    "SharedStore": "shared_store",
    "Storage": "storage",
    "Workload": "storage",
    "simulate": "storage",
}
_MODULES = ["back_ends", "cases", "pipeline", "plans", "shared_store", "stager", "storage", "store_drawing"]
__all__, __getattr__, __dir__ = load_on_use(__name__, _MODULES, _MODULE_OF)
