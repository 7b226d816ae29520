"""One clock for the service, the schedule, the replay and the demo (HOUSE section 4, row 8), and the pause that all processes keep."""

import threading

import pandas as pd
import pytest

from make_us_rich.core.settings import ExchangeError
from make_us_rich.market import clock as module
from make_us_rich.market.candles import fake_candles
from make_us_rich.market.clock import ExchangeTime, RunningClock, as_utc
from make_us_rich.market.exchange import BinanceClient
from make_us_rich.market.rate_pause import Market, RatePause
from make_us_rich.market.replay import ReplayServer
from make_us_rich.market.tape import Faults

NOON = pd.Timestamp("2025-01-20T12:00Z")
HOUR = pd.Timedelta("1h")


@pytest.fixture
def exchange():
    with ReplayServer({"BTC_USDT": fake_candles(600)}, now=NOON, label="synthetic candles") as server:
        yield server


def test_a_clock_stands_runs_and_is_set():
    base = RunningClock(NOON, speed=0)
    fast = RunningClock("2020-01-01", speed=3600, base=base)
    assert fast.now() == as_utc("2020-01-01") == fast()
    base.advance("2s")
    assert fast.now() == as_utc("2020-01-01T02:00")
    fast.set("2021-01-01T00:00+01:00", speed=1)
    base.advance(HOUR)
    assert fast.now() == as_utc("2021-01-01") and fast.speed == 1
    even = RunningClock(NOON, base=base)
    base.set("2035-01-01T00:00:00.123456789Z")  # ten years on, exact to the nanosecond
    assert even.now() - NOON == base.now() - (NOON + pd.Timedelta("2s") + HOUR)


def test_a_clock_never_runs_backwards_while_threads_read_it():
    clock, wrong = RunningClock(NOON, speed=1000), []

    def read():
        last = clock.now()
        for _ in range(300):
            last, before = clock.now(), last
            wrong.extend([before] if last < before else [])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert wrong == []


def test_the_schedule_follows_the_exchange_and_sees_this_machines_clock_jump(exchange, monkeypatch):
    machine = RunningClock("2026-01-01", speed=0)
    monkeypatch.setattr(module, "system_clock", machine)
    there = ExchangeTime(exchange.url)
    assert there.look() == (NOON - machine.now()).total_seconds() and there.now() == NOON
    assert as_utc(there.here(NOON + HOUR)) == machine.now() + HOUR
    machine.advance("3h")  # somebody sets this machine's clock: the hours at which we are woken are wrong now
    assert there.look() == -3 * 3600 and as_utc(there.here(NOON + HOUR)) == machine.now() + HOUR
    exchange.faults = Faults(status=503)
    exchange.clock.advance("5min")
    assert (there.look(), there.why, there.away_since) == (300, "HTTP 503", NOON)
    exchange.faults = Faults()
    there.look()
    assert (there.why, there.away_since) == ("", None)


def test_a_market_has_the_exchanges_time_whatever_ours_is(exchange, tmp_path):
    pause = RatePause(tmp_path / "pause.json", exchange.clock)
    market = Market(BinanceClient(exchange.url), pause, lambda: exchange.clock.now() + pd.Timedelta("90s"))
    assert market.now() == NOON + pd.Timedelta("90s")  # nobody was asked yet
    market.set_clock()
    assert abs(market.now() - NOON) < pd.Timedelta("1s")
    exchange.clock.advance("10h")
    assert abs(market.now() - exchange.clock.now()) < pd.Timedelta("1s")
    frame = market.get_data("BTC_USDT", "1h", NOON, exchange.clock.now())
    assert len(frame) == 10 and frame["close_time"].iloc[-1] < market.now()


def test_one_pause_for_all_processes_of_this_machine(exchange, tmp_path):
    mine, other = (RatePause(tmp_path / "pause.json", exchange.clock) for _ in range(2))
    market = Market(BinanceClient(exchange.url), mine, exchange.clock)
    exchange.faults = Faults(status=429, retry_after=30)
    with pytest.raises(ExchangeError, match="is not called again before 2025-01-20T12:00:30Z"):
        market.get_data("BTC_USDT", "1h", NOON - HOUR, NOON)
    asked = len(exchange.calls)
    with pytest.raises(ExchangeError):
        other.check()
    other.pause(7, "gets too many requests from here (HTTP 429)")
    assert mine.left()[0] == 30 and len(exchange.calls) == asked  # the longer one stays, and nobody has called
    exchange.clock.advance("-2h")
    assert mine.left()[0] == 30  # a clock that was set back does not make it longer
    exchange.clock.advance("2h")
    exchange.clock.advance("31s")
    assert other.left() == (0.0, mine.left()[1])
