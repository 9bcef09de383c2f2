"""Started ranks are dear, so all tests of a session share them, and TensorFlow is imported once on each.

After a module its ranks are tidied: ranks in which Horovod has started poll each other for work, and would take half
of two cores from the tests that follow. A test that breaks a world starts its own, or leaves it broken: the next test
is given fresh ranks.
"""

import os
import signal
import sys
from collections.abc import Iterator

import cloudpickle
import helpers
import hypothesis
import pytest

from nurion_utils import ranks
from nurion_utils.ranks.launchers import nodes
from nurion_utils.ranks.processes.guardian import mapped_by, remove

# A test run in the background may have been told to ignore interrupts, and what it starts would ignore them too.
signal.signal(signal.SIGINT, signal.default_int_handler)
cloudpickle.register_pickle_by_value(helpers)
# How long an example takes says nothing on a machine that others use as well.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

# What the name of a fixture says of its tests.
NEEDS = {"permitted": "lab", "notebook": "ranks", "resumed": "install", "ran": "notebook"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Functions of a test module travel to the ranks by value: the ranks cannot import the module."""
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        cloudpickle.register_pickle_by_value(module)
    for item in items:
        for name in getattr(item, "fixturenames", []):
            if marker := "ranks" if name.startswith("world") else NEEDS.get(name):
                item.add_marker(marker)
    # The longest file first, or it would still run when all others have ended; beside it those that wait the most.
    early = ["notebooks", "ranks"]
    items.sort(key=lambda item: early.index(folder) if (folder := item.path.parent.name) in early else len(early))


def pytest_sessionfinish() -> None:
    """MPI in this process has memory with a name, which would stay if xdist lost patience with the process' end."""
    remove(mapped_by(os.getpid()))


_started: list[str] = []  # launchers of ranks, since the test that runs now began


def _note(event: str, arguments: tuple) -> None:
    if event == "subprocess.Popen":
        words = {os.path.basename(os.fsdecode(word)) for word in arguments[1] if isinstance(word, str | os.PathLike)}
        _started.extend({"guardian.py", "mpiexec"} & words)


sys.addaudithook(_note)
SLOW = {"ranks", "lab", "notebook", "slow"}


@pytest.fixture(autouse=True)
def marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that uses ranks or TensorFlow says so by its marker, or `make check` would not stay quick."""
    markers = {mark.name for mark in request.node.iter_markers()}
    if not markers & {"tensorflow", *SLOW}:
        for name in ("tensorflow", "keras", "horovod"):
            monkeypatch.setitem(sys.modules, name, None)  # to import them is an error here
    _started.clear()
    yield
    if _started and not markers & SLOW:
        pytest.fail("this test starts ranks: mark it with pytest.mark.ranks")


@pytest.fixture(scope="session")
def started() -> Iterator[dict[int, ranks.World]]:
    """Worlds by their number of ranks, started when they are first asked for."""
    worlds: dict[int, ranks.World] = {}
    yield worlds
    for world in worlds.values():
        world.stop()


def lend(started: dict[int, ranks.World], n: int) -> Iterator[ranks.World]:
    if n not in started:
        started[n] = ranks.start(n)
    elif "running" not in repr(started[n]):
        started[n].restart()
    yield started[n]
    if "running" in repr(started[n]):
        started[n].run(tidy)


def tidy() -> None:
    import gc
    import sys

    if (hvd := sys.modules.get("horovod.tensorflow")) and hvd.is_initialized():
        hvd.shutdown()
    if keras := sys.modules.get("keras"):
        keras.backend.clear_session()
    gc.collect()


@pytest.fixture(scope="module")
def world2(started: dict[int, ranks.World]) -> Iterator[ranks.World]:
    """Two ranks, one core each on the smallest machine."""
    yield from lend(started, 2)


@pytest.fixture(scope="module")
def world4(started: dict[int, ranks.World]) -> Iterator[ranks.World]:
    """Four ranks; on two cores they share."""
    yield from lend(started, 4)


@pytest.fixture(autouse=True)
def whole(request: pytest.FixtureRequest, started: dict[int, ranks.World]) -> None:
    """The failure of a test is not that of others, too, which share its ranks."""
    for n, world in started.items():
        if f"world{n}" in request.fixturenames and "running" not in repr(world):
            world.restart()


@pytest.fixture(scope="module")
def permitted() -> None:
    """Skips what needs virtual nodes where there cannot be any."""
    try:
        nodes.namespaces()
    except nodes.NodesError as refusal:
        pytest.skip(str(refusal))
