"""Pairs at more than one interval, and homes without the hour: what each route and the client answer."""

import json

import httpx
import pandas as pd
import pytest
from api_kit import make_world
from tiny_model import publish, sample

from make_us_rich.api.app import create_app
from make_us_rich.api.client import Client
from make_us_rich.api.examples import NOW, add_people
from make_us_rich.core.database import connect, migrate
from make_us_rich.core.settings import get_settings
from make_us_rich.market.candles import SAMPLE_LABEL
from make_us_rich.market.exchange import BinanceClient
from make_us_rich.market.replay import ReplayServer
from make_us_rich.registry.store import ModelStore
from make_us_rich.serving.service import Service

ABOUT_A_PAIR = (
    "/v1/forecasts/BTC_USDT",
    "/v1/track-record/BTC_USDT",
    "/v1/models/BTC_USDT",
    "/v1/forecasts/BTC_USDT/history",
)


@pytest.fixture(params=["4h only", "1h and 4h"])
def world(request, tmp_path):
    series = ["BTC_USDT/4h"] if request.param == "4h only" else ["BTC_USDT/4h", "BTC_USDT/1h"]
    world = make_world(tmp_path / "home", series)
    world.usual = "4h" if request.param == "4h only" else "1h"
    world.intervals = [each.partition("/")[2] for each in series]
    yield world
    world.engine.dispose()


@pytest.mark.parametrize("path", ABOUT_A_PAIR)
def test_a_question_about_a_pair(world, path):
    member = world.client()
    assert member.get(path).json()["interval"] == world.usual
    for interval in world.intervals:
        assert member.get(path, params={"interval": interval}).json()["interval"] == interval
    missing = member.get(path, params={"interval": "1d"})
    assert (missing.status_code, missing.json()["error"]) == (404, "unknown_pair")
    assert missing.json()["message"].startswith("BTC_USDT 1d is not served; served are: ")
    wrong = member.get(path, params={"interval": "5h"})
    assert (wrong.status_code, wrong.json()["error"]) == (422, "bad_interval")


def test_lists_hold_every_series(world):
    member = world.client()
    for path, name in (("/v1/forecasts", "forecasts"), ("/v1/models", "models"), ("/v1/overview", "pairs")):
        assert [line["interval"] for line in member.get(path).json()[name]] == world.intervals
    record = member.get("/v1/track-record").json()
    assert (record["interval"], [line["interval"] for line in record["series"]]) == (world.usual, world.intervals)
    assert world.client(None).get("/readyz").status_code == 200
    assert member.get("/check_models_number").json()["number"] == len(world.intervals)
    predicted = member.put("/predict", params={"currency": "btc", "compare": "usdt"})
    assert predicted.json()["interval"] == world.usual


def test_the_client_asks_for_an_interval(world, monkeypatch):
    client = Client("http://127.0.0.1:9", world.tokens["member"])
    client._http = world.client()
    client._http.base_url = httpx.URL("http://127.0.0.1")
    assert client.forecast("BTC_USDT").interval == world.usual
    assert client.forecast("BTC_USDT", "4h").interval == client.forecast("BTC_USDT/4h").interval == "4h"
    assert client.track_record("BTC_USDT", "4h")["interval"] == "4h"
    assert {forecast.interval for forecast in client.forecasts()} == set(world.intervals)


def test_openapi_tells_it(world):
    schema = world.client(None).get("/openapi.json").json()
    for path, calls in schema["paths"].items():
        for call in calls.values():
            if "{pair}" in path:
                interval = next(each for each in call["parameters"] if each["name"] == "interval")
                assert (interval["required"], "4h" in interval["schema"]["enum"]) == (False, True)


def test_a_home_with_nothing_but_a_model_of_four_hours(tmp_path):
    "With a real model in a real store: the service gets ready, forecasts, and says of which interval."
    frame, home = sample("BTC_USDT"), tmp_path / "home"
    opening = frame["timestamp"].iloc[3000].floor("4h") + pd.Timedelta("5s")
    with ReplayServer({"BTC_USDT": frame}, now=opening, label=SAMPLE_LABEL) as exchange:
        store = ModelStore.of(get_settings(home=home), exchange.clock.now)
        publish(store, "BTC_USDT/4h", opening.floor("4h") - pd.Timedelta("8h"))
        settings = get_settings(home=home, exchange_url=exchange.url)
        engine = connect(settings.db_url)
        migrate(engine)
        service = Service(settings, client=BinanceClient(exchange.url), engine=engine, clock=exchange.clock.now)
        service.start()
        world = make_world(tmp_path / "other")
        world.app = create_app(service, engine, settings, lambda: NOW)
        world.tokens = add_people(engine)
        assert world.client(None).get("/readyz").status_code == 200
        told = world.client().get("/v1/forecasts").json()["forecasts"]
        assert [(each["pair"], each["interval"]) for each in told] == [("BTC_USDT", "4h")], json.dumps(service.status())
        one = world.client().get("/v1/forecasts/BTC_USDT").json()
        assert one == told[0] and one["interval"] == "4h"
        service.stop()
        world.engine.dispose()
