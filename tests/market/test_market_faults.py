"""Faults of the market, end to end: replay server over HTTP -> python-binance -> BinanceClient -> CandleStore (cases of FAULTS.md)."""

import shutil
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import free_port
from waiting import LONG, wait_for

from make_us_rich.core.settings import CandleError, ExchangeError, SettingsError
from make_us_rich.market.candle_store import CandleStore
from make_us_rich.market.candles import VALUE_COLUMNS, content_hash, fake_candles
from make_us_rich.market.exchange import BinanceClient
from make_us_rich.market.replay import ReplayServer
from make_us_rich.market.tape import Faults
from make_us_rich.market.wire import TRIES

PAIR, HOUR = "BTC_USDT", pd.Timedelta("1h")
TRUTH = fake_candles(9_500, start="2024-01-01")
NOW = pd.Timestamp("2025-01-15 10:30", tz="UTC")  # the candle of 10:00 is open


@pytest.fixture(scope="module")
def server():
    with ReplayServer(
        {PAIR: TRUTH, "ETH_USDT": fake_candles(9_500, seed=8, start="2024-01-01")}, now=NOW, label="synthetic candles"
    ) as server:
        yield server


@pytest.fixture
def exchange(server):
    """The server, mended and back at half past ten."""
    server.faults = Faults()
    server.clock.set(NOW, 0)
    server.calls.clear()
    return server


@pytest.fixture
def client(exchange, monkeypatch):
    monkeypatch.setattr("make_us_rich.market.wire.PAUSE", 0.01)
    return BinanceClient(exchange.url, timeout=LONG)


@pytest.fixture
def store(tmp_path):
    return CandleStore(tmp_path / "candles")


def closed(now=NOW):
    return TRUTH[TRUTH["timestamp"] + HOUR <= now].reset_index(drop=True)


def part(first, last):
    """The true candles that open from `first` to `last`."""
    return TRUTH[TRUTH["timestamp"].between(pd.Timestamp(first, tz="UTC"), pd.Timestamp(last, tz="UTC"))]


def same(found, expected):
    pd.testing.assert_frame_equal(found.reset_index(drop=True), expected.reset_index(drop=True))


def files(store):
    return {
        path.relative_to(store.root): path.read_bytes()
        for path in store.root.rglob("*")
        if path.suffix != ".lock" and path.is_file()
    }


# ------------------------------------------------------------ the plain way


def test_a_year_is_8760_closed_candles_with_every_value_unchanged(client, exchange):
    same(client.get_one_year_data(PAIR), closed().tail(8760))
    assert len(exchange.calls) == 9
    assert client.source == "synthetic candles"
    assert client.now() == NOW


@pytest.mark.parametrize("price", [0.00001234, 1.0, 98_765.43])
def test_prices_of_any_size_keep_their_digits(price):
    frame = fake_candles(200, price=price)
    with ReplayServer({"PEPE_USDT": frame}) as server:
        same(BinanceClient(server.url).newest("PEPE_USDT", "1h", 150), frame.iloc[:-1].tail(150))


def test_two_clients_of_two_hosts_live_in_one_process(client):
    with ReplayServer({"SOL_USDT": fake_candles(50, seed=9)}, label="<b>the one true exchange</b>") as other:
        stranger = BinanceClient(other.url)
        assert (client.source, stranger.source) == ("synthetic candles", other.url.removeprefix("http://"))
        assert len(stranger.newest("SOL_USDT", "1h", 10)) == 10
        with pytest.raises(CandleError, match="does not know the pair SOL_USDT"):
            client.newest("SOL_USDT", "1h", 10)


def test_no_request_carries_a_key(client, exchange, monkeypatch):
    monkeypatch.setenv("BINANCE_API_KEY", "canary")
    client.get_five_days_data(PAIR)
    assert not {"apikey", "signature", "timestamp", "recvWindow"} & {
        name for _, params in exchange.calls for name in params
    }


# ------------------------------------------------------------ F01, F02, F26: what is closed


