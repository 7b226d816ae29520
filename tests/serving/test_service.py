"""The service over a replay exchange with a movable clock and a real model: hours, swaps, bans, outages, restarts, several at once."""

import ast
import gc
import json
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from servers import database_url, postgresql  # noqa: F401
from tiny_model import PAIRS, publish, sample

from make_us_rich.core.database import connect
from make_us_rich.core.settings import ExchangeError, StoreError, get_settings, utc_iso
from make_us_rich.market.candles import SAMPLE_LABEL, fake_candles
from make_us_rich.market.replay import ReplayServer
from make_us_rich.market.tape import Faults
from make_us_rich.models.baselines import LEVELS
from make_us_rich.registry.store import ModelStore
from make_us_rich.serving import choice
from make_us_rich.serving import refresh as refreshing
from make_us_rich.serving import service as module
from make_us_rich.serving.ledger import load_record
from make_us_rich.serving.service import Service

HOUR = pd.Timedelta("1h")
START = 3000  # row of the sample: the newest closed candle when a test begins


class World:
    "A replay exchange, a home folder, and a clock for both."

    def __init__(self, home, server):
        self.home, self.server = home, server
        self.closed = sample("BTC_USDT")["timestamp"].iloc[START] + HOUR
        self.store = ModelStore.of(get_settings(home=home), server.clock.now)
        self.services = []
        self.set(0)

    def set(self, hours, seconds=5):
        self.server.clock.set(self.closed + hours * HOUR + pd.Timedelta(seconds=seconds))

    def service(self, **options):
        settings = get_settings(home=self.home, exchange_url=self.server.url, poll_seconds=5)
        self.services.append(Service(settings, clock=self.server.clock.now, jitter=lambda: 1.0, **options))
        return self.services[-1].start()

    def rows(self, pair="BTC_USDT", engine=None):
        return load_record(engine or self.services[-1].engine, pair)

    def klines(self):
        return sum(path.endswith("klines") for path, _ in self.server.calls)


@pytest.fixture
def world(tmp_path):
    frames = {pair: sample(pair) for pair in PAIRS}
    with ReplayServer(frames, now=frames["BTC_USDT"]["timestamp"].iloc[START], label=SAMPLE_LABEL) as server:
        made = World(tmp_path / "home", server)
        yield made
        for service in made.services:
            service.stop()


@pytest.fixture
def trusting(monkeypatch):
    "Without the trial run, which costs a second for each version."
    monkeypatch.setattr(choice, "try_model", lambda bundle: None)


def test_48_hours_of_two_pairs(world, trusting):
    "One forecast and one call per pair and hour, through a retraining and a restart; all settled but the newest; all recomputed."
    for pair in PAIRS:
        publish(world.store, pair, world.closed - HOUR)
    service = world.service()
    calls = world.klines()
    for hour in range(1, 48):
        if hour == 10:
            publish(world.store, "BTC_USDT", world.closed + 9 * HOUR, mark=1)
        if hour == 20:
            service.stop()
            service = world.service()
        world.set(hour)
        service.tick()
        world.set(hour, seconds=1800)
        service.tick()
    assert world.klines() - calls == 47 * len(PAIRS)
    for pair in PAIRS:
        rows = world.rows(pair)
        assert list(rows["target_open"]) == [world.closed + n * HOUR for n in range(48)]
        assert list(rows["status"]) == ["ok"] * 48
        assert list(rows["settled"]) == [True] * 47 + [False]
        assert rows["model_version"].nunique() == (2 if pair == "BTC_USDT" else 1)
        record = service.ledger.track_record(pair)
        assert (record.n, record.open, record.void, record.abstained, record.holes) == (47, 1, 0, 0, [])
        done = service.ledger.verify(pair, world.store, service.parts.candles)
        assert (done.checked, done.unknown) == (48, 0)
        stored, recorded = (
            service.parts.candles.read(pair),
            sample(pair),
        )  # zero open candles: all are as they were when they had closed
        assert stored.equals(recorded[recorded["timestamp"].isin(stored["timestamp"])].reset_index(drop=True))
        assert stored["timestamp"].iloc[-1] + HOUR == world.closed + 47 * HOUR
    assert service.status()["degraded"] == []
    with service.engine.begin() as raw:
        one = "SELECT min(id) FROM forecasts WHERE pair = 'SOL_USDT'"
        raw.exec_driver_sql(f"UPDATE forecasts SET actual = actual * 1.001 WHERE id = ({one})")
    with pytest.raises(
        StoreError, match=r"1 of 48 forecasts of SOL_USDT 1h on record differ .*\n.*outcome by"
    ) as caught:
        service.ledger.verify("SOL_USDT", world.store, service.parts.candles)
    assert caught.value.reason == "record_differs"


