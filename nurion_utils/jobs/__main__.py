"""``python -m nurion_utils.jobs NOTEBOOK --site SITE``: a notebook as a job of a machine; see ``--help``."""

from __future__ import annotations

import argparse
import ast
import sys
import time
from typing import Any

from nurion_utils.jobs.job import Job, Notebook
from nurion_utils.jobs.queueing import Submitted, cancel, status, submit
from nurion_utils.jobs.writing import explain, script
from nurion_utils.schedulers import SchedulerError, State

LONGEST_PAUSE_S = 30.0  # between two questions, which many users put to one scheduler
UNANSWERED = 10  # questions in a row before we give up
LOG_S = 10.0  # how long PBS may take to bring a log back


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 for a job that failed, 2 for one that was refused."""
    given = _parser().parse_args(arguments)
    try:
        job = _job(given)
        if not (given.submit or given.wait):
            print(explain(job) if given.explain else script(job), end="")
            return 0
        submitted = submit(job)
        print(f"job {submitted.id} on {job.site.name}: {submitted.script}", flush=True)
        return _wait(job, submitted) if given.wait else 0
    except (ValueError, SchedulerError) as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nurion_utils.jobs",
        description="Run a notebook as a job. Without --submit or --wait its script is printed, and nothing happens.",
        epilog="Executed notebook, log and cost come to the folder that the job is submitted from.",
    )
    parser.add_argument("notebook", help="an .ipynb file with a parameters cell")
    parser.add_argument("--site", required=True, help="nurion, neuron, slurm, pbs, or one that you described")
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("--ranks-per-node", type=int, default=1, metavar="N")
    parser.add_argument("--cores-per-rank", type=int, metavar="N")
    parser.add_argument("--hours", type=float, default=1.0, help="of walltime, at most (1)")
    parser.add_argument("--queue", help="the site's usual one unless given")
    parser.add_argument("-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--option", action="append", default=[], metavar="OPTION=VALUE", help="as --option=-A=pytorch")
    parser.add_argument("--data", help="a folder on the machine, which goes through its burst buffer if it has one")
    parser.add_argument("--results", help="where $RESULTS comes back to")
    parser.add_argument("--capacity-gb", type=float, help="of a burst buffer that is made for the job")
    parser.add_argument("--requeue", action="store_true", help="submit it again until it is done; see Job")
    parser.add_argument("--python", help="an interpreter on the machine, with this package; this one unless given")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the script (as without any of these)")
    what.add_argument("--explain", action="store_true", help="print it with the reason for each line")
    what.add_argument("--submit", action="store_true", help="submit it from here")
    what.add_argument("--wait", action="store_true", help="submit it, and wait until it has ended")
    return parser


def _job(given: argparse.Namespace) -> Job:
    same = "site nodes ranks_per_node cores_per_rank hours queue data results capacity_gb requeue".split()
    notebook = Notebook(given.notebook, {name: _value(text) for name, text in given.parameters})
    options = dict(text.partition("=")[::2] for text in given.option)
    return Job(notebook, options=options, python=given.python, **{name: getattr(given, name) for name in same})


def _value(text: str) -> Any:
    """A parameter as Python would read it; what is no literal is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _wait(job: Job, submitted: Submitted) -> int:
    told, pause_s, unanswered = "", 0.5, 0
    try:
        while True:
            try:
                state, unanswered = status(submitted), 0
                if (last := submitted.last) != submitted:
                    print(f"{time.strftime('%H:%M:%S')} job {submitted.id} goes on as job {last.id}", flush=True)
                    submitted = last
            except SchedulerError as error:  # it may be down for a while; the job is not
                state, unanswered = State("waiting", str(error)), unanswered + 1
                if unanswered == UNANSWERED:
                    raise
            if (words := _words(state)) != told:
                print(f"{time.strftime('%H:%M:%S')} {words}", flush=True)
            if state.name == "never":
                cancel(submitted)
                raise ValueError(f"job {submitted.id} could never have run, and was cancelled: {state.reason}")
            if state.ended:
                return _report(job, submitted, state)
            told = words
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, LONGEST_PAUSE_S)
    except KeyboardInterrupt:
        how = f"nurion_utils.jobs.cancel({submitted.id!r}, {job.site.name!r})"
        print(f"job {submitted.id} goes on; in this folder {how} ends it", file=sys.stderr)
        return 130


def _words(state: State) -> str:
    words = f"{state.name}: {state.reason}" if state.reason else state.name
    if state.name == "waiting" and state.starts_at:
        words += f", expected to start at {time.strftime('%Y-%m-%d %H:%M', time.localtime(state.starts_at))}"
    return words + (f" on {', '.join(state.nodes)}" if state.name == "running" and state.nodes else "")


def _report(job: Job, submitted: Submitted, state: State) -> int:
    log, ends = submitted.log, time.monotonic() + LOG_S
    while not log.exists() and time.monotonic() < ends:
        time.sleep(0.1)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    cost = next((line for line in reversed(lines) if line.startswith("cost: ")), "cost: not known")
    executed = log.with_name(f"{job.what.file.stem}.{submitted.script.stem.rpartition('.')[2]}.ipynb")
    done = state.name == "done" or (state.name == "gone" and cost.endswith("exit status 0"))
    if not done:
        print(*lines[-20:], sep="\n")
    for what, file in (("notebook", executed), ("log", log)):
        print(f"{what}: {file if file.exists() else 'there is none'}")
    print(cost)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
