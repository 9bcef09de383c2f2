"""The notebooks themselves: they run from the first cell to the last, quietly, and their exercises teach."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from notebook_sources import tags

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
# The tool with another root, so that build/ keeps what make run put there.
RUN = "import pathlib, sys, notebooks; sys.exit(notebooks.main(sys.argv[2:], pathlib.Path(sys.argv[1])))"
# Cells that are off by default are switched on; repetitions and sizes that no claim of the notebook needs are fewer.
WISHES = {
    "01": {"failure_labs": "True", "timing_rounds": "3", "volume_epochs": "8"},
    "03": {"turns": "2", "sizes": "[4096, 1048576, 67108864]", "image": "32", "epoch_steps": "1"},
    "04": {"n_volumes": "64", "reader_counts": "[1, 4, 32]", "pipeline_steps": "8", "pipeline_repeats": "1"},
    "05": {"n_seeds": "2", "live_batches": "[2048]", "search_trials": "8"},
    "07": {"repeats": "3"},
}
NOISE = re.compile(r"absl::InitializeLog|oneDNN|Warning|DEPRECATED|\d+%\|")


def execute(name: str, root: Path) -> Path:
    (root / "notebooks").symlink_to(ROOT / "notebooks")
    wishes = [word for key, value in WISHES.get(name[:2], {}).items() for word in ("-p", key, value)]
    command = [sys.executable, "-c", RUN, str(root), "run", name, *wishes]
    result = subprocess.run(command, cwd=ROOT / "tools", capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return root / "build" / "executed" / f"{name}.ipynb"


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.notebook
@pytest.mark.parametrize("name", NAMES)
def test_every_cell_runs_and_outputs_hold_no_log_noise(tmp_path: Path, name: str) -> None:
    for cell in code_cells(execute(name, tmp_path)):
        assert cell.execution_count is not None, f"did not run: {cell.source[:60]}"
        for output in cell.outputs:
            assert output.output_type != "error" or "raises-exception" in tags(cell)
            assert output.get("name") != "stderr", output.text
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not NOISE.search(text), text


def exercises(path: Path) -> list[tuple[str, str]]:
    """Pairs of the exercise's and its check's code."""
    cells = code_cells(path)
    return [(cell.source, check.source) for cell, check in itertools.pairwise(cells) if "exercise" in tags(cell)]


@pytest.mark.parametrize("name", NAMES)
def test_checks_accept_the_solution_and_explain_what_is_missing_without_it(world4, name: str) -> None:
    solved = exercises(ROOT / "notebooks" / f"{name}.ipynb")
    open_ones = exercises(ROOT / "notebooks" / "exercises" / f"{name}.ipynb")
    assert solved and len(solved) == len(open_ones)
    for (solution, check), (starter, same_check) in zip(solved, open_ones, strict=True):
        assert check == same_check
        names = {"world": world4, "n_ranks": world4.n}
        exec(solution, names)
        exec(check, names)
        names = {"world": world4, "n_ranks": world4.n}
        exec(starter, names)
        with pytest.raises(AssertionError, match="in place of the dots"):
            exec(check, names)
