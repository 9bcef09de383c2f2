"""Large batches: how the learning rate follows them, optimizers that bear them, and where they stop paying.

>>> from nurion_utils.large_batch import Recipe
>>> Recipe(batch=8192, base_batch=256, base_rate=0.1).peak_rate
3.2

Each name loads its module, and with it TensorFlow, when it is first used; so before you load a saved model with Keras,
import what it was trained with, such as `LARS` and `RecipeSchedule`.
"""

from nurion_utils._lazy import load_on_use

_MODULE_OF = {
    "CorrectedSGD": "optimizers",
    "DigitsTask": "tasks",
    "GroupedBatchNormalization": "batch_norm",
    "LARS": "optimizers",
    "NoiseScale": "noise_scale",
    "Recipe": "recipes",
    "RecipeError": "recipes",
    "RecipeSchedule": "schedules",
    "SyncBatchNormalization": "batch_norm",
    "critical_batch": "noise_scale",
    "search": "searching",
    "split_noise_scale": "noise_scale",
    "sweep": "sweeping",
    "tradeoff": "noise_scale",
    "zero_gamma": "batch_norm",
}
_MODULES = [
    "batch_norm",
    "drawing",
    "experiment",
    "lanes",
    "noise_scale",
    "optimizers",
    "recipes",
    "schedules",
    "searching",
    "sweeping",
    "tasks",
]
__all__, __getattr__, __dir__ = load_on_use(__name__, _MODULES, _MODULE_OF)
