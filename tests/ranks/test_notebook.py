"""Ranks keep their promises in a notebook: a real Jupyter kernel, driven as a front end drives it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import PATIENCE_S
from helpers.kernel import Notebook

pytestmark = pytest.mark.ranks

PACKAGE_FRAMES = re.compile(r"nurion_utils|ipyparallel|ipykernel")

START = """
import os, sys, time
from mpi4py import MPI  # only its name: functions written here run on the ranks
from nurion_utils import ranks
world = ranks.start(2)
"""
COLLECTIVE = "MPI.COMM_WORLD.barrier()"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    directory = tmp_path_factory.mktemp("kernel")
    with open(directory / "log", "w+") as log:
        with Notebook(stdout=log, stderr=log, cwd=str(directory)) as notebook:
            (directory / "beside.py").write_text("def answer():\n    return 42\n")
            assert not notebook.run(START).error
            yield notebook
            # the world is left to the end of the kernel
        log.seek(0)
        written = [line for line in log if "Kernel is running over TCP" not in line]
        assert written == []  # a server's log gets nothing of ours, not even at the end


@pytest.fixture
def notebook(kernel: Notebook) -> Notebook:
    """A notebook with two ranks, which the test may break."""
    if "running" not in kernel.run("world").text:
        assert not kernel.run("world.restart()").error
    return kernel


def test_a_cell_runs_on_every_rank_and_its_output_carries_the_rank(notebook: Notebook) -> None:
    outputs = notebook.run("%%px\nprint('rank', mpi_rank)\nmine = 10 * mpi_rank")
    assert sorted(outputs.shown) == ["[stdout:0] rank 0\n", "[stdout:1] rank 1\n"]
    assert (outputs.printed, outputs.error) == ("", "")


def test_without_streaming_the_output_comes_in_the_order_of_the_ranks(notebook: Notebook) -> None:
    late_first = "%%px --no-stream\nimport time\ntime.sleep(0.5 * (1 - mpi_rank))\nprint('rank', mpi_rank)"
    assert notebook.run(late_first).printed.split("\n") == ["[stdout:0] ", "rank 0", "[stdout:1] ", "rank 1", ""]
    assert "rank 1 of 2 raised ZeroDivisionError" in notebook.run("%%px --no-stream\n1 / (1 - mpi_rank)").error


def test_variables_stay_on_the_ranks_between_cells(notebook: Notebook) -> None:
    notebook.run("%%px\nmine = 10 * mpi_rank")
    values = notebook.run("%px mine + 1")
    assert [re.sub(r"Out\[(\d):\d+\]: ", r"\1: ", text) for text in sorted(values.shown)] == ["0: 1", "1: 11"]
    assert not notebook.run("world.restart()").error
    assert "NameError: name 'mine' is not defined" in notebook.run("%px mine").error


def test_targets_choose_ranks(notebook: Notebook) -> None:
    assert notebook.run("%%px --targets 1\nprint(mpi_rank)").shown == ["[stdout:1] 1\n"]
    assert "rank 1 of 2 raised ZeroDivisionError" in notebook.run("%%px --targets 1\n1 / 0").error


def test_functions_of_a_cell_travel_and_so_do_modules_beside_the_notebook(notebook: Notebook) -> None:
    cell = "import beside\ndef three():\n    return 3\nworld.run(lambda x: x * three() + beside.answer(), 2)"
    assert notebook.run(cell).shown == ["[48, 48]"]


def test_an_unblocked_cell_gives_its_results_later(notebook: Notebook) -> None:
    notebook.run("%%px --noblock -o later\nmpi_rank + 5")
    values = "replies = later.get(); later.wait_for_output(5); [reply.data['text/plain'] for reply in replies]"
    assert notebook.run(values).shown == ["['5', '6']"]


def test_an_error_is_shown_once_without_the_packages_frames(notebook: Notebook) -> None:
    outputs = notebook.run("%%px\nif mpi_rank == 1:\n    raise ValueError('no data')")
    assert sentence(outputs.error).startswith("RankError: rank 1 of 2 raised ValueError: no data")
    assert outputs.error.count("raise ValueError('no data')") == 1
    assert not PACKAGE_FRAMES.search(outputs.error) and outputs.text.strip() == ""
    outputs = notebook.run("def fail():\n    raise ValueError('no data')\nworld.run(fail)")
    assert sentence(outputs.error).startswith("RankError: rank 0 of 2 raised ValueError: no data (and so did rank 1)")
    assert re.search(r'File "In\[\d+\]", line 2, in fail\n    raise ValueError', outputs.error)
    assert outputs.error.count("raise ValueError('no data')") == 1
    assert not PACKAGE_FRAMES.search(outputs.error) and outputs.text.strip() == ""
    assert sorted(notebook.run("%%px\nprint(1)").shown) == ["[stdout:0] 1\n", "[stdout:1] 1\n"]  # still usable


def sentence(error: str) -> str:
    """Without the reader's own lines that led to the error."""
    return error[error.index("RankError: ") :]


