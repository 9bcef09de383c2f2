"""Data-parallel training: Keras 3 on Horovod.

Each name loads its module, and with it TensorFlow, when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
