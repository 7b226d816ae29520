"""The whole life of a home that has models of four hours only: trained, judged, served, told, settled, recomputed, rolled back."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
from fastapi.testclient import TestClient
from longer_candles import resampled
from test_cli import mkrich

from make_us_rich.api.app import create_app
from make_us_rich.api.examples import add_people
from make_us_rich.core.database import connect, migrate
from make_us_rich.core.settings import get_settings
from make_us_rich.market.candles import SAMPLE_LABEL, load_sample
from make_us_rich.market.replay import ReplayServer
from make_us_rich.registry.examples import publish_example
from make_us_rich.registry.store import ModelStore
from make_us_rich.runs.ledger import RunLedger
from make_us_rich.serving.service import Service

NAME, STEP = "BTC_USDT/4h", pd.Timedelta("4h")


@pytest.fixture(scope="module")
def exchange():
    frame = resampled(load_sample(), "4h")
    closed = frame["timestamp"].iloc[-10]
    with ReplayServer(
        {"BTC_USDT": frame}, interval="4h", now=closed + pd.Timedelta("5s"), label=SAMPLE_LABEL
    ) as server:
        server.closed = closed
        yield server


@pytest.fixture(scope="module")
def home(exchange, tmp_path_factory):
    "A home after its first training: the real notebook and the real gate, one member of one epoch."
    home = tmp_path_factory.mktemp("home")
    small = ("--set", "members=1", "--set", "epochs=1")
    done = mkrich("train", NAME, *small, "--history-days", "720", home=home, url=exchange.url)
    assert done.returncode in (0, 4), done.stdout + done.stderr
    return home


def said(*args, home, url=""):
    "What a command says, in one line; it must succeed."
    done = mkrich(*args, home=home, url=url, COLUMNS="200")
    assert done.returncode == 0, done.stdout + done.stderr
    return " ".join(done.stdout.split())


@pytest.fixture(scope="module")
def world(exchange, home):
    "The API over a service whose clock is the exchange's."
    settings = get_settings(home=home / "store", exchange_url=exchange.url, poll_seconds=5)
    engine = connect(settings.db_url)
    migrate(engine)
    service = Service(settings, engine=engine, clock=exchange.clock.now, jitter=lambda: 1.0).start()
    app = create_app(service, engine, settings, exchange.clock.now)
    token = add_people(engine, exchange.clock.now())["member"]
    yield SimpleNamespace(
        service=service, api=TestClient(app, "http://127.0.0.1", headers={"Authorization": f"Bearer {token}"})
    )
    service.stop()


def at_candle(exchange, service, number):
    "The moment after this many more candles have closed."
    exchange.clock.set(exchange.closed + number * STEP + pd.Timedelta("5s"))
    service.tick()


def test_its_gate_judged_candles_of_four_hours(home, exchange):
    store = ModelStore.of(get_settings(home=home / "store"))
    assert [str(series) for series in store.series()] == [NAME]
    champion = store.load(NAME).manifest
    assert (champion.interval, champion.passed) == ("4h", True)
    assert pd.Timestamp(champion.cutoff) == exchange.closed
    (judged,) = RunLedger(connect(f"sqlite:///{home / 'store' / 'mkrich.db'}")).rows()
    assert (judged.interval, judged.state) in {("4h", "published"), ("4h", "refused")}
    assert bool(judged.reason) == (judged.state == "refused")
    listed = said("models", home=home)
    assert "BTC_USDT 4h" in listed and "champion" in listed and champion.version in listed
    assert listed == said("models", NAME, home=home)


def test_it_is_ready_and_its_forecasts_come_and_are_settled(world, exchange):
    news = world.service.events.subscribe()
    for number in range(4):
        at_candle(exchange, world.service, number)
        (told,) = world.api.get("/v1/forecasts").json()["forecasts"]
        assert (told["pair"], told["interval"], told["status"]) == ("BTC_USDT", "4h", "ok"), told["sentence"]
        assert pd.Timestamp(told["target_open"]) == exchange.closed + number * STEP
        assert pd.Timestamp(told["target_close"]) - pd.Timestamp(told["target_open"]) == STEP
        assert world.api.get("/v1/forecasts/BTC_USDT").json() == told
    assert world.api.get("/readyz").json() == {"status": "ready"}
    assert world.service.status()["degraded"] == []
    heard = [(event.kind, event.pair, event.interval) for event in iter(lambda: news.get(0), None)]
    kinds = ["forecast"] + ["settled", "forecast"] * 2  # the first one that is settled is no news
    assert heard == [(kind, "BTC_USDT", "4h") for kind in kinds]
    record = world.api.get("/v1/track-record").json()
    assert (record["interval"], record["n"], record["open"], record["holes"]) == ("4h", 3, 1, [])


def test_the_commands_say_the_same(world, home, exchange):
    shown = world.service.answer(NAME).forecast
    (told,) = json.loads(mkrich("forecast", "--json", home=home, url=exchange.url).stdout)
    assert (told["interval"], told["target_open"], told["model_version"]) == (
        "4h",
        shown.target_open,
        shown.model_version,
    )
    assert told["median"] == pytest.approx(shown.median, rel=1e-9)
    record = said("record", home=home)
    assert "BTC_USDT 4h" in record and "3 scored, 1 open" in record
    assert "BTC_USDT 4h: 4 forecasts on record, recomputed from closed candles, agree" in said("verify", home=home)


def test_a_rollback_is_followed_at_once(world, home, exchange):
    store = ModelStore.of(get_settings(home=home / "store"), exchange.clock.now)
    before = world.service.answer(NAME).forecast
    newer = publish_example(store, NAME, exchange.closed + STEP)
    exchange.clock.set(exchange.clock.now() + pd.Timedelta("1min"))
    world.service.tick()
    assert world.service.answer(NAME).forecast == before  # what was said about these hours stays
    at_candle(exchange, world.service, 4)
    assert world.api.get("/v1/forecasts/BTC_USDT").json()["model_version"] == newer
    assert f"BTC_USDT 4h is served by {before.model_version}" in said("rollback", NAME, home=home)
    exchange.clock.set(exchange.clock.now() + pd.Timedelta("1min"))
    world.service.tick()
    now = world.api.get("/v1/forecasts/BTC_USDT").json()
    assert (now["model_version"], now["interval"], now["status"]) == (before.model_version, "4h", "ok")
    assert pd.Timestamp(now["target_open"]) == exchange.closed + 4 * STEP
    assert "6 forecasts on record" in said("verify", NAME, home=home)
