"""Faults F07, F21, F22, F23 of the candle store: revised candles, kill -9, damage on disk, many writers at once."""

import os
import random
import signal
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest
from forks import FORKS, preloading
from waiting import LONG, wait_for

from make_us_rich.core import storage
from make_us_rich.core.settings import CandleError, StoreError
from make_us_rich.market import candle_store
from make_us_rich.market.candle_store import CandleStore
from make_us_rich.market.candles import check_candles, content_hash, fake_candles
from make_us_rich.market.exchange import BinanceClient
from make_us_rich.market.replay import ReplayServer
from make_us_rich.market.series import Series
from make_us_rich.market.tape import Faults

PAIR = "BTC_USDT"
HOUR = pd.Timedelta("1h")
TRUTH = fake_candles(2000, start="2024-01-01")
STEPS = 10  # of one write: before and after each of five calls
forks = preloading(CandleStore.__module__, BinanceClient.__module__, ReplayServer.__module__)


class Exchange:
    """Synthetic candles behind a clock that the test moves."""

    source = "synthetic"

    def __init__(self, now: str | pd.Timestamp, frame: pd.DataFrame = TRUTH) -> None:
        self.clock, self.frame = pd.Timestamp(now), frame

    def now(self) -> pd.Timestamp:
        return self.clock

    def get_data(self, symbol, interval="1h", start=None, end=None, *, progress=None):
        opens = self.frame["timestamp"]
        return self.frame[(opens >= start) & (opens < end) & (opens + HOUR <= self.clock)].reset_index(drop=True)


def closed(now: pd.Timestamp, frame: pd.DataFrame = TRUTH) -> pd.DataFrame:
    return frame[frame["timestamp"] + HOUR <= now].reset_index(drop=True)


def leftovers(root: Path) -> list[str]:
    return sorted(path.name for path in (root / PAIR).iterdir())


# ---------------------------------------------------------------- F21: kill -9


def hammer(step: int, root: Path, start: pd.Timestamp) -> None:
    """Update hour by hour until killed at the given step of all writes together."""
    mortal(step)
    exchange = Exchange(start)
    while True:
        CandleStore(root).update(exchange, PAIR, rows=300)
        exchange.clock += HOUR


