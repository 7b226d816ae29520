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


TRAINING = {"members": 1, "epochs": 2, "steps_per_epoch": 10}  # `mkrich demo` trains as people do (tests/cli)


def with_short_training(path, folder):
    "A copy of a run notebook that learns next to nothing: it is refused, and says so on every page."
    nb = json.loads(path.read_text())
    (cell,) = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
    cell["source"] += ["\n", f"overrides = {TRAINING}"]
    copy = folder / path.name
    copy.write_text(json.dumps(nb))
    return copy


@pytest.mark.parametrize("path", check.notebooks(), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_notebook_runs(path, monkeypatch, tmp_path):
    if path.stem in ("run_train", "run_pretrain"):
        path = with_short_training(path, tmp_path)
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
        forget_routes()


def forget_routes():
    "A page that declares routes does so in the library's router, which has them already; a reader's kernel ends with the page, this process goes on."
    if routing := sys.modules.get("make_us_rich.api.routing"):
        routing.router.routes[:] = [r for r in routing.router.routes if r.endpoint.__module__ != "__main__"]


@pytest.fixture
def planted(tmp_path, monkeypatch):
    "A copy of the project in which a test may break something."
    for name in ("nbs", "make_us_rich", "tools", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.parquet"))
    for name in ("settings.ini", "README.md", "environment.yml", ".importlinter"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    return tmp_path


def edit(path, change):
    nb = json.loads(path.read_text())
    change(nb)
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n")


def test_gates_pass_on_an_untouched_copy(planted):
    assert [problem for gate in check.GATES.values() for problem in gate()] == []


SERIES = "02_market/01_series.ipynb"


def test_an_executed_notebook_is_found(planted):
    def execute(nb):
        next(c for c in nb["cells"] if c["cell_type"] == "code")["execution_count"] = 3

    edit(planted / "nbs" / SERIES, execute)
    assert any("01_series.ipynb: not clean" in p for p in check.not_clean())


def test_an_edited_library_and_an_orphan_are_found(planted):
    with (planted / "make_us_rich" / "market" / "series.py").open("a") as f:
        f.write("# edited by hand\n")
    (planted / "make_us_rich" / "market" / "orphan.py").write_text("")
    (planted / "make_us_rich" / "flat.py").write_text("")  # a module of the time before the rooms
    problems = check.not_in_step()
    assert any("make_us_rich/market/series.py: not what the notebooks export" in p for p in problems)
    for orphan in ("make_us_rich/market/orphan.py", "make_us_rich/flat.py"):
        assert any(f"{orphan}: no notebook exports it" in p for p in problems)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from make_us_rich.api.app import create_app", "api.app"),
        ("from make_us_rich.market.candles import (\n    load_sample,\n)", "market.candles"),
        ("from make_us_rich.market import replay", "market.replay"),
        ("import make_us_rich.serving.service", "serving.service"),
    ],
)
def test_an_upward_import_is_found(planted, line, name):
    edit(planted / "nbs" / SERIES, lambda nb: nb["cells"][-1].update(source=line.splitlines(keepends=True)))
    assert any(p.startswith(f"{SERIES}: imports {name} from ") for p in check.upward_imports())


def plant(planted, module, line):
    with (planted / "make_us_rich" / module).open("a") as f:
        f.write(f"\n{line}\n")


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("market/series.py", "from ..api.app import create_app"),  # an upward import
        ("serving/forecast.py", "from ..runs.run import Outcome"),  # two rooms that do not know each other
        ("runs/run.py", "from ..serving.forecast import Forecast"),
        ("dashboard/cards.py", "from ..market.candles import load_sample"),  # the dashboard knows core and api.client
        ("dashboard/cards.py", "from ..api.app import create_app"),
        ("registry/champion.py", "def lazily():\n    import torch"),  # no torch, not even inside a function
        ("api/app.py", "from ..models.training import training_loop"),
        ("runs/execution.py", "from .report import Run"),  # nor in what only starts a training
    ],
)
def test_a_broken_wall_is_found(planted, module, line):
    assert check.broken_walls() == []
    plant(planted, module, line)
    assert check.broken_walls() != []


