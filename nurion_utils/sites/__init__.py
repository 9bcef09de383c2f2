"""What a machine is: one TOML file per machine, every figure with its source.

>>> from nurion_utils import sites
>>> nurion = sites.load("nurion")
>>> nurion.node.cores, nurion.burst_buffer.bandwidth_gb_per_s
(68, 800.0)
>>> nurion.node.figures["cores"].source
'guide'

Code never asks which machine it runs on; it reads the machine's description. To describe a further
machine, copy ``nurion.toml`` to ``~/.config/nurion/sites/NAME.toml`` and change the figures: a file there wins over
one of the same name that is shipped here.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
