"""Other people's candle files: each kind gives the right candles, or a sentence that says what is wrong and where."""

import gzip
import io
import json
import zipfile

import numpy as np
import pandas as pd
import pytest

from make_us_rich.core.settings import CandleError
from make_us_rich.market.candles import COLUMNS, VALUE_COLUMNS, clean_candles, fake_candles
from make_us_rich.market.reading import read

HOURS = 60
TRUE = fake_candles(HOURS, start="2024-01-01").round(dict.fromkeys(VALUE_COLUMNS, 6))
TRUE["high"] = TRUE[VALUE_COLUMNS[:4]].max(axis=1)
TRUE["low"] = TRUE[VALUE_COLUMNS[:4]].min(axis=1)
MS = TRUE["timestamp"].astype("int64")
OHLCV = TRUE[VALUE_COLUMNS[:5]].to_numpy().tolist()
ISO = TRUE["timestamp"].dt.strftime("%Y-%m-%d %H:%M:%S")


def csv(names, *columns, sep=",", head="", tail="", decimal=".", newest_first=False) -> bytes:
    "A text with these columns."
    rows = list(zip(*[list(c) for c in columns], strict=True))
    rows = rows[::-1] if newest_first else rows
    shown = [sep.join(str(x).replace(".", decimal) if isinstance(x, float) else str(x) for x in row) for row in rows]
    lines = [*([head] if head else []), *([sep.join(names)] if names else []), *shown, *([tail] if tail else [])]
    return ("\n".join(lines) + "\n").encode()


def col(name):
    return TRUE[name]


O, H, L, C, V, Q = (TRUE[name] for name in VALUE_COLUMNS[:6])  # noqa: E741
BINANCE = [MS, O, H, L, C, V, MS + 3_599_999, Q, TRUE["trades"], TRUE["tb_base_av"], TRUE["tb_quote_av"], [0] * HOURS]
DUMP_NAMES = (
    "open_time,open,high,low,close,volume,close_time,quote_volume,count,taker_buy_volume,taker_buy_quote_volume,ignore"
)


def zipped(data: bytes, names=("BTCUSDT-1h.csv",)) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, data)
    return out.getvalue()


def parquet(frame: pd.DataFrame) -> bytes:
    out = io.BytesIO()
    frame.to_parquet(out)
    return out.getvalue()


def feather(frame: pd.DataFrame) -> bytes:
    out = io.BytesIO()
    frame.to_feather(out)
    return out.getvalue()


def as_json(found) -> bytes:
    return json.dumps(found).encode()