@pytest.mark.parametrize("minute", [0, 1, 30, 59])
def test_F01_the_open_candle_is_nowhere(client, exchange, store, minute):
    now = NOW.floor("1h") + pd.Timedelta(minutes=minute, seconds=10)
    exchange.clock.set(now)
    exchange.faults = Faults(open_factor=10)
    for frame in (
        client.get_five_days_data(PAIR),
        client.newest(PAIR, "1h", 120),
        client.get_data(PAIR, start=now.floor("1h") - 120 * HOUR),
    ):
        assert frame["timestamp"].iloc[-1] == now.floor("1h") - HOUR
        same(frame, closed(now).tail(120))
    store.update(client, PAIR, rows=120)
    same(store.read(PAIR), closed(now).tail(120))


def test_F01_the_exchange_does_show_the_open_candle_at_ten_times_its_price(client, exchange):
    exchange.faults = Faults(open_factor=10)
    raw = client.wire.call(lambda c: c.get_klines(symbol="BTCUSDT", interval="1h", limit=1))
    assert pd.Timestamp(raw[0][0], unit="ms", tz="UTC") == NOW.floor("1h")
    assert float(raw[0][4]) > 5 * TRUTH["close"].iloc[-1] / 2


FAKETIME = """
import sys, time
from make_us_rich.market.exchange import BinanceClient
frame = BinanceClient(sys.argv[1]).get_five_days_data("BTC_USDT")
print(frame["timestamp"].iloc[-1].isoformat(), len(frame), int(time.time()))
"""


@pytest.mark.skipif(not shutil.which("faketime"), reason="faketime is not installed")
@pytest.mark.parametrize("shift", ["+90s", "-2h", "+1d"])
def test_F02_the_clock_of_this_machine_decides_nothing(exchange, shift):
    exchange.clock.set("2025-01-15 10:59:10")
    call = ["faketime", "-f", shift, sys.executable, "-c", FAKETIME, exchange.url]
    last, rows, _ = subprocess.run(call, capture_output=True, text=True, check=True).stdout.split()
    assert (last, rows) == ("2025-01-15T09:00:00+00:00", "120")


@pytest.mark.parametrize("skew", [90, -7200, 86_400])
def test_F02_a_wrong_time_in_python_decides_nothing(client, exchange, monkeypatch, skew):
    exchange.clock.set("2025-01-15 10:59:10")
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() + skew)
    same(client.get_five_days_data(PAIR), closed().tail(120))
    assert client.now() == pd.Timestamp("2025-01-15 10:59:10", tz="UTC")


def test_F26_five_days_are_120_closed_candles_also_while_the_hour_turns(client, exchange):
    def turn(done, total):
        exchange.clock.advance("1h")

    exchange.faults = Faults(page_cap=50)
    exchange.clock.set("2025-01-15 10:59:59")
    same(client.newest(PAIR, "1h", 120, turn), closed().tail(120))
    exchange.clock.set("2025-01-15 10:59:59")
    frame = client.get_data(PAIR, start=NOW.floor("1h") - 120 * HOUR, progress=turn)
    assert frame.attrs["now"] == pd.Timestamp("2025-01-15 12:59:59", tz="UTC")  # two hours turned between three pages
    same(frame, part("2025-01-10 10:00", "2025-01-15 11:00"))


# ------------------------------------------------------------ F04, F05: gaps


def test_F04_a_gap_is_listed_and_never_filled(client, exchange, store):
    exchange.faults = Faults(drop=[("2024-06-01 00:00", "2024-06-01 05:00"), ("2024-09-09 03:00", "2024-09-09 03:00")])
    store.update(client, PAIR, start="2024-05-01")
    report = store.info(PAIR).report
    assert [gap.missing for gap in report.gaps] == [6, 1]
    assert report.gaps[0].start == pd.Timestamp("2024-06-01", tz="UTC")
    frame = store.read(PAIR)
    assert not frame["timestamp"].between("2024-06-01 00:00Z", "2024-06-01 05:00Z").any()
    assert client.get_one_year_data(PAIR).attrs["report"].missing == 7


def test_F04_a_gap_that_meets_the_border_of_a_page(client, exchange):
    border = TRUTH["timestamp"].iloc[1000]
    exchange.faults = Faults(drop=[(str(border - HOUR), str(border + HOUR))])
    frame = client.get_data(PAIR, start=TRUTH["timestamp"].iloc[0])
    same(frame, closed()[lambda f: ~f["timestamp"].between(border - HOUR, border + HOUR)])


