"""A burst buffer that is driven by commands, a DDN IME, and the paths that must not be deleted because of it.

The trap: an IME shows the same files as the file system behind it, so that deleting, renaming or truncating one
there does it to the original. `guard` refuses such paths; whatever changes files calls it first.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from nurion_utils import sites

# Without --block the command returns while the data is still under way (NCSA, Delta's guide to the IME, which also
# has the developer guide, IME 1.4: https://docs.ncsa.illinois.edu/systems/delta/en/latest/user_guide/data_mgmt.html).
BLOCK, RECURSIVE = "--block", "--recursive"


class BurstBufferError(ValueError):
    """A burst buffer was used in a way that it does not support, or its command failed; says what would be right."""


def guard(path: str | os.PathLike[str]) -> None:
    """Refuse a path through which a change would reach an original: one in the IME of any site that is described.

    The path is looked at as it is written, and with every symbolic link on its way followed. The whole mount is
    guarded, other users' directories too.

    Raises
    ------
    BurstBufferError
        The path lies in a burst buffer that shows the originals.
    """
    path = os.fsdecode(path)
    views = [PurePosixPath(view) for view in _views(path if os.path.isabs(path) else os.path.join(os.getcwd(), path))]
    for site in map(sites.load, sites.names()):
        if site.burst_buffer and site.burst_buffer.back_end == "ime":
            ime = Ime(site)
            if any(view.is_relative_to(ime.mount) for view in views):
                raise BurstBufferError(
                    f"{path!r} lies in the burst buffer of {site.name!r}, where a change to a file is a change to its "
                    f"original in {ime.shared}: free space there with Ime({site.name!r}).purge([...]), or name another"
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


@dataclass(frozen=True)
class Ime:
    """A site's IME, driven by the commands in the site's description; nothing here deletes a file.

    Paths are files or directories of the shared file system or of the buffer; a directory stands for all below it.

    Raises
    ------
    BurstBufferError
        The site has no IME, or its description lacks what is needed to command it. From the methods: a path is
        missing or lies elsewhere (then nothing was started), or a command failed.
    """

    site: sites.Site | str

    def __post_init__(self) -> None:
        site = sites.load(self.site) if isinstance(self.site, str) else self.site
        object.__setattr__(self, "site", site)
        if site.burst_buffer is None or site.burst_buffer.back_end != "ime":
            raise BurstBufferError(f"site {site.name!r} has no IME; take one that has, such as 'nurion'")
        needed = ("stage_in_command", "sync_out_command", "purge_command")
        missing = [f"burst_buffer.{name}" for name in needed if not getattr(site.burst_buffer, name)]
        if missing := missing + ([] if site.file_systems else ["a file system"]):
            raise BurstBufferError(f"site {site.name!r} does not say {missing[0]}; add it to its description")

    @property
    def mount(self) -> str:
        """Where the buffer shows the files: its path but for the part that is each user's own."""
        return os.path.normpath(self.site.burst_buffer.path.split("/$")[0])

    @property
    def shared(self) -> str:
        """The same of the file system behind the buffer, the site's first."""
        return os.path.normpath(next(iter(self.site.file_systems.values())).path.split("/$")[0])

    def path_in_buffer(self, path: str | os.PathLike[str]) -> str:
        """Where the buffer shows a file of the shared file system: /scratch/me/x as /scratch_ime/me/x."""
        path = PurePosixPath(os.path.abspath(os.fsdecode(path)))
        if path.is_relative_to(self.mount):
            return str(path)
        if path.is_relative_to(self.shared):
            return str(self.mount / path.relative_to(self.shared))
        raise BurstBufferError(
            f"{str(path)!r} is not in the burst buffer's reach: name one below {self.shared} or {self.mount}"
        )

    def stage_in(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        """Copy files into the buffer, and return when they are there."""
        self._run("stage_in_command", paths, BLOCK)

    def sync_out(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        """Write what changed in the buffer back to the shared file system, and return when it is there."""
        self._run("sync_out_command", paths, BLOCK)

    def purge(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        """Free the buffer of files, whose originals stay; synced first, so that nothing written can be lost."""
        self.sync_out(paths)
        self._run("purge_command", paths)

    def _run(self, command: str, paths: Sequence[str | os.PathLike[str]], *options: str) -> None:
        if isinstance(paths, str | bytes | os.PathLike) or not paths:
            raise BurstBufferError(f"paths must be a list of files or directories, not {paths!r}")
        found = [self.path_in_buffer(path) for path in paths]  # absolute, so that none can be taken for an option
        if missing := [path for path in found if not os.path.exists(path)]:
            raise BurstBufferError(f"{missing[0]!r} does not exist; name files or directories that do")
        words = [*shlex.split(getattr(self.site.burst_buffer, command)), *options, RECURSIVE]
        what = f"{shlex.join(words)!r} on {found[0]!r}" + (f" and {len(found) - 1} more" if found[1:] else "")
        try:
            done = subprocess.run([*words, *found], stdin=subprocess.DEVNULL, capture_output=True, errors="replace")
        except OSError as error:  # it is missing, or too many paths for one command line
            where = f"it is there on the nodes of {self.site.name!r}"
            raise BurstBufferError(f"{what} could not be started ({error.strerror}); {where}") from None
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())[:300] or "nothing"
            raise BurstBufferError(f"{what} failed with status {done.returncode} and said: {said}")
