"""The runner against real kernels: killed, raising, hanging, started twice, its own death; by fault number of FAULTS.md."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
from forks import run_server, warm  # noqa: F401
from waiting import LONG, gone, wait_for

from make_us_rich.core.database import connect, migrate
from make_us_rich.core.settings import SettingsError, get_settings
from make_us_rich.market.candles import fake_candles
from make_us_rich.market.replay import ReplayServer
from make_us_rich.market.series import Series
from make_us_rich.models.recipe import load_recipe
from make_us_rich.registry.store import ModelStore
from make_us_rich.runs import runner as runs
from make_us_rich.runs.execution import TrainOptions
from make_us_rich.runs.ledger import RunLedger
from make_us_rich.runs.train import train

BTC = Series.parse("BTC_USDT")
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "small_run.ipynb"
RECORD_PID = "Path(home).with_name('pid').write_text(str(os.getpid()))"


@pytest.fixture(scope="module")
def exchange():
    frames = {pair: fake_candles(400, seed) for seed, pair in enumerate(("BTC_USDT", "ETH_USDT", "SOL_USDT"))}
    with ReplayServer(frames, label="synthetic candles") as server:
        yield server


@pytest.fixture
def settings(exchange, tmp_path):
    return get_settings(
        home=tmp_path / "store", runs=tmp_path / "runs", exchange_url=exchange.url, history_days=10, deadline=LONG
    )


@pytest.fixture
def late(monkeypatch, tmp_path):
    "The deadline is over once the cell has told its number, however long it took to get there: the clock of the runner jumps."
    told = []

    def clock():
        jump = (
            LONG if told else 0
        )  # from the second look on, so that the runner has read what the cell's start reported
        told[:] = [path for path in [tmp_path / "pid"] if path.exists() and path.read_text()]
        return time.monotonic() + jump

    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))


def start(settings, act="", overrides=None, **parameters):
    "One recorded training of BTC_USDT, as a person asks for it."
    settings.home.mkdir(exist_ok=True)
    engine = connect(settings.db_url)
    migrate(engine)
    options = TrainOptions(again=True, notebook=NOTEBOOK, parameters={"act": act} | parameters)
    try:
        recipe = load_recipe("default", **(overrides or {}))
        return train(BTC, recipe, settings=settings, ledger=RunLedger(engine), options=options)
    finally:
        engine.dispose()


def kept(outcome):
    "The notebook of a failed run, and the states of its code cells."
    page = nbformat.read(outcome.notebook, 4)
    return page, [c.metadata.papermill.status for c in page.cells if c.cell_type == "code"]


def versions(settings):
    return [i for i in ModelStore.of(settings).versions("BTC_USDT") if not i.problem]


def test_published_once_and_skipped_the_second_time(settings):  # F34
    first = start(settings)
    assert (first.state, first.exit_code) == ("published", 0), first
    again = start(settings)
    assert (again.state, again.version, again.exit_code) == ("skipped", first.version, 0)
    assert again.reason.endswith(f"that run was published as {first.version}")
    assert [i.version for i in versions(settings)] == [first.version]
    folder = Path(first.notebook).parent
    assert folder == settings.runs / "BTC_USDT" / first.cutoff[:13]
    assert sorted(p.name for p in folder.iterdir()) == ["log.txt", "outcome.json", "result.json", "train.ipynb"]
    assert json.loads((folder / "outcome.json").read_text())["state"] == "published"


def test_killed_kernel(settings):  # F27
    outcome = start(settings, "os.kill(os.getpid(), signal.SIGKILL)")
    assert (outcome.state, outcome.exit_class, outcome.exit_code) == ("failed", "kernel_died", 1)
    assert outcome.reason.startswith(
        "kernel died (signal 9) in cell 4 of 5: Act; most often the machine ran out of memory"
    )
    page, states = kept(outcome)
    assert states == ["completed", "completed", "completed", "failed", "pending"]
    assert "kernel died (signal 9)" in page.cells[0].source and Path(outcome.notebook).name == "train.failed.ipynb"
    assert (
        not versions(settings)
        and not list(settings.runs.rglob("*.part"))
        and not list(settings.runs.rglob("train.ipynb"))
    )
    repaired = start(settings)  # the next start simply works, and no stale evidence is left
    assert repaired.state == "published" and not list(settings.runs.rglob("*.failed.ipynb"))


@pytest.mark.skipif(sys.platform != "linux", reason="warm starts fork")
@pytest.mark.usefixtures("warm")
def test_warm_start_tells_the_same_truth(settings, tmp_path, request):
    outcome = start(settings, "os.kill(os.getpid(), signal.SIGKILL)")
    assert outcome.reason.startswith("kernel died (signal 9) in cell 4 of 5: Act") and kept(outcome)[1][-2:] == [
        "failed",
        "pending",
    ]
    request.getfixturevalue("late")
    stopped = start(settings, f"{RECORD_PID}; time.sleep(3600)")
    assert stopped.exit_class == "timeout" and not psutil.pid_exists(int((tmp_path / "pid").read_text()))
    (tmp_path / "pid").unlink()
    (above,) = [p for p in psutil.Process().children() if "forkserver" in " ".join(p.cmdline())]
    wait_for(lambda: not above.children(recursive=True), what="the end of the forked run")
    above.kill()  # another one is started, or the run starts the slow way
    assert start(settings).state == "published"


@pytest.mark.usefixtures("warm")
def test_cell_raises(settings):  # F30
    outcome = start(settings, "1 / 0")
    assert (outcome.exit_class, outcome.cell) == ("cell_error", "cell 4 of 5: Act")
    assert outcome.reason == "ZeroDivisionError: division by zero (in cell 4 of 5: Act)"
    page, states = kept(outcome)
    assert states == ["completed", "completed", "completed", "failed", "pending"]
    assert any(
        o.output_type == "error" and o.ename == "ZeroDivisionError"
        for c in page.cells
        if c.cell_type == "code"
        for o in c.outputs
    )
    no_data = start(settings, "raise CandleError('no candles for BTC_USDT since today; ask for another pair')")
    assert (no_data.exit_class, no_data.exit_code) == ("no_data", 3)
    assert no_data.reason == "no candles for BTC_USDT since today; ask for another pair"


def test_deadline(settings, tmp_path, late):  # F28
    child = tmp_path / "child"
    begin = f"import subprocess; Path({str(child)!r}).write_text(str(subprocess.Popen(['sleep', '3600']).pid))"
    outcome = start(settings, f"{begin}; {RECORD_PID}; time.sleep(3600)")
    assert outcome.exit_class == "timeout"
    assert outcome.reason.startswith(f"not finished after {LONG} s, stopped in cell 4 of 5: Act; raise MUR_DEADLINE")
    left = [int(path.read_text()) for path in (tmp_path / "pid", child)]
    wait_for(lambda: all(map(gone, left)), what="the end of the kernel and of its child")
    assert kept(outcome)[1][-2:] == ["failed", "pending"]


RUNNER = """
import sys
from pathlib import Path
from make_us_rich.core.database import connect, migrate
from make_us_rich.core.settings import get_settings
from make_us_rich.market.series import Series
from make_us_rich.models.recipe import load_recipe
from make_us_rich.runs.execution import TrainOptions
from make_us_rich.runs.ledger import RunLedger
from make_us_rich.runs.train import train
settings = get_settings(history_days=10, deadline=300)
settings.home.mkdir(exist_ok=True)
engine = connect(settings.db_url)
migrate(engine)
options = TrainOptions(notebook=Path(sys.argv[1]), parameters={"act": sys.argv[2]})
about = {"settings": settings, "ledger": RunLedger(engine), "options": options}
print(train(Series.parse("BTC_USDT"), load_recipe("default"), **about).model_dump_json())
"""


def runner(settings, act=""):
    env = os.environ | {
        "MUR_HOME": str(settings.home),
        "MUR_RUNS": str(settings.runs),
        "MUR_EXCHANGE_URL": settings.exchange_url,
    }
    command = [sys.executable, "-c", RUNNER, str(NOTEBOOK), act]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_runner_leaves_no_orphan_and_is_marked_abandoned(settings, tmp_path):  # F29, F38
    first = runner(settings, f"{RECORD_PID}; time.sleep(3600)")
    pid_file = tmp_path / "pid"
    wait_for(lambda: pid_file.exists() and pid_file.read_text(), what="the cell")
    family = [psutil.Process(int(pid_file.read_text())), *psutil.Process(first.pid).children(recursive=True)]
    assert len(set(family)) >= 2
    first.kill()
    first.communicate()
    wait_for(lambda: all(map(gone, family)), what="the end of the killed runner's kernel")
    (outcome_path,) = settings.runs.rglob("outcome.json")
    assert json.loads(outcome_path.read_text())["state"] == "running"

    # another recipe: another folder, so that the account of the killed run stays to be seen
    second = start(settings, overrides={"hidden_size": 16})
    assert second.state == "published"
    abandoned = json.loads(outcome_path.read_text())
    assert (abandoned["state"], abandoned["exit_class"]) == ("abandoned", "abandoned")
    page = nbformat.read(outcome_path.parent / "train.failed.ipynb", 4)
    assert "was killed before the run ended" in page.cells[0].source
    assert [c.metadata.papermill.status for c in page.cells if c.cell_type == "code"][-2:] == ["failed", "pending"]


def test_two_starters_one_version(settings):  # F34
    both = [runner(settings), runner(settings)]
    outcomes = []
    for process in both:
        out, err = process.communicate(timeout=LONG)
        assert process.returncode == 0, err
        outcomes.append(json.loads(out.splitlines()[-1]))
    assert sorted(o["state"] for o in outcomes) == ["published", "skipped"]
    assert len(versions(settings)) == 1  # the other one was under way, or had just ended


@pytest.mark.usefixtures("warm")
def test_killed_between_publishing_and_promoting_is_adopted(settings):  # F35
    outcome = start(settings, act_late="os.kill(os.getpid(), signal.SIGKILL)")
    store = ModelStore.of(settings)
    assert outcome.state == "failed" and store.champion("BTC_USDT") is None
    (left,) = versions(settings)
    again = start(settings)
    assert (again.state, again.version) == ("skipped", left.version)
    assert again.reason.startswith(f"already published as {left.version}")
    assert store.champion("BTC_USDT").version == left.version


@pytest.mark.usefixtures("warm")
def test_rollback_is_respected(settings, exchange):
    first = start(settings)
    exchange.clock.advance("1h")
    try:
        second = start(settings)
        store = ModelStore.of(settings)
        assert store.rollback("BTC_USDT") == first.version
        assert start(settings).version == second.version  # skipped, and the pointer stays where a person has put it
        assert store.champion("BTC_USDT").version == first.version
    finally:
        exchange.clock.advance("-1h")


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"pairr": "ETH_USDT"}, "pairr is not a parameter of small_run.ipynb; did you mean pair?"),
        ({"history_days": "10"}, "history_days='10' is str, small_run.ipynb wants int; give it a int"),
        ({"overrides": {"hiden_size": 3}}, "a recipe has no 'hiden_size'; did you mean 'hidden_size'?"),
        ({"overrides": {"hidden_size": "x"}}, "recipe value hidden_size = 'x' does not fit"),
    ],
)
def test_wrong_parameters_leave_no_trace(settings, parameters, sentence):  # F33
    with pytest.raises(SettingsError) as caught:
        start(settings, **parameters)
    assert sentence in str(caught.value)
    assert not settings.runs.exists()
    engine = connect(settings.db_url)
    assert RunLedger(engine).rows() == []
    engine.dispose()


@pytest.mark.usefixtures("warm")
def test_nothing_of_a_run_but_the_row_says_that_it_is_under_way(settings):
    "HOUSE row 2 and 3: no lock file and no running.json beside the runs; outcome.json is a copy of the row."
    outcome = start(settings)
    left = {path.name for path in settings.runs.rglob("*") if path.is_file()}
    assert left == {"log.txt", "outcome.json", "result.json", "train.ipynb"}
    engine = connect(settings.db_url)
    row = RunLedger(engine).row_of(outcome.run_id)
    copy = json.loads((Path(outcome.notebook).parent / "outcome.json").read_text())
    assert (row.state, row.exit_class, row.version) == (copy["state"], copy["exit_class"], copy["version"])
    assert Path(row.notebook) == Path(copy["notebook"]).absolute()
    engine.dispose()


@pytest.mark.usefixtures("warm")
def test_the_recipe_is_handed_on_frozen(settings):
    "HOUSE row 16: what the notebook gets is the recipe that names the run, number by number."
    act = "from make_us_rich.models.recipe import Recipe; assert Recipe.from_json(recipe).hash in run_id"
    outcome = start(settings, act, overrides={"hidden_size": 16})
    assert outcome.state == "published", outcome.reason
    kept_recipe = ModelStore.of(settings).load(BTC, outcome.version).manifest.recipe
    assert kept_recipe == load_recipe("default", hidden_size=16).model_dump(mode="json")
