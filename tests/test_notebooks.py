"""Every notebook runs top to bottom, in this process, without network; and the gates of tools/check.py can fail."""

import importlib.util
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import pytest
from nbdev.test import test_nb as run_notebook  # another name, or pytest would collect it

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("check", ROOT / "tools" / "check.py")
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)


@pytest.mark.parametrize("path", check.notebooks(), ids=lambda p: p.stem)
def test_notebook_runs(path, monkeypatch, tmp_path):
    environment, root = dict(os.environ), logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    monkeypatch.setattr(sys, "argv", ["pytest"])
    try:
        assert run_notebook(path, skip_flags={"slow", "network"}, basepath=ROOT)[0]
    finally:
        os.environ.clear()
        os.environ.update(environment)
        root.setLevel(level)  # a notebook sets up the logging of a server
        root.handlers[:] = handlers


@pytest.fixture
def planted(tmp_path, monkeypatch):
    "A copy of the project in which a test may break something."
    for name in ("nbs", "make_us_rich", "tools", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.parquet"))
    for name in ("settings.ini", "README.md", "environment.yml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    return tmp_path


def edit(path, change):
    nb = json.loads(path.read_text())
    change(nb)
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n")


def test_gates_pass_on_an_untouched_copy(planted):
    assert [problem for gate in check.GATES.values() for problem in gate()] == []


def test_an_executed_notebook_is_found(planted):
    def execute(nb):
        next(c for c in nb["cells"] if c["cell_type"] == "code")["execution_count"] = 3

    edit(planted / "nbs" / "02_market/01_series.ipynb", execute)
    assert any("02_market/01_series.ipynb: not clean" in p for p in check.not_clean())


def test_an_edited_library_and_an_orphan_are_found(planted):
    with (planted / "make_us_rich" / "candles.py").open("a") as f:
        f.write("# edited by hand\n")
    (planted / "make_us_rich" / "orphan.py").write_text("")
    problems = check.not_in_step()
    assert any("candles.py: not what the notebooks export" in p for p in problems)
    assert any("orphan.py: no notebook exports it" in p for p in problems)


def test_an_upward_import_is_found(planted):
    edit(
        planted / "nbs" / "02_market/01_series.ipynb",
        lambda nb: nb["cells"][-1].update(source=["from make_us_rich.market.replay import ReplayServer"]),
    )
    assert any(
        "02_market/01_series.ipynb: imports replay from 02_market/06_replay.ipynb" in p for p in check.upward_imports()
    )


def test_a_lost_parameters_tag_is_found(planted):
    def lose(nb):
        for cell in nb["cells"]:
            cell["metadata"] = {}

    edit(planted / "nbs" / "run_train.ipynb", lose)
    assert any("run_train.ipynb: one cell has the tag `parameters`" in p for p in check.unsound_runs())


def test_a_stale_readme_is_found(planted):
    (planted / "README.md").write_text("old")
    assert any("README.md is not what nbs/index.ipynb makes" in p for p in check.stale_readme())


def test_a_leaked_path_is_found(planted):
    output = {"output_type": "stream", "name": "stdout", "text": ["/root/somebody/store\n"]}
    edit(planted / "nbs" / "02_market/01_series.ipynb", lambda nb: nb["cells"][-1].update(outputs=[output]))
    assert any("02_market/01_series.ipynb: holds" in p for p in check.not_clean())


def test_uneven_pins_are_found(planted):
    pins = (planted / "environment.yml").read_text()
    (planted / "environment.yml").write_text(pins.replace("ghapi<2", "ghapi<3"))
    assert check.uneven_pins()
