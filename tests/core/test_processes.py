"""Whole trees end, children end with a parent that is killed, and no other room has a way of its own (HOUSE section 4, row 9)."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from waiting import gone, wait_for

import make_us_rich
from make_us_rich.core.processes import descendants, end_tree, function_at, lives, path_of, start_with_parent
from make_us_rich.core.supervisor import ManagedProcess, ProcessFailed, Supervisor

LIBRARY = Path(make_us_rich.__file__).parent
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('there', flush=True); time.sleep(600)"
)


def sleeper(note: str) -> None:
    "Write our number, and the time of a SIGTERM; end only then."
    signal.signal(signal.SIGTERM, lambda *_: (Path(note).write_text("told"), sys.exit()))
    Path(note).write_text(str(os.getpid()))
    time.sleep(600)


def parent_of(note: str) -> None:
    "A parent that starts one child with patience, and lives on."
    start_with_parent(sleeper, note, patience=20)
    time.sleep(600)


def test_a_function_is_found_by_its_name():
    assert function_at(path_of(path_of)) is path_of
    sleeper_here = type(sleeper)(sleeper.__code__, {}, "sleeper")
    sleeper_here.__module__ = "__main__"
    with pytest.raises(ValueError, match="is exported by 0 notebooks"):
        path_of(sleeper_here)


@pytest.mark.parametrize("patience", [0, 0.3])
def test_a_tree_that_ignores_sigterm_ends_as_a_whole(patience):
    below = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], start_new_session=True).wait()"
    )
    eldest = subprocess.Popen([sys.executable, "-c", below], stdout=subprocess.PIPE)
    assert eldest.stdout.readline() == b"there\n"
    family = descendants(eldest.pid)
    end_tree(eldest, patience)
    eldest.stdout.close()
    assert family and all(gone(each) for each in family) and not lives(eldest.pid)
    end_tree(eldest)  # once more is no error


def test_a_child_ends_in_order_when_its_parent_is_killed(tmp_path):
    note, here = tmp_path / "note", str(Path(__file__).parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([here, str(LIBRARY.parent), *sys.path])}
    program = f"import test_processes as t; t.parent_of({str(note)!r})"
    parent = subprocess.Popen([sys.executable, "-c", program], env=env)
    try:
        wait_for(lambda: note.is_file() and note.read_text(), what="the child")
        child = psutil.Process(int(note.read_text()))
        assert child.parent().pid == parent.pid
        parent.kill()
        parent.wait()
        wait_for(lambda: gone(child), what="the child's end")
        assert note.read_text() == "told"  # by SIGTERM, as it had patience
    finally:
        parent.kill()


def program(text):
    "A way to start a Python program whose words go into the log."

    def begin(managed):
        with managed.log.open("wb") as log:
            return subprocess.Popen([sys.executable, "-S", "-c", text], stderr=log)

    return begin


def look_until_it_gives_up(supervisor, managed):
    "Start a process and look after it."
    supervisor.start(managed)
    wait_for(supervisor.look)


def test_a_supervisor_restarts_what_dies_and_gives_up_in_a_sentence(tmp_path):
    said = []
    steady = ManagedProcess("steady", program("import time; time.sleep(600)"), tmp_path / "a.log")
    supervisor = Supervisor([steady], said.append)
    supervisor.start(steady)
    steady.process.kill()
    wait_for(lambda: not steady.alive)
    supervisor.look()
    assert steady.alive and said == ["the steady has died (signal 9); it is started again"]
    pid = steady.process.pid
    supervisor.end()
    assert steady.state == "ended" and not lives(pid)
    hopeless = ManagedProcess("API", program("raise SystemExit('no disk')"), tmp_path / "b.log")
    supervisor = Supervisor([hopeless], said.append)
    supervisor.most = 2
    with pytest.raises(
        ProcessFailed, match=r"the API has died 2 times in 10 minutes \(no disk\); all is stopped, see "
    ):
        look_until_it_gives_up(supervisor, hopeless)
    assert not hopeless.alive


def test_no_other_room_ends_processes_in_a_way_of_its_own():
    own = re.compile(r"killpg|getppid|prctl|PDEATHSIG|preexec_fn|os\.kill\(|\.children\(recursive")
    found = [
        str(path.relative_to(LIBRARY))
        for path in LIBRARY.rglob("*.py")
        if path.parent.name != "core" and own.search(path.read_text())
    ]
    assert found == []
