"""Large-scale deep learning on real ranks: the package behind the Nurion notebooks.

The rooms load when they are entered, so that ``import nurion_utils`` costs next to nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["allreduce", "health", "ranks", "sites", "training"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
