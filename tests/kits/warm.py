"""Runs that start in a fraction of a second: forked from one process that has their libraries loaded, as the workers of the schedule do it.

A test takes the fixtures by name: `from warm import fork_server, warm  # noqa: F401`. One test at least of each way a run ends is without it.
"""

import os
from collections.abc import Iterator
from multiprocessing import forkserver

import pytest

from make_us_rich.core.kernels import ForkServer
from make_us_rich.runs import runner


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    "A fork server of this test file, whatever the file before has loaded into its own."
    environment = dict(os.environ)
    forkserver._forkserver._stop()
    server = ForkServer(runner.LIBRARIES)
    yield server
    server.close()
    forkserver._forkserver._stop()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def warm(fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    "The runs of this test start warm."
    monkeypatch.setattr(runner, "_FORK_SERVER", [fork_server])