ENDINGS = {
    "raise ValueError('no data')": "rank 1 of 2 raised ValueError: no data",
    "import sys; sys.exit()": "rank 1 of 2 raised SystemExit",
    "import os; os._exit(3)": "rank 1 left its process with exit code 3",
    "import os; os.kill(os.getpid(), 9)": "rank 1 was ended by SIGKILL",
}


CASES = [*(("%%px", ending) for ending in ENDINGS), *(("%%px --noblock", ending) for ending in list(ENDINGS)[::3])]


@pytest.mark.parametrize(("magic", "ending"), CASES)
def test_a_collective_cell_that_loses_a_rank_ends_with_its_name(notebook: Notebook, magic: str, ending: str) -> None:
    cell = f"{magic}\nprint('before')\nif mpi_rank == 1:\n    {ending}\n{COLLECTIVE}"
    outputs = notebook.run(cell)
    if magic.endswith("--noblock"):
        outputs = notebook.run("_.get()")
    else:
        assert "[stdout:0] before\n" in outputs.shown and "warn" not in outputs.text.lower()
    assert outputs.seconds < PATIENCE_S
    assert sentence(outputs.error).startswith(f"RankError: {ENDINGS[ending]}")
    assert 'where rank 0 was ---\n  File "%%px cell", line 4 in <module>' in outputs.error
    assert not PACKAGE_FRAMES.search(outputs.error)
    for cell in ("%px 1", "world.run(int)"):
        refusal = notebook.run(cell).error
        assert not PACKAGE_FRAMES.search(refusal) and refusal.endswith("; call world.restart()")


def test_a_collective_run_that_loses_a_rank_ends_with_its_name(notebook: Notebook) -> None:
    cell = "def collective():\n    if MPI.COMM_WORLD.rank == 0:\n        os._exit(0)\n    " + COLLECTIVE
    outputs = notebook.run(cell + "\nworld.run(collective)")
    assert outputs.seconds < PATIENCE_S
    assert re.match(
        r"Cell In\[\d+\], line 5\n----> 5 world.run\(collective\)\n\s*RankError: rank 0 left", outputs.error
    )
    assert re.search(r'where rank 1 was ---\n  File "In\[\d+\]", line 4 in collective', outputs.error)
    assert not PACKAGE_FRAMES.search(outputs.error) and outputs.text.strip() == ""


@pytest.mark.parametrize("cell", ["world.run(time.sleep, 1000)", "%%px\nimport time\ntime.sleep(1000)"])
def test_an_interrupt_reaches_the_ranks_and_the_world_stays_usable(notebook: Notebook, cell: str) -> None:
    outputs = notebook.interrupt(cell, after_s=1)
    assert outputs.seconds < PATIENCE_S
    assert "KeyboardInterrupt" in outputs.error and outputs.text.strip() == ""
    assert notebook.run("world.run(int)").shown == ["[0, 0]"]


STUCK = ["import time", "if MPI.COMM_WORLD.rank == 1: time.sleep(1000)", COLLECTIVE]
STUCK_PX = "\n".join(["%%px", *STUCK])
STUCK_RUN = "\n    ".join(["def stuck():", *STUCK]) + "\nworld.run(stuck)"


