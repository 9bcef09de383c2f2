"""Burst buffers as their sites drive them: an IME's commands, DataWarp's and Rabbit's directives, whole job scripts.

>>> script = job_script("nurion", "/scratch/$USER/imagenet", 'python train.py "$DATA"', nodes=4, hours=2)

The trap: an IME shows the same files as the file system behind it, so that deleting, renaming or truncating one
there does it to the original.  `guard` refuses such paths; whatever changes files calls it first.
"""

from __future__ import annotations

import functools
import math
import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nurion_utils import sites

if TYPE_CHECKING:
    import pandas as pd

# Without --block the command returns while the data is still under way (NCSA, Delta's guide to the IME, which also
# has the developer guide, IME 1.4: https://docs.ncsa.illinois.edu/systems/delta/en/latest/user_guide/data_mgmt.html).
BLOCK, RECURSIVE = "--block", "--recursive"
BATCH_BYTES = 100_000  # of arguments; Linux takes 128 KiB at the least
_STATUS = re.compile(r"^\s*(Dirty|Clean|Syncing):\s*(\d+)\s*$", re.MULTILINE)


class BackEndError(ValueError):
    """A burst buffer was used in a way that it does not support, or its command failed; says what would be right."""


def guard(path: str | os.PathLike[str], site: sites.Site | str | None = None) -> None:
    """Refuse a path through which a change would reach an original: one below the path of an IME.

    The path is looked at as it is written, and with every symbolic link on its way followed.  The whole mount is
    guarded, other users' directories too.

    Parameters
    ----------
    site
        The only site to look at; by default all that have a description.

    Raises
    ------
    BackEndError
        The path lies below the burst buffer of a site whose back end is an IME.
    """
    if site is None:
        mounts = _mounts(sites.DIRECTORY)
    else:
        mounts = _mount(sites.load(site) if isinstance(site, str) else site)
    spellings = list(_spellings(os.fsdecode(path)))
    for name, mount, original in mounts:
        if any(_below(spelling, mount) for spelling in spellings):
            raise BackEndError(
                f"{os.fsdecode(path)!r} lies in the burst buffer of {name!r}, where a change to a file is a change to "
                f"its original in {original}: free space there with Ime({name!r}).purge([...]), or name another path."
            )


@functools.cache
def _mounts(directory: Path) -> tuple[tuple[str, str, str], ...]:
    """Of all sites described in `directory`: it stays the same as long as Python runs."""
    return tuple(mount for path in sorted(directory.glob("*.toml")) for mount in _mount(sites.read(path)))


def _mount(site: sites.Site) -> tuple[tuple[str, str, str], ...]:
    """Name, mount point and original of a site's IME; a path's fixed part, before ``$USER``, is its mount."""
    if site.burst_buffer is None or site.burst_buffer.back_end != "ime":
        return ()
    return ((site.name, _fixed(site.burst_buffer.path), _fixed(_shared(site).path)),)


def _fixed(path: str) -> str:
    return os.path.abspath(path.split("/$")[0])


def _spellings(path: str) -> Iterator[str]:
    """The path as written, then with one symbolic link after the other followed, as the kernel does."""
    yield os.path.abspath(path)
    done, rest, links = "/", os.path.join(os.getcwd(), path).split("/"), 0
    while rest:
        part = rest.pop(0)
        following = os.path.dirname(done) if part == ".." else os.path.normpath(os.path.join(done, part))
        if part not in ("", ".", "..") and links < 40 and os.path.islink(following):  # 40 are Linux' limit
            target, links = os.readlink(following), links + 1
            done, rest = ("/" if target.startswith("/") else done), target.split("/") + rest
            yield os.path.normpath("/".join([done, *rest]))
        else:
            done = following
    yield done


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _shared(site: sites.Site) -> sites.FileSystem:
    """The file system behind the burst buffer: the first."""
    if not site.file_systems:
        raise BackEndError(f"site {site.name!r} describes no file system behind its burst buffer; add one.")
    return next(iter(site.file_systems.values()))


