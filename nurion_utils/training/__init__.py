"""Data-parallel training: Keras 3 on Horovod, the data it learns from and the models that learn.

Each name loads its module, and with it TensorFlow, when it is first used.
"""

from nurion_utils._lazy import load_on_use

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
__all__, __getattr__, __dir__ = load_on_use(__name__, _MODULES, _MODULE_OF)
