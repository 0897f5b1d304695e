"""Settings of every test: examples are drawn anew from a fixed seed and are never timed."""

import gc
import os

# Two threads that wait for each other are far slower than one where other programs keep the cores
# busy, and the models here are too small to gain from a second. Before torch is imported, and for
# the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest
from hypothesis import settings

from toys import composition
from toys.command_line import CommandLine
from toys.tries import tries

# Deadlines measure the load of the machine, and a random failure in CI helps nobody.
settings.register_profile("project", deadline=None, derandomize=True, max_examples=tries(15, 30))
settings.load_profile("project")

composition.remember()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long modules first: at the end, other workers would wait for them."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """No later search for garbage walks through what is imported by now: it stays."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries that count their objects at the end would miss the frozen ones."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    started = CommandLine(tmp_path_factory.mktemp("command_line"))
    yield started
    started.close()
