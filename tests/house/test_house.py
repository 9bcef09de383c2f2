"""The plan of the house holds: rooms of a size that one can read, doors that open, arrows that only go down."""

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import nurion_utils

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nurion_utils"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(init.parent for init in PACKAGE.rglob("*/__init__.py"))
PACKAGE_LINES = 15_783
READERS = [*(ROOT / "notebooks" / "src").glob("*.py"), *(ROOT / "tools").rglob("*.py"), ROOT / "README.md"]


def title(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def of_room(room: Path) -> list[Path]:
    return [*room.glob("*.py"), *room.glob("*.pyi")]


def code_lines(path: Path, function: ast.FunctionDef) -> int:
    """Lines with code: neither blank, nor comment alone, nor docstring."""
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    shown = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code = {n for t in tokens if t.type not in shown for n in range(t.start[0], t.end[0] + 1)}
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        code -= set(range(first.lineno, first.end_lineno + 1))
    return len(code & set(range(function.lineno, function.end_lineno + 1)))


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("room", ROOMS, ids=title)
def test_a_room_has_at_most_1500_lines(room: Path) -> None:
    assert lines(of_room(room)) <= 1500


def test_the_package_does_not_grow() -> None:
    assert lines([*FILES, *PACKAGE.rglob("*.pyi")]) <= PACKAGE_LINES


@pytest.mark.parametrize("file", FILES, ids=title)
def test_a_file_has_at_most_300_lines_and_its_functions_40_and_7_arguments(file: Path) -> None:
    assert lines([file]) <= 300
    long = {each.name: n for each in functions(file) if (n := code_lines(file, each)) > 40}
    assert not long
    named = {each.name: [*each.args.posonlyargs, *each.args.args, *each.args.kwonlyargs] for each in functions(file)}
    wide = {name: len(a) for name, a in named.items() if len([x for x in a if x.arg not in ("self", "cls")]) > 7}
    assert not wide


def test_imports_only_go_down_and_in_no_circle() -> None:
    checked = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("file", FILES, ids=title)
def test_nothing_private_is_taken_from_another_room(file: Path) -> None:
    home = ".".join(("nurion_utils", *file.relative_to(PACKAGE).parent.parts))
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nurion_utils.") and node.module != home:
            inside = node.module.startswith(f"{home}.")
            private = [name.name for name in node.names if name.name.startswith("_")]
            assert inside or not private, f"{node.module}: {private}"


def stub_names(room: Path) -> list[str]:
    stub = ast.parse((room / "__init__.pyi").read_text())
    return [name.asname for node in ast.walk(stub) if isinstance(node, ast.ImportFrom) for name in node.names]


@pytest.mark.tensorflow
@pytest.mark.parametrize("room", [PACKAGE, *ROOMS], ids=lambda room: room.name)
def test_exported_names_are_importable_and_documented(room: Path) -> None:
    face = importlib.import_module(".".join(room.relative_to(ROOT).parts))
    assert face.__doc__ and sorted(face.__all__) == sorted(stub_names(room))
    for name in face.__all__:
        found = getattr(face, name)
        assert not hasattr(face, "__lazy_shadowed__"), "a name is that of its module: then neither can be pickled"
        if inspect.ismodule(found) or inspect.isclass(found) or inspect.isfunction(found):
            assert found.__doc__, f"{face.__name__}.{name} has no docstring"


def test_every_room_is_in_the_readme() -> None:
    listed = re.findall(r"^\| `nurion_utils\.(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(nurion_utils.__all__)


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_what_a_room_exports_is_met_outside_of_it(room: Path) -> None:
    inside = set(of_room(room))
    readers = READERS + [file for file in FILES if file not in inside]
    text = "\n".join(file.read_text() for file in readers)
    assert not [name for name in stub_names(room) if not re.search(rf"\b{name}\b", text)]


@pytest.mark.parametrize("file", READERS, ids=lambda file: file.name)
def test_notebooks_tools_and_readme_enter_rooms_by_their_doors(file: Path) -> None:
    for module, names in re.findall(r"from (nurion_utils(?:\.\w+)*) import ([\w, ]+)", file.read_text()):
        face = importlib.import_module(module)
        for name in (word.split(" as ")[0].strip() for word in names.split(",")):
            assert name in getattr(face, "__all__", vars(face)), f"{module} does not offer {name}"


EXAMPLES = [file for file in FILES if ">>> " in file.read_text()]


@pytest.mark.tensorflow
@pytest.mark.parametrize("file", EXAMPLES, ids=title)
def test_examples_in_docstrings_give_what_they_show(file: Path) -> None:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    failed, tried = doctest.testmod(module)
    assert not failed and (tried or "+SKIP" in file.read_text())
