"""Data-parallel training: Keras 3 on Horovod, the data it learns from and the models that learn.

Each name loads its module, and with it TensorFlow, when it is first used.
"""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "DistributedOptimizer": "optimizer",
    "BroadcastCallback": "callbacks",
    "MetricAverageCallback": "callbacks",
    "SyncCheckCallback": "callbacks",
    "ElasticState": "elastic",
    "elastic_launch": "_elastic_launcher",
    "elastic_run": "elastic",
    "Shard": "shard",
}
_MODULES = ["callbacks", "digits", "elastic", "memory", "models", "optimizer", "shard", "volumes"]
__all__ = sorted([*_MODULE_OF, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
