"""The schedule with real processes: a short simulated month, real notebooks in recorded runs, catch-up, no overlap, no orphans."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest
from forks import run_server, warm  # noqa: F401
from servers import database_url, postgresql  # noqa: F401
from waiting import LONG, gone, wait_for

from make_us_rich.core.database import connect, migrate
from make_us_rich.core.settings import get_settings
from make_us_rich.market.candles import fake_candles
from make_us_rich.market.replay import ReplayServer
from make_us_rich.market.series import Pair, Series
from make_us_rich.market.tape import Faults
from make_us_rich.models.recipe import load_recipe
from make_us_rich.registry.store import ModelStore
from make_us_rich.runs.evidence import keep_page, outside_requests
from make_us_rich.runs.execution import TrainOptions
from make_us_rich.runs.ledger import RunLedger, series_of
from make_us_rich.runs.lost import close_abandoned
from make_us_rich.runs.run import identify, read_run_id
from make_us_rich.runs.train import train
from make_us_rich.schedule.plan import Plan, PlanFile, read_plan
from make_us_rich.schedule.schedule import Options, Schedule, look_around, run_once, start, stop

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "tests" / "notebooks" / "small_run.ipynb"
BY_HAND = 86_400  # seconds between two looks around that nobody takes by hand
STAND_IN = """
import time
from make_us_rich.market.exchange import BinanceClient
from make_us_rich.runs.run import Outcome, identify

def run(training):
    now = BinanceClient(training.settings.exchange_url).now()
    made = identify(training.series, training.series.interval.floor(now), training.recipe)
    (training.settings.home / "planned").touch()
    while (training.settings.home / "hold").exists():
        time.sleep(0.05)
    return Outcome(state="published", exit_class="ok", version="v" + made.cutoff.isoformat(), **made.facts)