def test_swaps_with_every_fifth_version_bad(world):
    "A bad version leaves the old one serving, is named, and is forgotten when a good one comes; trial runs are real here."
    sound = publish(world.store, "BTC_USDT", world.closed - 20 * HOUR)
    service = world.service()
    shown = service.answer("BTC_USDT").body
    reader = service.events.subscribe()
    for n in range(1, 11):
        version = publish(world.store, "BTC_USDT", world.closed - (20 - n) * HOUR, mark=n, broken=n % 5 == 0)
        world.set(0, seconds=60 + 20 * n)
        service.tick()
        status = service.status()["pairs"][0]
        assert status["champion"] == version
        if n % 5 == 0:
            assert status["model_version"] == sound
            assert "computes other prices here" in status["problems"]["model"]
            assert version in service.status()["degraded"][0]
        else:
            sound = version
            assert (status["model_version"], status["problems"]) == (version, {})
        assert service.answer("BTC_USDT").body == shown  # the forecast of the running hour stays
    kinds = [event.kind for event in iter(lambda: reader.get(0), None)]
    assert kinds.count("model") == 8
    assert kinds.count("degraded") == 2
    world.set(1)
    service.tick()
    forecast = service.answer("BTC_USDT").forecast
    assert (forecast.status, forecast.model_version) == ("ok", sound)
    world.store.rollback("BTC_USDT")  # from the bad champion to the one that serves: nothing changes
    world.set(1, seconds=30)
    service.tick()
    assert service.answer("BTC_USDT").forecast == forecast
    world.store.rollback("BTC_USDT")
    world.set(1, seconds=60)
    service.tick()  # withdrawn: the version before answers at once, and both answers are on record
    again = service.answer("BTC_USDT").forecast
    assert again.model_version not in ("", sound)
    assert set(world.rows()["model_version"].iloc[-2:]) == {sound, again.model_version}


def test_older_versions_and_older_pointers_are_not_followed(world, trusting):
    old = publish(world.store, "BTC_USDT", world.closed - 3 * HOUR)
    path = world.home / "models/BTC_USDT/1h/champion.json"
    before = path.read_bytes()
    new = publish(world.store, "BTC_USDT", world.closed - 2 * HOUR, mark=1)
    service = world.service()
    late = publish(world.store, "BTC_USDT", world.closed - 4 * HOUR, mark=2, promote=False)
    with pytest.raises(StoreError, match="older cut-off"):
        world.store.promote("BTC_USDT", late)
    path.write_bytes(before)  # as a store that is not yet consistent may answer
    world.set(0, seconds=60)
    service.tick()
    assert service.status()["pairs"][0]["model_version"] == new != old


SECOND_PROCESS = """
import json, sys
import pandas as pd
from make_us_rich.serving.service import Service
from make_us_rich.core.settings import get_settings
home, url, now = sys.argv[1:]
service = Service(get_settings(home=home, exchange_url=url), clock=lambda: pd.Timestamp(now)).start()
print(json.dumps(service.status()))
"""


