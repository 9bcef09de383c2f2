"""Jobs given to a scheduler, asked after and cancelled: Slurm and PBS Pro, both played by the strict stand-in."""

import os
import subprocess
import time

import pytest

from nurion_utils import jobs, sites
from nurion_utils.jobs import Job
from nurion_utils.schedulers import SchedulerError, State, commands, pbs, slurm


def until(submitted, condition):
    """The first state that fulfils the condition; a job that ends before is shown."""
    deadline = time.monotonic() + 60
    while not condition(state := jobs.status(submitted)):
        assert not state.ended and time.monotonic() < deadline, state
        time.sleep(0.05)
    return state


def ended(state):
    return state.ended


def running(state):
    return state.name == "running"


def job(scheduler, command, **changes):
    return Job(command, scheduler.kind, **{"directory": scheduler.work, "python": scheduler.python, **changes})


def test_a_job_runs_where_it_was_submitted_and_says_what_it_cost(queue):
    submitted = jobs.submit(job(queue, 'echo "$PWD $job $NURION_ENDS_AT" > told', nodes=2, hours=1))
    state = until(submitted, ended)
    assert state == State("done", exit_status=0, starts_at=state.starts_at, nodes=("n1", "n2"))
    assert abs(state.starts_at - time.time()) < 60
    folder, number, ends_at = (queue.work / "told").read_text().split()
    assert folder == str(queue.work) and submitted.id in (number, f"{number}.head")
    assert abs(int(ends_at) - state.starts_at - 3600) < 60
    assert submitted.log.read_text().startswith("cost: 2 nodes x ")
    assert submitted.script == queue.work / f"train.{number}.sh" and "NURION_ENDS_AT" in submitted.script.read_text()
    assert sorted(os.listdir(queue.work)) == sorted([submitted.script.name, submitted.log.name, "told"])


def test_a_job_that_fails_is_told_from_one_that_is_done(queue):
    submitted = jobs.submit(job(queue, "bash -c 'exit 3'"))
    state = until(submitted, ended)
    assert (state.name, state.exit_status) == ("failed", 3)
    assert "exit status 3" in submitted.log.read_text()


def test_a_job_is_cancelled_while_it_runs_and_while_it_waits(queue):
    queue.rules(slots=1)
    first = jobs.submit(job(queue, "touch begun; sleep 600"))
    assert until(first, running).nodes == ("n1",)
    second = jobs.submit(job(queue, "touch never"))
    waits = jobs.status(second)
    assert waits.name == "waiting" and not waits.ended and waits.starts_at > time.time()
    jobs.cancel(second)
    jobs.cancel(first.id, queue.kind)
    assert until(first, ended).name == until(second, ended).name == "cancelled"
    assert not (queue.work / "never").exists()
    jobs.cancel(first)  # which has ended already: nothing to do
    jobs.cancel("9999", queue.kind)


def test_what_a_job_leaves_running_ends_with_it(queue):
    submitted = jobs.submit(job(queue, "true; (trap '' TERM; sleep 601 & wait) & wait"))
    until(submitted, running)
    jobs.cancel(submitted)
    until(submitted, ended)
    assert subprocess.run(["pgrep", "-f", "sleep 601"], stdout=-3).returncode == 1


def test_a_job_that_outlives_its_walltime_has_failed_for_that_reason(queue, monkeypatch):
    monkeypatch.setattr(Job, "clock", "00:00:01")
    submitted = jobs.submit(job(queue, "sleep 600"))
    state = until(submitted, ended)
    assert state.name == "failed" and ("TIMEOUT" in state.reason or state.reason == "over its walltime")


@pytest.mark.parametrize(
    ("queue", "changes", "reason"),
    [
        ("slurm", {"nodes": 4}, "PartitionNodeLimit"),
        ("slurm", {"hours": 3}, "PartitionTimeLimit"),
        ("pbs", {"nodes": 4}, "Can Never Run: Not enough total nodes available"),
        ("pbs", {"ranks_per_node": 9}, "Can Never Run: Insufficient amount of resource: ncpus (R: 9 A: 6 T: 0)"),
    ],
    indirect=["queue"],
)
def test_a_job_that_can_never_run_is_told_from_one_that_waits(queue, changes, reason):
    queue.rules(most_minutes=120)
    submitted = jobs.submit(job(queue, "true", **changes))
    assert jobs.status(submitted) == State("never", reason) and not jobs.status(submitted).ended


@pytest.mark.parametrize("queue", ["pbs"], indirect=True)
def test_pbs_refuses_at_once_what_a_queue_never_takes(queue):
    queue.rules(most_minutes=120)
    with pytest.raises(
        SchedulerError, match="^qsub refused the job: Job violates queue and/or server resource limits$"
    ):
        jobs.submit(job(queue, "true", hours=3))


def test_what_the_scheduler_refuses_is_one_sentence_and_leaves_nothing(queue):
    name = {"slurm": "sbatch", "pbs": "qsub"}[queue.kind]
    for changes in ({"queue": "nowhere"}, {"options": {"--strange": "x"}}):
        with pytest.raises(SchedulerError, match=f"^{name} refused the job: [^\n]+$"):
            jobs.submit(job(queue, "true", **changes))
    with pytest.raises(SchedulerError, match=f"^{name} refused the job: .*missing"):
        queue.talk.submit(queue.work / "missing")
    assert os.listdir(queue.work) == [] and queue.told() == {}


