"""Jobs that submit themselves again, until they are done or do not get on: under Slurm and PBS Pro, both played."""

import os
import re
import time

import nbformat
import pytest

from nurion_utils import jobs
from nurion_utils.jobs import Job, script
from nurion_utils.jobs.__main__ import main


def submit(queue, does, **changes):
    """Submit a job that does, as bash, what is said for the first, the second and so on of a chain."""
    (queue.work / "runs").touch()
    for number, each in enumerate(does, 1):
        (queue.work / f"do{number}").write_text(each.replace("SAVE", 'echo saved >> "$NURION_PROGRESS"'))
    usual = {"directory": queue.work, "python": queue.python, "requeue": True}
    return jobs.submit(Job("bash -c 'echo >> runs; . ./do$(wc -l < runs)'", queue.kind, **usual | changes))


def end(submitted):
    """How its chain ended, and what its last job printed."""
    until(lambda: jobs.status(submitted).ended)
    return jobs.status(submitted), submitted.last.log.read_text()


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ran(queue):
    return len((queue.work / "runs").read_text().splitlines())


def test_a_job_is_submitted_again_until_it_is_done_and_says_what_all_cost(queue):
    submitted = submit(queue, ["sleep 1; SAVE; exit 75", "sleep 1; SAVE; exit 75", "sleep 1"], nodes=2)
    state, log = end(submitted)
    assert state.name == "done" and ran(queue) == 3
    numbers = [each.id.partition(".")[0] for each in (submitted, submitted.last)]
    assert numbers == ["1", "3"] and submitted.last.id.replace("3", "1") == submitted.id
    seconds = re.search(r"^cost: 2 nodes x (\d+) s = 0.00\d node-hours, exit status 0$", log, re.MULTILINE)[1]
    assert int(seconds) >= 3
    assert "job 1 goes on as job 2\n" in submitted.log.read_text() and "exit status 75" in submitted.log.read_text()
    assert {"train.1.sh", "train.2.sh", "train.3.sh", "train.3.chain"} <= set(os.listdir(queue.work))
    assert not [*queue.work.glob("*.progress")] and len([*queue.work.glob("*.chain")]) == 1


def test_two_jobs_in_a_row_without_progress_end_the_chain_and_one_does_not(queue):
    state, log = end(submit(queue, ["exit 75", "SAVE; exit 75", "exit 75", "exit 75", "exit 0"]))
    assert (state.name, state.exit_status, ran(queue)) == ("failed", 75, 4)
    assert "job 4 is not submitted again: 2 jobs in a row have made no progress\n" in log


def test_an_error_ends_the_chain_whatever_was_saved(queue):
    state, log = end(submit(queue, ["SAVE; exit 75", "SAVE; exit 3", "exit 0"]))
    assert (state.name, state.exit_status, ran(queue)) == ("failed", 3, 2) and "again" not in log


def test_a_job_that_the_walltime_has_ended_goes_on_if_it_gets_on(queue, monkeypatch):
    monkeypatch.setattr(Job, "clock", "00:00:02")
    long_ago = {"NURION_ENDS_AT": "0"}  # for its script counts whole minutes
    state, log = end(submit(queue, ["SAVE; sleep 600", "SAVE; sleep 600", "exit 0"], environment=long_ago))
    assert state.name == "done" and ran(queue) == 3
    assert not re.search("again", log)


@pytest.mark.parametrize("cancel", ["by us", "by its first number", "by the scheduler's command"])
def test_a_job_that_is_cancelled_does_not_go_on_although_it_could(queue, cancel, monkeypatch):
    monkeypatch.chdir(queue.work)
    submitted = submit(queue, ["SAVE; exit 75", "SAVE; trap 'exit 75' TERM; sleep 600 & wait", "exit 0"])
    until(lambda: ran(queue) == 2)
    if cancel == "by us":
        jobs.cancel(submitted)
    elif cancel == "by its first number":
        jobs.cancel("1", queue.kind)
    else:
        queue.talk.cancel(submitted.last.id)
    assert (
        end(submitted)[0].name == jobs.status("1", queue.kind).name == "cancelled"
        and ran(queue) == 2
        and len(queue.told()) == 2
    )


def test_a_chain_that_is_cancelled_between_two_jobs_has_ended(queue):
    queue.rules(slots=1)
    submitted = submit(queue, ["until [ -e go ]; do sleep 0.1; done; SAVE; exit 75", "exit 0"])
    command = {"slurm": "sbatch", "pbs": "qsub"}[queue.kind]
    (queue.work / "real").mkdir()
    (queue.work.parent / "commands" / command).rename(queue.work / "real" / command)
    queue.replace(command, f'touch asked; sleep 1; exec ./real/{command} "$@"')
    (queue.work / "go").touch()
    until((queue.work / "asked").exists)
    jobs.cancel(submitted)
    until(lambda: len(queue.told()) == 2)
    until(lambda: jobs.status(submitted).name == "cancelled")
    assert ran(queue) == 1


def test_a_job_that_cannot_be_submitted_again_says_what_is_to_be_done(queue):
    submitted = submit(queue, ["until [ -e go ]; do sleep 0.1; done; SAVE; exit 75"])
    queue.replace({"slurm": "sbatch", "pbs": "qsub"}[queue.kind], "echo not from here >&2; exit 1")
    (queue.work / "go").touch()
    state, log = end(submitted)
    assert (state.name, state.exit_status) == ("failed", 75)
    assert "not from here\njob 1 could not be submitted again; to go on, submit train.1.sh by hand\n" in log


def test_a_script_that_was_submitted_by_hand_goes_on_as_well(queue, monkeypatch):
    monkeypatch.chdir(queue.work)
    body = "bash -c 'echo >> runs; [ $(wc -l < runs) = 2 ] || exit 75'"
    job = Job(body, queue.kind, python=queue.python, requeue=True)
    (queue.work / "mine").write_text(script(job))
    queue.talk.submit("mine")
    until(lambda: (queue.work / "runs").exists() and ran(queue) == 2)
    until(lambda: [each["exit"] for each in queue.told().values()] == [75, 0])


@pytest.mark.slow
def test_a_notebook_goes_through_its_cells_again_and_is_followed_to_its_end(queue, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(queue.work)
    code = """
import os, sys
runs = open("runs", "a+")
runs.write("*")
runs.seek(0)
if len(runs.read()) < 2:
    runs.close()
    open(os.environ["NURION_PROGRESS"], "a").write("saved")
    sys.exit(75)
"""
    cells = [nbformat.v4.new_code_cell(each) for each in (code, "print('the end')")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), queue.work / "book.ipynb")
    assert main(["book.ipynb", "--site", queue.kind, "--requeue", "--wait"]) == 0
    told = capsys.readouterr().out
    assert re.findall(r"job (\d+)\S* goes on as job (\d+)", told)[-1][1] == "2"
    assert f"notebook: {queue.work}/book.2.ipynb\nlog: {queue.work}/book.o2\ncost: 1 nodes x " in told
    assert "the end" in (queue.work / "book.o2").read_text()
