"""Large batches: how the learning rate follows them, optimizers that tolerate them, and where they stop paying.

>>> from nurion_utils.large_batch import Recipe
>>> Recipe(batch=8192, base_batch=256, base_rate=0.1).peak_rate
3.2

Each name loads its module, and with it TensorFlow, when it is first used; so before you load a saved model with Keras,
import what it was trained with, such as `LARS` and `RecipeSchedule`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
