"""The notebooks themselves: they run from the first cell to the last, quietly, and their exercises teach."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
# The tool with another root, so that build/ keeps what make run put there; one process for all notebooks.
RUN = "import pathlib, sys, notebooks; sys.exit(notebooks.main(sys.argv[2:], pathlib.Path(sys.argv[1])))"
NOISE = re.compile(r"absl::InitializeLog|oneDNN|Warning|DEPRECATED|\d+%\|")


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of notebooks executed with the cells switched on that are off by default, and few repetitions."""
    root = tmp_path_factory.mktemp("root")
    (root / "notebooks").symlink_to(ROOT / "notebooks")
    command = [sys.executable, "-c", RUN, str(root), "run", "-p", "failure_labs", "True", "-p", "turns", "2"]
    result = subprocess.run(command, cwd=ROOT / "tools", capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return root / "build" / "executed"


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_runs_and_outputs_hold_no_log_noise(executed: Path, name: str) -> None:
    for cell in code_cells(executed / f"{name}.ipynb"):
        assert cell.execution_count is not None, f"did not run: {cell.source[:60]}"
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not NOISE.search(text), text


def exercises(path: Path) -> list[tuple[str, str]]:
    """Pairs of the exercise's and its check's code."""
    cells = code_cells(path)
    tags = [cell.metadata.get("tags", []) for cell in cells]
    return [(cells[i].source, cells[i + 1].source) for i in range(len(cells)) if "exercise" in tags[i]]


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
