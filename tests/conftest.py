"""Started ranks are dear, so the tests of a module share them; a test that breaks a world starts its own.

They are not kept for longer: ranks in which Horovod has started poll each other for work, and would take half of
two cores from the tests that follow.
"""

import signal
from collections.abc import Iterator

import cloudpickle
import pytest

from nurion_utils import ranks
from nurion_utils.ranks.launchers import lab

# A test run in the background may have been told to ignore interrupts, and what it starts would ignore them too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Functions of a test module travel to the ranks by value: the ranks cannot import the module."""
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        cloudpickle.register_pickle_by_value(module)


@pytest.fixture(scope="module")
def world2() -> Iterator[ranks.World]:
    """Two ranks, one core each on the smallest machine."""
    with ranks.start(2) as world:
        yield world


@pytest.fixture(scope="module")
def world4() -> Iterator[ranks.World]:
    """Four ranks; on two cores they share."""
    with ranks.start(4) as world:
        yield world


@pytest.fixture(scope="module")
def permitted() -> None:
    """Skips what needs a lab where there cannot be one."""
    try:
        lab.start(2).close()
    except lab.LabError as refusal:
        pytest.skip(str(refusal))
