"""Large-scale deep learning on real ranks: the package behind the Nurion notebooks.

The rooms load when they are entered, so that ``import nurion_utils`` costs next to nothing.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
