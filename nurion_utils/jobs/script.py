"""A job of a supercomputer: what to run, how large and for how long; and the script that its scheduler takes.

>>> script = job_script("nurion", "/scratch/$USER/imagenet", 'python train.py "$DATA"', nodes=4, hours=2)

A new scheduler is a function in `HEADERS`, a new burst buffer one in `BODIES`.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from nurion_utils import sites
from nurion_utils._checks import number, one_of, whole_number
from nurion_utils.jobs.burst_buffers import BLOCK, RECURSIVE, BurstBufferError, path_in_ime

# What a scheduler reads of a burst buffer that is made for the job (NERSC's examples; nearnodeflash.github.io).
DIRECTIVES = {
    "datawarp": """\
#DW jobdw capacity={gb}GB access_mode=striped type=scratch
#DW stage_in source={source} destination={path}/data type=directory
#DW stage_out source={path}/results destination={results} type=directory""",
    "rabbit": """\
#DW jobdw type=xfs capacity={gb}GB name={name}
#DW copy_in source={source} destination={path}/data
#DW copy_out source={path}/results destination={results}""",
}


@dataclass(frozen=True)
class Job:
    """What to run on which machine; a ValueError in one sentence if the machine cannot run it.

    `source` and `results` are directories on the shared file system, in which ``$USER`` is the user's name: of the
    data, None for a job without, staged into the burst buffer where the site has one; and of what comes back, `source`
    with ``-results`` at its end unless given. `command` is what each rank runs, one line of shell; it finds the data in
    ``$DATA``, and puts results into ``$RESULTS``. `hours` of walltime are rounded up to whole minutes. `capacity_gb` is
    space in the burst buffer: of the whole job with DataWarp, of each node with Rabbit; an IME needs none said. `queue`
    and `application` are the site's usual queue and the first application of its list, unless given. The variables of
    `environment` are exported.
    """

    site: sites.Site | str
    source: str | None
    command: str
    nodes: int
    hours: float
    capacity_gb: float | None = None
    results: str | None = None
    ranks_per_node: int = 1
    queue: str | None = None
    application: str | None = None
    name: str = "train"
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        site = sites.load(self.site) if isinstance(self.site, str) else self.site
        if (scheduler := site.scheduler) is None:
            raise ValueError(f"site {site.name!r} has no scheduler: take one that has, such as 'nurion'")
        usual = {"queue": scheduler.job_queue, "application": next(iter(scheduler.applications), "")}
        usual["results"] = f"{str(self.source).rstrip('/')}-results" if self.source is not None else None
        for key, value in {"site": site, **{key: usual[key] for key in usual if getattr(self, key) is None}}.items():
            object.__setattr__(self, key, value)
        whole_number(self.nodes, "nodes", most=site.node.count)
        whole_number(self.ranks_per_node, "ranks_per_node", most=site.node.cores)
        one_of(self.queue, f"the queue on {site.name!r}", scheduler.queues)
        longest = scheduler.long_queue_hours
        if number(self.hours, "hours", above=0) > (longest or math.inf):
            source = scheduler.figures["long_queue_hours"].source
            raise ValueError(f"hours must be at most {longest:g} on {site.name!r} ({source}), not {self.hours!r}")
        if self.capacity_gb is not None:
            most = site.burst_buffer and site.burst_buffer.capacity_tb and 1000 * site.burst_buffer.capacity_tb
            number(self.capacity_gb, "capacity_gb", above=0, most=most)
        self._require_text()

    def _require_text(self) -> None:
        """Whatever is written into the script is one word or one line there, and says what it says here."""
        for what in ("name", "application") if self.site.scheduler.application_option else ("name",):
            text = getattr(self, what)  # 15 characters are all that PBS takes
            if not isinstance(text, str) or not re.fullmatch(r"[A-Za-z][\w.-]{0,14}", text, re.ASCII):
                raise ValueError(f"{what} must be a letter and up to 14 letters, digits, '.', '_' or '-', not {text!r}")
        for key, value in self.environment.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", str(key), re.ASCII) or not _is_line(value):
                raise ValueError(f"environment must be names and a line of text each, not {key!r} and {value!r}")
        if not _is_line(self.command) or not self.command.strip() or self.command.lstrip()[0] in "-#":
            raise ValueError(f"command must be one line of shell, as 'python train.py \"$DATA\"', not {self.command!r}")
        shell = {"input": f"launcher {self.command}\n", "encoding": "utf-8", "env": os.environ | {"LC_ALL": "C"}}
        read = subprocess.run(["bash", "-n"], capture_output=True, **shell)
        if read.stderr:
            raise ValueError(f"bash cannot read the command {self.command!r}: {' '.join(read.stderr.split())}")
        paths = [self.source, self.results] if self.source is not None else []
        if self.results is not None and not paths:
            raise ValueError(f"results need a source: name the directory of data, not only {self.results!r}")
        for path in paths:  # no "..": nobody can tell here where it leads there
            if not _is_line(path) or not path.startswith("/") or ".." in path.split("/"):
                raise ValueError(f"{path!r} must be an absolute path on {self.site.name!r}, one line without '..'")
        if paths and any(PurePosixPath(one).is_relative_to(other) for one, other in (paths, paths[::-1])):
            raise ValueError(f"the results must not lie in the data, nor the data in the results: {self.results!r}")

    @property
    def minutes(self) -> int:
        """Walltime in whole minutes, the finest that all schedulers know."""
        return max(1, math.ceil(round(60 * self.hours, 6)))

    @property
    def clock(self) -> str:
        """Walltime as hours, minutes and seconds."""
        return f"{self.minutes // 60:02d}:{self.minutes % 60:02d}:00"

    @property
    def launcher(self) -> str:
        """The command that starts the ranks."""
        ranks, cores = self.nodes * self.ranks_per_node, self.site.node.cores // self.ranks_per_node
        return self.site.scheduler.launcher.format(nodes=self.nodes, ranks=ranks, cores_per_rank=cores)


