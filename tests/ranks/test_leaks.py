"""Whatever happens to a notebook or a script, no process, file or shared memory of its ranks outlives it."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jupytext
import nbformat
import psutil
import pytest
from helpers import PATIENCE_S
from helpers.kernel import Notebook, child_environment

from nurion_utils import ranks
from nurion_utils.ranks.interrupts import no_interrupt_lost

pytestmark = pytest.mark.ranks

READY = "ranks are at work"

START = """
import multiprocessing, os, sys, time
from nurion_utils import ranks

def hold_shared_memory():
    from mpi4py import MPI
    window = MPI.Win.Allocate_shared(1 << 20, comm=MPI.COMM_WORLD)
    window.tomemory()[:] = bytes(1 << 20)
    MPI.held = window

world = ranks.start(2)
world.run(hold_shared_memory)
"""
AT_WORK = f"""
print({READY!r}, flush=True)
world.run(time.sleep, 1000)
"""


class Traces:
    """What ranks that were started with this temporary directory have left: processes, files, shared memory."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.environment = {**child_environment(), "TMPDIR": str(directory)}
        self._shared_memory_before = shared_memory()

    def processes(self) -> list[str]:
        """Ranks, controller and launcher have their run directory in the environment, the guardian as argument."""
        mark, found = f"{self.directory}/nurion-", []
        for process in psutil.process_iter():
            try:
                if mark in f"{process.cmdline()} {process.environ()}":
                    found.append(f"{process.pid} {process.status()} {process.cmdline()}")
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def left(self) -> list[str]:
        files = [str(path) for path in self.directory.glob("nurion-*")]
        return self.processes() + files + sorted(shared_memory() - self._shared_memory_before)

    def assert_gone(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == []


def shared_memory() -> set[str]:
    """Named segments that no process has open: those that are in use by other worlds are not ours."""
    in_use = set()
    for process in psutil.process_iter():
        try:
            in_use |= {area.path for area in process.memory_maps() if area.path.startswith("/dev/shm/")}
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return {str(path) for path in Path("/dev/shm").iterdir()} - in_use


@pytest.fixture
def traces(tmp_path: Path) -> Iterator[Traces]:
    traces = Traces(tmp_path)
    yield traces
    for process in traces.processes():  # of a test that failed
        os.kill(int(process.split()[0]), signal.SIGKILL)


def run_script(traces: Traces, code: str) -> subprocess.Popen[str]:
    script = traces.directory / "script.py"
    script.write_text(code)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(script)], env=traces.environment, **pipes)


def until_ready(process: subprocess.Popen[str]) -> None:
    assert READY in process.stdout.readline()
    time.sleep(0.5)


# -- scripts --------------------------------------------------------------------------------------------------------

ORDERLY = {
    "its end without stop()": ("", "", 0),
    "an error": ("world.run(divmod, 1, 0)", "RankError: rank 0 of 2 raised ZeroDivisionError", 1),
    "a world that nobody holds any more": (
        "pid = world._processes._guarded.process.pid\ndel world\ntime.sleep(3)\n"
        "assert not os.path.exists(f'/proc/{pid}')",
        "",
        0,
    ),
    "stop() where nobody but the script collects dead processes": (
        "import ctypes\nctypes.CDLL(None).prctl(36, 1)  # adopt them\nworld.stop()\n"
        "try:\n    print(os.waitpid(-1, 0), 'was left')\nexcept ChildProcessError:\n    pass",
        "",
        0,
    ),
    "a forked child that ends first": (
        "if os.fork() == 0:\n    sys.exit()\nos.wait()\nassert world.run(int) == [0, 0]",
        "",
        0,
    ),
    "stop() beside a forked child": (
        "pool = multiprocessing.get_context('fork').Pool(2)\nworld.stop()\n"
        "assert not os.path.exists(world._processes.directory)",
        "",
        0,
    ),
}


@pytest.mark.parametrize("ending", ORDERLY)
def test_a_script_leaves_nothing_after(traces: Traces, ending: str) -> None:
    code, message, status = ORDERLY[ending]
    script = run_script(traces, START + code)
    output, errors = script.communicate(timeout=60)
    assert script.returncode == status and output == "" and (message in errors if message else errors == "")
    traces.assert_gone()