"""
BTC = Series.parse("BTC_USDT")


@pytest.fixture(scope="module")
def exchange():
    frames = {pair: fake_candles(400, seed) for seed, pair in enumerate(("BTC_USDT", "ETH_USDT"))}
    with ReplayServer(frames, label="synthetic candles") as server:
        server.clock.advance("-100h")
        yield server


@pytest.fixture
def settings(exchange, tmp_path, monkeypatch):
    exchange.faults = Faults()
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    return get_settings(
        home=tmp_path / "store", runs=tmp_path / "runs", exchange_url=exchange.url, history_days=5, deadline=LONG
    )


@pytest.fixture
def ledger(settings):
    settings.home.mkdir(exist_ok=True)
    engine = connect(settings.db_url)
    migrate(engine)
    yield RunLedger(engine)
    engine.dispose()


def recorded(settings, ledger, exchange, series=BTC, recipe="default", **options):
    "One recorded training by the small notebook."
    options = TrainOptions(**{"history_days": 5, "notebook": NOTEBOOK, "now": exchange.clock.now()} | options)
    return train(series, load_recipe(recipe), settings=settings, ledger=ledger, options=options)


def test_short_month(tmp_path):
    "Kernels die, an outage, a full disk, a worker and two schedules killed: one true outcome each, no orphan, no half version, alerts."
    command = [
        sys.executable,
        str(ROOT / "bench" / "simulated_month.py"),
        "--pairs",
        "2",
        "--hours",
        "9",
        "--seed",
        "3",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout[: done.stdout.index("}\n", done.stdout.index('"alerts"')) + 1])
    assert figures["states"]["failed: disk_full"] == 2 and figures["states"]["failed: exchange"] == 2
    assert figures["events"] == {"outage hours": 1, "worker killed": 1, "schedule killed": 2}


@pytest.mark.usefixtures("warm")
def test_recorded_run_of_a_real_notebook_with_its_page(settings, ledger, exchange):  # F27, F30, F95
    def start_run(act="", **more):
        return recorded(settings, ledger, exchange, parameters={"act": act}, pause=60, **more)

    killed = start_run("os.kill(os.getpid(), signal.SIGKILL)")
    row = ledger.find(killed.run_id)
    assert (row.state, row.exit_class, row.attempts) == (
        "failed",
        "kernel_died",
        1,
    ) and row.retry_at > pd.Timestamp.now("UTC")
    assert Path(row.notebook).name == "train.failed.ipynb" and Path(row.log).exists()
    full = start_run("raise OSError(28, 'No space left on device')")
    row = ledger.find(full.run_id)
    assert (row.exit_class, row.retry_at, row.attempts) == ("disk_full", None, 2)
    assert row.reason.startswith("disk full: OSError: [Errno 28]")
    idle = start_run()  # a schedule leaves a failure that no retry helps as it is
    assert (
        idle.state == "skipped"
        and "that run was failed (disk_full: disk full" in idle.reason
        and ledger.find(full.run_id).reason == row.reason
    )
    fine = start_run(again=True)
    row = ledger.find(fine.run_id)
    assert (row.state, row.version, row.attempts, row.exit_class) == ("published", fine.version, 3, "ok")
    assert start_run().reason.startswith(
        f"nothing to do: no closed candle after {fine.cutoff} and the same recipe; that run was published"
    )

    page = Path(keep_page(fine, settings).page)
    assert page.name == "train.html" and outside_requests(page.read_text()) == [] and "A small run" in page.read_text()
    assert ModelStore.of(settings).page("BTC_USDT", fine.version) == page.read_bytes()


@pytest.mark.usefixtures("warm")
def test_a_version_that_is_gone_is_made_again_when_a_person_asks(settings, ledger, exchange):
    first = recorded(settings, ledger, exchange)
    shutil.rmtree(settings.home / "models")
    assert recorded(settings, ledger, exchange).state == "skipped"  # a schedule goes by its ledger
    again = recorded(settings, ledger, exchange, again=True)
    assert (again.state, ledger.find(first.run_id).attempts, ledger.find(first.run_id).version) == (
        "published",
        2,
        again.version,
    )


@pytest.mark.usefixtures("warm")
def test_pooled_run_has_its_account_and_comes_first(settings, ledger, exchange):
    said = []
    act = "read = CandleStore.read; CandleStore.read = lambda self, pair, *a, **k: read(self, 'BTC_USDT', *a, **k)"
    pooled = recorded(
        settings,
        ledger,
        exchange,
        Series.parse("POOLED_ALL"),
        recipe="pooled",
        tell=said.append,
        parameters={"pair": "POOLED_ALL", "act": act},
        feed=(BTC, Series.parse("GONE_USDT")),
    )
    row = ledger.find(pooled.run_id)
    assert (row.pair, row.recipe, row.state, row.version) == ("POOLED_ALL", "pooled", "published", pooled.version)
    assert ModelStore.of(settings).champion("POOLED_ALL").version == row.version
    assert said[0].startswith("GONE_USDT is not up to date for the pooled run: ") and said[1].startswith("cell 1 of")
    assert (settings.candles_dir / "BTC_USDT" / "1h.parquet").exists()
    plan = read_plan("- ETH_USDT")
    states = run_once(Schedule(settings, plan, Options(jobs=1, runner="stand_in:run")))
    assert list(states) == ["POOLED_ALL/1h/pooled", "ETH_USDT/1h/finetune"]
    assert [entry.state for entry in states.values()] == ["skipped", "published"]  # once a week is enough for the first


def test_wrong_input_before_a_kernel_is_an_account_too(settings, ledger, exchange):
    unknown = recorded(settings, ledger, exchange, Series.parse("DOGE_USDT"))
    row = ledger.find(unknown.run_id)
    assert (row.state, row.exit_class, row.retry_at) == ("failed", "no_data", None) and "DOGE" in row.reason
    exchange.faults = Faults(status=503)
    away = recorded(settings, ledger, exchange, Series.parse("ETH_USDT"))
    row = ledger.find(away.run_id)
    assert (row.state, row.exit_class) == ("failed", "exchange") and row.retry_at is not None


@pytest.mark.usefixtures("warm")
def test_ledger_was_away_when_the_run_ended(settings, ledger, exchange, monkeypatch):  # F35
    monkeypatch.setattr("make_us_rich.runs.train._patiently", lambda write, seconds=20: None)
    first = recorded(settings, ledger, exchange)
    assert (first.state, ledger.find(first.run_id).state) == ("published", "running")
    monkeypatch.undo()
    again = recorded(settings, ledger, exchange)
    row = ledger.find(first.run_id)
    assert (row.state, row.version, again.state) == ("published", first.version, "skipped")
    assert len(ModelStore.of(settings).versions("BTC_USDT")) == 1


def test_two_machines_one_run(database_url):  # noqa: F811
    engine = connect(database_url)
    migrate(engine)
    noon = pd.Timestamp("2026-11-24T12:00Z")
    run, runs = identify(BTC, noon, load_recipe("default")), Path("runs")
    ledger = RunLedger(engine, lambda: noon)
    assert [ledger.begin(run, runs), ledger.begin(run, runs)] == [1, None]
    ledger.finish(run, "refused", reason="why")
    assert [ledger.begin(run, runs), ledger.begin(run, runs, again=["refused"])] == [None, 2]
    ledger.finish(run, "published", version="v")
    ledger.finish(run, "failed")
    (row,) = ledger.rows(Pair.parse("BTC_USDT"), state="published", since=noon)
    assert (row.version, row.started_at, row.cutoff) == ("v", noon, noon)
    assert ledger.find(str(row.id)).run_id == run.text and ledger.forget(noon + pd.Timedelta("1s")) == 1
    engine.dispose()


def test_a_plan_of_four_hour_candles_only(settings, exchange, ledger):
    "HOUSE row 14: series of another interval are planned, trained and told like those of the hour."
    plan = read_plan("- BTC_USDT/4h\n- {pair: ETH_USDT, interval: 4h}")
    options = Options(jobs=1, runner="stand_in:run")
    states = run_once(Schedule(settings, plan, options))
    assert list(states) == ["POOLED_ALL/4h/pooled", "BTC_USDT/4h/finetune", "ETH_USDT/4h/finetune"]
    assert [entry.state for entry in states.values()] == ["published"] * 3, states
    assert {str(series_of(row)) for row in ledger.rows()} == {"POOLED_ALL/4h", "BTC_USDT/4h", "ETH_USDT/4h"}
    assert {row.cutoff for row in ledger.rows()} == {exchange.clock.now().floor("4h")}
    assert ledger.rows(BTC) == [] and len(ledger.rows(Pair.parse("BTC_USDT"))) == 1
    again = run_once(Schedule(settings, plan, options))
    assert [entry.state for entry in again.values()] == ["skipped"] * 3


@pytest.mark.usefixtures("warm")
def test_a_real_notebook_of_four_hour_candles(settings, ledger):
    four = Series.parse("BTC_USDT/4h")
    frames = {"BTC_USDT": fake_candles(400, 5, interval="4h")}
    with ReplayServer(frames, interval="4h", label="synthetic candles") as slow:
        there = settings.model_copy(update={"exchange_url": slow.url, "home": settings.home / "four"})
        made = recorded(there, ledger, slow, four, history_days=20)
    assert (made.state, made.interval) == ("published", "4h"), made.reason
    store = ModelStore.of(there)
    assert store.champion(four).version == made.version and store.champion(BTC) is None
    assert Path(made.notebook).parent.name.endswith("-4h") and ledger.find(made.run_id).interval == "4h"


@pytest.mark.usefixtures("warm")
def test_a_rolled_back_version_does_not_come_back(settings, exchange, ledger):
    "HOUSE row 1: whoever makes up for a dead runner respects what a person has taken back."
    first = recorded(settings, ledger, exchange)
    exchange.clock.advance("1h")
    second = recorded(settings, ledger, exchange)
    store = ModelStore.of(settings)
    assert store.rollback(BTC) == first.version
    ledger.begin(read_run_id(second.run_id), settings.runs, again=["published"])  # as if its runner had died
    (Path(second.notebook).parent / "outcome.json").unlink()
    (row,) = close_abandoned(ledger, settings)
    assert (row.state, row.version) == ("published", second.version)
    assert store.champion(BTC).version == first.version
    exchange.clock.advance("-1h")


def test_down_for_six_hours_is_one_run_for_the_newest_candle(settings, exchange, ledger):  # F36
    options = Options(jobs=1, runner="stand_in:run", pause=0.2)
    plan = read_plan("pairs: [BTC_USDT, ETH_USDT]\npretrain: false")
    run_once(Schedule(settings, plan, options))
    before = exchange.clock.now()
    exchange.clock.advance("6h")
    states = run_once(Schedule(settings, plan, options))
    assert [s.state for s in states.values()] == ["published"] * 2
    cutoffs = sorted({r.cutoff for r in ledger.rows()})
    assert cutoffs == [before.floor("h"), exchange.clock.now().floor("h")] and len(ledger.rows()) == 4
    states = run_once(Schedule(settings, plan, options))
    assert all(s.state == "skipped" and "asks for a run; that one was published" in s.note for s in states.values())


def test_a_training_longer_than_the_interval_never_overlaps_and_is_told(settings, exchange, ledger):  # F37
    settings.home.mkdir(exist_ok=True)
    (settings.home / "hold").touch()
    schedule = Schedule(
        settings, Plan(read_plan("- BTC_USDT").entries, ""), Options(jobs=2, tick=BY_HAND, runner="stand_in:run")
    )
    start(schedule)
    try:
        wait_for(
            lambda: len(ledger.rows(state="running")) == 1 and (settings.home / "planned").exists(),
            what="the first run",
        )
        for _ in range(5):
            exchange.clock.advance("1h")
            look_around(schedule)
        assert len(ledger.rows(state="running")) == 1
        assert "retrain/BTC_USDT/1h/finetune" in schedule.watch.alerts.open
        (settings.home / "hold").unlink()
        newest = exchange.clock.now().floor("h")
        wait_for(
            lambda: any(r.cutoff == newest and r.state == "published" for r in ledger.rows()),
            what="the run of the newest hour",
        )
        assert len(ledger.rows()) == 2, [(r.cutoff, r.state) for r in ledger.rows()]
        look_around(schedule)
        assert not schedule.watch.alerts.open
    finally:
        assert stop(schedule)


def test_killed_schedule_leaves_no_orphan(settings, exchange, ledger, tmp_path):  # F29
    settings.home.mkdir(exist_ok=True)
    (settings.home / "hold").touch()
    (tmp_path / "pairs.yaml").write_text("pairs: [BTC_USDT]\npretrain: false\n")
    program = f"""
