"""`python -m nurion_utils.jobs`: a notebook becomes a job, and comes back executed, with its log and its cost."""

import os
import re
import signal
import subprocess
import sys

import nbformat
import pytest

from nurion_utils.jobs import script
from nurion_utils.jobs.__main__ import main
from nurion_utils.jobs.job import Job, Notebook


@pytest.fixture
def notebook(tmp_path):
    """A notebook that prints its parameters, and fails if they say so."""
    parameters = nbformat.v4.new_code_cell("n_ranks = 1\nword = 'none'", metadata={"tags": ["parameters"]})
    cell = nbformat.v4.new_code_cell(
        "print(n_ranks, word)\nassert word != 'wrong'\nimport time; time.sleep(n_ranks // 99)"
    )
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
    path = tmp_path / "a book.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, cell], metadata=kernel), path)
    return str(path)


@pytest.mark.slow
def test_a_notebook_comes_back_executed_with_its_log_and_its_cost(queue, notebook, monkeypatch, capsys):
    monkeypatch.chdir(queue.work)
    words = ["--site", queue.kind, "--nodes", "2", "--ranks-per-node", "2", "-p", "word", 'it\'s "$HOME"']
    assert main([notebook, *words, "--wait"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^\d\d:\d\d:\d\d running on n1, n2$", told, re.MULTILINE)
    assert re.fullmatch(r"cost: 2 nodes x \d+ s = 0\.\d{3} node-hours, exit status 0", told.splitlines()[-1])
    executed, log = (re.search(rf"^{what}: (.+)$", told, re.MULTILINE)[1] for what in ("notebook", "log"))
    assert '4 it\'s "$HOME"\n' in nbformat.read(executed, 4).cells[-1].outputs[0].text
    assert '4 it\'s "$HOME"' in open(log).read()
    assert {os.path.dirname(executed), os.path.dirname(log)} == {str(queue.work)}


@pytest.mark.slow
@pytest.mark.parametrize("queue", ["pbs"], indirect=True)
def test_a_notebook_on_a_machine_like_nurion_finds_its_data_in_the_burst_buffer(queue, machine, monkeypatch, capsys):
    queue.rules(queues=["normal"], cores=68)
    monkeypatch.setenv("PATH", f"{machine.tmp}/commands:{os.environ['PATH']}")
    monkeypatch.setenv("BASH_FUNC_module%%", "() { :; }")
    machine.write(machine.scratch / "me/data/volume", "dear")
    folder = machine.scratch / "me/run"
    folder.mkdir()
    cells = [nbformat.v4.new_code_cell("n_ranks = 1", metadata={"tags": ["parameters"]})]
    code = "import os, shutil; shutil.copy(os.environ['DATA'] + '/volume', os.environ['RESULTS'] + '/model'); n_ranks"
    cells.append(nbformat.v4.new_code_cell(code))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "book.ipynb")
    words = [str(folder / "book.ipynb"), "--site", "played", "--nodes", "3", "--data", f"{machine.scratch}/$USER/data"]
    monkeypatch.chdir(machine.tmp)
    assert main([*words, "--wait"]) == 2  # not from here
    assert f"are taken from {machine.scratch}/$USER only" in capsys.readouterr().err
    monkeypatch.chdir(folder)
    assert main([*words, "--wait"]) == 0, capsys.readouterr()
    told = capsys.readouterr().out
    assert machine.calls() == [("stage in", ["volume"]), ("sync", ["model"]), ("purge", ["volume", "model"])]
    assert (machine.scratch / "me/data-results/model").read_text() == "dear"
    assert "cost: 3 nodes x " in told
    executed = nbformat.read(re.search("^notebook: (.+)$", told, re.MULTILINE)[1], 4)
    assert executed.cells[-1].outputs[0].data["text/plain"] == "3"


@pytest.mark.slow
def test_a_notebook_that_fails_shows_its_error_and_is_kept(queue, notebook, monkeypatch, capsys):
    monkeypatch.chdir(queue.work)
    queue.rules(history=queue.kind == "slurm")  # a PBS without history: only the log tells how the job ended
    assert main([notebook, "--site", queue.kind, "-p", "word", "wrong", "--wait"]) == 1
    told = capsys.readouterr().out
    assert "AssertionError" in told and told.splitlines()[-1].endswith("exit status 1")
    assert "AssertionError" in str(nbformat.read(re.search("^notebook: (.+)$", told, re.MULTILINE)[1], 4).cells)


@pytest.mark.slow
def test_whoever_stops_waiting_is_told_how_the_job_is_ended(queue, notebook, monkeypatch):
    words = ["--site", queue.kind, "-p", "n_ranks", "59400", "--wait"]  # it sleeps for ten minutes
    waits = subprocess.Popen(
        [sys.executable, "-m", "nurion_utils.jobs", notebook, *words], cwd=queue.work, stdout=-1, stderr=-1, text=True
    )
    assert any("running" in line for line in waits.stdout)
    waits.send_signal(signal.SIGINT)
    told = waits.communicate()[1]
    assert waits.returncode == 130
    assert re.fullmatch(
        rf"job (\S+) goes on; in this folder nurion_utils.jobs.cancel\('\1', '{queue.kind}'\) ends it\n", told
    )


def test_a_job_that_can_never_run_is_not_waited_for(queue, notebook, monkeypatch, capsys):
    monkeypatch.chdir(queue.work)
    assert main([notebook, "--site", queue.kind, "--nodes", "99", "--wait"]) == 2
    assert re.search(r"job \S+ could never have run, and was cancelled: \S+", capsys.readouterr().err)
    (job,) = queue.told().values()
    assert job["cancelled"]


def test_submitting_returns_at_once(queue, notebook, monkeypatch, capsys):
    monkeypatch.chdir(queue.work)
    queue.rules(slots=0)  # so that it waits
    assert main([notebook, "--site", queue.kind, "--submit"]) == 0
    (kept,) = queue.work.iterdir()
    assert re.fullmatch(rf"job \S+ on {queue.kind}: {kept}\n", capsys.readouterr().out)
    assert [job["state"] for job in queue.told().values()] == ["Q"]


def test_without_more_the_script_is_printed_and_nothing_happens(notebook, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    words = [notebook, "--site", "nurion", "--nodes", "16", "--hours", "2", "--queue", "debug", "--option=-A=pytorch"]
    options = {"nodes": 16, "hours": 2, "queue": "debug", "options": {"-A": "pytorch"}}
    assert main(words) == main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out == 2 * script(Job(Notebook(notebook), "nurion", **options))
    assert main([*words, "--explain"]) == 0
    assert "[guide, 2026-03]\n#PBS -A pytorch\n" in capsys.readouterr().out
    assert os.listdir(tmp_path) == [os.path.basename(notebook)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["-p", "n_rank", "3"],
            "'a book.ipynb' has no parameter 'n_rank'; those of its parameters cell: n_ranks, word",
        ),
        (["--nodes", "9000", "--submit"], "must be at most 4,970, not 9,000 [KISTI"),
        (["--site", "fugaku"], "there is no site 'fugaku'"),
        (["--site", "pbs", "--submit"], "qsub is not found"),
        (["--hours", "nan"], "hours must be a number above 0"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_before_anything_starts(
    notebook, words, says, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([notebook, "--site", "nurion", *words]) == 2
    told = capsys.readouterr()
    assert says in told.err and told.err.count("\n") == 1 and not told.out


def test_a_scheduler_that_is_down_is_asked_again_but_not_for_ever(queue, notebook, monkeypatch, capsys):
    monkeypatch.chdir(queue.work)
    monkeypatch.setattr("nurion_utils.jobs.__main__.LONGEST_PAUSE_S", 0.01)
    queue.rules(slots=0)
    queue.replace({"slurm": "scontrol", "pbs": "qstat"}[queue.kind], "date +%N >> asked; echo it is down >&2; exit 1")
    assert main([notebook, "--site", queue.kind, "--wait"]) == 2
    assert len((queue.work / "asked").read_text().split()) == 10
    assert re.search(r"cannot be asked after job \S+: it is down\n$", capsys.readouterr().err)
