"""A backup while everything is written to, and back: into SQLite and into PostgreSQL, and from there once more."""

import threading

import numpy as np
import pandas as pd
import pytest
from servers import database_url, postgresql  # noqa: F401
from sqlalchemy import func, select
from tiny_model import publish

from make_us_rich.api.examples import add_people
from make_us_rich.core.database import connect, migrate, session
from make_us_rich.core.settings import StoreError, get_settings
from make_us_rich.core.tables import ForecastRow, TableBase, User
from make_us_rich.market.candle_store import CandleStore
from make_us_rich.market.importing import import_candles
from make_us_rich.registry.store import ModelStore
from make_us_rich.serving.backup import back_up, restore
from make_us_rich.serving.examples import example_candles, record_hours, sharp_and_blind
from make_us_rich.serving.verify import Ledger

NOW = pd.Timestamp("2025-03-01", tz="UTC")


@pytest.fixture
def full(tmp_path):
    "A home with a record, people, candles and two versions of a model."
    settings = get_settings(home=tmp_path / "full")
    engine, frame = connect(settings.db_url), example_candles()
    migrate(engine)
    rows = np.arange(1000, 1200)
    record_hours(engine, frame, rows, sharp_and_blind(frame, rows)["BTC_USDT"])
    add_people(engine, NOW)
    import_candles(CandleStore(settings.candles_dir), frame, "BTC_USDT", lambda: NOW)
    store = ModelStore.of(settings)
    for mark in range(2):
        publish(store, "BTC_USDT", NOW + mark * pd.Timedelta("1h"), mark=mark)
    yield settings, engine, frame
    engine.dispose()


def rows_of(settings) -> dict[str, list[tuple]]:
    engine = connect(settings.db_url)
    with session(engine) as s:
        found = {t.name: sorted(map(repr, s.execute(select(t)).all())) for t in TableBase.metadata.sorted_tables}
    engine.dispose()
    return found


def same(one, other) -> None:
    assert rows_of(one) == rows_of(other)
    stores = [ModelStore.of(each) for each in (one, other)]
    assert stores[0].champion("BTC_USDT") == stores[1].champion("BTC_USDT")
    assert stores[0].load("BTC_USDT").model == stores[1].load("BTC_USDT").model
    frames = [CandleStore(each.candles_dir).read("BTC_USDT") for each in (one, other)]
    pd.testing.assert_frame_equal(*frames)


def test_there_and_back(full, tmp_path, database_url):  # noqa: F811
    "From SQLite into this database, and from there into SQLite again; new rows get new numbers."
    settings, _, _ = full
    there = get_settings(home=tmp_path / "there", database_url=database_url)
    back = get_settings(home=tmp_path / "back")
    told = back_up(settings, tmp_path / "one.zip")
    assert told.rows["forecasts"] == 200 and told.rows["users"] == 3
    restore(there, tmp_path / "one.zip")
    same(settings, there)
    back_up(there, tmp_path / "two.zip")
    restore(back, tmp_path / "two.zip")
    same(settings, back)
    engine = connect(there.db_url)
    with session(engine) as s:
        s.add(User(name="new", role="member", created_at=NOW))
    engine.dispose()
    with pytest.raises(StoreError, match="an empty home only"):
        restore(there, tmp_path / "one.zip")


def test_what_was_answered_before_is_in_it(full, tmp_path):
    "Forecasts are recorded and settled without a pause meanwhile: the copy is one moment, and holds all before it."
    settings, engine, frame = full
    stop, written = threading.Event(), []

    def write() -> None:
        for row in range(200, 1000):
            if stop.is_set():
                return
            one = np.arange(row, row + 1)
            record_hours(engine, frame, one, sharp_and_blind(frame, one)["ETH_USDT"], "ETH_USDT")
            written.append(row)

    writer = threading.Thread(target=write)
    writer.start()
    copies = []
    for number in range(3):
        before = len(written)
        told = back_up(settings, tmp_path / f"{number}.zip")
        copies.append((before, told.rows["forecasts"] - 200, len(written)))
    stop.set()
    writer.join()
    assert all(before <= copied <= after + 1 for before, copied, after in copies) and copies[-1][0] > 0
    again = get_settings(home=tmp_path / "again")
    restore(again, tmp_path / "2.zip")
    home = connect(again.db_url)
    with session(home) as s:
        kept = set(s.scalars(select(ForecastRow.target_open).where(ForecastRow.pair == "ETH_USDT")))
        assert s.scalar(select(func.count()).select_from(ForecastRow)) == copies[-1][1] + 200
    hours = [frame["timestamp"].iloc[row] + pd.Timedelta("1h") for row in written[: copies[-1][0]]]
    assert set(hours) <= kept and len(Ledger(home).series()) == 2
    home.dispose()
