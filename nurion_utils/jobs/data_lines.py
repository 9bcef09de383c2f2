"""The lines of a script that bring data to the job and results back, one function per kind of burst buffer."""

from __future__ import annotations

import math
import re
import shlex

from nurion_utils.jobs.burst_buffers import BLOCK, RECURSIVE, BurstBufferError, path_in_ime
from nurion_utils.jobs.job import Job, Line

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


def directives(job: Job) -> list[Line]:
    """What the scheduler is told of a buffer that is made for the job, and copied to and from by it."""
    buffer = job.burst_buffer
    if buffer is None or buffer.back_end not in DIRECTIVES:
        return []
    if job.capacity_gb is None:
        raise BurstBufferError(f"capacity_gb is needed: the burst buffer of {job.site.name!r} is made for the job")
    if unsafe := sorted(set(re.sub(r"[\w./+@%:,-]", "", job.data + job.results, flags=re.ASCII))):
        raise BurstBufferError(
            f"a #DW directive has no way to quote the {unsafe[0]!r} in {job.data!r} or {job.results!r}: name another "
            "directory, with the user's name written out"
        )
    fields = {"gb": math.ceil(job.capacity_gb), "source": job.data, "results": job.results, "path": buffer.path}
    text = DIRECTIVES[buffer.back_end].format(**fields, name=buffer.path.removeprefix("$DW_JOB_"))
    whys = ("a burst buffer for the job", "data is here before the job starts", "results are copied after its end")
    return [Line(*each, buffer.figures["back_end"].cited) for each in zip(text.splitlines(), whys, strict=True)]


def lines(job: Job) -> list[Line]:
    """What the job itself does before the ranks start."""
    if job.data is None:
        return []
    buffer = job.burst_buffer
    if buffer is None:
        return _exports(job.data, job.results)
    if buffer.back_end == "ime":
        return _ime(job)
    each_node = job.launcher if buffer.back_end == "rabbit" else ""  # there it has a file system of its own
    source = buffer.figures["path"].cited
    return [
        Line(f'export DATA="{buffer.path}/data"', "where the scheduler has put the data", source),
        Line(f'export RESULTS="{buffer.path}/results"', f"copied to {job.results} after the job has ended", source),
        Line(f'{each_node}mkdir -p "$RESULTS"', "on each node, if each has one of its own"),
    ]


def _exports(data: str, results: str) -> list[Line]:
    """Two variables; ``$USER`` in them is the user's name, and nothing else means anything to the shell."""
    words = [
        '"$USER"'.join(shlex.quote(piece) if piece else "" for piece in re.split(r"\$USER(?!\w)", path))
        for path in (data, results)
    ]
    whys = ("where the data is", "where results belong", "")
    texts = (f"export DATA={words[0]}", f"export RESULTS={words[1]}", 'mkdir -p "$RESULTS"')
    return [Line(text, why) for text, why in zip(texts, whys, strict=True)]


def _ime(job: Job) -> list[Line]:
    buffer = job.burst_buffer
    data, results = (path_in_ime(job.site, path) for path in (job.data, job.results))
    warning = buffer.warning or "never rm here: it deletes the originals"
    return [
        Line("# The same files as on the shared file system, as the burst buffer shows them."),
        Line(f"# TAKE CARE: {warning}"),
        *_exports(data, results),
        Line(
            f'{buffer.stage_in_command} {BLOCK} {RECURSIVE} "$DATA"',
            "data into the burst buffer; without --block it would not wait for the end",
            buffer.figures["stage_in_command"].cited,
        ),
    ]


def at_the_end(job: Job) -> list[Line]:
    """What the job does when it ends, even by a failure: each returns whether it went well."""
    buffer = job.burst_buffer
    if buffer is None or buffer.back_end != "ime":
        return []
    why, source = (
        "results back to the shared file system, then the buffer is freed; the originals stay",
        "purge_command",
    )
    return [
        Line(f'    {buffer.sync_out_command} {BLOCK} {RECURSIVE} "$RESULTS" &&', why, buffer.figures[source].cited),
        Line(f'        {buffer.purge_command} {RECURSIVE} "$DATA" "$RESULTS" || ended=1'),
    ]
