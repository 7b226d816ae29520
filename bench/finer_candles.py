"""What would finer candles give? python bench/finer_candles.py [--data FOLDER]

There are no candles finer than an hour in the shared data, so the question is asked one level up, where the hourly candles ARE the finer
ones: 4h and 12h candles are built from them, and HAR-t forecasts the next one twice, with the variance of the coarse candle (its own range
and return) and with the realised variance of the hourly candles inside it. All hours lie before the test span of each series. 20 CPU s.
"""

import argparse
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
from accuracy import DATA
from basket import histories, one_each
from peers import HOURS

from make_us_rich.evaluation.scores import crps, dm_test
from make_us_rich.market.candles import next_returns, scorable_rows
from make_us_rich.market.series import Interval
from make_us_rich.models import har
from make_us_rich.models.baselines import Base
from make_us_rich.models.har import HarT


def coarse(hourly: pd.DataFrame, hours: int) -> pd.DataFrame:
    "Candles of so many hours, whole ones only, with the realised variance of the hours inside as the column `fine`."
    returns = np.log(hourly["close"]).diff().where(hourly["timestamp"].diff() == pd.Timedelta("1h"), 0.0)
    spread, body = np.log(hourly["high"] / hourly["low"]), np.log(hourly["close"] / hourly["open"])
    fine = 0.5 * (returns**2 + (0.5 * spread**2 - (2 * np.log(2) - 1) * body**2).clip(lower=0))
    groups = hourly.assign(fine=fine, n=1).groupby(hourly["timestamp"].dt.floor(f"{hours}h"))
    rules = {
        "open": "first",
        "high": "max",
        "low": "min",
        "close": "last",
        "volume": "sum",
        "trades": "sum",
        "fine": "sum",
        "n": "sum",
    }
    frame = groups.agg(rules).reset_index()
    return frame[frame["n"] == hours].drop(columns="n").reset_index(drop=True)


def realised(frame: pd.DataFrame, returns: np.ndarray, taps: int | None = None) -> np.ndarray:
    "In the place of `har.candle_variance`: the finer candles' variance, one wild print tamed in the same way."
    variance = frame["fine"].to_numpy()
    before = np.append(np.inf, har.decayed_mean(variance, 240, taps)[:-1])
    return np.minimum(variance, 100 * before + 1e-10)


def compare(hourly: pd.DataFrame, hours: int) -> tuple[int, float, float, float]:
    "Candles scored, CRPS / base without and with the finer candles, and t of the difference."
    frame, step = coarse(hourly, hours), Interval.parse(f"{hours}h")
    start = max(840, len(frame) // 2)
    rows = scorable_rows(frame, np.arange(start, len(frame) - 1), step, window=240)
    y = next_returns(frame, rows, step)
    plain = crps(y, HarT(step).fit(frame, start).quantiles(frame, rows))
    with patch.object(har, "candle_variance", realised):
        finer = crps(y, HarT(step).fit(frame, start).quantiles(frame, rows))
    base = crps(y, Base(step).quantiles(frame, rows)).mean()
    return len(rows), plain.mean() / base, finer.mean() / base, dm_test(finer - plain)[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the Parquet files")
    asked, cpu = parser.parse_args(), time.process_time()
    frames = one_each(histories(asked.data, []))
    for hours in (4, 12):
        found = {}
        for name, frame in frames.items():
            before = frame[: len(frame) - round(HOURS / 10)]  # nothing of the test span
            if len(before) // hours > 1_500:
                found[name] = compare(before, hours)
        table = pd.DataFrame(found, index=["candles", "HAR-t / base", "with finer / base", "t"]).T
        ratio = table["with finer / base"] / table["HAR-t / base"]
        across = (ratio.mean() - 1) / (ratio.std() / np.sqrt(len(ratio)))
        print(table.round(4).to_string())
        won = f"better on {(ratio < 1).sum()} of {len(ratio)}, t over series {across:+.1f}"
        print(f"{hours}h: with finer / without {ratio.mean():.4f}, {won}\n", flush=True)
    print(f"{time.process_time() - cpu:.0f} CPU s")