def test_a_ban_is_kept_by_other_processes_and_after_a_restart(world, trusting):
    for pair in PAIRS:
        publish(world.store, pair, world.closed - HOUR)
    service = world.service()
    world.set(1)
    world.server.faults = Faults(status=418, retry_after=600)
    calls = len(world.server.calls)
    service.tick()
    assert len(world.server.calls) == calls + 1  # two pairs, one refusal
    world.server.faults = Faults()
    for seconds in (60, 300, 590):
        world.set(1, seconds=seconds)
        service.tick()
        now = utc_iso(world.server.clock.now())
        if seconds == 300:  # another process
            command = [sys.executable, "-c", SECOND_PROCESS, str(world.home), world.server.url, now]
            told = subprocess.run(command, capture_output=True, text=True, check=True)
            status = json.loads(told.stdout.splitlines()[-1])
            assert 300 < status["exchange_pause"]["seconds"] <= 305
            assert {p["status"] for p in status["pairs"]} == {"abstain"}
            words = "has banned this address for a while (HTTP 418); it is not called again before"
            assert any(words in text for text in status["degraded"])
    restarted = world.service()
    assert restarted.status()["exchange_pause"]["seconds"] > 0
    assert len(world.server.calls) == calls + 1  # nobody has called
    assert restarted.answer("BTC_USDT").forecast.reason == "stale_data"
    assert "HTTP 418" in restarted.answer("BTC_USDT").forecast.sentence
    world.set(1, seconds=620)
    restarted.tick()
    assert len(world.server.calls) > calls + 1
    assert restarted.answer("BTC_USDT").forecast.target_open == utc_iso(world.closed + HOUR)
    assert list(world.rows()["status"]) == ["ok", "abstain", "ok"]  # the abstention stays on record beside the forecast
    assert restarted.ledger.verify("BTC_USDT", world.store, restarted.parts.candles).checked == 2


def test_hours_offline_are_holes_and_a_restart_invents_nothing(world, trusting):
    publish(world.store, "BTC_USDT", world.closed - HOUR)
    service = world.service()
    for hour in (1, 2):
        world.set(hour)
        service.tick()
    shown = service.answer("BTC_USDT").forecast
    for _ in range(3):
        service.stop()
        world.set(2, seconds=1200)
        service = world.service()
        assert service.answer("BTC_USDT").forecast.quantiles == shown.quantiles
    assert len(world.rows()) == 3
    service.stop()
    world.set(7)
    service = world.service()
    record = service.ledger.track_record("BTC_USDT")
    assert (record.n, record.open) == (3, 1)  # the one that was open before has its candle now
    assert record.holes == [
        {"from": utc_iso(world.closed + 3 * HOUR), "to": utc_iso(world.closed + 7 * HOUR), "hours": 4}
    ]
    assert "4 h from" in record._repr_markdown_()
    missing = sample("BTC_USDT")["timestamp"].iloc[
        START + 9
    ]  # the candle of the hour that opens 8 hours after the start
    world.server.faults = Faults(drop=[(utc_iso(missing), utc_iso(missing))])
    for hour in (8, 9, 10):
        world.set(hour)
        service.tick()
    record = service.ledger.track_record("BTC_USDT")
    assert (record.n, record.void, record.open) == (4, 1, 0)
    assert service.answer("BTC_USDT").forecast.reason == "data_gap"
    assert service.ledger.verify("BTC_USDT", world.store, service.parts.candles).checked == 5