@dataclass(frozen=True)
class Ime:
    """A site's IME, driven by the commands in the site's description; nothing here deletes a file.

    Paths may be those of the shared file system or of the buffer, files or directories; a directory stands for all
    files below it.

    Raises
    ------
    BackEndError
        The site has no IME, or does not say how to command it.  From the methods: a path is missing or lies
        elsewhere (then nothing was started), or a command is missing or failed.
    """

    site: sites.Site | str

    def __post_init__(self) -> None:
        site = sites.load(self.site) if isinstance(self.site, str) else self.site
        object.__setattr__(self, "site", site)
        _shared(site)
        _ime_commands(site)

    def path_in_buffer(self, path: str | os.PathLike[str]) -> str:
        """Where the buffer shows a file of the shared file system: /scratch/me/x as /scratch_ime/me/x."""
        path, shared, buffer = (
            os.path.abspath(path),
            _fixed(_shared(self.site).path),
            _fixed(self.site.burst_buffer.path),
        )
        if _below(path, buffer):
            return path
        if not _below(path, shared):
            raise BackEndError(f"{path!r} is not in the burst buffer's reach: name one below {shared} or {buffer}.")
        return os.path.normpath(os.path.join(buffer, os.path.relpath(path, shared)))

    def stage_in(self, paths: Iterable[str | os.PathLike[str]]) -> int:
        """Copy files into the buffer, and return how many when they are there."""
        return self._run("stage_in_command", self._files(paths), BLOCK)[0]

    def sync_out(self, paths: Iterable[str | os.PathLike[str]]) -> int:
        """Write what changed in the buffer back to the shared file system, and return how many files when it is."""
        return self._run("sync_out_command", self._files(paths), BLOCK)[0]

    def purge(self, paths: Iterable[str | os.PathLike[str]]) -> int:
        """Free the buffer of files, whose originals stay; synced first, so that nothing written can be lost."""
        files = self._files(paths)
        self._run("sync_out_command", files, BLOCK)
        return self._run("purge_command", files)[0]

    def status(self, paths: Iterable[str | os.PathLike[str]]) -> pd.DataFrame:
        """What the buffer holds of each file, as the columns path, dirty_bytes, clean_bytes and syncing_bytes.

        Dirty bytes are those that only the buffer has yet.
        """
        import pandas as pd

        files = self._files(paths)
        _, output = self._run("status_command", files)
        found = {
            f"{kind.lower()}_bytes": [int(size) for key, size in _STATUS.findall(output) if key == kind]
            for kind in ("Dirty", "Clean", "Syncing")
        }
        if any(len(sizes) != len(files) for sizes in found.values()):
            raise BackEndError(
                f"{self.site.burst_buffer.status_command!r} said what cannot be read: {_quoted(output)}."
            )
        return pd.DataFrame({"path": files, **found})

    def _files(self, paths: Iterable[str | os.PathLike[str]]) -> list[str]:
        if isinstance(paths, str | bytes | os.PathLike):
            raise BackEndError(f"paths are a list of them, as [{os.fsdecode(paths)!r}], not one.")
        files = []
        for path in [self.path_in_buffer(path) for path in paths]:
            if not os.path.exists(path):
                raise BackEndError(f"{path!r} does not exist: name files or directories that do.")
            below = [os.path.join(here, name) for here, _, names in os.walk(path) for name in names]
            files += sorted(below) if os.path.isdir(path) else [path]
        return files

    def _run(self, command: str, files: list[str], *options: str) -> tuple[int, str]:
        """Run a command on files, as many at a time as its command line takes; how many, and all that it said."""
        words = [*shlex.split(getattr(self.site.burst_buffer, command)), *options]
        output = ""
        for batch in _batches(files):
            # Paths are absolute, so that none can be taken for an option.
            try:
                done = subprocess.run(
                    [*words, *batch], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
                )
            except FileNotFoundError:
                raise BackEndError(
                    f"the command {words[0]!r} was not found: it is there on the nodes of {self.site.name!r}."
                ) from None
            if done.returncode:
                files_text = repr(batch[0]) + (f" and {len(batch) - 1} more" if len(batch) > 1 else "")
                raise BackEndError(
                    f"{shlex.join(words)!r} failed with status {done.returncode} on {files_text}: "
                    f"{_quoted(done.stderr or done.stdout)}."
                )
            output += done.stdout
        return len(files), output


def _batches(files: list[str]) -> Iterator[list[str]]:
    batch, size_bytes = [], 0
    for file in files:
        length = len(os.fsencode(file)) + 9  # its zero byte, and a pointer to it
        if batch and size_bytes + length > BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
        batch.append(file)
        size_bytes += length
    if batch:
        yield batch


def _quoted(output: str) -> str:
    words = " ".join(output.split())
    return repr(words[:300] + ("..." if len(words) > 300 else "")) if words else "it said nothing"


def _ime_commands(site: sites.Site) -> sites.BurstBuffer:
    buffer = site.burst_buffer
    if buffer is None or buffer.back_end != "ime":
        raise BackEndError(f"site {site.name!r} has no IME: take one that has, such as 'nurion'.")
    commands = ("stage_in_command", "sync_out_command", "purge_command", "status_command")
    if missing := [command for command in commands if not getattr(buffer, command)]:
        raise BackEndError(f"site {site.name!r} does not say burst_buffer.{missing[0]}; add it to its description.")
    return buffer