def _is_line(text: Any) -> bool:
    return isinstance(text, str) and text.replace("\t", " ").isprintable()


def job_script(
    site: sites.Site | str, source: str | None, command: str, nodes: int, hours: float, **options: Any
) -> str:
    """A `script.Job`, with its fields as options, as a script that brings results back even when training fails."""
    job = Job(site, source, command, nodes, hours, **options)
    scheduler = job.site.scheduler
    back_end = job.site.burst_buffer.back_end if job.site.burst_buffer and job.source is not None else "posix"
    directives, body = BODIES[back_end](job)
    if directives and scheduler.kind == "Flux":  # which takes the directives as one attribute of the job
        directives = ['#FLUX: -S dw="""', *(f"#FLUX: {line}" for line in directives), '#FLUX: """']
    start = [f"# Submit it from {scheduler.submit_from}: nowhere else are jobs taken."] if scheduler.submit_from else []
    start += ['cd "$PBS_O_WORKDIR"'] if scheduler.kind == "PBS Pro" else []
    start += [f"module load {shlex.join(scheduler.job_modules)}"] if scheduler.job_modules else []
    start += [f"export {key}={shlex.quote(value)}" for key, value in job.environment.items()]
    header = ["#!/bin/bash", *HEADERS[scheduler.kind](job), *scheduler.options, *directives]
    return "\n".join([*header, "", *start, "set -e", "", *body, f"{job.launcher} {job.command}", ""])


def _pbs(job: Job) -> list[str]:
    scheduler, cores, each = job.site.scheduler, job.site.node.cores, job.ranks_per_node
    known_as = f"{scheduler.application_option} {job.application}" if scheduler.application_option else None
    select = f"#PBS -l select={job.nodes}:ncpus={cores}:mpiprocs={each}:ompthreads={cores // each}"
    lines = [f"#PBS -N {job.name}", f"#PBS -q {job.queue}", known_as, job.source and scheduler.burst_buffer_option]
    return [line for line in lines if line] + [select, f"#PBS -l walltime={job.clock}"]