def test_kill_at_any_moment_leaves_the_old_or_the_new_file(tmp_path):
    store = CandleStore(tmp_path)
    now, grown = pd.Timestamp("2024-02-01T00:20Z"), 0
    store.update(Exchange(now), PAIR, rows=300)
    for step in range(STEPS, 3 * STEPS):  # in the second or third update
        rows = store.info(PAIR).rows
        child = FORKS.Process(target=hammer, args=(step, tmp_path, now))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        frame = store.read(PAIR)  # would raise, and make a .bad file, on half a file
        now = frame["timestamp"].iloc[-1] + HOUR + pd.Timedelta("20min")
        pd.testing.assert_frame_equal(frame, closed(now).tail(len(frame)).reset_index(drop=True))
        grown += len(frame) > rows
    assert grown == 2 * STEPS
    store.update(Exchange(now + HOUR), PAIR)
    assert leftovers(tmp_path) == ["1h.lock", "1h.parquet"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def mortal(step: int) -> list[int]:
    """From now on this process kills itself at the given step of its writes: 0 is before the first, even numbers before, odd ones after a call."""
    count = [0]

    def deadly(call, half=False):
        def wrapped(*args, **kwargs):
            count[0] += 1
            if count[0] * 2 - 2 == step:
                if half:
                    args[0].write(args[1][: len(args[1]) // 2])
                    args[0].flush()
                die()
            result = call(*args, **kwargs)
            if count[0] * 2 - 1 == step:
                die()
            return result

        return wrapped

    def open_deadly(*args, **kwargs):
        file = os_fdopen(*args, **kwargs)

        class Half:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, data):
                return deadly(lambda f, d: f.write(d), half=True)(file, data)

            def flush(self):
                file.flush()

            def fileno(self):
                return file.fileno()

        return Half()

    os_fdopen = os.fdopen
    tempfile.mkstemp = deadly(tempfile.mkstemp)
    os.fdopen = open_deadly
    os.fsync = deadly(os.fsync)
    os.replace = deadly(os.replace)
    assert storage.os is os
    assert storage.tempfile is tempfile
    return count


def die_at(step: int, root: Path, now: pd.Timestamp) -> None:
    """One update that kills itself at the given step; else its exit status is the number of calls."""
    count = mortal(step)
    CandleStore(root).update(Exchange(now), PAIR)
    os._exit(count[0])


def test_kill_at_every_step_of_a_write(tmp_path):
    old_now, new_now = pd.Timestamp("2024-02-01T00:20Z"), pd.Timestamp("2024-02-01T05:20Z")
    outcomes = []
    for step in range(100):
        root = tmp_path / str(step)
        store = CandleStore(root, wait=LONG)
        store.update(Exchange(old_now), PAIR, rows=300)
        child = FORKS.Process(target=die_at, args=(step, root, new_now))
        child.start()
        child.join()
        outcomes.append(store.info(PAIR).rows)
        assert (
            store.update(Exchange(new_now), PAIR).rows == 305
        )  # nobody has to clean up by hand, and no lock is left behind
        assert leftovers(root) == ["1h.lock", "1h.parquet"]
        if child.exitcode >= 0:
            break
    assert child.exitcode == STEPS / 2  # mkstemp, write, fsync, replace, fsync of the folder
    assert outcomes == [300] * 7 + [305] * 4


# ---------------------------------------------------------------- F22: damage on disk


def mutations(data: bytes, luck: random.Random):
    """(name, damaged bytes), 300 of them."""
    yield "empty", b""
    for _ in range(99):
        yield "cut", data[: luck.randrange(1, len(data))]
    for _ in range(150):
        bad = bytearray(data)
        bad[luck.randrange(len(bad))] ^= 1 << luck.randrange(8)
        yield "flipped", bytes(bad)
    for _ in range(25):
        at = luck.randrange(len(data) - 512)
        yield "zeroed", data[:at] + bytes(512) + data[at + 512 :]
    for _ in range(25):
        yield "grown", data + luck.randbytes(luck.randrange(1, 100))


def test_300_mutations_are_put_aside_and_rebuilt(tmp_path, caplog):
    store, luck = CandleStore(tmp_path), random.Random(2)
    exchange = Exchange("2024-02-01T00:20Z")
    store.update(exchange, PAIR, rows=300)
    path, truth, seen = store.path(PAIR), store.read(PAIR), 0
    good = path.read_bytes()
    bad = path.with_name("1h.parquet.bad")
    for name, data in mutations(good, luck):
        if data == good:  # 512 zeros over zeros
            continue
        path.write_bytes(data)
        caplog.clear()
        seen += 1
        if seen % 8:  # a reader meets the damage
            with pytest.raises(
                CandleError,
                match=r"were damaged and are now in .*parquet.bad; fetch them with: mkrich candles BTC_USDT",
            ):
                store.read(PAIR)
            assert not path.exists(), name
        if seen % 8 < 2:  # an update meets it, or comes after the reader
            assert store.update(exchange, PAIR, rows=300).rows == 300, name
            pd.testing.assert_frame_equal(store.read(PAIR), truth)
        else:
            path.write_bytes(good)
        assert bad.read_bytes() == data, name
        assert "was put aside as 1h.parquet.bad" in caplog.text, name
        bad.unlink()
    assert seen >= 299


def test_a_file_of_another_pair_or_from_another_program_is_not_believed(tmp_path, caplog):
    store, exchange = CandleStore(tmp_path), Exchange("2024-02-01T00:20Z")
    store.update(exchange, "ETH_USDT", rows=100)
    path = store.path(PAIR)
    path.parent.mkdir(parents=True)
    path.write_bytes(store.path("ETH_USDT").read_bytes())
    with pytest.raises(CandleError, match="damaged"):
        store.read(PAIR)
    assert "it holds ETH_USDT 1h" in caplog.text
    TRUTH.to_parquet(path)
    with pytest.raises(CandleError, match="damaged"):
        store.read(PAIR)
    assert "it has no seal" in caplog.text


def test_a_clock_that_goes_back_destroys_nothing(tmp_path, caplog):
    "By half a minute, an hour, three years: the file stays byte for byte, and goes on when the clock is right again."
    store, exchange = CandleStore(tmp_path), Exchange("2024-02-01T05:00:10Z")
    store.update(exchange, PAIR, rows=100)
    kept, right = store.path(PAIR).read_bytes(), exchange.clock
    for back in ("30s", "1h", "1000D"):
        exchange.clock = right - pd.Timedelta(back)
        store.update(exchange, PAIR, rows=100)
        assert store.path(PAIR).read_bytes() == kept and len(store.read(PAIR)) == 100
    assert (
        "is kept as it is: its newest candle ends at 2024-02-01T05:00:00Z, but the exchange says it is" in caplog.text
    )
    exchange.clock = right + HOUR
    assert store.update(exchange, PAIR, rows=100).last == pd.Timestamp("2024-02-01T05:00Z")
    assert [p.name for p in store.path(PAIR).parent.glob("*.bad*")] == []


def test_a_file_of_a_newer_version_stays(tmp_path):
    "One more fact in its provenance, or one more column: a sentence, and the file is where it was."
    store, exchange = CandleStore(tmp_path), Exchange("2024-02-01T05:20Z")
    store.update(exchange, PAIR, rows=100)
    frame, book = candle_store.open_candle_file(store.path(PAIR).read_bytes(), Series.parse(PAIR))
    more = candle_store._pack(frame.assign(open_interest=1.0), book)
    facts = candle_store._to_json(book)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candle_store, "_to_json", lambda book: facts[:-1] + ', "basket": 7}')
        other = candle_store._pack(frame, book)
    for data in (more, other):
        store.path(PAIR).write_bytes(data)
        for attempt in (lambda: store.read(PAIR), lambda: store.update(exchange, PAIR, rows=100)):
            with pytest.raises(StoreError, match="this version cannot read them"):
                attempt()
        assert store.path(PAIR).read_bytes() == data and not list(store.path(PAIR).parent.glob("*.bad*"))


def test_a_disk_without_room_leaves_the_old_file_and_says_so(tmp_path, monkeypatch):
    store, exchange = CandleStore(tmp_path), Exchange("2024-02-01T05:20Z")
    store.update(exchange, PAIR, rows=100)
    before = store.path(PAIR).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        exchange.clock += HOUR
        with pytest.raises(
            StoreError, match=r"could not be written .No space left on device.*make room, then run again"
        ):
            store.update(exchange, PAIR)
    assert store.path(PAIR).read_bytes() == before
    assert leftovers(tmp_path) == ["1h.lock", "1h.parquet"]


# ---------------------------------------------------------------- F23: many writers, over HTTP


def update_many(root: Path, url: str, times: int, rows: int) -> None:
    client, store = BinanceClient(url), CandleStore(root)
    for _ in range(times):
        store.update(client, PAIR, rows=rows)
        check_candles(store.read(PAIR))


def run_all(count: int, *args) -> None:
    children = [FORKS.Process(target=update_many, args=args) for _ in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(LONG)
    assert [child.exitcode for child in children] == [0] * count


def test_eight_processes_fetch_once(tmp_path):
    with ReplayServer({PAIR: TRUTH}) as server:
        now = server.clock.now()
        run_all(8, tmp_path, server.url, 1, 1900)
        pages = [params for path, params in server.calls if path.endswith("klines")]
        starts = {params.get("startTime") for params in pages}
    frame = CandleStore(tmp_path).read(PAIR)
    pd.testing.assert_frame_equal(frame, closed(now).tail(1900).reset_index(drop=True))
    assert len(starts) == len(pages)  # no page was asked for twice
    assert leftovers(tmp_path) == ["1h.lock", "1h.parquet"]


def test_eight_processes_while_the_hours_run(tmp_path):
    start = TRUTH["timestamp"].iloc[1000]
    with ReplayServer({PAIR: TRUTH}, now=start, speed=5 * 3600) as server:  # five candles a second
        run_all(8, tmp_path, server.url, 5, 300)
        store, client = CandleStore(tmp_path), BinanceClient(server.url)
        server.clock.set(server.clock.now(), speed=0)
        store.update(client, PAIR)
        now = server.clock.now()
    frame, book = store.read(PAIR), store.info(PAIR)
    pd.testing.assert_frame_equal(frame, closed(now).tail(len(frame)).reset_index(drop=True))
    assert frame["timestamp"].is_unique
    assert book.report.missing == 0
    assert sum(each.rows for each in book.ranges) == book.rows
    assert book.revisions == 0
    assert leftovers(tmp_path) == ["1h.lock", "1h.parquet"]


def test_who_waits_too_long_gets_a_sentence(tmp_path):
    store = CandleStore(tmp_path, wait=0.2)
    child = FORKS.Process(target=hold, args=(tmp_path,))
    child.start()
    wait_for((tmp_path / "held").exists)
    with pytest.raises(
        StoreError,
        match=r"another process has been updating .*1h.parquet for more than 0.2 s; let it finish or stop it",
    ):
        store.update(Exchange("2024-02-01T05:20Z"), PAIR, rows=100)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert store.update(Exchange("2024-02-01T05:20Z"), PAIR, rows=100).rows == 100  # the lock died with its holder


def hold(root: Path) -> None:
    class Slow(Exchange):
        def get_data(self, *args, **kwargs):
            (root / "held").touch()
            time.sleep(3600)

    CandleStore(root).update(Slow("2024-02-01T05:20Z"), PAIR, rows=100)


# ---------------------------------------------------------------- F07 and the straight road, over HTTP


def test_a_revised_candle_is_taken_over_and_counted(tmp_path, caplog):
    now = TRUTH["timestamp"].iloc[1000] + pd.Timedelta("20min")
    with ReplayServer({PAIR: TRUTH}, now=now) as server:
        store, client = CandleStore(tmp_path), BinanceClient(server.url)
        store.update(client, PAIR, rows=200)
        before = store.info(PAIR)
        row = TRUTH.loc[995]
        server.faults = Faults(replace=[(row["timestamp"], "close", row["low"])])
        store.update(client, PAIR, rows=200)
        assert store.info(PAIR) == before  # nothing has closed, nothing was asked
        server.clock.advance("1h")
        store.update(client, PAIR, rows=200)
    book = store.info(PAIR)
    assert (before.revisions, book.revisions, book.rows) == (0, 1, 201)
    assert book.content_hash == content_hash(store.read(PAIR)) != before.content_hash
    changed = store.read(PAIR).set_index("timestamp")["close"][row["timestamp"]]
    assert changed == pytest.approx(row["low"], abs=1e-8)
    assert "1 closed candles were revised" in caplog.text


def test_an_update_asks_for_what_is_missing_and_no_more(tmp_path):
    now = TRUTH["timestamp"].iloc[1500] + pd.Timedelta("20min")
    with ReplayServer({PAIR: TRUTH}, now=now) as server:
        store, client = CandleStore(tmp_path), BinanceClient(server.url)

        def calls(**wanted) -> int:
            before = len([path for path, _ in server.calls if path.endswith("klines")])
            store.update(client, PAIR, **wanted)
            return len([path for path, _ in server.calls if path.endswith("klines")]) - before

        assert calls(rows=800) == 1
        assert calls(rows=800) == 0
        server.clock.advance("1h")
        assert calls(rows=800) == 1
        assert calls(rows=1200) == 1
        server.clock.advance("3h")
        assert calls() == 1
        assert store.info(PAIR).rows == 1203
        assert store.read(PAIR)["timestamp"].iloc[-1] == TRUTH["timestamp"].iloc[1503]


def test_bad_rows_are_counted_once(tmp_path):
    now = TRUTH["timestamp"].iloc[1000] + pd.Timedelta("20min")
    bad = Faults(replace=[(TRUTH["timestamp"].iloc[i], "high", 0.0) for i in (990, 995)])
    with ReplayServer({PAIR: TRUTH}, now=now) as server:
        server.faults = bad
        store, client = CandleStore(tmp_path), BinanceClient(server.url)
        first = store.update(client, PAIR, start=TRUTH["timestamp"].iloc[800])
        for _ in range(3):
            server.clock.advance("1h")
            last = store.update(client, PAIR)
    assert (first.invalid, last.invalid, last.missing) == (2, 2, 2)
    assert last.rows == first.rows + 3
