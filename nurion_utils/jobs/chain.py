"""Jobs that submit themselves again: what their scripts do for that, and what they leave for whoever follows them.

All jobs of a chain share the file NAME.NUMBER.chain, with the number of the last one, in the folder that they run in.
Each of those before has a line in it: its number, the seconds that all took until its end, and how many in a row have
made no progress. A line "stop" ends the chain.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from nurion_utils.jobs.job import Job, Line

STOP = "stop"
MOST_IDLE = 2  # jobs in a row without progress; the first may have met with an accident
WARNING_S = 120  # before the end, ranks are warned where the scheduler can; Slurm may be a minute early


def warning_s(job: Job) -> int:
    """How long before the walltime is over, in seconds: a tenth of it at most."""
    return min(WARNING_S, 6 * job.minutes)


def start(job: Job) -> list[Line]:
    """What such a job does first."""
    return [
        Line(f'cp "$0" {job.name}."$job".sh', "what is submitted again", "sbatch(1), qsub(1B): $0 is a copy of theirs"),
        Line(
            f'export NURION_PROGRESS="$PWD/{job.name}.$job.progress"',
            "whatever has saved something from which a later job goes on writes a line into it",
        ),
    ]


def again(job: Job, submit: str, cancel: str) -> list[Line]:
    """The function with which a script submits itself by the scheduler's own commands, if there is more to do."""
    near_s = min(WARNING_S + 60, 30 * job.minutes)
    texts = [
        ("again() {", "goes on in another job, if there is more to do and it is of use"),
        ("    trap '' TERM", "the walltime must not end this as well"),
        (f'    chain={job.name}."$job".chain', "what the jobs before have left, if there were any"),
        ("    read -r _ before_s idle < <(grep -s '^[0-9]' \"$chain\" | tail -n 1; echo - 0 0)", ""),
        ('    [ -s "$NURION_PROGRESS" ] && idle=0 || idle=$((idle + 1))', "jobs in a row that have saved nothing new"),
        ('    rm -f "$NURION_PROGRESS"', ""),
        ('    [ "$ended" != 0 ] || return', "all is done"),
        (
            f'    [ "$ended" = {os.EX_TEMPFAIL} ] || [ "$(date +%s)" -ge $((NURION_ENDS_AT - {near_s})) ] || return',
            "75 says that there is more to do; near its end a job was ended by the walltime; else it was an error",
        ),
        (f'    if [ "$idle" = {MOST_IDLE} ]; then', "it would be so for ever"),
        (f'        echo "job $job is not submitted again: {MOST_IDLE} jobs in a row have made no progress"', ""),
        ("        return", ""),
        ("    fi", ""),
        (f'    ! grep -qsx {STOP} "$chain" || return', "it was cancelled"),
        (f'    if ! next=$({submit} {job.name}."$job".sh); then', "it begins when this one has ended"),
        (f'        echo "job $job could not be submitted again; to go on, submit {job.name}.$job.sh by hand"', ""),
        ("        return", ""),
        ("    fi", ""),
        ("    next=${next%%[.;]*}", "its number alone"),
        ('    echo "$job $((before_s + SECONDS)) $idle" >> "$chain"', "for the next one, and for whoever follows it"),
        (f'    mv "$chain" {job.name}."$next".chain', ""),
        ('    echo "job $job goes on as job $next"', ""),
        (f'    ! grep -qx {STOP} {job.name}."$next".chain || {cancel} "$next"', "it was cancelled meanwhile"),
        ("}", ""),
    ]
    return [Line(*each) for each in texts]


def last(script: Path) -> Path:
    """The script of the last job so far of a chain, by the script of any; itself if it has not gone on."""
    name, number, suffix = script.name.rsplit(".", 2)
    for file in script.parent.iterdir():  # not asked for by name: that a file is missing is remembered by NFS
        found = re.fullmatch(rf"{re.escape(name)}\.(\d+)\.chain", file.name)
        try:
            if found and re.search(rf"^{number} ", file.read_text(), re.MULTILINE):
                return script.with_name(f"{name}.{found[1]}.{suffix}")
        except FileNotFoundError:  # it has just gone on
            return last(script)
    return script


def goes_on(script: Path) -> bool:
    """Whether a script is one that submits itself again."""
    return "\nagain() {\n" in script.read_text()


def stop(script: Path) -> None:
    """Have the job of a script not go on in another."""
    with open(script.with_suffix(".chain"), "a") as file:
        file.write(f"{STOP}\n")
