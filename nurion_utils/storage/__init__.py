"""A parallel file system: its model, simulated and live, and what was published of real ones."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
