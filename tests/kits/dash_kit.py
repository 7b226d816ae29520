"""What the tests of the dashboard, its screenshots and its benchmark share: a real API whose service was filled by hand, and a page server."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import uvicorn
from longer_candles import resampled
from servers import free_port
from sqlalchemy import Engine
from tiny_model import PAIRS, sample
from waiting import LONG, wait_for

from make_us_rich.api.app import create_app
from make_us_rich.api.examples import add_people
from make_us_rich.core.database import connect, migrate, session
from make_us_rich.core.settings import Settings, get_settings, utc_iso
from make_us_rich.core.storage import write_atomic
from make_us_rich.core.tables import ForecastRow, RunRow
from make_us_rich.dashboard.server import PageOptions, Running, start_dashboard
from make_us_rich.market.candles import SAMPLE_LABEL
from make_us_rich.market.exchange import BinanceClient
from make_us_rich.market.replay import ReplayServer
from make_us_rich.market.series import Series
from make_us_rich.models.baselines import LEVELS
from make_us_rich.serving.forecast import Forecast
from make_us_rich.serving.ledger import ledger_row
from make_us_rich.serving.refresh import SeriesState
from make_us_rich.serving.service import Service

HOUR = pd.Timedelta("1h")
VERSION = "20231230T230000Z-0123456789ab"
BELL = np.array(
    [
        -1.96,
        -1.64,
        -1.28,
        -1.04,
        -0.84,
        -0.67,
        -0.52,
        -0.39,
        -0.25,
        -0.13,
        0.0,
        0.13,
        0.25,
        0.39,
        0.52,
        0.67,
        0.84,
        1.04,
        1.28,
        1.64,
        1.96,
    ]
)
TAILS = BELL * (0.86 + 0.07 * np.abs(BELL))  # hourly returns have fat tails


def forecasts_of(series: Series, frame: pd.DataFrame, rows: np.ndarray) -> tuple[list[Forecast], list[list[float]]]:
    "For each row, ranges from the volatility of the days before it, and those of the last month: a stand-in for a model that costs no training."
    pair, step = str(series.pair), series.interval.delta
    moves = np.log(frame["close"]).diff().fillna(0)
    near = np.sqrt(
        (moves**2).ewm(halflife=14).mean() * 0.6 + (moves**2).rolling(168, min_periods=1).mean() * 0.4
    ).to_numpy()
    wide = moves.rolling(720, min_periods=24).std().bfill().to_numpy()
    answers, bases = [], []
    for i in rows:
        last, opens = float(frame["close"].iloc[i]), frame["timestamp"].iloc[i] + step
        prices = last * np.exp(near[i] * (TAILS + 0.08 * np.sin(i)))
        low, high = prices[2], prices[18]
        decimals = max(2, 4 - int(np.floor(np.log10(last))))
        facts = {
            "pair": pair,
            "interval": str(series.interval),
            "status": "ok",
            "as_of": utc_iso(opens),
            "target_open": utc_iso(opens),
            "target_close": utc_iso(opens + step),
            "sentence": f"{pair} at {opens + step:%H:%M} UTC: between {low:,.{decimals}f} and {high:,.{decimals}f} with 80 % probability, after {last:,.{decimals}f}",
            "last_close": last,
            "median": float(prices[10]),
            "quantiles": dict(zip(LEVELS, prices.tolist(), strict=True)),
            "width": 1.0,
            "p_up": round(0.5 + 0.04 * float(np.sin(i)), 3),
            "model_version": VERSION,
            "model_age_hours": 24.0,
            "data_age_minutes": 2.0,
            "source": SAMPLE_LABEL,
            "label": SAMPLE_LABEL,
            "run_id": "run",
            "reliability": "On 1,440 test hours its ranges beat 'no change' by 2.6 % and the 80 % range held 80.4 % of the hours.",
        }
        answers.append(Forecast(**facts))
        bases.append((last * np.exp(wide[i] * TAILS)).tolist())
    return answers, bases


@dataclass
class Stage:
    "A real API on loopback, its parts, and people with tokens."

    settings: Settings
    engine: Engine
    service: Service
    tokens: dict[str, str]
    now: pd.Timestamp
    app: Any
    server: uvicorn.Server | None = None
    thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.port}"

    def state(self, pair: str = "BTC_USDT") -> SeriesState:
        return self.service.states[Series.parse(pair)]

    def forecast(self, pair: str = "BTC_USDT") -> Forecast:
        return self.state(pair).answer.forecast

    def show(self, forecast: Forecast) -> None:
        "Answer with this from now on, and tell who listens."
        self.service.states[forecast.series].answering.show(forecast, self.now)
        self.service.events.send("forecast", self.now, forecast.pair, forecast.interval)

    def change(self, pair: str = "BTC_USDT", **facts: Any) -> None:
        self.show(self.forecast(pair).model_copy(update=facts))

    def up(self) -> None:
        "Start to answer."
        self.server = uvicorn.Server(
            uvicorn.Config(self.app, port=self.settings.port, log_level="error", timeout_graceful_shutdown=1)
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started or not self.thread.is_alive(), what="the API")
        assert self.thread.is_alive(), f"the API did not start at {self.url}; is the port taken?"

    def down(self) -> None:
        "Stop to answer."
        if self.server and self.thread:
            self.server.should_exit = True
            self.thread.join(LONG)
            assert not self.thread.is_alive(), "the API did not stop"


def make_stage(home: Path, hours: int = 500, interval: str = "1h") -> Stage:
    "Two pairs with so many hours (or longer candles) of history from the sample; not answering yet."
    settings = get_settings(home=home, port=free_port(), exchange_url="http://127.0.0.1:9")
    frames = {pair: resampled(sample(pair), interval) for pair in PAIRS}
    now = frames[PAIRS[0]]["timestamp"].iloc[-1] + pd.Timedelta("17min")  # the last candle is the open one
    engine = connect(settings.db_url)
    migrate(engine)
    service = Service(settings, engine=engine, clock=lambda: now)
    service.start = service.run_forever = service.tick = lambda *_: None
    service.ledger.clock = lambda: now
    known = {pair: Series.parse(pair, interval) for pair in PAIRS}
    with ReplayServer(frames, interval=interval, now=now, label=SAMPLE_LABEL) as exchange:
        for series in known.values():
            service.parts.candles.update(BinanceClient(exchange.url), series, rows=hours + 60)
    for pair, series in known.items():
        _fill(service, series, frames[pair].iloc[:-1].reset_index(drop=True), hours, now)
    _add_runs(engine, home, now, interval)
    tokens = add_people(engine, now)
    return Stage(
        settings, engine, service, tokens, now, create_app(service, engine, settings, lambda: now, heartbeat=1.0)
    )


def _add_runs(engine: Engine, home: Path, now: pd.Timestamp, interval: str) -> None:
    "One run with its page, which made the model, and one that failed."
    page = home / "runs" / "train.html"
    page.parent.mkdir(parents=True)
    page.write_text("<!doctype html><title>run</title><h1>The executed notebook</h1><script>parent.bad = 1</script>")
    plan = {
        "pair": "BTC_USDT",
        "interval": interval,
        "cutoff": now.floor(interval),
        "recipe": "finetune",
        "recipe_hash": "0" * 16,
        "host": "here/1",
        "attempts": 1,
    }
    (page.parent / "log.txt").write_text("cell 4 of 18: no room <b>left</b>")
    plan["log"] = str(page.parent / "log.txt")
    facts = {
        "exit_class": "",
        "reason": "",
        "version": VERSION,
        "notebook": str(page.with_suffix(".ipynb")),
        "seconds": 11.7,
        "finished_at": now,
    }
    failed = {
        "exit_class": "no_space",
        "reason": "the disk of the store is full; free some room",
        "version": "",
        "notebook": "",
    }
    with session(engine) as s:
        s.add(RunRow(run_id="run", state="published", started_at=now - HOUR, **plan, **facts))
        s.add(RunRow(run_id="run-2", state="failed", started_at=now, **plan, **facts | failed))


def _fill(service: Service, series: Series, frame: pd.DataFrame, hours: int, now: pd.Timestamp) -> None:
    answers, bases = forecasts_of(series, frame, np.arange(len(frame) - hours, len(frame)))
    lines = [
        ledger_row(f, base, pd.Timestamp(f.target_open) + pd.Timedelta("1s"))
        for f, base in zip(answers, bases, strict=True)
    ]
    with session(service.engine) as s:
        s.add_all([ForecastRow(**line) for line in lines])
    service.ledger.settle(series, frame)
    state = SeriesState(series)
    state.answering.show(answers[-1], now)
    state.choice.model = SimpleNamespace(manifest=SimpleNamespace(version=VERSION, cutoff=now))
    state.settling.count(service.ledger)
    service.states[series] = state


@contextlib.contextmanager
def answering_stage(home: Path, hours: int = 60, **settings: Any) -> Iterator[Stage]:
    "A stage that answers, put away at the end."
    made = make_stage(home, hours)
    made.settings = made.settings.model_copy(update=settings)
    made.up()
    try:
        yield made
    finally:
        made.down()
        made.engine.dispose()


@contextlib.contextmanager
def page_server(stage: Stage, token: str | None = None, local: bool = False, **options: Any) -> Iterator[Running]:
    "Voila for this API; `local` logs the viewer in as local mode does."
    settings = (
        stage.settings if local else stage.settings.model_copy(update={"home": stage.settings.home / "elsewhere"})
    )
    if local:
        write_atomic(settings.home / "local-token", stage.tokens["admin"].encode(), mode=0o600)
    running = start_dashboard(settings, PageOptions(port=free_port(), token=token, **options))
    try:
        yield running
    finally:
        running.stop()