def job_script(
    site: sites.Site | str,
    source: str,
    command: str,
    nodes: int,
    hours: float,
    capacity_gb: float | None = None,
    *,
    results: str | None = None,
    ranks_per_node: int = 1,
    queue: str | None = None,
    application: str | None = None,
    name: str = "train",
) -> str:
    """A complete job script that trains from the burst buffer and brings the results back, even when training fails.

    Parameters
    ----------
    source
        The directory of data on the shared file system.  For an IME it may contain ``$USER``.
    command
        What each rank runs, one line of shell; finds the data in ``$DATA``, and puts results into ``$RESULTS``.
    capacity_gb
        Space in the burst buffer: of the whole job with DataWarp, of each node with Rabbit.  An IME needs none said.
    results
        The directory of results on the shared file system; by default `source` with ``-results`` at its end.
    queue, application
        The site's usual queue, and the first application of its list, unless given.

    Raises
    ------
    BackEndError
        The site cannot run the job, or its directives cannot say it.
    """
    site = sites.load(site) if isinstance(site, str) else site
    scheduler, buffer, node = site.scheduler, site.burst_buffer, site.node
    if scheduler is None or buffer is None or buffer.back_end == "posix":
        raise BackEndError(f"site {site.name!r} has no burst buffer that jobs ask a scheduler for: take one that has.")
    for what, value, most in [("nodes", nodes, node.count), ("ranks_per_node", ranks_per_node, node.cores)]:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise BackEndError(f"{what} must be a whole number from 1 to {most}, not {value!r}.")
    queue, application = queue or scheduler.job_queue, application or next(iter(scheduler.applications), "")
    longest = scheduler.long_queue_hours or math.inf
    if not 0 < hours < math.inf or hours > longest:
        raise BackEndError(f"hours must be above 0 and at most {longest:g}, not {hours!r}.")
    if queue not in scheduler.queues:
        raise BackEndError(f"site {site.name!r} has no queue {queue!r}: its queues are {', '.join(scheduler.queues)}.")
    for what, word in {"name": name, **({"application": application} if scheduler.application_option else {})}.items():
        if not re.fullmatch(r"[A-Za-z][\w.-]{0,14}", word, re.ASCII):  # 15 characters are all that PBS takes
            raise BackEndError(f"{what} must be at most 15 letters, digits, '.', '_' or '-', not {word!r}.")
    if not command.strip() or "\n" in command:
        raise BackEndError(f"command must be one line of shell, such as 'python train.py \"$DATA\"', not {command!r}.")
    if capacity_gb is not None and not 0 < capacity_gb <= 1000 * (buffer.capacity_tb or math.inf):
        raise BackEndError(f"capacity_gb must be above 0 and fit the buffer of {site.name!r}, not {capacity_gb!r}.")
    source = source.rstrip("/")
    results = results.rstrip("/") if results else f"{source}-results"
    for path in (source, results):
        # No "..": nobody can tell here where it leads there.
        if not path.startswith("/") or ".." in path.split("/") or not path.isprintable():
            raise BackEndError(f"{path!r} must be an absolute path on {site.name!r}, without '..' or line breaks.")
    if _below(results, source) or _below(source, results):
        raise BackEndError(f"the results must not lie in the data, nor the data in the results: {results!r}.")

    body = _ime_lines if buffer.back_end == "ime" else _directive_lines
    directives, before, after = body(site, source, results, capacity_gb)
    shape = {"nodes": nodes, "ranks": nodes * ranks_per_node, "cores_per_rank": node.cores // ranks_per_node}
    launcher = scheduler.launcher.format(**shape)
    make_results = 'mkdir -p "$RESULTS"'
    if buffer.back_end == "rabbit":  # each node has a file system of its own
        make_results = f"{launcher} {make_results}"
    lines = ["#!/bin/bash", *_header(site, name, nodes, hours, ranks_per_node, queue, application)]
    if directives and scheduler.kind == "Flux":  # which takes the directives as one attribute of the job
        directives = ['#FLUX: -S dw="""', *(f"#FLUX: {line}" for line in directives), '#FLUX: """']
    start = [f"# Submit it from {scheduler.submit_from}: nowhere else are jobs taken."] if scheduler.submit_from else []
    start += ['cd "$PBS_O_WORKDIR"'] if scheduler.kind == "PBS Pro" else []
    start += [f"module load {shlex.join(scheduler.job_modules)}"] if scheduler.job_modules else []
    lines += [*scheduler.options, *directives, "", *start, "set -e", "", *before, make_results, "", *after]
    return "\n".join([*lines, f"{launcher} {command}", ""])


def _header(site: Any, name: str, nodes: int, hours: float, per_node: int, queue: str, application: str) -> list[str]:
    scheduler, cores, minutes = site.scheduler, site.node.cores, math.ceil(60 * hours)
    clock = f"{minutes // 60:02d}:{minutes % 60:02d}:00"
    if scheduler.kind == "PBS Pro":
        select = f"select={nodes}:ncpus={cores}:mpiprocs={per_node}:ompthreads={cores // per_node}"
        known_as = f"{scheduler.application_option} {application}" if scheduler.application_option else None
        lines = [f"#PBS -N {name}", f"#PBS -q {queue}", known_as, scheduler.burst_buffer_option]
        return [line for line in lines if line] + [f"#PBS -l {select}", f"#PBS -l walltime={clock}"]
    options = {"job-name": name, "nodes": nodes}
    if scheduler.kind == "Slurm":
        sign, options = "#SBATCH", {**options, "qos": queue, "ntasks-per-node": per_node, "time": clock}
    else:
        sign, options = "#FLUX:", {**options, "queue": queue, "time-limit": f"{minutes}m"}
    return [f"{sign} --{key}={value}" for key, value in options.items()]


def _ime_lines(site: sites.Site, source: str, results: str, capacity_gb: float | None) -> tuple[list[str], ...]:
    buffer, shared = _ime_commands(site), _fixed(_shared(site).path)

    def in_buffer(path: str) -> str:
        if not path.startswith(f"{shared}/"):
            raise BackEndError(f"{path!r} is not in the burst buffer's reach: name a directory below {shared}.")
        pieces = (_fixed(buffer.path) + path.removeprefix(shared)).split(
            "$USER"
        )  # which the job's shell knows, and no quotes
        return '"$USER"'.join(shlex.quote(piece) if piece else "" for piece in pieces)

    before = [
        "# The same files as on the shared file system, as the burst buffer shows them.",
        f"# TAKE CARE: {buffer.warning}" if buffer.warning else "# TAKE CARE: never rm here: it deletes the originals.",
        f"export DATA={in_buffer(source)}",
        f"export RESULTS={in_buffer(results)}",
    ]
    after = [
        "# At the end, even of a failed training: write the results back, then free the buffer; the originals stay.",
        "finish() {",
        f'    {buffer.sync_out_command} {BLOCK} {RECURSIVE} "$RESULTS" &&',
        f'        {buffer.purge_command} {RECURSIVE} "$DATA" "$RESULTS" || exit 1',
        "}",
        "trap finish EXIT",
        "",
        f'{buffer.stage_in_command} {BLOCK} {RECURSIVE} "$DATA"',
    ]
    return [], before, after


def _directive_lines(site: sites.Site, source: str, results: str, capacity_gb: float | None) -> tuple[list[str], ...]:
    """What the scheduler reads before the job starts (NERSC's examples; nearnodeflash.github.io, user interactions)."""
    if capacity_gb is None:
        raise BackEndError(
            f"capacity_gb is needed: the burst buffer of {site.name!r} is made for the job, of that size."
        )
    for path in (source, results):
        if unsafe := sorted(set(re.sub(r"[\w./+@%:,-]", "", path, flags=re.ASCII))):
            raise BackEndError(
                f"a #DW directive cannot say {path!r}, as it has no way to quote {unsafe[0]!r}: rename it, or name "
                "another directory, with the user's name written out."
            )
    path, capacity = site.burst_buffer.path, f"{math.ceil(capacity_gb)}GB"
    if site.burst_buffer.back_end == "datawarp":
        directives = [
            f"#DW jobdw capacity={capacity} access_mode=striped type=scratch",
            f"#DW stage_in source={source} destination={path}/data type=directory",
            f"#DW stage_out source={path}/results destination={results} type=directory",
        ]
    else:
        directives = [
            f"#DW jobdw type=xfs capacity={capacity} name={path.removeprefix('$DW_JOB_')}",
            f"#DW copy_in source={source} destination={path}/data",
            f"#DW copy_out source={path}/results destination={results}",
        ]
    before = [
        "# The data is here before the job starts; the results are copied to",
        f"# {results} after it has ended.",
        f'export DATA="{path}/data"',
        f'export RESULTS="{path}/results"',
    ]
    return directives, before, []
