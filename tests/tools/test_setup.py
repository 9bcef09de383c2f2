"""The set-up: what it refuses, how it resumes, and that the three lists of versions agree."""

import ast
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.path.realpath(sys.executable)


def load(path: Path):
    """Import a tool as a module, as it stands in a clone."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_clone(target: Path) -> Path:
    """What git would check out, as far as the set-up reads it."""
    for name in ("requirements.lock", "pyproject.toml", "README.md", "LICENSE", "tools", "nurion_utils"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.mkdir(exist_ok=True)
            shutil.copy(source, target / name)
    return target


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    return copy_clone(tmp_path / "clone")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def contents(*folders: Path) -> dict:
    return {path: path.is_file() and path.read_bytes() for folder in folders for path in folder.rglob("*")}


def refusal(clone: Path, home: Path, *, fault: str = "", **env: str) -> str:
    """The sentence with which a set-up of `clone` refuses, once `fault`, a line of Python, has struck.

    Everything that a refusal has to be is asserted here: status 1, one sentence, nothing changed.
    """
    before = contents(clone, home)
    script = f"import runpy, shutil, sys; {fault}\nrunpy.run_path('tools/setup.py', run_name='__main__')"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "XDG_"))}
    clean["RUSTUP_HOME"] = os.devnull  # pip asks rustc for its version, and rustup's rustc would write into HOME
    done = subprocess.run(
        [PYTHON, "-c", script], cwd=clone, env={**clean, "HOME": str(home), **env}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"[A-Z][^\n]*\.\n", done.stderr) and not re.search(r"[.!?] +[A-Z]", done.stderr)
    assert contents(clone, home) == before
    return done.stderr


def test_another_python_is_refused(clone, home):
    said = refusal(clone, home, fault="sys.version_info = (3, 12, 1, 'final', 0)")
    assert "install python3.11" in said and "PYTHON=" in said


def test_even_an_old_python_can_read_far_enough_to_be_refused():
    ast.parse((ROOT / "tools" / "setup.py").read_text(), feature_version=(3, 6))


@pytest.mark.parametrize("missing", ["g++", "make"])
def test_a_missing_build_tool_is_refused_while_no_horovod_is_cached(clone, home, tmp_path, missing):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in {"g++", "make"} - {missing}:
        (tools / tool).symlink_to(shutil.which("true"))
    assert f"{missing} is missing: install it" in refusal(clone, home, PATH=str(tools))


def test_a_full_disk_is_refused(clone, home):
    said = refusal(clone, home, fault="shutil.disk_usage = lambda place: shutil._ntuple_diskusage(10**10, 0, 10**9)")
    assert "needs 3.0 GB" in said and "1.0 GB left" in said and "make room" in said


@pytest.mark.slow  # pip tries again and again
def test_a_missing_network_is_refused_before_uv_is_there(clone, home):
    nowhere = "http://127.0.0.1:9"
    assert "connect this machine" in refusal(clone, home, HTTPS_PROXY=nowhere, HTTP_PROXY=nowhere, ALL_PROXY=nowhere)


def test_the_sites_mirror_named_to_pip_is_told_to_uv(clone, home, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    (home / ".config" / "pip").mkdir(parents=True)
    (home / ".config" / "pip" / "pip.conf").write_text("[global]\nindex-url = https://mirror.example/simple\n")
    assert load(clone / "tools" / "setup.py").ENV["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://other.example/simple")
    assert load(clone / "tools" / "setup.py").ENV["UV_DEFAULT_INDEX"] == "https://other.example/simple"


@pytest.mark.parametrize("package", ["horovod", "tensorflow-cpu", "mpich", "oneccl-devel"])
def test_a_new_version_of_what_horovod_is_built_from_asks_for_a_new_wheel(clone, package):
    before = load(clone / "tools" / "setup.py").compiled_horovod()
    lock = clone / "requirements.lock"
    lock.write_text(re.sub(f"^{package}==.*", f"{package}==99.0", lock.read_text(), flags=re.MULTILINE))
    assert load(clone / "tools" / "setup.py").compiled_horovod().parent != before.parent


def test_a_new_recipe_asks_for_a_new_wheel_and_a_new_tqdm_does_not(clone):
    before = load(clone / "tools" / "setup.py").compiled_horovod()
    lock = clone / "requirements.lock"
    lock.write_text(re.sub("^tqdm==.*", "tqdm==99.0", lock.read_text(), flags=re.MULTILINE))
    assert load(clone / "tools" / "setup.py").compiled_horovod() == before
    recipe = clone / "tools" / "horovod_wheel.py"
    recipe.write_text(recipe.read_text().replace('"HOROVOD_WITH_GLOO": "1"', '"HOROVOD_WITHOUT_GLOO": "1"'))
    assert load(clone / "tools" / "setup.py").compiled_horovod() != before


def test_a_patch_that_does_not_fit_stops_the_build(clone, tmp_path):
    recipe = load(clone / "tools" / "horovod_wheel.py")
    for name, old, _ in recipe.PATCHES:
        file = tmp_path / "horovod" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text((file.read_text() if file.exists() else "") + old + "\n")
    recipe.patch(tmp_path / "horovod")
    with pytest.raises(SystemExit, match="occurs 0 times instead of once"):
        recipe.patch(tmp_path / "horovod")


def set_up(clone: Path) -> subprocess.Popen:
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([PYTHON, "tools/setup.py"], cwd=clone, **output)


# What a set-up is made of. Where these tests have passed with just that before, they are not run again.
PARTS = ["tools/setup.py", "tools/horovod_wheel.py", "requirements.lock", "pyproject.toml", "tests/tools/test_setup.py"]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, request) -> Iterator[tuple[Path, list[str]]]:
    """A second clone, set up by the third attempt, and what it said.

    The first set-up is killed while it installs the packages, the second once it has installed them; the third
    are two at once.
    """
    setup = load(ROOT / "tools" / "setup.py")
    passed = setup.CACHE / f"tests-{setup.digest(''.join((ROOT / part).read_text() for part in PARTS))}.passed"
    if passed.exists() and not os.environ.get("INSTALL"):
        pytest.skip("nothing of the set-up has changed since these tests passed here (INSTALL=1 runs them again)")
    failed = request.session.testsfailed
    clone = copy_clone(tmp_path_factory.mktemp("second") / "clone")
    if not load(clone / "tools" / "setup.py").compiled_horovod().exists():
        pytest.skip("this home has no compiled Horovod, which make setup leaves in its cache")
    for reached in ("bin/python", "packages.stamp"):
        killed = set_up(clone)
        while not (clone / ".venv" / reached).exists():
            assert killed.poll() is None, killed.stdout.read()
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    both = [set_up(clone), set_up(clone)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    yield clone, said
    if request.session.testsfailed == failed:
        passed.touch()


def test_a_killed_set_up_is_resumed_where_it_stopped_by_one_of_two_that_come_at_once(resumed):
    _, said = resumed
    assert "packages" not in "".join(said)
    assert sorted("Setting up: Horovod" in text for text in said) == [False, True]
    assert "Waiting for another set-up" in "".join(said)


def test_the_cached_horovod_takes_its_mpi_and_oneccl_from_the_clone_it_is_installed_in(resumed):
    clone, _ = resumed
    code = "import horovod.tensorflow; print(*{x.split()[-1] for x in open('/proc/self/maps') if '.so' in x})"
    libraries = subprocess.check_output([clone / ".venv/bin/python", "-c", code], text=True, stderr=subprocess.DEVNULL)
    for name in ("lib/libmpi.so.12", "lib/cpu/libccl.so.1", "tensorflow/libtensorflow_cc.so.2"):
        assert [Path(path) for path in libraries.split() if path.endswith(name)], name
    assert {path.split("/.venv/")[0] for path in libraries.split() if "/.venv/" in path} == {str(clone)}


def test_a_set_up_with_nothing_to_do_is_silent(resumed):
    clone, _ = resumed
    process = set_up(clone)
    assert process.communicate() == ("", None) and process.returncode == 0


def test_a_venv_whose_python_is_gone_is_made_anew(resumed):
    clone, _ = resumed
    python = clone / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nonexistent/python3.11")
    assert set_up(clone).wait() == 0
    subprocess.run([python, "-c", "import horovod, nurion_utils"], check=True)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", LOCK, re.MULTILINE))
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [Requirement(text) for text in PROJECT["dependencies"] + EXTRAS["build"] + EXTRAS["test"]]


@pytest.mark.parametrize("wanted", DIRECT, ids=str)
def test_the_lock_holds_a_version_that_the_project_allows(wanted):
    assert wanted.specifier.contains(PINS[wanted.name])


def test_the_lock_holds_names_and_exact_versions_only():
    lines = [line for line in LOCK.splitlines() if not line.lstrip().startswith("#")]
    assert len(lines) == len(PINS)
    assert not re.search(r"://|@|^/", LOCK, re.MULTILINE)


def test_conda_users_get_the_versions_of_the_lock():
    text = (ROOT / "environment.yml").read_text()
    environment = yaml.safe_load(text)
    assert environment["name"] == "nurion" and "python=3.11" in environment["dependencies"]
    listed = dict(line.split("==") for line in environment["dependencies"][-1]["pip"] if "==" in line)
    # Horovod cannot come from an index unpatched: the recipe in the head of the file builds it.
    assert f"horovod=={PINS['horovod']}" in text
    assert listed == {wanted.name: PINS[wanted.name] for wanted in DIRECT if wanted.name != "horovod"}