def test_exchange_and_store_gone_for_a_day(world, trusting, monkeypatch):
    "Dated answers, no crash, no growth, and everything goes on afterwards."
    for pair in PAIRS:
        publish(world.store, pair, world.closed - HOUR)
    service = world.service()

    with monkeypatch.context() as patch:
        patch.setattr(service.parts.market.client.wire, "call", exchange_gone)
        for name in ("champion", "series"):
            patch.setattr(service.parts.store, name, store_gone)
        world.set(0, seconds=1800)
        service.tick()
        assert service.answer("SOL_USDT").forecast.status == "ok"  # nothing changes for anybody within the hour
        sizes = []
        for minute in range(60, 24 * 60, 12):
            world.set(0, seconds=60 * minute)
            service.tick()
            if minute % 240 == 0:
                gc.collect()
                sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4)  # kB
        forecast = service.answer("SOL_USDT").forecast
        assert (forecast.reason, forecast.as_of) == ("stale_data", utc_iso(world.closed))
        assert "is 23 h" in forecast.sentence
        status = service.status()
        assert status["ready"]
        assert len(status["degraded"]) == 2
        assert sizes[-1] - sizes[0] < 6000, sizes
    world.set(25, seconds=400)
    service.tick()  # the first pair to ask finds the exchange in order, so the other one does not wait for its turn either
    service.tick()
    assert service.answer("SOL_USDT").forecast.target_open == utc_iso(world.closed + 25 * HOUR)
    assert service.status()["degraded"] == []
    rows = world.rows("SOL_USDT")
    assert list(rows["status"]) == ["ok", *["abstain"] * 23, "ok"]  # one honest answer for each hour
    hole = {"from": utc_iso(world.closed + 24 * HOUR), "to": utc_iso(world.closed + 25 * HOUR), "hours": 1}
    assert service.ledger.track_record("SOL_USDT").holes == [hole]


def test_three_services_at_once_make_one_record(world, trusting, database_url):  # noqa: F811
    "On SQLite and on PostgreSQL: one forecast per pair and hour, one call to the exchange, and all three show the same."
    for pair in PAIRS:
        publish(world.store, pair, world.closed - HOUR)
    with ThreadPoolExecutor(3) as pool:
        services = list(pool.map(lambda _: world.service(engine=connect(database_url)), range(3)))
        for hour in range(1, 3):
            world.set(hour)
            calls = world.klines()
            list(pool.map(lambda service: service.tick(), services))
            assert world.klines() - calls == len(PAIRS)
            for pair in PAIRS:
                assert len({service.answer(pair).forecast.median for service in services}) == 1
                assert services[0].answer(pair).forecast.target_open == utc_iso(world.closed + hour * HOUR)
    for pair in PAIRS:
        rows = world.rows(pair)
        assert list(rows["target_open"]) == [world.closed + n * HOUR for n in range(3)]
        assert list(rows["settled"]) == [True, True, False]
        assert services[1].ledger.verify(pair, world.store, services[1].parts.candles).checked == 3


