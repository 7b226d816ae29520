"""The ledger on SQLite and on a real PostgreSQL: exact with many writers, honest about what was changed, and the breaker."""

import numpy as np
import pandas as pd
import pytest
from forks import FORKS, preloading
from servers import database_url, postgresql  # noqa: F401
from sqlalchemy import func, select
from waiting import LONG

from make_us_rich.core.database import connect, migrate, session
from make_us_rich.core.settings import StoreError, utc_iso
from make_us_rich.core.tables import ForecastRow
from make_us_rich.evaluation.scores import evaluate
from make_us_rich.market.candles import fake_candles
from make_us_rich.models.baselines import LEVELS, MEDIAN, Base
from make_us_rich.registry.champion import Pointer
from make_us_rich.registry.versions import UNUSABLE
from make_us_rich.serving.breaker import circuit_breaker, demotions, why_suspended
from make_us_rich.serving.forecast import Forecast
from make_us_rich.serving.ledger import load_record
from make_us_rich.serving.verify import Ledger

HOUR = pd.Timedelta("1h")
FRAME = fake_candles(1203, seed=4, start="2025-01-01")
ROWS = np.arange(1000, 1200)
forks = preloading("make_us_rich.serving.verify", "psycopg")
GOOD, BAD = "20250101T000000Z-0123456789ab", "20250102T000000Z-0123456789ab"


@pytest.fixture
def engine(database_url):  # noqa: F811
    made = connect(database_url, wait=LONG)
    migrate(made)
    yield made
    made.dispose()


def forecast_of(row: int, spread: float = 0.004, version: str = GOOD) -> Forecast:
    as_of, last = FRAME["timestamp"].iloc[row] + HOUR, float(FRAME["close"].iloc[row])
    prices = last * np.exp(quantiles(spread))
    return Forecast(
        pair="BTC_USDT",
        interval="1h",
        status="ok",
        sentence="",
        as_of=utc_iso(as_of),
        target_open=utc_iso(as_of),
        target_close=utc_iso(as_of + HOUR),
        last_close=last,
        median=float(prices[MEDIAN]),
        quantiles=dict(zip(LEVELS, prices.tolist(), strict=True)),
        p_up=0.5,
        width=1.0,
        model_version=version,
        source="synthetic candles",
        label="synthetic candles",
        run_id="by-hand",
    )


def quantiles(spread: float) -> np.ndarray:
    return np.linspace(-2, 2, 21) * spread + 1e-6


def record_all(engine, rows=ROWS, spread=0.004, version=GOOD) -> int:
    ledger, base = Ledger(engine), Base("1h").quantiles(FRAME, rows)
    count = 0
    for row, other in zip(rows, base, strict=True):
        forecast = forecast_of(row, spread, version)
        prices = (forecast.last_close * np.exp(other)).tolist()
        count += ledger.record(forecast, prices, pd.Timestamp(forecast.as_of) + pd.Timedelta("2s"))
    return count


def write_and_settle(url, barrier, results):
    engine = connect(url, wait=LONG)
    barrier.wait(LONG)
    try:
        new = record_all(engine, ROWS[:40])
        abstention = Forecast(pair="BTC_USDT", interval="1h", status="abstain", reason="stale_data", sentence="")
        held_back = Ledger(engine).record(abstention, None, FRAME["timestamp"].iloc[1100])
        barrier.wait(LONG)
        results.put((new, held_back, Ledger(engine).settle("BTC_USDT", FRAME)))
    except BaseException as e:
        results.put(repr(e))
    engine.dispose()


def test_five_processes_write_and_settle_the_same_rows(engine, database_url):  # noqa: F811
    barrier, results = FORKS.Barrier(5), FORKS.Queue()
    processes = [FORKS.Process(target=write_and_settle, args=(database_url, barrier, results)) for _ in range(5)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=LONG) for _ in processes]
    for process in processes:
        process.join(LONG)
    assert [sum(column) for column in zip(*answers, strict=True)] == [40, 1, 41], answers
    rows = load_record(engine, "BTC_USDT")
    assert (len(rows), int(rows["settled"].sum()), int(rows["crps"].notna().sum())) == (41, 41, 40)


