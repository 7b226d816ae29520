"""Candles of four hours or a day, made of hourly ones as an exchange makes them."""

import pandas as pd

from make_us_rich.market.candles import COLUMNS, TIME
from make_us_rich.market.series import Interval


def resampled(frame: pd.DataFrame, interval: str) -> pd.DataFrame:
    "Hourly candles in longer ones; those with a missing hour are left out."
    step = Interval.parse(interval)
    groups = frame.groupby(frame["timestamp"].dt.floor(step.delta))
    ends = {"open": ("open", "first"), "high": ("high", "max"), "low": ("low", "min"), "close": ("close", "last")}
    sums = {name: (name, "sum") for name in ("volume", "quote_av", "trades", "tb_base_av", "tb_quote_av")}
    longer = groups.agg(**ends, **sums)[groups.size() == step.ms // 3_600_000].reset_index()
    longer["timestamp"] = longer["timestamp"].astype(TIME)
    longer["close_time"] = (longer["timestamp"] + step.delta - pd.Timedelta("1ms")).astype(TIME)
    return longer[COLUMNS]
