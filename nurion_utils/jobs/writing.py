"""A job as a script, and why each line of it is there.

A new scheduler is a file like `slurm.py`, a new burst buffer a function of `data_lines.py`.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import PurePosixPath

from nurion_utils.jobs import chain, data_lines, flux, linting, pbs, slurm
from nurion_utils.jobs.job import Job, Line
from nurion_utils.schedulers.pbs import launcher_environment

SCHEDULERS = {"PBS Pro": pbs, "Slurm": slurm, "Flux": flux}


def script(job: Job) -> str:
    """What its scheduler takes; results come back even when the run fails, and the log ends with what it cost.

    ValueError with all that `lint` finds.
    """
    return "\n".join([*(line.text for line in _lines(job)), ""])


def explain(job: Job) -> str:
    """The same script, with a comment above each line: why it is there, and who says so."""
    lines = []
    for line in _lines(job):
        margin = line.text[: len(line.text) - len(line.text.lstrip())]
        lines += [f"{margin}# {line.why} [{line.source}]"] if line.why else []
        lines.append(line.text)
    return "\n".join([*lines, ""])


def _lines(job: Job) -> list[Line]:
    linting.require_no_findings(job)
    scheduler = SCHEDULERS[job.site.scheduler.kind]
    directives = data_lines.directives(job)
    if directives and scheduler is flux:
        directives = flux.directives(directives)
    if job.requeue and not hasattr(scheduler, "AGAIN"):
        raise ValueError(f"jobs of {job.site.scheduler.kind} cannot submit themselves again: leave requeue out")
    header = scheduler.header(job)
    if doubled := {line.text.split()[1].partition("=")[0] for line in header} & set(job.options) - {"-l"}:
        raise ValueError(f"option {min(doubled)} is a field of the job: give it there")
    body = [*data_lines.lines(job), Line("")] if job.data is not None else []
    launcher = job.site.scheduler.figures["launcher"].cited if job.launcher else "papermill"
    run = Line(job.launcher + job.command, "the ranks" if job.launcher else "the notebook, on the first node", launcher)
    header = [Line("#!/bin/bash"), *header, *_options(job), *directives, Line("")]
    run = [run, Line("ended=0", "all is done")]
    return [*header, *_start(job), *scheduler.START, *_environment(job), *_finish(job), Line(""), *body, *run]


def _options(job: Job) -> list[Line]:
    lines, prefix = [], SCHEDULERS[job.site.scheduler.kind].PREFIX
    for key, value in linting.options(job).items():
        why, source = "asked for", "the job"
        if rule := job.site.options.get(key):
            why, source = rule.remark or f"needed here: {rule.needed}", rule.figures["needed"].cited
        word = f'"{value}"' if re.search(r"[^\w.=:,+-]", value) else value
        lines.append(Line(f"{prefix} {key}{'=' if word and key.startswith('--') else ' '}{word}".rstrip(), why, source))
    return lines


def _start(job: Job) -> list[Line]:
    counts = [(each, linting.limit(job, f"most_{each}")) for each in ("running", "waiting")]
    said = [f"{each} {most[1]} [{linting.cited(job, most[0])}]" for each, most in counts if most]
    lines = [Line(f"# Of one user's jobs this queue has at most: {', '.join(said)}.")] if said else []
    if where := job.site.scheduler.submit_from:
        cited = linting.cited(job, "scheduler.submit_from")
        lines.append(Line(f"# Submit it from {where}: nowhere else are jobs taken [{cited}]."))
    return lines


def _environment(job: Job) -> list[Line]:
    site, lines = job.site.scheduler, []
    folder = shlex.quote(str(PurePosixPath(job.python or sys.executable).parent))
    lines += [Line(f'export PATH={folder}:"$PATH"', "the environment that the job was made for")]
    if not job.launcher:
        lines += [Line("export JUPYTER_PREFER_ENV_PATH=1", "its kernel, not one of that name in the home folder")]
    if site.job_modules:
        modules = site.figures["job_modules"].cited
        lines.append(Line(f"module load {shlex.join(site.job_modules)}", "the site's compilers and MPI", modules))
    if job.launcher and SCHEDULERS[site.kind] is pbs:
        reached = launcher_environment(job.launcher)
        why, source = "PBS reaches other nodes for MPICH, where ssh may not", "pbs_tmrsh(8B)"
        lines += [Line(f"export {key}={shlex.quote(value)}", why, source) for key, value in reached.items()]
    ends = f"export NURION_ENDS_AT=$(($(date +%s) + {60 * job.minutes}))"
    lines.append(Line(ends, "when the time is up, in seconds since 1970: for a program that saves before"))
    lines += [Line(f"export {key}={shlex.quote(value)}", "asked for") for key, value in job.environment.items()]
    return lines


def _finish(job: Job) -> list[Line]:
    scheduler = SCHEDULERS[job.site.scheduler.kind]
    node_s = f"{job.nodes} * s"
    said = f"'cost: {job.nodes} nodes x %d s = %d.%03d node-hours, exit status %d\\n'"
    seconds = "    s=$((before_s + SECONDS))" if job.requeue else "    s=$SECONDS"
    return [
        Line(f'job="{scheduler.ID}"', "its number"),
        *(chain.start(job) + chain.again(job, scheduler.AGAIN, scheduler.CANCEL) if job.requeue else []),
        Line("ended=143", "as for a job that is ended from outside, until all is done"),
        Line("finish() {", "at the end, however it comes"),
        Line("    code=$?"),
        Line('    [ "$code" = 0 ] || ended=$code'),
        *([Line("    again || true", "whatever becomes of that, the rest is done")] if job.requeue else []),
        *data_lines.at_the_end(job),
        Line(seconds, "with all jobs before" if job.requeue else ""),
        Line(f"    printf {said} $s $(({node_s} / 3600)) $(({node_s} % 3600 * 1000 / 3600)) $ended", "nodes x elapsed"),
        Line('    exit "$ended"'),
        Line("}"),
        Line("trap finish EXIT"),
        Line("set -e", "the first failure ends the job"),
    ]