def test_no_answer_that_is_not_on_record(world, trusting):
    "While another program holds the database, the last forecast stays until its hour is over; then there is none."
    publish(world.store, "BTC_USDT", world.closed - HOUR)
    database = f"sqlite:///{world.home / 'mkrich.db'}"
    service = world.service(engine=connect(database, wait=0.1))
    shown = service.answer("BTC_USDT")
    other = sqlite3.connect(world.home / "mkrich.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    world.set(1)
    service.tick()
    assert service.answer("BTC_USDT") is shown
    assert "is locked by another program" in service.status()["degraded"][0]
    world.set(1, seconds=400)
    service.tick()
    assert service.answer("BTC_USDT").forecast.reason == "no_record"
    other.execute("ROLLBACK")
    world.set(1, seconds=410)
    service.tick()
    assert service.answer("BTC_USDT").forecast.target_open == utc_iso(world.closed + HOUR)
    assert list(world.rows()["status"]) == ["ok", "ok"]
    assert service.status()["degraded"] == []
    other.close()


def test_a_bad_live_record_takes_the_champion_back(world, trusting):
    old = publish(world.store, "BTC_USDT", world.closed - 300 * HOUR)
    new = publish(world.store, "BTC_USDT", world.closed - 299 * HOUR, mark=1)
    service = world.service()
    shown, reader = service.answer("BTC_USDT").forecast, service.events.subscribe()
    frame = sample("BTC_USDT")
    for row in range(START - 170, START):  # a week of useless ranges, five times too wide, under the champion's name
        opens, last = frame["timestamp"].iloc[row] + HOUR, float(frame["close"].iloc[row])
        prices = {level: last * (1 + 0.2 * (level - 0.5)) for level in LEVELS}
        times = {"as_of": utc_iso(opens), "target_open": utc_iso(opens), "target_close": utc_iso(opens + HOUR)}
        bad = shown.model_copy(update=times | {"last_close": last, "quantiles": prices, "median": last})
        base = [last * (1 + 0.02 * (level - 0.5)) for level in LEVELS]
        assert service.ledger.record(bad, base, opens + pd.Timedelta("3s"))
    world.set(1)
    service.tick()
    events = [event for event in iter(lambda: reader.get(0), None) if event.kind in ("demoted", "model")]
    assert [event.kind for event in events] == ["demoted", "model"]
    assert "above the base's" in events[0].data["reason"]
    assert world.store.champion("BTC_USDT").version == old
    forecast = service.answer("BTC_USDT").forecast
    assert (forecast.status, forecast.model_version, forecast.target_open) == ("ok", old, utc_iso(world.closed + HOUR))
    assert json.loads(service.record_body("BTC_USDT"))["badge"]["colour"] == "red"
    with pytest.raises(StoreError, match="was withdrawn by a rollback"):
        world.store.promote("BTC_USDT", new)
    world.store.rollback("BTC_USDT", to=new)  # somebody insists: it gets another week
    world.set(2)
    service.tick()
    assert service.answer("BTC_USDT").forecast.model_version == new


def test_last_good_models_serve_while_the_store_is_down_at_the_start(world, trusting, monkeypatch):
    version = publish(world.store, "BTC_USDT", world.closed - HOUR)
    local = ModelStore.of(get_settings(home=world.home), url=(world.home / "last_good").as_uri())
    monkeypatch.setattr(module, "make_parts", with_last_good(module.make_parts, local))
    world.service()
    assert local.champion("BTC_USDT").version == version

    for name in ("champion", "series"):
        monkeypatch.setattr(ModelStore, name, only_for(local, getattr(ModelStore, name)))
    service = world.service()
    assert service.status()["pairs"][0]["model_version"] == version
    assert service.answer("BTC_USDT").forecast.status == "ok"
    assert "nobody answers" in service.status()["degraded"][0]
    monkeypatch.undo()
    monkeypatch.setattr(choice, "try_model", lambda bundle: None)
    newer = publish(
        world.store, "BTC_USDT", world.closed, mark=1
    )  # the store is back: its pointer counts, not that of the copy
    world.set(0, seconds=120)
    service.tick()
    assert service.status()["pairs"][0]["model_version"] == newer
    assert service.status()["degraded"] == []


def test_a_withdrawn_version_is_not_served_again(world, trusting):
    "Over a runner that dies between publishing and promoting, two services on one store, and a restart of everything."
    pair = "BTC_USDT"
    old = publish(world.store, pair, world.closed - 3 * HOUR)
    bad = publish(world.store, pair, world.closed - 2 * HOUR, mark=1)
    died = world.store.load(pair, bad).manifest.run_id
    world.service()
    world.service()
    world.store.rollback(pair)
    for n in range(3):
        if n == 2:
            for service in world.services:
                service.stop()
            world.services = []
            world.service()
            world.service()
        store = ModelStore.of(get_settings(home=world.home), world.server.clock.now)
        assert store.adopt(pair, died) is None  # its runner starts again, and finds what it had published
        with pytest.raises(
            StoreError, match=rf"{bad} of {pair} was withdrawn .* mkrich rollback {pair} --to {bad}"
        ) as e:
            store.promote(pair, bad)
        assert e.value.reason == "withdrawn"
        assert (store.champion(pair).version, store.champion(pair).withdrawn) == (old, [bad])
        world.set(0, seconds=60 + 60 * n)
        for service in world.services:
            service.tick()
            assert service.status()["pairs"][0]["model_version"] == service.answer(pair).forecast.model_version == old
    new = publish(world.store, pair, world.closed - HOUR, mark=2, promote=False)  # the next runner dies there
    assert world.store.adopt(pair, world.store.load(pair, new).manifest.run_id).version == new
    world.store.rollback(pair, to=bad)  # a person names it
    assert world.store.champion(pair).withdrawn == []
    world.set(0, seconds=600)
    for service in world.services:
        service.tick()
        assert service.status()["pairs"][0]["model_version"] == bad


def test_nothing_serves_where_only_a_withdrawn_version_is_sound(world, trusting):
    old = publish(world.store, "BTC_USDT", world.closed - 2 * HOUR)
    bad = publish(world.store, "BTC_USDT", world.closed - HOUR, mark=1)
    service = world.service()
    assert service.answer("BTC_USDT").forecast.model_version == bad
    world.store.rollback("BTC_USDT")
    (world.home / "models" / "BTC_USDT" / "1h" / old / "model.onnx").write_bytes(b"damaged")
    world.set(0, seconds=60)
    service.tick()
    forecast = service.answer("BTC_USDT").forecast
    assert (forecast.status, forecast.reason, service.status()["pairs"][0]["model_version"]) == (
        "abstain",
        "no_model",
        "",
    )
    assert old in forecast.sentence


@pytest.mark.parametrize("interval", ["4h", "1d"])
def test_a_home_with_only_longer_candles(tmp_path, trusting, interval):
    "Ready, forecasts, on record and settled: without one model of the hour."
    name, step = f"BTC_USDT/{interval}", pd.Timedelta(interval)
    frame = fake_candles(1_100, seed=5, interval=interval)
    closed = frame["timestamp"].iloc[1_000]
    with ReplayServer(
        {"BTC_USDT": frame}, interval=interval, now=closed + pd.Timedelta("5s"), label=SAMPLE_LABEL
    ) as server:
        store = ModelStore.of(get_settings(home=tmp_path), server.clock.now)
        version = publish(store, name, closed - step)
        settings = get_settings(home=tmp_path, exchange_url=server.url, poll_seconds=5)
        service = Service(settings, clock=server.clock.now, jitter=lambda: 1.0).start()
        try:
            for n in range(4):
                server.clock.set(closed + n * step + pd.Timedelta("5s"))
                service.tick()
                forecast = service.answer(name).forecast
                assert (forecast.status, forecast.model_version) == ("ok", version), forecast.sentence
                assert pd.Timestamp(forecast.target_close) - pd.Timestamp(forecast.target_open) == step
            status = service.status()
            assert (status["ready"], status["degraded"]) == (True, [])
            record = service.ledger.track_record(name)
            assert (record.n, record.open, record.holes) == (3, 1, [])
        finally:
            service.stop()


def test_what_is_known_of_a_series_has_one_writer_each():
    "Fetching, choice, settling, answering: whoever composes them asks, and sets nothing."
    for composer in (refreshing, module):
        nodes = ast.walk(ast.parse(Path(composer.__file__).read_text()))
        stored = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
        foreign = {ast.unparse(n) for n in stored if ast.unparse(n.value) != "self"}
        assert foreign <= {"parts.jitter", "service.parts.market.rest_until"}, composer.__name__


def only_for(local, method):
    return lambda store, *args: method(store, *args) if store is local else store_gone()


def with_last_good(make_parts, local):
    def made(*args):
        parts = make_parts(*args)
        parts.last_good = local
        return parts

    return made


def store_gone(*_):
    raise StoreError("the model store s3://models cannot be read: nobody answers; check MUR_MODELS_URL")


def exchange_gone(*_):
    raise ExchangeError("the exchange is unavailable: it cannot be reached; check the network")
