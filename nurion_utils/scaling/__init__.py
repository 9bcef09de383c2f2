"""The whole machine: a step on any number of nodes, predicted with intervals and held against published runs.

>>> from nurion_utils import scaling
>>> table = scaling.predict("nurion", scaling.PUBLISHED["CosmoFlow"], [1, 1024])
>>> list(table["nodes"]), bool((table["step_low_s"] < table["step_s"]).all())
([1, 1024], True)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
