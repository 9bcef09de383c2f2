"""A job in the words of Flux."""

from __future__ import annotations

from nurion_utils.jobs.job import Job, Line

PREFIX, ID = "#FLUX:", "$FLUX_JOB_ID"
START: list[Line] = []


def header(job: Job) -> list[Line]:
    """The directives for what is the job's own."""
    lines = [
        (f"--job-name={job.name}", "its name in the queue"),
        (f"--nodes={job.nodes}", "how many nodes"),
        *([(f"--queue={job.queue}", "the queue")] if job.queue else []),
        (f"--time-limit={job.minutes}m", "then it is ended"),
    ]
    return [Line(f"#FLUX: {text}", why) for text, why in lines]


def directives(lines: list[Line]) -> list[Line]:
    """Those to a burst buffer, which Flux takes as one attribute of the job."""
    inner = [Line(f"#FLUX: {line.text}") for line in lines]
    return [Line('#FLUX: -S dw="""', lines[0].why, lines[0].source), *inner, Line('#FLUX: """')]
