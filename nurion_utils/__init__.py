"""Large-scale deep learning on real ranks: the package behind the Nurion notebooks.

The rooms load when they are entered, so that ``import nurion_utils`` costs next to nothing.
"""

from nurion_utils._lazy import load_on_use

__version__ = "0.1.0"
__all__, __getattr__, __dir__ = load_on_use(__name__, ["allreduce", "health", "ranks", "sites", "training"])