def test_a_job_that_ended_long_ago_is_gone(queue):
    queue.rules(history=False)
    submitted = jobs.submit(job(queue, "true"))
    deadline = time.monotonic() + 60
    while (state := jobs.status(submitted)).name in ("waiting", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert state == State("gone") and state.ended
    assert jobs.status("9999", queue.kind) == State("gone")


@pytest.mark.parametrize("queue", ["slurm"], indirect=True)
def test_accounts_are_asked_where_they_are_kept(queue):
    queue.replace("sacct", "echo 'TIMEOUT|None|2026-11-27T04:03:05|0:0|n1,n2'")
    state = jobs.status("9999", "slurm")
    assert (state.name, state.reason, state.nodes) == ("failed", "TIMEOUT", ("n1", "n2"))
    queue.replace("sacct", "echo Slurm accounting storage is disabled >&2")
    assert jobs.status("9999", "slurm") == State("gone")


def test_a_machine_without_the_scheduler_says_where_it_would_be(queue, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin/nothing")
    for ask in (lambda: queue.talk.submit("x"), lambda: queue.talk.state("1"), lambda: queue.talk.cancel("1")):
        with pytest.raises(SchedulerError, match="is not found: it is on the login nodes of a machine with this"):
            ask()


def test_a_scheduler_that_does_not_answer_is_not_waited_for(queue, monkeypatch):
    asked = {"slurm": "scontrol", "pbs": "qstat"}[queue.kind]
    queue.replace(asked, "exec sleep 600")
    monkeypatch.setattr(commands, "PATIENCE_S", 0.2)
    with pytest.raises(SchedulerError, match=f"{asked} has not answered for 0.2 s: ask again"):
        queue.talk.state("1")


def test_a_scheduler_that_is_down_is_quoted(queue):
    queue.replace({"slurm": "scontrol", "pbs": "qstat"}[queue.kind], "echo connection refused >&2; exit 1")
    with pytest.raises(SchedulerError, match="cannot be asked after job 1: connection refused"):
        queue.talk.state("1")


def test_jobs_that_wait_already_count_against_the_rule(queue):
    queue.rules(slots=1)
    figure = {"status": "chosen", "source": "me", "date": "2026"}
    generic = sites.load(queue.kind)
    figures = {"queues": {"value": ["main"], **figure}, "job_queue": {"value": "main", **figure}}
    scheduler = {"scheduler": {**{k: f.model_dump() for k, f in generic.scheduler.figures.items()}, **figures}}
    rule = {"queues": {"main": {"most_waiting": {"value": 1, **figure}}}}
    site = sites.Site.model_validate({"name": "mine", "title": "mine", **scheduler, **rule})
    mine = Job("sleep 600", site, directory=queue.work, python=queue.python)
    until(jobs.submit(mine), running)
    jobs.submit(mine)
    with pytest.raises(
        ValueError, match="1 jobs of yours on 'mine' wait in queue 'main', which takes at most 1: let one"
    ):
        jobs.submit(mine)


def test_what_no_scheduler_is_asked(tmp_path):
    with pytest.raises(ValueError, match="there is no directory"):
        jobs.submit(Job("true", "slurm", directory=tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="jobs of Flux on 'elcapitan' are only written"):
        jobs.submit(Job("true", "elcapitan", directory=tmp_path))
    with pytest.raises(ValueError, match="on 'nurion' are taken from /scratch/"):
        jobs.submit(Job("true", "nurion", directory=tmp_path, queue="exclusive"))
    with pytest.raises(ValueError, match="name the site of job '7'"):
        jobs.status("7")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "state"),
    [
        (("PENDING", "Resources", "Unknown", "0:0", ""), State("waiting", "Resources")),
        (("PENDING", "PartitionConfig", "Unknown", "0:0", ""), State("never", "PartitionConfig")),
        (
            ("PENDING", "QOSMaxWallDurationPerJobLimit", "N/A", "0:0", ""),
            State("never", "QOSMaxWallDurationPerJobLimit"),
        ),
        (("PENDING", "QOSMaxJobsPerUserLimit", "N/A", "0:0", ""), State("waiting", "QOSMaxJobsPerUserLimit")),
        (("CANCELLED by 0", "None", "Unknown", "0:15", "None assigned"), State("cancelled", exit_status=143)),
        (("OUT_OF_MEMORY", "None", "Unknown", "0:125", "(null)"), State("failed", "OUT_OF_MEMORY", exit_status=253)),
        (("NODE_FAIL", "None", "Unknown", "1:0", ""), State("failed", "NODE_FAIL", exit_status=1)),
        (("COMPLETING", "None", "Unknown", "0:0", ""), State("running")),
        (("REQUEUE_HOLD", "JobHeldUser", "Unknown", "0:0", ""), State("waiting", "JobHeldUser")),
    ],
)
def test_slurms_words_for_a_job(words, state):
    assert slurm._state(*words) == state


@pytest.mark.parametrize(
    ("told", "state"),
    [
        ({"job_state": "H", "comment": "Job held"}, State("waiting", "Job held")),
        ({"job_state": "E", "exec_host": "n1/0*2+n1/1+n2/0"}, State("running", nodes=("n1", "n2"))),
        ({"job_state": "F", "substate": 93, "Exit_status": -29}, State("failed", "over its walltime", exit_status=-29)),
        ({"job_state": "F", "substate": 91, "Exit_status": 271}, State("cancelled", exit_status=271)),
        ({"job_state": "Q", "estimated": {"start_time": 1795752320}}, State("waiting", starts_at=1795752320)),
        ({"job_state": "Q", "estimated": {"start_time": "soon"}}, State("waiting")),
    ],
)
def test_pbss_words_for_a_job(told, state):
    assert pbs._state(told) == state