def test_an_interrupted_script_leaves_nothing(traces: Traces) -> None:
    script = run_script(traces, START + AT_WORK)
    until_ready(script)
    script.send_signal(signal.SIGINT)
    assert script.wait(timeout=PATIENCE_S) == -signal.SIGINT
    traces.assert_gone()


def test_shared_memory_that_is_open_but_not_mapped_yet_goes_with_a_killed_script(traces: Traces) -> None:
    code = "world.run(lambda: setattr(sys, 'held', open(f'/dev/shm/nurion-open-{os.getpid()}', 'w')))\n"
    script = run_script(traces, START + code + AT_WORK)
    until_ready(script)
    assert len(list(Path("/dev/shm").glob("nurion-open-*"))) == 2
    script.kill()
    script.wait()
    traces.assert_gone()


def test_a_killed_script_leaves_nothing_though_a_forked_child_lives_on(traces: Traces) -> None:
    script = run_script(traces, START + "if os.fork() == 0:\n    time.sleep(60)\n    os._exit(0)\n" + AT_WORK)
    until_ready(script)
    (child,) = [child for child in psutil.Process(script.pid).children() if "guardian.py" not in str(child.cmdline())]
    script.kill()
    script.wait()
    traces.assert_gone()
    assert child.is_running()
    child.kill()


@pytest.mark.parametrize("after_s", [0.15, 0.6, 1.2])
def test_an_interrupted_start_leaves_nothing(traces: Traces, after_s: float) -> None:
    code = f"import time\nfrom nurion_utils import ranks, sites\nprint({READY!r}, flush=True)\nranks.start(2)\n"
    script = run_script(traces, code + "time.sleep(9)")
    assert READY in script.stdout.readline()
    time.sleep(after_s)
    script.send_signal(signal.SIGINT)
    errors = script.communicate(timeout=PATIENCE_S)[1]
    assert script.returncode == -signal.SIGINT and errors.rstrip().endswith("KeyboardInterrupt")
    traces.assert_gone()


def busy_loops() -> list[subprocess.Popen]:
    return [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]


def test_an_interrupt_at_any_moment_of_a_start_on_busy_cores_is_raised_and_leaves_nothing(traces: Traces) -> None:
    """As often as the environment variable KILLS says; the moments are spread over what one whole start takes."""
    code = f"import time\nfrom nurion_utils import ranks\nprint({READY!r}, flush=True)\nranks.start(2)\n"
    kills = int(os.environ.get("KILLS", "5"))
    loops = busy_loops()
    try:
        script = run_script(traces, code + "print('started', flush=True)")
        assert READY in script.stdout.readline()
        began = time.monotonic()
        assert script.stdout.readline() == "started\n", script.communicate()[1]
        whole_s = time.monotonic() - began
        assert script.communicate(timeout=PATIENCE_S)[1] == ""
        for _ in range(kills):
            script = run_script(traces, code + "time.sleep(60)")
            assert READY in script.stdout.readline()
            time.sleep(after_s := random.uniform(0, whole_s))
            script.send_signal(signal.SIGINT)
            errors = script.communicate(timeout=PATIENCE_S)[1]
            assert script.returncode == -signal.SIGINT and errors.rstrip().endswith("KeyboardInterrupt"), after_s
            traces.assert_gone()
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def test_an_interrupt_that_the_import_system_swallows_is_raised(traces: Traces) -> None:
    """It ends the import of each module with a callback of a weak reference, whose errors Python only prints."""
    code = """
import signal, sys
from nurion_utils import ranks

def strike(frame, event, _):
    if event == "call" and frame.f_code.co_name == "cb" and "importlib" in frame.f_code.co_filename:
        sys.setprofile(None)
        print("struck", flush=True)
        signal.raise_signal(signal.SIGINT)

sys.setprofile(strike)
ranks.start
print("went on")
"""
    script = run_script(traces, code)
    output, errors = script.communicate(timeout=60)
    assert output == "struck\n" and "Exception ignored in" in errors
    assert script.returncode == -signal.SIGINT and errors.rstrip().endswith("KeyboardInterrupt")


