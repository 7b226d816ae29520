"""HAR-t as fallback champion: the graph is the model, a refused network leaves it serving, the breaker of bad records ends in it."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from tiny_model import publish

from make_us_rich.core.database import connect, migrate
from make_us_rich.core.settings import get_settings, utc_iso
from make_us_rich.evaluation.checks import Check, Verdict
from make_us_rich.evaluation.scores import evaluate
from make_us_rich.market.candle_store import CandleStore
from make_us_rich.market.candles import SAMPLE_LABEL, load_sample, next_returns, scorable_rows
from make_us_rich.market.replay import ReplayServer
from make_us_rich.market.series import Series
from make_us_rich.models.baselines import LEVELS
from make_us_rich.models.features import split
from make_us_rich.models.har import HarT
from make_us_rich.models.har_graph import WINDOW, fallback_graph, fit_fallback
from make_us_rich.models.recipe import load_recipe
from make_us_rich.registry.served_model import graph_returns, open_graph
from make_us_rich.registry.store import ModelStore
from make_us_rich.runs.ledger import RunLedger
from make_us_rich.runs.publish import publish_fallback, publish_or_refuse
from make_us_rich.runs.report import RunPlace, open_run, rows_to_test
from make_us_rich.runs.train import train
from make_us_rich.serving.forecasting import forecast_pair
from make_us_rich.serving.service import Service

HOUR = pd.Timedelta("1h")
CLOSED = pd.Timestamp("2023-12-20T12:00Z")  # the newest candle has closed when the first run begins
POOR = {"members": 1, "epochs": 2, "steps_per_epoch": 3, "hidden_size": 8}  # learns next to nothing


@pytest.fixture(scope="module")
def exchange():
    with ReplayServer({"BTC_USDT": load_sample()}, now=CLOSED + pd.Timedelta("5s"), label=SAMPLE_LABEL) as server:
        yield server


@pytest.fixture(scope="module")
def settings(exchange, tmp_path_factory):
    home = tmp_path_factory.mktemp("fallback")
    return get_settings(
        home=home / "store", runs=home / "runs", exchange_url=exchange.url, poll_seconds=5, deadline=900
    )


@pytest.fixture(scope="module")
def first(settings):
    "The first run of a pair, by the real runner, with a network that cannot pass."
    settings.home.mkdir(exist_ok=True)
    engine = connect(settings.db_url)
    migrate(engine)
    recipe = load_recipe("default", **POOR)
    return train(Series.parse("BTC_USDT"), recipe, settings=settings, ledger=RunLedger(engine))


def test_the_graph_is_the_model():
    frame = (
        load_sample("SOL_USDT")
        .tail(5_000)
        .reset_index(drop=True)
        .drop(index=[4_300, 4_301, 4_302])
        .reset_index(drop=True)
    )
    har = fit_fallback(frame, 4_000)
    session = open_graph(fallback_graph(har, frame))
    rows = scorable_rows(frame, np.arange(4_000, len(frame)), window=WINDOW)
    assert len(rows) > 800

    def predict(candles, times, width=1.0):
        return session.run(None, {"candles": candles, "open_time": times, "width": np.full(len(candles), width)})

    Q, wanted = graph_returns(predict, WINDOW, frame, rows), har.quantiles(frame, rows)
    assert np.abs(Q - wanted).max() < 1e-6 * np.abs(wanted).max()
    wide = graph_returns(lambda *x: predict(*x, 1.3), WINDOW, frame, rows)
    assert np.allclose(wide - wide[:, [10]], 1.3 * (Q - Q[:, [10]]), atol=1e-12) and np.allclose(
        wide[:, 10], Q[:, 10], atol=1e-12
    )
    assert fallback_graph(har, frame) == fallback_graph(fit_fallback(frame, 4_000), frame)  # the same bytes


def test_a_refused_network_leaves_har_t_serving(first, settings, exchange):
    assert (first.state, first.exit_code) == ("refused", 4) and "champion's on the same" in first.reason
    store = ModelStore.of(settings)
    (only,) = store.versions("BTC_USDT")
    assert only.champion and only.manifest.recipe["name"] == "HAR-t" and only.manifest.run_id == f"{first.run_id}-har-t"
    failed = {check["name"] for check in only.manifest.verdict["checks"] if not check["passed"]}
    assert only.manifest.passed and not failed
    (result,) = settings.runs.rglob("result.json")
    assert json.loads(result.read_text())["fallback"] == only.version
    page = (result.parent / "train.ipynb").read_text()
    assert f"The fallback HAR-t `{only.version}` serves." in page and "It is the fallback HAR-t" in page
    forecast = forecast_pair("BTC_USDT", store, CandleStore(settings.candles_dir), None, CLOSED + pd.Timedelta("1min"))
    assert (forecast.status, forecast.model_version) == (
        "ok",
        only.version,
    ) and "the fallback HAR-t" in forecast.reliability


def test_the_breaker_of_bad_records_ends_in_har_t(first, settings, exchange, monkeypatch):
    monkeypatch.setattr("make_us_rich.serving.choice.try_model", lambda bundle: None)
    store = ModelStore.of(settings)
    har = store.champion("BTC_USDT").version
    network = publish(store, "BTC_USDT", CLOSED)
    service = Service(settings, clock=exchange.clock.now, jitter=lambda: 1.0).start()
    try:
        shown = service.answer("BTC_USDT").forecast
        assert (shown.status, shown.model_version) == ("ok", network)
        frame = load_sample()
        frame = frame[frame["timestamp"] + HOUR <= CLOSED].tail(171).reset_index(drop=True)
        for opens, last in zip(frame["timestamp"].iloc[:-1] + HOUR, frame["close"].iloc[:-1], strict=True):
            prices = {
                level: last * (1 + 0.2 * (level - 0.5)) for level in LEVELS
            }  # a week of useless ranges under the network's name
            times = {"as_of": utc_iso(opens), "target_open": utc_iso(opens), "target_close": utc_iso(opens + HOUR)}
            bad = shown.model_copy(update=times | {"last_close": last, "quantiles": prices, "median": last})
            service.ledger.record(
                bad, [last * (1 + 0.02 * (level - 0.5)) for level in LEVELS], opens + pd.Timedelta("3s")
            )
        exchange.clock.set(CLOSED + HOUR + pd.Timedelta("5s"))
        service.tick()
        assert store.champion("BTC_USDT").version == har
        forecast = service.answer("BTC_USDT").forecast
        assert (forecast.status, forecast.model_version, forecast.target_open) == ("ok", har, utc_iso(CLOSED + HOUR))
        assert "the fallback HAR-t" in forecast.reliability
        verified = service.ledger.verify("BTC_USDT", store, service.parts.candles, since=CLOSED)
        assert (verified.checked, verified.unknown) == (2, 0)
    finally:
        service.stop()
        exchange.clock.set(CLOSED + pd.Timedelta("5s"))


def test_a_week_old_fallback_is_fitted_anew(first, settings, exchange):
    store, candles = ModelStore.of(settings), CandleStore(settings.candles_dir)
    exchange.clock.set(CLOSED + pd.Timedelta("8d5s"))
    try:
        parts = {"place": RunPlace(str(settings.home), exchange_url=exchange.url)}
        run = open_run("BTC_USDT", **parts)
        assert candles.info("BTC_USDT").last == CLOSED + pd.Timedelta("8d") - HOUR
        early = open_run("BTC_USDT", cutoff=utc_iso(CLOSED + pd.Timedelta("6d")), **parts)
        assert publish_fallback(early).sentence.startswith("BTC_USDT has a champion already")
        fresh = publish_fallback(run)
        assert fresh.version == store.champion("BTC_USDT").version and fresh.version.startswith("20231228T120000Z-")
        manifest = store.load("BTC_USDT").manifest
        assert "not_worse" in [check["name"] for check in manifest.verdict["checks"]]  # the old one was the measure
    finally:
        exchange.clock.set(CLOSED + pd.Timedelta("5s"))


def test_behind_a_better_pooled_model_it_waits_for_the_first_network(monkeypatch, tmp_path):
    run = open_run("BTC_USDT", place=RunPlace(str(tmp_path)))
    part = split(len(run.frame), run.recipe.test_size, run.recipe.val_size, run.recipe.steps).test
    knowing = {}

    def better(store, frame, rows, *_):  # what a pooled model would say that knows a little of the future
        y, Q = next_returns(frame, rows), HarT(window=WINDOW).fit(frame, int(rows[0])).quantiles(frame, rows)
        return knowing.setdefault("Q", Q + 0.1 * y[:, None])

    monkeypatch.setattr("make_us_rich.runs.publish.champion_returns", better)
    monkeypatch.setattr("make_us_rich.runs.report.champion_returns", better)
    fallback = publish_fallback(run)
    assert fallback.version == "" and fallback.waiting and "serves this pair better" in fallback.sentence
    assert run.models.champion("BTC_USDT") is None and run.models.versions("BTC_USDT") == []
    check = next(c for c in fallback.waiting.verdict.checks if c.name == "not_worse")
    assert (check.passed, fallback.waiting.verdict.passed) == (False, True)  # told, but no reason to refuse

    network = fallback_graph(fit_fallback(run.frame, part.start - 500), run.frame)  # plays the network
    result = SimpleNamespace(
        recipe=run.recipe,
        forecaster=SimpleNamespace(window=WINDOW),
        history=pd.DataFrame({"step": []}),
        cpu_seconds=1.0,
    )
    rows = rows_to_test(run, part, WINDOW)
    span = SimpleNamespace(
        scores=evaluate(run.frame, rows, {"network": HarT().fit(run.frame, int(rows[0])).quantiles(run.frame, rows)})
    )
    refused = publish_or_refuse(run, result, network, span, Verdict([Check("x", False, 0.0, "", "No.")]), fallback)
    assert (refused.state, refused.fallback, run.models.champion("BTC_USDT")) == ("refused", "", None)
    published = publish_or_refuse(run, result, network, span, Verdict([Check("x", True, 0.0, "", "Yes.")]), fallback)
    assert [step.version for step in run.models.champion("BTC_USDT").steps] == [published.version, published.fallback]
    assert run.models.load("BTC_USDT", version=published.fallback).manifest.recipe["name"] == "HAR-t"


def test_serving_it_needs_neither_torch_nor_scipy(first, settings):
    code = f"""
import sys
from make_us_rich.serving.forecasting import ModelLoader
from make_us_rich.core.settings import get_settings
from make_us_rich.registry.store import ModelStore
ModelLoader(ModelStore.of(get_settings(home={str(settings.home)!r}))).get("BTC_USDT")
print([name for name in ("torch", "scipy.optimize") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