def test_the_live_record_is_the_backtest(engine):
    assert record_all(engine) == len(ROWS)
    assert record_all(engine) == 0
    ledger = Ledger(engine, clock=lambda: FRAME["timestamp"].iloc[1201])
    assert ledger.settle("BTC_USDT", FRAME.head(1201)) == len(ROWS)
    record = ledger.track_record("BTC_USDT")
    scores = evaluate(FRAME, ROWS, {"m": np.tile(quantiles(0.004), (len(ROWS), 1))}).table.loc["m"]
    found = [
        record.n,
        record.crps_bp,
        record.crps_base,
        record.crps_t,
        record.mae_naive,
        *record.hit,
        record.coverage[80].share,
    ]
    names = ["n", "crps_bp", "crps/base", "dm_t", "mae/naive", "hit", "hit_low", "hit_high"]
    wanted = [*(scores[name] for name in names), len(ROWS), scores["cov80"]]
    assert found == pytest.approx(wanted, rel=1e-9)
    assert record.badge.checks[0].passed
    assert record.to_dict()["badge"]["colour"] in ("green", "grey", "red")
    assert ledger.track_record("BTC_USDT", since=FRAME["timestamp"].iloc[1101]).n == 100
    assert ledger.track_record("BTC_USDT", version=BAD).n == 0


def test_no_forecast_after_the_fact(engine):
    ledger = Ledger(engine)
    forecast = forecast_of(1000)
    with pytest.raises(StoreError, match="is on record before its hour ends") as caught:
        ledger.record(forecast, None, pd.Timestamp(forecast.target_close))
    assert caught.value.reason == "too_late"
    with session(engine) as s:
        assert s.scalar(select(func.count(ForecastRow.id))) == 0


class Shelf:
    "A model store of pointers: GOOD was champion before BAD."

    def __init__(self, lost=()):
        step = {"manifest_sha256": "0" * 64, "promoted_at": "2025-01-01T00:00Z", "reason": ""}
        history = [{"version": GOOD} | step]
        self.pointer = Pointer(pair="BTC_USDT", interval="1h", seq=2, history=history, version=BAD, **step)
        self.lost = lost

    def champion(self, series):
        return self.pointer

    def rollback(self, series, to, reason):
        if to in self.lost:
            raise StoreError("it is damaged", UNUSABLE[0])
        self.pointer = self.pointer.model_copy(update={"version": to, "history": []})
        return to


@pytest.mark.parametrize("lost", [(), (GOOD,)])
def test_the_breaker_takes_a_bad_champion_back(engine, lost):
    now, shelf = FRAME["timestamp"].iloc[1201], Shelf(lost)
    ledger = Ledger(engine, clock=lambda: now)
    record_all(engine, ROWS[:167], spread=0.05, version=BAD)
    record_all(engine, ROWS, spread=0.05, version=GOOD)  # the predecessor was bad as well: not the champion's fault
    ledger.settle("BTC_USDT", FRAME)
    assert circuit_breaker(engine, "BTC_USDT", shelf, now) is None  # 167 hours are not enough
    record_all(engine, ROWS[167:], spread=0.05, version=BAD)
    ledger.settle("BTC_USDT", FRAME)
    done = ledger.circuit_breaker("BTC_USDT", shelf)
    assert (done.from_version, done.to_version) == (BAD, "" if lost else GOOD)
    assert "above the base's" in done.reason
    assert bool(why_suspended(engine, "BTC_USDT", BAD)) == bool(lost)
    again = ledger.circuit_breaker("BTC_USDT", shelf)
    if lost:
        assert again is None
        assert len(demotions(engine, "BTC_USDT")) == 1
    else:  # its own record is bad, too, and nothing is left before it
        assert (again.from_version, again.to_version) == (GOOD, "")
        assert "train another model" in ledger.suspended("BTC_USDT", GOOD)
