"""Processes of `multiprocessing` that start in milliseconds: forked from a server that has their libraries loaded.

A process has one such server. It keeps what the first user had it load, so each test file asks for its own: `forks = preloading("psycopg")`.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing import forkserver

import pytest

from make_us_rich.core.kernels import ForkServer
from make_us_rich.runs import runner

FORKS = multiprocessing.get_context("forkserver")


def preloading(*modules: str) -> Callable:
    "A fixture for a test file: the children of `FORKS` have these modules loaded."

    @pytest.fixture(scope="module", autouse=True)
    def forks() -> Iterator[None]:
        forkserver._forkserver._stop()
        FORKS.set_forkserver_preload(["pytest", *modules])
        yield
        forkserver._forkserver._stop()

    return forks


@pytest.fixture(scope="module")
def run_server() -> Iterator[ForkServer]:
    "A server of which runs are forked, as in the workers of the schedule."
    environment = dict(os.environ)
    forkserver._forkserver._stop()
    server = ForkServer(runner.LIBRARIES)
    yield server
    server.close()
    forkserver._forkserver._stop()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def warm(run_server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    "The runs of this test start warm, in a fraction of a second; of each way a run ends one test is without this."
    monkeypatch.setattr(runner, "_FORK_SERVER", [run_server])
