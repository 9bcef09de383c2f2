"""What a site's rules say of a job, before anything is submitted: every reason for which it would not run, at once."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nurion_utils.jobs.job import Job


class Finding(NamedTuple):
    """A rule that a job breaks: the entry of the site's description, and a sentence that cites its source and date."""

    rule: str
    sentence: str


def lint(job: Job, waiting: int = 0) -> list[Finding]:
    """Why the site would refuse this job or never run it, each with what would be right; nothing if it will run.

    `waiting` is how many jobs of the same user wait in its queue already.
    """
    checks = (_queue, _hours, _nodes, _sizes, _options, _directory, _architecture)
    found = [finding for check in checks for finding in check(job)]
    most = limit(job, "most_waiting")
    if most and waiting >= most[1]:
        end = f"wait in queue {job.queue!r}, which takes at most {most[1]}: let one begin first"
        found.append(_finding(job, most[0], f"{waiting} jobs of yours", end))
    return found


def require_no_findings(job: Job, waiting: int = 0) -> None:
    """ValueError with all that `lint` finds, in one sentence."""
    if found := lint(job, waiting):
        raise ValueError("; ".join(finding.sentence for finding in found))


def limit(job: Job, key: str) -> tuple[str, Any] | None:
    """What the job's queue allows at most, or else the scheduler, and which entry says so."""
    queue = job.site.queues.get(job.queue)
    for section, part in ((f"queues.{job.queue}", queue), ("scheduler", job.site.scheduler)):
        if (value := getattr(part, key, None)) is not None:
            return f"{section}.{key}", value
    return None


def cited(job: Job, rule: str) -> str:
    """Source and date of an entry of the site's description."""
    section, _, key = rule.rpartition(".")
    return dict(job.site.parts())[section].figures[key].cited


def _finding(job: Job, rule: str, words: str, end: str) -> Finding:
    return Finding(rule, f"{words} on {job.site.name!r} {end} [{cited(job, rule)}]")


def _queue(job: Job) -> Iterator[Finding]:
    known = job.site.scheduler.queues
    if known and job.queue is not None and job.queue not in known:
        yield _finding(job, "scheduler.queues", "the queue", f"must be one of {', '.join(known)}, not {job.queue}")


def _hours(job: Job) -> Iterator[Finding]:
    most = limit(job, "most_hours")
    if most and job.minutes > 60 * most[1]:
        place = f"hours in queue {job.queue!r}" if most[0].startswith("queues") else "hours"
        longer = {name: queue.most_hours for name, queue in job.site.queues.items() if queue.most_hours}
        others = [f"{name!r} has {hours:g}" for name, hours in longer.items() if 60 * hours >= job.minutes]
        end = f"must be at most {most[1]:g}, not {job.hours:g}" + (f"; queue {', '.join(others)}" if others else "")
        yield _finding(job, most[0], place, end)


def _nodes(job: Job) -> Iterator[Finding]:
    limits = [most] if (most := limit(job, "most_nodes")) else []
    if job.node and job.node.count:
        limits.append((f"partitions.{job.partition}.count", job.node.count))
    rule, most = min(limits, key=lambda each: each[1], default=("", job.nodes))
    if job.nodes > most:
        place = f"nodes in queue {job.queue!r}" if job.queue else "nodes"
        yield _finding(job, rule, place, f"must be at most {most:,}, not {job.nodes:,}")


def _sizes(job: Job) -> Iterator[Finding]:
    if job.node and job.node.cores and job.ranks_per_node * job.cores > job.node.cores:
        end = f"must be at most {job.node.cores}, not {job.ranks_per_node} ranks with {job.cores} each"
        yield _finding(job, f"partitions.{job.partition}.cores", "the cores of a node", end)
    most_gb = 1000 * ((job.burst_buffer and job.burst_buffer.capacity_tb) or math.inf)
    if job.capacity_gb is not None and job.capacity_gb > most_gb:
        end = f"must be at most {most_gb:,.0f}, not {job.capacity_gb:,.0f}"
        yield _finding(job, "burst_buffer.capacity_tb", "capacity_gb", end)


def options(job: Job) -> dict[str, str]:
    """Those of the job, after what the site usually wants."""
    usual = {
        name: option.usual
        for name, option in job.site.options.items()
        if option.usual is not None and (option.needed != "burst buffer" or job.burst_buffer)
    }
    return usual | dict(job.options)


def _options(job: Job) -> Iterator[Finding]:
    given = options(job)
    for name, option in job.site.options.items():
        rule, value = f"options.{name}", given.get(name)
        remark = f"; {option.remark}" if option.remark else ""
        if option.needed == "never" and value is not None:
            yield _finding(job, f"{rule}.needed", f"option {name}", f"is not allowed: leave it out{remark}")
        elif value is None and option.needed in ("always", *(["burst buffer"] if job.burst_buffer else [])):
            end = f"is mandatory: give it as options={{{name!r}: ...}}{remark}"
            yield _finding(job, f"{rule}.needed", f"option {name}", end)
        elif value is not None and option.values and value not in option.values:
            end = f"must be one of {', '.join(map(repr, option.values))}, not {value!r}"
            yield _finding(job, f"{rule}.values", f"option {name}", end)
        elif value is not None and option.pattern and not re.fullmatch(option.pattern, value):
            end = f"must be of the form {option.pattern!r}, not {value!r}{remark}"
            yield _finding(job, f"{rule}.pattern", f"option {name}", end)


def _directory(job: Job) -> Iterator[Finding]:
    below = job.site.scheduler.submit_from
    if below and job.directory is not None:
        directory, allowed = (Path(os.path.expandvars(path)).resolve() for path in (job.directory, below))
        if not directory.is_relative_to(allowed):
            end = f"are taken from {below} only: submit it there, not in {directory}"
            yield _finding(job, "scheduler.submit_from", "jobs", end)


def _architecture(job: Job) -> Iterator[Finding]:
    queue, here = job.site.queues.get(job.queue), platform.machine()
    if queue and queue.architecture not in (None, here) and not isinstance(job.what, str) and job.python is None:
        end = f"are {queue.architecture}, this Python is for {here}: give python=, one that was installed there"
        yield _finding(job, f"queues.{job.queue}.architecture", f"the nodes of queue {job.queue!r}", end)