def test_F05_a_gap_in_the_last_120_hours_keeps_the_window_at_120(client, exchange):
    exchange.faults = Faults(drop=[("2025-01-15 05:00", "2025-01-15 07:00")])
    frame = client.get_five_days_data(PAIR)
    assert len(frame) == 120
    assert [str(gap) for gap in frame.attrs["report"].gaps] == ["3 from 2025-01-15T05:00:00Z to 2025-01-15T07:00:00Z"]


def test_F05_a_gap_that_reaches_the_present_is_told_with_its_beginning(client, exchange, store):
    store.update(client, PAIR, rows=200)
    before = files(store)
    exchange.faults = Faults(drop=[("2025-01-15 07:00", "2025-01-15 23:00")])
    with pytest.raises(
        CandleError, match="BTC_USDT has had no candle since 2025-01-15T06:00:00Z: the exchange stands still"
    ) as caught:
        client.get_five_days_data(PAIR)
    assert caught.value.reason == "inactive"
    exchange.clock.advance("1h")
    with pytest.raises(CandleError, match="no candle since"):
        store.update(client, PAIR)
    assert files(store) == before


# ------------------------------------------------------------ F06, F08, F10, F11: pages


@pytest.mark.parametrize(
    "faults",
    [
        {"overlap_rows": 10},
        {"overlap_rows": 10, "page_cap": 300},
        {"shuffle": True},
        {"descending": True},
        {"descending": True, "page_cap": 700, "overlap_rows": 3},
        {"unit": "us"},
        {"unit": "mixed"},
        {"unit": "us", "shuffle": True, "page_cap": 333},
        {"page_cap": 700},
        {"page_cap": 97},
    ],
    ids=str,
)
def test_F06_F08_F10_F11_odd_pages_give_the_same_candles(client, exchange, faults):
    exchange.faults = Faults(**faults)
    same(client.newest(PAIR, "1h", 2500), closed().tail(2500))
    same(client.get_data(PAIR, start="2024-08-01", end="2024-12-24T14:00"), part("2024-08-01", "2024-12-24 13:00"))


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 1500),
    cap=st.integers(90, 1000),
    overlap=st.integers(0, 20),
    unit=st.sampled_from(["ms", "us", "mixed"]),
    shuffle=st.booleans(),
    gaps=st.lists(st.tuples(st.integers(2, 1400), st.integers(0, 40)), max_size=4),
    minute=st.integers(0, 59),
)
def test_any_mixture_of_odd_pages_and_gaps_gives_exactly_the_truth(
    client, exchange, rows, cap, overlap, unit, shuffle, gaps, minute
):
    now = NOW.floor("1h") + pd.Timedelta(minutes=minute)
    exchange.clock.set(now)
    spans = [(now.floor("1h") - (back + length) * HOUR, now.floor("1h") - back * HOUR) for back, length in gaps]
    drop = [(str(first), str(last)) for first, last in spans]
    exchange.faults = Faults(page_cap=cap, overlap_rows=overlap, unit=unit, shuffle=shuffle, drop=drop)
    truth = closed(now)
    for first, last in spans:
        truth = truth[~truth["timestamp"].between(first, last)]
    same(client.newest(PAIR, "1h", rows), truth.tail(rows))
    start = now.floor("1h") - rows * HOUR
    same(client.get_data(PAIR, start=start), truth[truth["timestamp"] >= start])


def test_F06_repeated_rows_are_counted_and_stored_once(client, exchange, store):
    exchange.faults = Faults(overlap_rows=10, page_cap=500)
    assert client.newest(PAIR, "1h", 2000).attrs["report"].duplicates > 0
    store.update(client, PAIR, rows=2000)
    assert store.read(PAIR)["timestamp"].is_unique


def test_F08_any_order_hashes_to_the_same_content(client, exchange):
    plain = content_hash(client.newest(PAIR, "1h", 1500))
    exchange.faults = Faults(shuffle=True)
    shuffled = client.newest(PAIR, "1h", 1500)
    assert content_hash(shuffled) == plain
    assert shuffled.attrs["report"].unsorted > 0