from pathlib import Path

from make_us_rich.core.settings import get_settings
from make_us_rich.schedule.plan import PlanFile
from make_us_rich.schedule.schedule import Options, Schedule, run_forever
settings = get_settings(home={str(settings.home)!r}, runs={str(settings.runs)!r}, exchange_url={exchange.url!r})
run_forever(Schedule(settings, PlanFile(Path({str(tmp_path / "pairs.yaml")!r})), Options(runner="stand_in:run")), wait=1)
"""
    for end in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"OMP_NUM_THREADS": "1"})
        wait_for(lambda: ledger.rows(state="running"), what="a run")
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        process.send_signal(end)
        process.wait(LONG)
        wait_for(lambda family=family: all(map(gone, family)), what="the end of what it had started")
        assert len(ledger.rows(state="running")) == 1  # nobody was there to say otherwise
        ledger.finish(ledger.rows()[0].run_id, "failed")
        exchange.clock.advance("1h")


def test_the_list_is_read_again_and_a_bad_one_is_told(settings, exchange, tmp_path):
    (tmp_path / "pairs.yaml").write_text("pairs: [BTC_USDT]\npretrain: false\n")
    schedule = Schedule(
        settings, PlanFile(tmp_path / "pairs.yaml"), Options(jobs=1, tick=BY_HAND, runner="stand_in:run")
    )
    start(schedule)
    try:
        wait_for(
            lambda: (
                schedule.states.get("BTC_USDT/1h/finetune")
                and schedule.states["BTC_USDT/1h/finetune"].state == "published"
            )
        )
        (tmp_path / "pairs.yaml").write_text("pairs: [BTC_USDT, {pair: ETH_USDT, minuts: 2}]\n")
        look_around(schedule)
        assert "did you mean minutes?" in schedule.watch.alerts.open["plan/file"].text
        (tmp_path / "pairs.yaml").write_text("pairs: [ETH_USDT, {pair: BTC_USDT, recipe: nonsense}]\npretrain: false\n")
        look_around(schedule)
        wait_for(
            lambda: (
                schedule.states.get("ETH_USDT/1h/finetune")
                and schedule.states["ETH_USDT/1h/finetune"].state == "published"
            )
        )
        wait_for(lambda: schedule.states["BTC_USDT/1h/nonsense"].problem)
        look_around(schedule)
        assert list(schedule.watch.alerts.open) == ["plan/BTC_USDT/1h/nonsense"]
        assert {job.id for job in schedule.jobs.get_jobs()} == {
            "look",
            "tidy",
            "ETH_USDT/1h/finetune",
            "BTC_USDT/1h/nonsense",
        }
    finally:
        stop(schedule)
