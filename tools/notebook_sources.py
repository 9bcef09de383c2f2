"""From the text sources of the notebooks to the notebooks themselves: what a writer needs to know.

``notebooks/src/NN_name.py`` (percent format) is what people edit. ``build`` makes two files of it, both
without outputs: ``notebooks/NN_name.ipynb``, and ``notebooks/exercises/NN_name.ipynb``, the same whole
notebook with the solutions taken out, so that it can be worked through on its own. ``build --check`` names
the files that drifted.

- The first cell is markdown: ``# Title``, then paragraphs that begin with ``**Goal:**`` (one sentence) and
  ``**Minutes:**`` (on 2 cores); the index of the site quotes all three.
- ``# %% tags=["parameters"]`` marks the one cell of parameters; ``run -p NAME VALUE`` replaces a value.
- ``# %% alt="what the figure shows"`` describes the cell's figures to those who cannot see them; a figure
  without it fails the run.
- ``# %% tags=["raises-exception"]`` marks a cell that must end in an error.
- An exercise is three cells: the task in markdown, ``# %% tags=["exercise"]`` and ``# %% tags=["check"]``.
  The middle one holds starter code, and the solution between the lines ``# --- solution`` and
  ``# --- end solution``, in whose place the exercise edition has ``...  # your code here`` (same
  indentation). The starter code gives every name the check reads a value (``answer = None``), so that the
  check can explain what is wrong. In the full notebook the middle cell is folded.
- Other tags and options are refused. Magics are written plainly or as a comment (``# %%px``). Other notebooks
  are linked as ``[text](NN_name.ipynb)``. Read no file by a relative path: the exercise edition lies elsewhere.
- Maths is ``$...$``, ``$$...$$`` or an ``align*`` environment; the site turns it into MathML.
"""

from __future__ import annotations

import copy
import hashlib
import re
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

TAGS = {"parameters", "exercise", "check", "raises-exception"}
SOLUTION = re.compile(r"^([ \t]*)# --- solution[ \t]*\n(?:.*\n)*?[ \t]*# --- end solution[ \t]*$", re.MULTILINE)
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


class Refused(Exception):
    """One sentence for the reader: what is wrong, and what would be right."""


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def front(nb: NotebookNode) -> dict[str, str | None]:
    """Title, goal and minutes as the first cell states them; None where it does not."""
    text = nb.cells[0].source if nb.cells and nb.cells[0].cell_type == "markdown" else ""
    patterns = {"title": r"^# (.+)$"}
    patterns |= {k: rf"^\*\*{k.title()}:\*\*\s+((?:.+\n?)+?)(?=\n|\*\*|- |\Z)" for k in ("goal", "minutes")}
    found = {key: re.search(pattern, text, re.MULTILINE) for key, pattern in patterns.items()}
    return {key: " ".join(match[1].split()) if match else None for key, match in found.items()}


def _check_source(nb: NotebookNode, name: str) -> None:
    """Refuse what would otherwise go wrong in silence: typing errors in options, lost solutions."""
    missing = [key for key, text in front(nb).items() if text is None]
    if missing:
        raise Refused(
            f"{name}: the first cell lacks its {' and '.join(missing)} (# Title, **Goal:** ..., **Minutes:** ...)."
        )
    parameters = sum("parameters" in tags(cell) for cell in nb.cells)
    if parameters != 1:
        raise Refused(f"{name}: exactly one cell is tagged parameters, not {parameters}.")
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    for cell in nb.cells:
        where = f"{name}, cell that begins `{cell.source.strip().partition(chr(10))[0]}`"
        unknown = sorted((set(cell.metadata) - {"tags", "alt", "lines_to_next_cell"}) | (set(tags(cell)) - TAGS))
        if unknown:
            raise Refused(
                f"{where}: {unknown[0]!r} is unknown; the options are tags and alt, the tags {', '.join(sorted(TAGS))}."
            )
        exercise = "exercise" in tags(cell)
        markers = len(re.findall(r"# --- (?:end )?solution", cell.source))
        blocks = len(SOLUTION.findall(cell.source))
        if markers != 2 * blocks or exercise != bool(blocks):
            raise Refused(
                f"{where}: a cell tagged exercise, and no other, holds its solution between "
                "the lines '# --- solution' and '# --- end solution'."
            )
        if exercise and "check" not in tags((code[code.index(cell) + 1 :] or [cell])[0]):
            raise Refused(f"{where}: the code cell after an exercise is its check and is tagged check.")


def _notebook(cells: list[NotebookNode]) -> str:
    """The text of a notebook without outputs, each cell's id taken from its own content.

    So editing a cell leaves the other ids alone; cells with equal content are counted.
    """
    seen: dict[str, int] = {}
    for cell in cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    nb = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL, "language_info": {"name": "python"}})
    nbformat.validate(nb)
    return nbformat.writes(nb) + "\n"


def editions(source: Path) -> tuple[str, str]:
    """The full notebook and the exercise edition of one source, as texts.

    Raises
    ------
    Refused
        If the source breaks a convention of this module's docstring.
    """
    parsed = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")
    _check_source(parsed, source.name)
    full = []
    for cell in parsed.cells:
        new = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        kept = {key: cell.metadata[key] for key in ("tags", "alt") if key in cell.metadata}
        full.append(new(cell.source, metadata=kept))
    exercises = copy.deepcopy(full)
    for cell, blank in zip(full, exercises, strict=True):
        if "exercise" in tags(cell):
            cell.metadata["jupyter"] = {"source_hidden": True}
            blank.source = SOLUTION.sub(r"\1...  # your code here", blank.source)
    return _notebook(full), _notebook(exercises)


def build(root: Path, check: bool = False) -> list[str]:
    """Bring the generated notebooks up to date (with `check`: touch nothing).

    Returns one sentence for every file that still differs from its source.
    """
    folder = root / "notebooks"
    wanted: dict[Path, str] = {}
    for source in sorted((folder / "src").glob("*.py")):
        if not re.fullmatch(r"\d\d_\w+", source.stem):
            raise Refused(f"notebooks/src/{source.name}: a source is named NN_name.py, such as 00_first_steps.py.")
        full, exercises = editions(source)
        wanted |= {folder / f"{source.stem}.ipynb": full, folder / "exercises" / f"{source.stem}.ipynb": exercises}
    drifted = [path for path, text in wanted.items() if not path.exists() or path.read_text("utf-8") != text]
    if not check:
        for path in drifted:
            write(path, wanted[path])
        drifted = []
    there = {*folder.glob("[0-9][0-9]_*.ipynb"), *folder.glob("exercises/[0-9][0-9]_*.ipynb")}
    sentences = [
        f"{path.relative_to(root)} differs from its source: run `python tools/notebooks.py build`." for path in drifted
    ]
    return sentences + [
        f"{path.relative_to(root)} has no source in notebooks/src: delete it." for path in sorted(there - set(wanted))
    ]


def write(path: Path, text: str) -> None:
    """Write a file in one step, so that nobody ever finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
