"""The notebook tool: sources to twins and exercises, honest runs, pages that anyone can read."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from bs4 import BeautifulSoup
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]

import notebook_sources  # noqa: E402
from notebook_site import faults, mathml, page  # noqa: E402

import notebooks  # noqa: E402

FRONT = """\
# %% [markdown]
# # A small notebook
#
# **Goal:** see that the tool
# works.
#
# **Minutes:** 1

# %% tags=["parameters"]
steps: int = 1
"""

EXERCISE = """
# %% [markdown]
# How many pieces does each rank send?

# %% tags=["exercise"]
def pieces(ranks):
    pieces = None
    if ranks > 0:
        # --- solution
        pieces = 2 * (ranks - 1)  # SECRET
        # --- end solution
    return pieces

# %% tags=["check"]
assert pieces(4) == 6, "reduce-scatter and allgather take ranks - 1 steps each"
"""


def project(root: Path, **sources: str) -> Path:
    """A project folder with these cells after the usual front, as notebooks/src/NN_name.py."""
    folder = root / "notebooks" / "src"
    folder.mkdir(parents=True)
    for name, cells in sources.items():
        (folder / f"{name.removeprefix('n')}.py").write_text(FRONT + textwrap.dedent(cells))
    return root


def command(root: Path, *arguments: str, **options) -> subprocess.Popen:
    start = "import sys, pathlib, notebooks; sys.exit(notebooks.main(sys.argv[2:], pathlib.Path(sys.argv[1])))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools"), **options}
    return subprocess.Popen(
        [sys.executable, "-c", start, str(root), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def cells(path: Path) -> list[nbformat.NotebookNode]:
    return nbformat.read(path, 4).cells


# ---- build ----------------------------------------------------------------------------------------------------


def test_the_notebooks_of_this_project_follow_from_their_sources():
    assert notebook_sources.build(ROOT, check=True) == []


@pytest.mark.parametrize("folder", ["notebooks", "notebooks/exercises"])
def test_the_notebooks_of_this_project_are_valid_and_hold_no_outputs(folder):
    for path in (ROOT / folder).glob("*.ipynb"):
        nb = json.loads(path.read_text("utf-8"))
        nbformat.validate(nb)
        assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 5)
        assert set(nb["metadata"]) == {"kernelspec", "language_info"}
        for cell in nb["cells"]:
            assert set(cell["metadata"]) <= {"tags", "alt", "jupyter"}
            assert not cell.get("outputs") and cell.get("execution_count") is None


lines = st.lists(st.integers(0, 10**6), min_size=1, max_size=6, unique=True)


@settings(deadline=None, max_examples=25)
@given(lines, st.data())
def test_editing_a_cell_leaves_the_ids_of_all_others_alone(tmp_path_factory, numbers, data):
    edited = data.draw(st.integers(0, len(numbers) - 1))
    source = tmp_path_factory.mktemp("ids") / "00_ids.py"
    ids = []
    for version in (numbers, [*numbers[:edited], -1, *numbers[edited + 1 :]]):
        source.write_text(FRONT + "".join(f"\n# %%\nx = {number}\n" for number in version))
        ids.append([cell["id"] for cell in json.loads(notebook_sources.editions(source)[0])["cells"]])
    differing = [place for place, (before, after) in enumerate(zip(*ids, strict=True)) if before != after]
    assert differing == [edited + 2]  # the front is two cells
    assert len(set(ids[1])) == len(ids[1])


def test_cells_with_equal_content_have_different_ids(tmp_path):
    root = project(tmp_path, n00_twice="# %%\nprint(1)\n# %%\nprint(1)\n")
    assert notebooks.main(["build"], root) == 0
    ids = [cell.id for cell in cells(root / "notebooks/00_twice.ipynb")]
    assert len(set(ids)) == len(ids)


def test_the_exercise_edition_has_the_task_and_the_check_but_not_the_solution(tmp_path):
    root = project(tmp_path, n00_exercise=EXERCISE)
    notebooks.main(["build"], root)
    full, exercises = cells(root / "notebooks/00_exercise.ipynb"), cells(root / "notebooks/exercises/00_exercise.ipynb")
    assert "SECRET" in full[3].source and full[3].metadata["jupyter"] == {"source_hidden": True}
    assert "SECRET" not in str(exercises) and "solution" not in str(exercises)
    assert "        ...  # your code here\n    return pieces" in exercises[3].source
    compile(exercises[3].source, "exercise", "exec")
    assert "jupyter" not in exercises[3].metadata
    others = [0, 1, 2, 4]
    assert [exercises[n] for n in others] == [full[n] for n in others]


def test_magics_reach_the_notebook_as_magics(tmp_path):
    root = project(tmp_path, n00_magic="# %%\n# %%px\nimport os\n")
    notebooks.main(["build"], root)
    assert cells(root / "notebooks/00_magic.ipynb")[-1].source == "%%px\nimport os"


def test_check_names_what_drifted_and_changes_nothing(tmp_path, capsys):
    root = project(tmp_path, n00_one="", n01_two="")
    notebooks.main(["build"], root)
    twin = root / "notebooks/01_two.ipynb"
    twin.write_text(twin.read_text().replace("steps: int = 1", "steps: int = 2"))
    (root / "notebooks/02_orphan.ipynb").write_text("{}")
    before = twin.read_text()
    assert notebooks.main(["build", "--check"], root) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in said] == ["notebooks/01_two.ipynb", "notebooks/02_orphan.ipynb"]
    assert twin.read_text() == before


@pytest.mark.parametrize(
    "wrong, word",
    [
        (FRONT.replace("**Goal:**", "Goal:"), "goal"),
        (FRONT + '# %% tags=["parameters"]\na = 1\n', "parameters"),
        (FRONT + '# %% tag=["check"]\na = 1\n', "'tag'"),
        (FRONT + '# %% tags=["chekc"]\na = 1\n', "'chekc'"),
        (FRONT + EXERCISE.replace("# --- end solution", "# --- the end"), "end solution"),
        (FRONT + EXERCISE.replace('tags=["exercise"]', ""), "exercise"),
        (FRONT + EXERCISE.replace('tags=["check"]', ""), "check"),
    ],
)
def test_a_source_that_breaks_a_convention_is_refused_in_one_sentence(tmp_path, capsys, wrong, word):
    root = project(tmp_path)
    (root / "notebooks/src/00_wrong.py").write_text(wrong)
    assert notebooks.main(["build"], root) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("00_wrong.py") and word in sentence
    assert not list(root.glob("notebooks/*.ipynb"))


# ---- run ------------------------------------------------------------------------------------------------------

GOOD = r"""
# %% [markdown]
# A ring takes $2(P-1)$ steps of $$ \alpha + \frac{n}{P} \beta . $$ See [the next](01_fails.ipynb).

