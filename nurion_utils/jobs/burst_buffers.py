"""The paths that must not be deleted because of a burst buffer that shows the originals, a DDN IME.

An IME shows the same files as the file system behind it, so that deleting, renaming or truncating one there does it
to the original. `guard` refuses such paths; whatever changes files calls it first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import PurePosixPath

from nurion_utils import sites

# Without --block the command returns while the data is still under way (NCSA, Delta's guide to the IME, which also
# has the developer guide, IME 1.4: https://docs.ncsa.illinois.edu/systems/delta/en/latest/user_guide/data_mgmt.html).
BLOCK, RECURSIVE = "--block", "--recursive"


class BurstBufferError(ValueError):
    """A burst buffer was used in a way that it does not support; says what would be right."""


def guard(path: str | os.PathLike[str]) -> None:
    """Refuse a path through which a change would reach an original: one in the IME of any site that is described.

    As it is written, or after any symbolic link on its way; the whole mount counts, other users' directories too. The
    refusal is a BurstBufferError.
    """
    path = os.fsdecode(path)
    views = [PurePosixPath(view) for view in _views(path if os.path.isabs(path) else os.path.join(os.getcwd(), path))]
    for site in map(sites.load, sites.names()):
        if site.burst_buffer and site.burst_buffer.back_end == "ime":
            mount, shared = paths_of_ime(site)
            if any(view.is_relative_to(mount) for view in views):
                buffer = site.burst_buffer
                raise BurstBufferError(
                    f"{path!r} lies in the burst buffer of {site.name!r}, where a change to a file is a change to its "
                    f"original in {shared}: to free space there, write back what has changed with "
                    f"'{buffer.sync_out_command} {BLOCK} {RECURSIVE}', then '{buffer.purge_command} {RECURSIVE}'; "
                    "or name another path"
                )


def _views(path: str, links: int = 40) -> Iterator[str]:
    """The absolute path as written, then with one symbolic link after the other followed, as the kernel does."""
    yield os.path.normpath(path)
    parts = path.split("/")
    for i in range(2, len(parts) + 1 if links else 0):  # the kernel, too, gives up after 40
        here = "/".join(parts[:i])
        try:
            target = os.path.join(os.path.dirname(here), os.readlink(here))
        except OSError:  # not a link, or not any more
            continue
        yield from _views("/".join([target, *parts[i:]]), links - 1)
        return


def paths_of_ime(site: sites.Site) -> tuple[str, str]:
    """Where a site's IME shows the files, and the file system behind it: its first, without each user's own part.

    BurstBufferError if the site's description lacks what is needed to use its IME.
    """
    needed = ("stage_in_command", "sync_out_command", "purge_command")
    missing = [f"burst_buffer.{name}" for name in needed if not getattr(site.burst_buffer, name)]
    if missing := missing + ([] if site.file_systems else ["a file system"]):
        raise BurstBufferError(f"site {site.name!r} does not say {missing[0]}; add it to its description")
    described = site.burst_buffer.path, next(iter(site.file_systems.values())).path
    return tuple(os.path.normpath(path.split("/$")[0]) for path in described)


def path_in_ime(site: sites.Site, path: str) -> str:
    """Where a site's IME shows a file of the file system behind it: /scratch/me/x as /scratch_ime/me/x."""
    mount, shared = paths_of_ime(site)
    file = PurePosixPath(os.path.normpath(path))
    if file.is_relative_to(mount):
        return str(file)
    if file.is_relative_to(shared):
        return str(mount / file.relative_to(shared))
    raise BurstBufferError(f"{path!r} is not in the burst buffer's reach: name one below {shared} or {mount}")