def test_an_interrupt_while_a_world_that_nobody_holds_is_closed_is_raised(traces: Traces) -> None:
    code = """
import os, signal, time
from nurion_utils import ranks

world = ranks.start(1)
world._resources.callback(lambda: (print("closing", flush=True), os.kill(os.getpid(), signal.SIGINT)))
del world
time.sleep(600)  # and not only at the end of this
print("went on")
"""
    script = run_script(traces, code)
    output, errors = script.communicate(timeout=60)
    assert output == "closing\n" and script.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt") and "Exception ignored" not in errors
    traces.assert_gone()


def test_an_interrupt_that_a_library_swallows_is_raised_once_it_has_done() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with no_interrupt_lost():
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            reached.append("the end of the block")
    assert reached and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_after_a_killed_guardian_no_process_is_left_and_the_next_start_sweeps_the_directory(traces: Traces) -> None:
    script = run_script(traces, START + AT_WORK)
    until_ready(script)
    (guardian,) = [child for child in psutil.Process(script.pid).children() if "guardian.py" in str(child.cmdline())]
    script.send_signal(signal.SIGSTOP)  # so that nobody but the guardian could clean up
    guardian.kill()
    script.kill()
    script.wait()
    deadline = time.monotonic() + PATIENCE_S
    while traces.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert traces.processes() == [] and len(list(traces.directory.glob("nurion-*"))) == 1
    done = run_script(traces, "from nurion_utils import ranks\nranks.start(1).stop()")
    assert done.communicate(timeout=60) == ("", "")
    assert list(traces.directory.glob("nurion-*")) == []


def test_a_sweep_spares_the_worlds_that_are_in_use(traces: Traces) -> None:
    script = run_script(traces, START + "ranks.start(1).stop()\nassert world.run(int) == [0, 0]")
    assert script.communicate(timeout=60) == ("", "")
    traces.assert_gone()


# -- notebooks ------------------------------------------------------------------------------------------------------


def kill(notebook: Notebook) -> None:
    notebook.manager.signal_kernel(signal.SIGKILL)


def restart(notebook: Notebook) -> None:
    notebook.manager.restart_kernel(now=False)


@pytest.mark.parametrize("end", [kill, restart])
def test_a_kernel_leaves_nothing_after(traces: Traces, end: Callable[[Notebook], None]) -> None:
    with Notebook(env=traces.environment) as notebook:
        assert not notebook.run(START).error
        notebook.send("world.run(time.sleep, 1000)" if end is kill else "")
        time.sleep(0.5)
        end(notebook)
        traces.assert_gone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_papermill_that_was_ended_leaves_nothing(traces: Traces, number: signal.Signals) -> None:
    notebook = jupytext.reads(f"# %%\n{START}\n# %%\nopen('ready', 'w').close()\n{AT_WORK}", fmt="py:percent")
    nbformat.write(notebook, traces.directory / "in.ipynb")
    papermill = subprocess.Popen(
        [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb", "-k", "python3", "--log-level", "ERROR"],
        cwd=traces.directory,
        env=traces.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (traces.directory / "ready").exists():
        assert time.monotonic() < deadline and papermill.poll() is None
        time.sleep(0.1)
    papermill.send_signal(number)
    papermill.wait(timeout=PATIENCE_S)
    traces.assert_gone()


def test_what_mpi_left_of_killed_programs_is_swept_up_and_what_is_in_use_or_new_is_not() -> None:
    names = [f"/dev/shm/mpich_shm_test{what}_0" for what in ("forgotten", "in_use", "new")]
    for name in names:
        Path(name).write_bytes(b"0")
    try:
        for name in names[:2]:
            os.utime(name, (0, 0))
        with open(names[1]):
            ranks.start(1).stop()
        assert [os.path.exists(name) for name in names] == [False, True, True]
    finally:
        for name in names:
            Path(name).unlink(missing_ok=True)