# %%
import os, sys
print(steps, sys.executable, os.getcwd())

# %% tags=["raises-exception"]
raise ValueError("asked for")

# %% alt="A rising line"
import matplotlib.pyplot as plt
plt.plot([1, 2]);
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One run of three notebooks: one good, one failing, one with a figure that nobody described."""
    root = project(
        tmp_path_factory.mktemp("ran"),
        n00_good=GOOD + EXERCISE,
        n01_fails="# %%\nx = 1\n# %%\nz = 1\ny = x / 0\nz = 2\n# %%\nprint('never')\n",
        n02_figure="# %%\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]);\n",
    )
    home = root / "home"
    kernel = home / ".local/share/jupyter/kernels/python3/kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text('{"argv": ["/bin/false"], "display_name": "another", "language": "python"}')
    (root / "tmp").mkdir()
    notebooks.main(["build"], root)
    process = command(root, "run", "-p", "steps", "1e3", HOME=str(home), TMPDIR=str(root / "tmp"))
    output, _ = process.communicate(timeout=300)
    return root, process.returncode, output


def test_a_failing_notebook_is_reported_with_its_failing_line_and_the_others_still_run(ran):
    root, code, output = ran
    assert code == 1
    table = output[output.index("notebook  ") :].splitlines()
    good, fails, error, figure = (row.split(maxsplit=2) for row in table[1:5])
    assert good[0] == "00_good" and good[2] == "passed" and float(good[1]) > 0
    assert fails[0] == "01_fails" and fails[2] == "failed at In [4] `y = x / 0`"  # In [2] is the given parameter
    assert " ".join(error) == "ZeroDivisionError: division by zero"
    assert figure[0] == "02_figure"
    assert "time limit 600 s" in table[-1].lower()


def test_a_figure_without_alternative_text_is_reported_by_notebook_and_cell(ran):
    _, _, output = ran
    (row,) = [line for line in output.splitlines() if line.startswith("02_figure ")]
    assert "In [3] `import matplotlib.pyplot as plt` shows a figure without alternative text" in row


def test_a_run_says_nothing_but_its_progress_and_its_table(ran):
    _, _, output = ran
    progress, table = output.split("\n\n")
    assert [line.split(":")[0] for line in progress.splitlines()] == [
        name for name in ("00_good", "01_fails", "02_figure") for _ in range(2)
    ]
    assert len(table.splitlines()) == 6


def test_parameters_reach_the_notebook_and_its_kernel_is_this_environments_own(ran):
    root, _, _ = ran
    printed = [cell.outputs[0].text for cell in cells(root / "build/executed/00_good.ipynb") if "sys" in cell.source]
    assert printed == [f"1000.0 {sys.executable} {root / 'notebooks'}\n"]


def test_a_run_leaves_nothing_in_the_home_folder_or_in_tmp(ran):
    root, _, _ = ran
    assert [path.name for path in (root / "home").rglob("*") if path.is_file()] == ["kernel.json"]
    assert not list((root / "tmp").iterdir())


def test_every_image_on_a_page_has_the_text_of_its_cell(ran):
    root, _, _ = ran
    images = BeautifulSoup((root / "build/site/00_good.html").read_text(), "html.parser").select("img")
    assert [image["alt"] for image in images] == ["A rising line"]
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)


def test_pages_need_no_network_and_show_maths_folded_solutions_and_errors(ran):
    root, _, _ = ran
    soup = BeautifulSoup((root / "build/site/00_good.html").read_text(), "html.parser")
    assert not soup.select("script, link, iframe")
    assert [element.get("display") for element in soup.select("math")] == ["inline", "block"]
    assert "SECRET" in soup.select_one("details").text and "SECRET" not in soup.select_one("summary").text
    assert soup.find("a", string="the next")["href"] == "01_fails.html"
    assert "asked for" in soup.select_one("pre.error").text
    failed = BeautifulSoup((root / "build/site/01_fails.html").read_text(), "html.parser")
    assert "ZeroDivisionError" in failed.select_one(".notice").text


def test_the_index_lists_each_notebook_with_goal_minutes_seconds_and_status(ran):
    root, _, _ = ran
    soup = BeautifulSoup((root / "build/site/index.html").read_text(), "html.parser")
    rows = [[cell.get_text(" ", strip=True) for cell in row.select("th, td")] for row in soup.select("tbody tr")]
    assert [row[0] for row in rows] == ["00 A small notebook", "01 A small notebook", "02 A small notebook"]
    assert [row[4] for row in rows] == ["passed", "not passed", "not passed"]
    assert all(row[1:3] == ["see that the tool works.", "1"] and row[3].isdigit() for row in rows)


def test_a_page_whose_notebook_has_changed_since_is_marked_out_of_date(ran, tmp_path):
    root, _, _ = ran
    changed = project(tmp_path, n00_good="# %%\nx = 1\n")
    notebooks.main(["build"], changed)
    (changed / "build").mkdir()
    (changed / "build/executed").symlink_to(root / "build/executed")
    assert notebooks.main(["site"], changed) == 0
    assert "out of date" in (changed / "build/site/index.html").read_text()


@pytest.mark.parametrize("arguments, word", [(["nope"], "nope"), (["-p", "nope", "1"], "steps")])
def test_a_run_of_what_is_not_there_is_refused_in_one_sentence(tmp_path, capsys, arguments, word):
    root = project(tmp_path, n00_one="")
    notebooks.main(["build"], root)
    assert notebooks.main(["run", *arguments], root) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert word in sentence
    assert not (root / "build").exists()


def test_a_run_of_notebooks_that_drifted_is_refused_in_one_sentence(tmp_path, capsys):
    root = project(tmp_path, n00_one="")
    notebooks.main(["build"], root)
    (root / "notebooks/src/00_one.py").write_text(FRONT + "# %%\nx = 1\n")
    assert notebooks.main(["run"], root) == 2
    assert "notebooks.py build" in capsys.readouterr().err


SLEEPS = """
# %%
import os, pathlib, time
pathlib.Path("pid").write_text(str(os.getpid()))
# %%
time.sleep(100)
"""


@pytest.mark.notebook
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_its_table_and_leaves_no_kernel(tmp_path, number):
    root = project(tmp_path, n00_sleeps=SLEEPS, n01_other="")
    notebooks.main(["build"], root)
    (root / "tmp").mkdir()
    process = command(root, "run", TMPDIR=str(root / "tmp"))
    pid_file = root / "notebooks/pid"
    while not (pid_file.exists() and pid_file.read_text()):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    kernel = psutil.Process(int(pid_file.read_text()))
    time.sleep(0.5)  # into the cell that sleeps
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert not kernel.is_running()
    assert "stopped at In [3] `time.sleep(100)`" in output and output.count("not run") == 1
    assert not list((root / "tmp").iterdir())
    nbformat.validate(nbformat.read(root / "build/executed/00_sleeps.ipynb", 4))


@pytest.mark.notebook
def test_a_notebook_over_its_time_limit_is_ended_and_says_so(tmp_path):
    root = project(tmp_path, n00_sleeps=SLEEPS)
    notebooks.main(["build"], root)
    process = command(root, "run", "--timeout", "4")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "over the time limit of 4 s at In [" in output and "Time limit 4 s" in output
    assert not psutil.pid_exists(int((root / "notebooks/pid").read_text()))


# ---- pages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tex", [r"\bar g = \frac{1}{P} \sum_{p=1}^{P} g_p", r"\begin{aligned} a &= b \\ c &= d \end{aligned}"]
)
def test_formulas_become_mathml(tex):
    html = mathml(tex, "block")
    assert html.startswith("<math") and "&amp;" not in html and "\\" not in html


@pytest.mark.parametrize("tex", [r"\nonsense{x}", r"\frac{a}{", "a & b"])
def test_a_formula_that_cannot_be_shown_is_a_fault_of_its_page(tex):
    text = nbformat.v4.new_markdown_cell(f"Here: ${tex}$ .")
    (fault,) = faults(page(nbformat.v4.new_notebook(cells=[text]), {"title": "x"}))
    assert "cannot be shown" in fault and tex in fault


def test_an_image_in_text_without_alternative_text_is_a_fault_of_its_page():
    image = "![{}](data:image/png;base64,AA)"
    for alt, count in (("", 1), ("A line", 0)):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(image.format(alt))])
        assert len(faults(page(nb, {"title": "x"}))) == count