def test_a_room_that_has_no_floor_is_found(planted):
    (planted / "make_us_rich" / "cellar").mkdir()
    (planted / "make_us_rich" / "cellar" / "__init__.py").write_text("")
    assert check.broken_walls() != []


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("a, b, c = 1, 2, 3", "packed assignment"),
        ("(a, b), c = (1, 2), 3", "packed assignment"),
        ("x = 1 if True else 2 if False else 3", "conditional in a conditional"),
        ("x = [y for z in range(3) if (y := z)]", "walrus in a filter"),
        ("def f(a, b, c, d, e, f, g, h, i):\n    'One too many.'", "more than 8 parameters"),
        ("def _f():\n    return 1", "function without a docstring"),
        ("class F:\n    def g(self):\n        return 1", "function without a docstring"),
        (f"x = '{'x' * 120}'", "line over 120"),
        ("\n# %% ../../nbs/01_core/99_dense.ipynb #0\n" + "x = 1\n" * 61, "cell over 60 lines"),
        ("\n".join(["x = 1", ""] * 201), "module over 400 lines"),  # blank lines count: `wc -l`
    ],
)
def test_a_dense_cell_is_found(planted, line, rule):
    module = planted / "make_us_rich" / "core" / "dense.py"
    module.write_text(f"{line}\n")
    assert {found for found, _ in check.air.findings(module)} == {rule}


def test_the_gate_counts_what_is_too_dense(planted, monkeypatch):
    rules = {rule: n for rule, n in check.air.figures(planted).items() if rule not in check.air.SIZES}
    monkeypatch.setattr(check, "CEILING", rules)
    assert check.too_dense() == []
    plant(planted, "market/series.py", "a, b, c = 1, 2, 3")
    assert any("against the rule 'packed assignment'" in p for p in check.too_dense())


def test_a_name_with_two_meanings_is_found(planted):
    assert check.two_meanings() == []  # the face and the commands say names again on purpose
    plant(planted, "runs/run.py", "def find_gaps():\n    'Of a run.'")
    assert check.two_meanings() == ["find_gaps: market.candles, runs.run; the lower room keeps the name"]


def test_a_ceiling_that_could_be_lower_is_found(planted, monkeypatch):
    monkeypatch.setitem(check.CEILING, "walrus in a filter", 1000)
    assert any("'walrus in a filter'" in p and "lower its ceiling" in p for p in check.too_dense())


def test_a_stale_house_is_found(planted):
    edit(
        planted / "nbs" / SERIES,
        lambda nb: nb["cells"][0].update(source=["# Another title\n", "\n", "> Another room\n"]),
    )
    assert any("docs/house.md is not what the folders of nbs/ say" in p for p in check.stale_house())


def test_a_lost_parameters_tag_is_found(planted):
    def lose(nb):
        for cell in nb["cells"]:
            cell["metadata"] = {}

    edit(planted / "nbs" / "pages" / "run_train.ipynb", lose)
    assert any("run_train.ipynb: one cell has the tag `parameters`" in p for p in check.unsound_runs())


def test_a_stale_readme_is_found(planted):
    (planted / "README.md").write_text("old")
    assert any("README.md is not what nbs/index.ipynb makes" in p for p in check.stale_readme())


def test_a_leaked_path_is_found(planted):
    output = {"output_type": "stream", "name": "stdout", "text": ["/root/somebody/store\n"]}
    edit(planted / "nbs" / SERIES, lambda nb: nb["cells"][-1].update(outputs=[output]))
    assert any("01_series.ipynb: holds" in p for p in check.not_clean())


def test_uneven_pins_are_found(planted):
    pins = (planted / "environment.yml").read_text()
    (planted / "environment.yml").write_text(pins.replace("ghapi<2", "ghapi<3"))
    assert check.uneven_pins()
