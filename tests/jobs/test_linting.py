"""What a site would refuse, or accept and never run, is said here, with the rule, its source and its date."""

import platform
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nurion_utils import sites
from nurion_utils.jobs import Job, lint, script


def rules(job, **others):
    return [finding.rule for finding in lint(job, **others)]


def act():
    """A function to run."""


COMMENT = {"--comment": "field=ai;appl=tf"}


@pytest.mark.parametrize(
    ("site", "changes", "rule", "says"),
    [
        (
            "nurion",
            {"hours": 48.5},
            "queues.normal.most_hours",
            r"at most 48, not 48.5; queue 'long' has 120 \[guide, 2026",
        ),
        ("nurion", {"hours": 121, "queue": "long"}, "queues.long.most_hours", "at most 120, not 121 "),
        ("nurion", {"hours": 13, "queue": "debug"}, "queues.debug.most_hours", "'normal' has 48, 'long' has 120"),
        ("nurion", {"nodes": 4971}, "queues.normal.most_nodes", r"at most 4,970, not 4,971 \[KISTI.*2021-04\]"),
        ("nurion", {"nodes": 133, "queue": "norm_skl"}, "partitions.skylake.count", "at most 132, not 133"),
        ("nurion", {"nodes": 8306, "queue": "exclusive"}, "partitions.knl.count", "at most 8,305, not 8,306"),
        ("nurion", {"queue": "gpu"}, "scheduler.queues", "must be one of normal, long.* not gpu"),
        ("nurion", {"ranks_per_node": 69}, "partitions.knl.cores", "at most 68, not 69 ranks with 1 each"),
        ("nurion", {"ranks_per_node": 2, "cores_per_rank": 35}, "partitions.knl.cores", "not 2 ranks with 35 each"),
        (
            "nurion",
            {"directory": "/home01/me"},
            "scheduler.submit_from",
            r"from /scratch/\$USER only: .* not in /home01",
        ),
        ("cori", {"data": "/s/d", "capacity_gb": 2e6}, "burst_buffer.capacity_tb", "at most 1,800,000, not 2,000,000"),
        (
            "neuron",
            {"options": {}},
            "options.--comment.needed",
            r"mandatory: give it as options={'--comment'.*since 2026",
        ),
        ("neuron", {"options": {"--comment": "tf"}}, "options.--comment.pattern", "of the form 'field=.*, not 'tf'"),
        (
            "neuron",
            {"options": {**COMMENT, "--mem": "9G"}},
            "options.--mem.needed",
            "not allowed: leave it out; memory follows",
        ),
        ("neuron", {"options": COMMENT, "hours": 49}, "scheduler.most_hours", "at most 48, not 49"),
        ("nurion", {"data": "/scratch/me/d", "options": {"-P": "x"}}, "options.-P.values", "'burst_buffer', not 'x'"),
    ],
)
def test_a_rule_that_is_broken_is_named_with_what_would_be_right(site, changes, rule, says):
    job = Job("python train.py", site, **changes)
    (finding,) = lint(job)
    assert finding.rule == rule and re.search(says, finding.sentence)
    assert finding.sentence.endswith("]") and "\n" not in finding.sentence and not finding.sentence[0].isupper()
    with pytest.raises(ValueError, match=re.escape(finding.sentence)):
        script(job)


@pytest.mark.parametrize(
    ("site", "changes"),
    [
        ("nurion", {"nodes": 4970, "hours": 48}),
        ("nurion", {"hours": 120, "queue": "long"}),
        ("nurion", {"nodes": 132, "queue": "norm_skl", "ranks_per_node": 40}),
        ("nurion", {"directory": "/scratch/me/run"}),
        ("neuron", {"options": COMMENT, "queue": "cas_v100_2", "hours": 48, "nodes": 10_000}),
        ("hangang", {}),
        ("slurm", {"nodes": 10**6, "hours": 10**4, "queue": "anything", "directory": "/"}),
        ("pbs", {"nodes": 10**6, "hours": 10**4}),
    ],
)
def test_what_no_known_rule_forbids_is_let_through(site, changes, monkeypatch):
    monkeypatch.setenv("USER", "me")
    assert lint(Job("python train.py", site, **changes)) == []
    assert script(Job("python train.py", site, **changes))


def test_all_findings_come_at_once():
    job = Job("x", "neuron", hours=50, queue="nowhere", options={"--mem": "3G"}, directory="/home")
    needed = ["options.--comment.needed", "options.--mem.needed"]
    assert rules(job) == ["scheduler.queues", "scheduler.most_hours", *needed, "scheduler.submit_from"]
    with pytest.raises(ValueError, match="must be one of .*; hours .*; option --comment .*; option --mem .*; jobs on"):
        script(job)


def test_a_directory_counts_for_where_it_really_is(tmp_path, monkeypatch):
    monkeypatch.setenv("USER", "me")
    (tmp_path / "link").symlink_to("/scratch/me")
    assert lint(Job("x", "nurion", directory=tmp_path / "link" / "run")) == []
    assert rules(Job("x", "nurion", directory="/scratch/me/../you")) == ["scheduler.submit_from"]


def test_as_many_jobs_may_wait_as_the_queue_takes():
    job = Job("x", "nurion", queue="debug")
    assert lint(job, waiting=1) == [] and rules(job, waiting=2) == ["queues.debug.most_waiting"]
    assert lint(Job("x", "slurm"), waiting=10**6) == []


def test_this_python_is_no_use_on_another_architecture(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    job = {"site": "neuron", "queue": "gh200_1", "options": COMMENT}
    assert rules(Job(act, **job)) == ["queues.gh200_1.architecture"]
    assert lint(Job(act, **job, python="/scratch/me/arm/bin/python")) == []
    assert lint(Job("python train.py", **job)) == []  # whose Python that is, is not known here
    assert lint(Job(act, **{**job, "queue": "cpu"})) == []
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert lint(Job(act, **job)) == []


LIMITS = st.none() | st.integers(1, 100)


@given(LIMITS, LIMITS, LIMITS, st.integers(1, 120), st.integers(1, 120))
def test_a_job_passes_if_and_only_if_it_is_within_every_limit(most_nodes, count, most_hours, nodes, hours):
    def figures(**values):
        known = {key: value for key, value in values.items() if value is not None}
        return {key: {"value": v, "status": "chosen", "source": "me", "date": "2026"} for key, v in known.items()}

    scheduler = figures(kind="Slurm", launcher="srun -n {ranks}", queues=["q"], job_queue="q")
    site = sites.Site.model_validate(
        {
            "name": "mine",
            "title": "mine",
            "scheduler": scheduler,
            "partitions": {"p": figures(count=count, cores=4)},
            "queues": {"q": figures(most_nodes=most_nodes, most_hours=most_hours and float(most_hours))},
        }
    )
    within = all(
        most is None or asked <= most for most, asked in ((most_nodes, nodes), (count, nodes), (most_hours, hours))
    )
    assert (lint(Job(act, site, nodes=nodes, hours=hours)) == []) == within