def test_F10_an_absurd_unit_is_refused(client, exchange):
    exchange.faults = Faults(unit="ns")
    with pytest.raises(CandleError):
        client.get_five_days_data(PAIR)


def test_F11_a_server_that_hands_out_no_more_is_refused_with_both_numbers(client, exchange, store):
    exchange.faults = Faults(page_cap=700, stuck=True)
    for ask in (
        lambda: client.get_one_year_data(PAIR),
        lambda: client.get_data(PAIR, start=NOW.floor("1h") - 8760 * HOUR),
    ):
        with pytest.raises(
            ExchangeError,
            match=r"have (699|700) of 8,760 candles of BTC_USDT, and the exchange .* hands out no more; try again",
        ) as caught:
            ask()
        assert caught.value.exit_code == 1
    with pytest.raises(ExchangeError):
        store.update(client, PAIR)
    assert files(store) == {}


def test_F11_a_stuck_newest_page_is_enough_for_what_it_holds(client, exchange):
    exchange.faults = Faults(stuck=True)
    same(client.get_five_days_data(PAIR), closed().tail(120))


# ------------------------------------------------------------ F07: revision


def test_F07_a_revised_candle_is_replaced_and_changes_the_hash(client, exchange, store):
    store.update(client, PAIR, rows=300)
    before = store.info(PAIR)
    when = NOW.floor("1h") - 3 * HOUR
    revised = float(TRUTH.set_index("timestamp").loc[when, "volume"]) * 2
    exchange.faults = Faults(replace=[(str(when), "volume", str(revised))])
    exchange.clock.advance("1h")
    store.update(client, PAIR)
    after = store.info(PAIR)
    assert (after.revisions, after.rows) == (before.revisions + 1, before.rows + 1)
    assert after.content_hash != before.content_hash
    assert store.read(PAIR).set_index("timestamp").loc[when, "volume"] == revised


# ------------------------------------------------------------ F09, F24: rows that break a rule


def test_F09_candles_off_the_hour_are_refused_and_counted(client, exchange, store):
    exchange.faults = Faults(offset_ms=1_694_789)
    with pytest.raises(
        CandleError, match=r"none of the [\d,]+ candles of BTC_USDT can be used: 121 do not open on a whole interval"
    ) as caught:
        client.get_five_days_data(PAIR)
    assert caught.value.reason == "bad_candles"
    with pytest.raises(CandleError):
        store.update(client, PAIR, rows=120)
    assert files(store) == {}


BAD = [
    ("close", "NaN"),
    ("close", None),
    ("close", "abc"),
    ("open", "-1"),
    ("low", "0"),
    ("high", "0.00000001"),
    ("volume", "-3"),
    ("trades", "many"),
    ("high", "Infinity"),
    ("close_time", 0),
]


@pytest.mark.parametrize(("column", "value"), BAD)
def test_F24_a_bad_row_is_dropped_and_counted(client, exchange, column, value):
    when = NOW.floor("1h") - 5 * HOUR
    exchange.faults = Faults(replace=[(str(when), column, value)])
    frame = client.get_five_days_data(PAIR)
    report = frame.attrs["report"]
    assert (len(frame), report.invalid, report.missing) == (120, 1, 1)
    assert when not in set(frame["timestamp"])
    assert np.isfinite(frame[VALUE_COLUMNS].to_numpy()).all()


def test_F24_the_share_of_bad_rows_is_known_to_the_caller(client, exchange):
    exchange.faults = Faults(replace=[(str(NOW.floor("1h") - i * HOUR), "close", "NaN") for i in range(3, 13)])
    report = client.newest(PAIR, "1h", 990).attrs["report"]
    assert report.invalid == 10
    assert report.bad_share > 0.001


# ------------------------------------------------------------ F12, F19, F25: nothing, not any more, too little


