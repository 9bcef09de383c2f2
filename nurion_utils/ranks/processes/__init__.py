"""The processes beside the ranks: the guardian that ends them, the controller that connects them, agents on nodes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
