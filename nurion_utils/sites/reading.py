"""Descriptions of machines, found by name and checked."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from nurion_utils.sites.model import Part, Site, SiteError

DIRECTORY = Path(__file__).parent


def _files() -> dict[str, Path]:
    """Each site's description: a file of the user's own wins over the one that is shipped."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return {path.stem: path for folder in (DIRECTORY, config / "nurion" / "sites") for path in folder.glob("*.toml")}


def names() -> list[str]:
    """The sites that have a description, shipped or in ``~/.config/nurion/sites``."""
    return sorted(_files())


def load(name: str) -> Site:
    """The description of a site; SiteError if there is none, or its file is wrong, with the file and the entry."""
    if name not in (files := _files()):
        raise SiteError(f"there is no site {name!r}; the sites that exist are: {', '.join(sorted(files))}")
    return read(files[name])


def read(path: Path) -> Site:
    """Read and check one description; `load` finds it by the site's name."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        return Site.model_validate(tomllib.loads(text) | {"name": Path(path).stem})
    except tomllib.TOMLDecodeError as error:
        figure = 'cores = { value = 68, status = "read", source = "guide" }'
        raise SiteError(f"{path}: this is not TOML ({error}); a figure is written as `{figure}`") from None
    except ValidationError as error:
        # A misspelt entry is also a missing one: name the misspelling.
        first = sorted(error.errors(), key=lambda found: found["type"] != "extra_forbidden")[0]
        # `figures` and the alternatives of a type are ours: the file has no such levels.
        ours = ("figures", "int", "float", "str", "list[str]")
        keys = [str(key) for key in first["loc"] if key not in ours]
        raise SiteError(": ".join(filter(None, [str(path), ".".join(keys), _remedy(first)]))) from None


def _remedy(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        section = Site.model_fields.get(error["loc"][0])
        kinds = (section.annotation, *get_args(section.annotation)) if section else ()
        part = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Part)), Site)
        known = ", ".join(key for key in part.model_fields if key != "figures")
        return f"no such entry is known here; the known ones are: {known}"
    if error["type"] == "missing":
        return "this entry is missing; add it"
    if error["type"] in ("model_type", "dict_type"):
        return 'a figure is written as `{ value = ..., status = "...", source = "..." }`'
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"