def test_F12_an_empty_answer_names_pair_and_date(client, exchange, store):
    exchange.faults = Faults(empty=True)
    for ask in (
        lambda: client.get_five_days_data(PAIR),
        lambda: client.get_data(PAIR, start="2025-01-10"),
        lambda: store.update(client, PAIR, rows=120),
    ):
        with pytest.raises(CandleError, match=r"no candles for BTC_USDT since 2025-01-1\dT") as caught:
            ask()
        assert (caught.value.exit_code, caught.value.reason) == (3, "no_candles")
    assert files(store) == {}


def test_F19_a_delisted_pair_is_inactive_and_the_others_go_on(client, exchange):
    exchange.faults = Faults(delisted={PAIR: "2025-01-10 07:00"})
    with pytest.raises(
        CandleError, match="BTC_USDT has had no candle since 2025-01-10T06:00:00Z: the exchange lists it as BREAK"
    ) as caught:
        client.get_five_days_data(PAIR)
    assert (caught.value.reason, client.status(PAIR)) == ("inactive", "BREAK")
    assert len(client.get_five_days_data("ETH_USDT")) == 120
    same(client.get_data(PAIR, start="2025-01-09", end="2025-01-10T07:00"), part("2025-01-09", "2025-01-10 06:00"))


def test_F19_a_renamed_pair_is_unknown_and_the_stored_candles_stay(client, exchange, store):
    store.update(client, PAIR, rows=200)
    before = files(store)
    exchange.faults = Faults(renamed={PAIR})
    exchange.clock.advance("1h")
    for ask in (
        lambda: client.get_five_days_data(PAIR),
        lambda: client.status(PAIR),
        lambda: store.update(client, PAIR),
    ):
        with pytest.raises(CandleError, match="does not know the pair BTC_USDT; check its spelling") as caught:
            ask()
        assert (caught.value.exit_code, caught.value.reason) == (3, "unknown_pair")
    assert files(store) == before


def test_F25_119_candles_are_119(exchange):
    with ReplayServer({PAIR: TRUTH.head(120)}) as young:  # the last one is open
        client = BinanceClient(young.url)
        with pytest.raises(
            CandleError, match="need 120 closed candles, have 119: BTC_USDT begins 2024-01-01T00:00:00Z"
        ) as caught:
            client.get_five_days_data(PAIR)
        assert (caught.value.exit_code, caught.value.reason) == (3, "short_history")
        assert len(client.newest(PAIR, "1h", 121)) == 119


# ------------------------------------------------------------ F13, F20 and their like: no answer


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"html": True}, "is unavailable: its answer is not JSON"),
        ({"html": True, "status": 502}, "is unavailable: it answered HTTP 502"),
        ({"status": 503}, "is unavailable: it answered HTTP 503;"),
        ({"text_body": True}, "is unavailable: it answered HTTP 500"),
        ({"cut_json": True}, "is unavailable: its answer is not JSON, or only a part of it"),
        ({"status": 451}, r"does not serve this place \(HTTP 451\); set MUR_EXCHANGE_URL"),
        ({"status": 418, "retry_after": 120}, r"banned .*HTTP 418\); wait 120 s, until 2025-01-15T10:32:00Z"),
        ({"status": 429, "retry_after": 60}, r"too many requests .*wait 60 s, until 2025-01-15T10:31:00Z"),
    ],
    ids=str,
)
def test_F13_F20_no_answer_is_one_sentence_and_the_store_is_untouched(client, exchange, store, faults, words):
    store.update(client, PAIR, rows=200)
    before = files(store)
    exchange.clock.advance("0h")
    exchange.faults = Faults(**faults)
    for ask in (lambda: client.newest(PAIR, "1h", 120), lambda: store.update(client, PAIR)):
        with pytest.raises(ExchangeError, match=words) as caught:
            ask()
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 1
    assert files(store) == before


@pytest.mark.parametrize(
    "faults",
    [{"html": True, "status": 502}, {"text_body": True}, {"cut_json": True}, {"status": 429, "retry_after": 1}],
    ids=str,
)
def test_a_hiccup_is_not_an_error(client, exchange, faults):
    exchange.faults = Faults(**faults, times=1)
    same(client.get_five_days_data(PAIR), closed().tail(120))
    assert len(exchange.calls) == 2


