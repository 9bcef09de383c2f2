"""A job given to its scheduler, asked after and cancelled, by the scheduler's own commands."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from nurion_utils import sites
from nurion_utils.jobs.job import Job
from nurion_utils.jobs.linting import limit, require_no_findings
from nurion_utils.jobs.writing import script
from nurion_utils.schedulers import State, pbs, slurm


@dataclass(frozen=True)
class Submitted:
    """A job in a queue: the scheduler's id for it, and the script as it was submitted, which lies beside its log."""

    id: str
    site: sites.Site
    script: Path

    @property
    def log(self) -> Path:
        """What the job prints: on the way, or, with PBS, when it has ended."""
        name, number, _ = self.script.name.rsplit(".", 2)
        return self.script.with_name(f"{name}.o{number}")


def submit(job: Job) -> Submitted:
    """Submit a job from its directory, the current one unless it names another.

    ValueError with all that `lint` finds, before anything is submitted; SchedulerError if the scheduler refuses it.
    """
    scheduler, directory = _scheduler(job.site), Path(job.directory or ".").resolve()
    if not directory.is_dir():
        raise ValueError(f"there is no directory {str(directory)!r}: make it before a job is submitted from there")
    job = replace(job, directory=directory)
    text = script(job)
    if limit(job, "most_waiting"):
        require_no_findings(job, scheduler.waiting(job.queue))
    file, path = tempfile.mkstemp(prefix=f"{job.name}.", suffix=".sh", dir=directory)
    try:
        with open(file, "w") as opened:
            opened.write(text)
        id = scheduler.submit(path, directory=directory)
        kept = directory / f"{job.name}.{id.partition('.')[0]}.sh"
        os.replace(path, kept)
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise
    return Submitted(id, job.site, kept)


def status(job: Submitted | str, site: sites.Site | str | None = None) -> State:
    """How a job is doing; an id of the scheduler's needs the site. SchedulerError if the scheduler cannot be asked."""
    scheduler, id = _of(job, site)
    return scheduler.state(id)


def cancel(job: Submitted | str, site: sites.Site | str | None = None) -> None:
    """End a job, waiting or running; one that has ended already is left alone."""
    scheduler, id = _of(job, site)
    scheduler.cancel(id)


def _of(job: Submitted | str, site: sites.Site | str | None) -> tuple[ModuleType, str]:
    if isinstance(job, Submitted):
        return _scheduler(job.site), job.id
    if site is None:
        raise ValueError(f"name the site of job {job!r}, as in status({job!r}, 'nurion')")
    return _scheduler(sites.load(site) if isinstance(site, str) else site), job


def _scheduler(site: sites.Site) -> ModuleType:
    kind = site.scheduler and site.scheduler.kind
    if kind not in ("Slurm", "PBS Pro"):
        raise ValueError(f"jobs of {kind} on {site.name!r} are only written: submit the script by hand")
    return {"Slurm": slurm, "PBS Pro": pbs}[kind]