@pytest.mark.parametrize("cell", [STUCK_PX, STUCK_RUN])
@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_inside_a_collective_ends_the_world_and_says_so(notebook: Notebook, cell: str, times: int) -> None:
    if times == 2:  # a second interrupt means: do not wait
        notebook.run("from nurion_utils.ranks import watching\nwatching.GRACE_S = 1000")
    outputs = notebook.interrupt(cell, after_s=1, times=times)
    notebook.run("watching.GRACE_S = 3" if times == 2 else "")
    assert outputs.seconds < PATIENCE_S
    last = outputs.error.split("KeyboardInterrupt: ")[-1]
    assert re.match(r"ranks? 0(, 1)? did not react to the interrupt\n--- where rank 0 was ---\n.*line [34] in", last)
    assert last.endswith("call world.restart() to start them afresh.")
    refusal = r"RankError: this world has ended because .* did not react to the interrupt; call world.restart\(\)"
    assert re.fullmatch(refusal, notebook.run("%px 1").error)


WORK = """
import time
from nurion_utils import ranks
def work():
    for _ in ranks.progress(range(20), description="folding"):
        time.sleep(0.05)
"""


@pytest.mark.parametrize("cell", [WORK + "world.run(work);", "%%px\n" + WORK + "work()"])
def test_a_notebook_shows_one_progress_bar_for_all_ranks(notebook: Notebook, cell: str) -> None:
    outputs = notebook.run(cell)
    (bar,) = [state for state in outputs.widgets.values() if "ProgressModel" in state.get("_model_name", "")]
    assert (bar["value"], bar["max"], bar["bar_style"]) == (40, 40, "success")
    assert len(outputs.shown) == 1 and (outputs.printed, outputs.error) == ("", "")


def test_what_tells_its_progress_on_ranks_only_iterates_in_the_notebook_itself(notebook: Notebook) -> None:
    outputs = notebook.run("from nurion_utils import ranks\nsum(ranks.progress(range(4)))")
    assert (outputs.shown, outputs.printed, outputs.error, outputs.widgets) == (["6"], "", "", {})


def test_staging_on_ranks_shows_one_bar_of_all_bytes(notebook: Notebook, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for name in "abcd":
        (tmp_path / "source" / name).write_bytes(bytes(100_000_000))  # long enough to be asked after
    for copy, total in ((f"{tmp_path}/copy", 400_000_000), (f"{tmp_path}/copy{{rank}}", 800_000_000)):
        outputs = notebook.run(
            "from nurion_utils import staging\n"
            f"staging.stage({str(tmp_path / 'source')!r}, {copy!r}, world, replicate={'{' in copy});"
        )
        (bar,) = [state for state in outputs.widgets.values() if "ProgressModel" in state.get("_model_name", "")]
        assert (bar["value"], bar["max"], bar["bar_style"], outputs.error) == (total, total, "success", "")


def test_where_nobody_can_answer_as_under_papermill_there_is_no_bar(notebook: Notebook) -> None:
    notebook.allow_stdin = False
    outputs = notebook.run(WORK + "world.run(work);")
    notebook.allow_stdin = True
    assert not outputs.widgets and (outputs.text.strip(), outputs.error) == ("", "")


def test_a_cell_that_starts_ranks_ends_its_earlier_ones_when_it_is_run_again(notebook: Notebook) -> None:
    cell = "other = ranks.start(1)"
    assert not notebook.run(cell).error
    notebook.run("pid = other.run(os.getpid)[0]; unread = other._view.apply_async(time.sleep, 1000)")
    outputs = notebook.run(cell)
    assert (outputs.text.strip(), outputs.error) == ("", "")
    assert not notebook.run("while os.path.exists(f'/proc/{pid}'): time.sleep(0.1)", timeout_s=PATIENCE_S).error
    assert "stopped while its ranks were at work" in notebook.run("unread.result()[0]").text
    assert notebook.run("%%px\nprint(1)").shown == ["[stdout:0] 1\n"]
    assert notebook.run("world.run(int)").shown == ["[0, 0]"]  # a world that is still held goes on
    assert not notebook.run("other.stop(); world.restart();").error


def test_stopping_and_starting_print_nothing(notebook: Notebook) -> None:
    for cell in ("world.stop()", "world.restart();", "with ranks.start(1) as other:\n    other.run(int)"):
        outputs = notebook.run(cell)
        assert (outputs.text.strip(), outputs.error) == ("", "")
