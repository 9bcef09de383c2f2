"""A job given to its scheduler, asked after and cancelled, by the scheduler's own commands."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from nurion_utils import sites
from nurion_utils.jobs import chain
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

    @property
    def last(self) -> Submitted:
        """The job that it has gone on in, if it submits itself again; itself if it has not."""
        script = chain.last(self.script)
        number, _, server = self.id.partition(".")
        return replace(self, id=f"{script.name.rsplit('.', 2)[1]}{server and '.' + server}", script=script)


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
    """How a job is doing, or the one that it has gone on in.

    An id of the scheduler's needs the site; where it has gone on is known in the folder that it was submitted from.
    SchedulerError if the scheduler cannot be asked.
    """
    last = _submitted(job, site).last
    state = _scheduler(last.site).state(last.id)
    # It may have gone on meanwhile: it says so before it ends.
    return status(last) if state.ended and last.last != last else state


def cancel(job: Submitted | str, site: sites.Site | str | None = None) -> None:
    """End a job, waiting or running, or the one that it has gone on in; one that has ended already is left alone.

    Of an id of the scheduler's the same is true as in `status`.
    """
    last = _submitted(job, site).last
    if last.script.exists() and chain.goes_on(last.script):
        chain.stop(last.script)
        if last.last != last:  # it went on just now
            return cancel(last)
    _scheduler(last.site).cancel(last.id)


def _submitted(job: Submitted | str, site: sites.Site | str | None) -> Submitted:
    if isinstance(job, Submitted):
        return job
    if site is None:
        raise ValueError(f"name the site of job {job!r}, as in status({job!r}, 'nurion')")
    number = job.partition(".")[0]
    here = [path for path in Path.cwd().glob("*.*.sh") if path.stem.endswith(f".{number}")]
    script = here[0] if here else Path.cwd() / f"job.{number}.sh"
    return Submitted(job, sites.load(site) if isinstance(site, str) else site, script)


def _scheduler(site: sites.Site) -> ModuleType:
    kind = site.scheduler and site.scheduler.kind
    if kind not in ("Slurm", "PBS Pro"):
        raise ValueError(f"jobs of {kind} on {site.name!r} are only written: submit the script by hand")
    return {"Slurm": slurm, "PBS Pro": pbs}[kind]