@pytest.mark.parametrize(
    "faults",
    [{"status": 418, "retry_after": 1}, {"status": 429, "retry_after": 11}, {"status": 451}, {"status": 403}],
    ids=str,
)
def test_a_ban_or_a_long_wait_is_not_answered_by_another_call(client, exchange, faults):
    exchange.faults = Faults(**faults)
    with pytest.raises(ExchangeError):
        client.get_five_days_data(PAIR)
    assert len(exchange.calls) == 1


@pytest.mark.parametrize("faults", [{"delay": 5.0}, {"drip": 0.05}], ids=str)
def test_F17_a_hanging_or_dripping_answer_ends(exchange, faults):
    exchange.faults = Faults(**faults, times=99)
    client = BinanceClient(exchange.url, timeout=0.3)
    with pytest.raises(ExchangeError, match="is unavailable: it did not answer in time"):
        client.newest(PAIR, "1h", 500)
    assert 1 <= len(exchange.calls) <= TRIES


def test_F20_no_such_host_and_nobody_there():
    for url in ("http://127.0.0.1:9", "http://no-such-host.invalid"):
        with pytest.raises(
            ExchangeError,
            match="is unavailable: it cannot be reached; check the network, try again later, or set MUR_EXCHANGE_URL",
        ):
            BinanceClient(url).get_five_days_data(PAIR)


# ------------------------------------------------------------ wrong questions


def test_wrong_questions_are_refused_in_one_sentence(client):
    with pytest.raises(SettingsError, match="has no candles of the interval 5m"):
        client.newest(PAIR, "5m", 10)
    with pytest.raises(SettingsError, match="start is a date such as"):
        client.get_data(PAIR, start="soon")
    with pytest.raises(SettingsError, match="an interval is one of"):
        client.get_data(PAIR, "1 hour", start="2024-01-01")
    with pytest.raises(SettingsError, match="a pair is a base and a quote asset"):
        client.get_five_days_data("bitcoin")
    with pytest.raises(CandleError, match="no candles for BTC_USDT since 2026-01-01T00:00:00Z"):
        client.get_data(PAIR, start="2026-01-01")


# ------------------------------------------------------------ the replay itself


def test_the_replay_stops_cleanly_and_a_new_one_may_take_its_port():
    before = threading.active_count()
    with ReplayServer({PAIR: TRUTH.head(50)}) as first:
        BinanceClient(first.url).now()
        port = int(first.url.rpartition(":")[2])
    with ReplayServer({PAIR: TRUTH.head(50)}, port=port) as second:
        assert second.url == first.url
        BinanceClient(second.url).now()
    assert threading.active_count() == before


def test_the_replay_pages_as_binance_does(exchange, client):
    def ask(**bounds):
        return [row[0] for row in client.wire.call(lambda c: c.get_klines(symbol="BTCUSDT", interval="1h", **bounds))]

    opens = [int(t) for t in TRUTH["timestamp"].astype("int64")]
    newest = opens.index(int(NOW.floor("1h").timestamp() * 1000))
    assert ask() == opens[newest - 499 : newest + 1]
    assert ask(limit=5000) == opens[newest - 999 : newest + 1]
    assert ask(limit=2, startTime=opens[10]) == opens[10:12]
    assert ask(limit=2, startTime=opens[10] + 1) == opens[11:13]
    assert ask(limit=3, endTime=opens[10]) == opens[8:11]
    assert ask(startTime=opens[10], endTime=opens[12]) == opens[10:13]
    assert ask(startTime=opens[newest] + 1) == []


SERVE = """
import sys
from make_us_rich.market.candles import SAMPLE_LABEL, load_sample
from make_us_rich.market.replay import serve_replay
serve_replay({"BTC_USDT": load_sample("BTC_USDT")}, port=int(sys.argv[1]), speed=3600, label=SAMPLE_LABEL)
"""


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_serve_replay_plays_in_the_foreground_until_it_is_told_to_stop():
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(port)], stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: listens(port), what="the replay")
        client = BinanceClient(f"http://127.0.0.1:{port}")
        first = client.now()
        assert client.source == "historical sample"
        wait_for(lambda: client.now() - first > pd.Timedelta("5min"))
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=LONG)
    assert "Traceback" not in errors