def _slurm(job: Job) -> list[str]:
    options = {"job-name": job.name, "nodes": job.nodes, "qos": job.queue}
    options |= {"ntasks-per-node": job.ranks_per_node, "time": job.clock}
    return [f"#SBATCH --{key}={value}" for key, value in options.items()]


def _flux(job: Job) -> list[str]:
    options = {"job-name": job.name, "nodes": job.nodes, "queue": job.queue, "time-limit": f"{job.minutes}m"}
    return [f"#FLUX: --{key}={value}" for key, value in options.items()]


def _exports(data: str, results: str) -> list[str]:
    """Two variables; ``$USER`` in them is the user's name, and nothing else means anything to the shell."""
    words = [
        '"$USER"'.join(shlex.quote(piece) if piece else "" for piece in re.split(r"\$USER(?!\w)", path))
        for path in (data, results)
    ]
    return [f"export DATA={words[0]}", f"export RESULTS={words[1]}", 'mkdir -p "$RESULTS"', ""]


def _no_buffer(job: Job) -> tuple[list[str], list[str]]:
    return [], _exports(job.source, job.results) if job.source is not None else []


def _ime(job: Job) -> tuple[list[str], list[str]]:
    buffer = job.site.burst_buffer
    data, results = (path_in_ime(job.site, path) for path in (job.source, job.results))
    return [], [
        "# The same files as on the shared file system, as the burst buffer shows them.",
        f"# TAKE CARE: {buffer.warning or 'never rm here: it deletes the originals'}",
        *_exports(data, results),
        "# At the end, even of a failed training: write the results back, then free the buffer; the originals stay.",
        "finish() {",
        f'    {buffer.sync_out_command} {BLOCK} {RECURSIVE} "$RESULTS" &&',
        f'        {buffer.purge_command} {RECURSIVE} "$DATA" "$RESULTS" || exit 1',
        "}",
        "trap finish EXIT",
        "",
        f'{buffer.stage_in_command} {BLOCK} {RECURSIVE} "$DATA"',
    ]


def _made_for_the_job(job: Job) -> tuple[list[str], list[str]]:
    """The scheduler makes the buffer and copies, as directives tell it, which know no quotes."""
    buffer = job.site.burst_buffer
    if job.capacity_gb is None:
        raise BurstBufferError(f"capacity_gb is needed: the burst buffer of {job.site.name!r} is made for the job")
    if unsafe := sorted(set(re.sub(r"[\w./+@%:,-]", "", job.source + job.results, flags=re.ASCII))):
        raise BurstBufferError(
            f"a #DW directive has no way to quote the {unsafe[0]!r} in {job.source!r} or {job.results!r}: name another "
            "directory, with the user's name written out"
        )
    fields = {"gb": math.ceil(job.capacity_gb), "source": job.source, "results": job.results, "path": buffer.path}
    directives = DIRECTIVES[buffer.back_end].format(**fields, name=buffer.path.removeprefix("$DW_JOB_"))
    each_node = f"{job.launcher} " if buffer.back_end == "rabbit" else ""  # there it has a file system of its own
    return directives.splitlines(), [
        f"# The data is here before the job starts; the results are copied to {job.results} after it has ended.",
        f'export DATA="{buffer.path}/data"',
        f'export RESULTS="{buffer.path}/results"',
        f'{each_node}mkdir -p "$RESULTS"',
        "",
    ]


HEADERS = {"PBS Pro": _pbs, "Slurm": _slurm, "Flux": _flux}
BODIES = {"posix": _no_buffer, "ime": _ime, "datawarp": _made_for_the_job, "rabbit": _made_for_the_job}
