"""Packages whose modules load when one of their names is first used."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def load_on_use(
    package: str, modules: list[str], module_of: dict[str, str] | None = None
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """``__all__``, ``__getattr__`` and ``__dir__`` of a package.

    Parameters
    ----------
    package
        Its ``__name__``.
    modules
        Names of its public modules.
    module_of
        For every further public name the module that it comes from.
    """
    names = module_of or {}
    public = sorted([*names, *modules])

    def get(name: str) -> Any:
        if name in names:
            return getattr(import_module(f"{package}.{names[name]}"), name)
        if name in modules:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def list_names() -> list[str]:
        return sorted({*vars(import_module(package)), *public})

    return public, get, list_names