LISTS = [[int(t), *row] for t, row in zip(MS, OHLCV, strict=True)]
KRAKEN = [[int(t) // 1000, *map(str, row[:4]), str(row[3]), str(row[4]), 7] for t, row in zip(MS, OHLCV, strict=True)]
COINBASE = [[int(t) // 1000, row[2], row[1], row[0], row[3], row[4]] for t, row in zip(MS, OHLCV, strict=True)]
SEC = MS // 1000
FULL = set(VALUE_COLUMNS)
GOOD: dict[str, bytes] = {
    "binance dump without names": csv([], *BINANCE),
    "binance dump with names": csv(DUMP_NAMES.split(","), *BINANCE),
    "binance dump in us": csv([], MS * 1000, *BINANCE[1:6], (MS + 3_600_000) * 1000 - 1, *BINANCE[7:]),
    "binance dump, ms and then us": csv([], [*MS[:30], *(MS[30:] * 1000)], *BINANCE[1:6], BINANCE[6], *BINANCE[7:]),
    "binance dump zipped": zipped(csv([], *BINANCE)),
    "a gzipped text": gzip.compress(csv(["time", *VALUE_COLUMNS[:5]], SEC, O, H, L, C, V)),
    "cryptodatadownload": csv(
        ["unix", "date", "symbol", "open", "high", "low", "close", "Volume BTC", "Volume USDT", "tradecount"],
        *(MS, ISO, ["BTC/USDT"] * HOURS, O, H, L, C, V, Q, TRUE["trades"]),
        head="https://www.CryptoDataDownload.com",
        newest_first=True,
    ),
    "cryptodatadownload of before": csv(
        ["Date", "Symbol", "Open", "High", "Low", "Close", "Volume BTC", "Volume USD"],
        *(TRUE["timestamp"].dt.strftime("%Y-%m-%d %I-%p"), ["BTCUSD"] * HOURS, O, H, L, C, V, Q),
        head="https://www.CryptoDataDownload.com",
    ),
    "kaggle": csv(
        ["Timestamp", "Open", "High", "Low", "Close", "Volume_(BTC)", "Volume_(Currency)", "Weighted_Price"],
        *(SEC, O, H, L, C, V, Q, C),
    ),
    "kaggle, an index in front": csv(["", "date", *VALUE_COLUMNS[:5]], range(HOURS), ISO, O, H, L, C, V),
    "kraken archive": csv([], SEC, O, H, L, C, V, TRUE["trades"]),
    "kraken answer": as_json({"error": [], "result": {"XXBTZUSD": KRAKEN, "last": 1}}),
    "coinbase answer": as_json(COINBASE[::-1]),
    "coinbase advanced": as_json(
        {
            "candles": [
                {
                    "start": str(r[0]),
                    "low": str(r[1]),
                    "high": str(r[2]),
                    "open": str(r[3]),
                    "close": str(r[4]),
                    "volume": str(r[5]),
                }
                for r in COINBASE
            ]
        }
    ),
    "tradingview export": csv(
        ["time", "open", "high", "low", "close", "Volume", "Volume MA"], SEC, O, H, L, C, V, [""] * HOURS
    ),
    "tradingview udf": as_json(
        {
            "s": "ok",
            "t": SEC.tolist(),
            "o": O.tolist(),
            "h": H.tolist(),
            "l": L.tolist(),
            "c": C.tolist(),
            "v": V.tolist(),
        }
    ),
    "freqtrade json": as_json(LISTS),
    "freqtrade feather": feather(TRUE.rename(columns={"timestamp": "date"})[["date", *VALUE_COLUMNS[:5]]]),
    "our parquet": parquet(TRUE),
    "parquet with an index": parquet(TRUE.set_index("timestamp")[VALUE_COLUMNS[:5]]),
    "json records": as_json(
        [
            dict(zip(["Date", "Open", "High", "Low", "Close", "Volume"], [i, *r], strict=True))
            for i, r in zip(ISO, OHLCV, strict=True)
        ]
    ),
    "json lines": b"\n".join(
        as_json({"t": int(t), "o": r[0], "h": r[1], "l": r[2], "c": r[3], "v": r[4]})
        for t, r in zip(MS, OHLCV, strict=True)
    ),
    "utf-16": csv(["time", *VALUE_COLUMNS[:5]], ISO, O, H, L, C, V, sep="\t").decode().encode("utf-16"),
    "utf-8 with a mark": b"\xef\xbb\xbf" + csv(["time", *VALUE_COLUMNS[:5]], ISO, O, H, L, C, V),
    "latin-1 banner": "café\n".encode("latin-1") + csv(["time", *VALUE_COLUMNS[:5]], ISO, O, H, L, C, V),
    "semicolons and decimal commas": csv(
        [["Zeit", "time"][1], *VALUE_COLUMNS[:5]], ISO, O, H, L, C, V, sep=";", decimal=","
    ),
    "windows line ends": csv(["time", *VALUE_COLUMNS[:5]], ISO, O, H, L, C, V).replace(b"\n", b"\r\n"),
    "comments": csv(["time", *VALUE_COLUMNS[:5]], ISO, O, H, L, C, V, head="# made by a program\n// and by another"),
    "a sum below": csv(["time", *VALUE_COLUMNS[:5]], ISO, O, H, L, C, V, tail="Total,,,,,12345"),
    "a copyright below": csv(["time", *VALUE_COLUMNS[:5]], ISO, O, H, L, C, V, tail="\n(c) somebody"),
    "metatrader": csv(
        ["<DATE>", "<TIME>", "<OPEN>", "<HIGH>", "<LOW>", "<CLOSE>", "<TICKVOL>", "<VOL>"],
        *(
            TRUE["timestamp"].dt.strftime("%Y.%m.%d"),
            TRUE["timestamp"].dt.strftime("%H:%M:%S"),
            O,
            H,
            L,
            C,
            [1] * HOURS,
            V,
        ),
        sep="\t",
    ),
    "quoted thousands": csv(["time", *VALUE_COLUMNS[:5]], ISO, O, H, L, C, [f'"{1000 + i:,}.5"' for i in range(HOURS)]),
    "a zone in the text": csv(
        ["time", *VALUE_COLUMNS[:5]], TRUE["timestamp"].dt.tz_convert("+02:00").map(str), O, H, L, C, V
    ),
    "names once more": b"".join(
        csv(["time", *VALUE_COLUMNS[:5]], *(x[a:b] for x in (ISO, O, H, L, C, V))) for a, b in ((0, 30), (30, 60))
    ),
    "numbers as 1e3": csv(["time", *VALUE_COLUMNS[:5]], ISO, *([f"{x:.12e}" for x in y] for y in (O, H, L, C, V))),
    "a page twice": csv(["time", *VALUE_COLUMNS[:5]], *([*x, *x[:20]] for x in (ISO, O, H, L, C, V))),
}
CHANGED_VOLUME = {"quoted thousands"}


@pytest.mark.parametrize("kind", GOOD)
def test_every_kind_gives_its_candles(kind, tmp_path):
    path = tmp_path / "a candle file"
    path.write_bytes(GOOD[kind])
    frame, report = read(path)
    assert list(frame.columns) == COLUMNS and len(frame) == HOURS and report.rows == HOURS, report.told
    assert (report.interval, report.invalid, report.misaligned) == ("1h", 0, 0)
    compared = VALUE_COLUMNS[: 4 if kind in CHANGED_VOLUME else 5]
    np.testing.assert_allclose(frame[compared], TRUE[compared], rtol=1e-9)
    assert (frame["timestamp"] == TRUE["timestamp"]).all() and (frame["close_time"] == TRUE["close_time"]).all()
    for name in report.lacking:
        assert (frame[name] == 0).all() and name in " ".join(report.told)
    for name in FULL - set(report.lacking) - {"trades"}:
        assert (frame[name] > 0).all(), name


def test_amounts_keep_their_values(tmp_path):
    for kind in ("binance dump with names", "binance dump without names"):
        path = tmp_path / "dump.csv"
        path.write_bytes(GOOD[kind])
        frame, report = read(path)
        np.testing.assert_allclose(frame[VALUE_COLUMNS], TRUE[VALUE_COLUMNS])
        assert report.lacking == ()


def spoil(**changes) -> pd.DataFrame:
    frame = pd.DataFrame({"time": ISO, "open": O, "high": H, "low": L, "close": C, "volume": V}).astype(object)
    for name, value in changes.items():
        frame[name] = value
    return frame


def with_row(i: int, **cells) -> pd.DataFrame:
    frame = spoil()
    for name, value in cells.items():
        frame.loc[i, name] = value
    return frame


def scaled(first: int, factor: float) -> pd.DataFrame:
    frame = spoil()
    frame.loc[first:, ["open", "high", "low", "close"]] *= factor
    return frame


QUARTERS = pd.date_range("2024-01-01", periods=HOURS, freq="15min").strftime("%Y-%m-%d %H:%M:%S")
ENDS = (MS + 3_599_999).tolist()
BAD: dict[str, tuple[object, str | None, str]] = {
    "quarters as hours": (spoil(time=QUARTERS), "1h", "15 minutes apart"),
    "hours as days": (spoil(), "1d", "read them as 1h"),
    "weeks": (
        spoil(time=pd.date_range("2022-01-03", periods=HOURS, freq="7D").strftime("%Y-%m-%d")),
        None,
        "168 hours apart",
    ),
    "day first": (spoil(time=TRUE["timestamp"].dt.strftime("%d/%m/%Y %H:%M")), None, "two ways"),
    "month first": (spoil(time=TRUE["timestamp"].dt.strftime("%m/%d/%Y %H:%M")), None, "two ways"),
    "day first with dots": (spoil(time=TRUE["timestamp"].dt.strftime("%d.%m.%Y %H:%M")), None, "two ways"),
    "no close": (spoil().drop(columns="close"), None, "no column for close"),
    "no time": (spoil().drop(columns="time"), None, "no column for timestamp"),
    "a word for a price": (with_row(7, close="n/a"), None, "line 8"),
    "a negative volume": (with_row(9, volume=-1.0), None, "line 10"),
    "a price of zero": (with_row(9, low=0.0), None, "line 10"),
    "high below low": (with_row(3, high=1e-9), None, "line 4"),
    "ends of candles": (spoil(time=ENDS), None, "ends of candles"),
    "half past": (spoil(time=(MS + 1_800_000).tolist()), None, "off by 30 minutes"),
    "two symbols": (spoil(symbol=["BTCUSDT", "ETHUSDT"] * 30), None, "2 symbols"),
    "half in cents": (scaled(30, 100.0), None, "100 times larger"),
    "half in thousands": (scaled(30, 0.001), None, "1,000 times smaller"),
    "a price x 100": (
        with_row(30, **{k: spoil().loc[30, k] * 100 for k in ("open", "high", "low", "close")}),
        None,
        "line 31",
    ),
    "open and close swapped": (spoil(open=C, close=O), None, "swapped"),
    "a page twice with other closes": (
        pd.concat([spoil(), spoil(close=C * 1.00001, high=H * 1.01).iloc[:20]]),
        None,
        "twice with other prices",
    ),
    "high and low swapped": (spoil(high=L, low=H), None, "no 1h candles"),
    "an unfinished merge": (
        csv(["time", *VALUE_COLUMNS[:5]], ISO, O, H, L, C, V, tail="<<<<<<< HEAD"),
        None,
        "unfinished merge",
    ),
    "half a json": (GOOD["freqtrade json"][:-40], None, "breaks off"),
    "half a parquet": (GOOD["our parquet"][:-400], None, "cannot be read"),
    "half a zip": (GOOD["binance dump zipped"][:-60], None, "cannot be read"),
    "two in a zip": (zipped(b"x", ("a.csv", "b.csv")), None, "2 files"),
    "a page of html": (b"<!doctype html><html><body>429</body></html>", None, "no rows of candles"),
    "an error as json": (b'{"code": -1121, "msg": "Invalid symbol."}', None, "no list of candles"),
    "nothing": (b"", None, "no rows of candles"),
    "names only": (csv(["time", *VALUE_COLUMNS[:5]], *[[]] * 6), None, "no rows of candles"),
    "three columns": ([[1, 2, 3]], None, "no list of candles"),
    "one row": (spoil().iloc[:1], None, "say the interval"),
    "a list of numbers": ([1, 2, 3], None, "no list of candles"),
    "dates of 1970": (spoil(time=list(range(HOURS))), None, "none of the times"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_candle_is_refused_in_a_sentence(kind, tmp_path):
    source, interval, words = BAD[kind]
    if isinstance(source, bytes):
        path = tmp_path / "candles"
        path.write_bytes(source)
        source = path
    with pytest.raises(CandleError, match=words) as refused:
        read(source, interval)
    text = str(refused.value)
    assert ";" in text and "\n" not in text and len(text) < 500


def test_a_few_bad_rows_are_left_out_and_told():
    frame = fake_candles(3000, start="2024-01-01")
    frame.loc[100, "high"] = frame.loc[100, "low"] / 2
    frame.loc[200, VALUE_COLUMNS[:4]] *= 100
    found, report = read(frame)
    assert len(found) == 2998 and report.invalid == 2 and "2 invalid of 3,000 rows left out" in report.told


def test_odd_but_true_is_told():
    "A halt, an empty day, a repeated header: kept, and said."
    frame = fake_candles(300, start="2024-01-01")
    price = float(frame.loc[99, "close"])
    frame.loc[100:140, VALUE_COLUMNS[:4]] = price
    frame.loc[100:140, VALUE_COLUMNS[4:]] = 0
    frame.loc[141, ["open", "high", "low", "close"]] = [price, price * 1.01, price * 0.99, price]
    frame.loc[142:, VALUE_COLUMNS[:4]] *= price / float(frame.loc[142, "open"])
    _, report = read(frame)
    assert any("a halt, or filled in" in text for text in report.told)


def test_a_collapse_is_no_fault():
    "A coin that loses 99.9 % in a day, candle after candle, is the market's own doing."
    steps = np.r_[np.zeros(48), np.full(24, -0.29), np.zeros(48)]
    close = 100 * np.exp(np.cumsum(steps))
    opened = np.r_[100.0, close[:-1]]
    times = pd.date_range("2024-01-01", periods=len(close), freq="1h", tz="UTC")
    frame = pd.DataFrame({"time": times, "open": opened, "close": close, "volume": 1.0})
    frame = frame.assign(high=frame[["open", "close"]].max(axis=1), low=frame[["open", "close"]].min(axis=1))
    assert read(frame)[1].invalid == 0


def test_frames_of_other_libraries():
    import pyarrow as pa

    assert len(read(pa.Table.from_pandas(TRUE))[0]) == HOURS
    columns = pd.MultiIndex.from_product([["Open", "High", "Low", "Close", "Volume"], ["BTC-USD"]])
    yahoo = pd.DataFrame(OHLCV, columns=columns, index=pd.DatetimeIndex(TRUE["timestamp"], name="Datetime"))
    assert len(read(yahoo)[0]) == HOURS


def test_cleaning_names_what_is_lacking():
    "What ccxt returns is cleaned; what has no volume is refused, not emptied."
    frame = pd.DataFrame(LISTS, columns=["timestamp", *VALUE_COLUMNS[:5]])
    assert len(clean_candles(frame)[0]) == HOURS
    with pytest.raises(CandleError, match="lack the columns open, close"):
        clean_candles(frame.drop(columns=["open", "close"]))
