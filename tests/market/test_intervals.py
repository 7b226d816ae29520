"""Other candles than hourly ones take the same road, and every text about them says what was measured on hourly ones only."""

import numpy as np
import pandas as pd
import pytest
from longer_candles import resampled

from make_us_rich.core.settings import CandleError
from make_us_rich.market.candles import fake_candles, load_sample
from make_us_rich.market.replay import ReplayServer
from make_us_rich.market.series import Interval
from make_us_rich.models.export import convert_model, validate_model
from make_us_rich.runs.pretrain import train_pair
from make_us_rich.runs.publish import publish_fallback, publish_or_refuse, where_next
from make_us_rich.runs.report import RunPlace, judge, open_run, walk_test_span
from make_us_rich.serving.forecasting import forecast_pair

SMALL = {"members": 1, "epochs": 1}
ONLY_1H = "The design was measured on 1h candles only"


@pytest.mark.parametrize(("interval", "days"), [("4h", 720), ("15m", 45)])
def test_the_whole_road(interval, days, tmp_path):
    frame = resampled(load_sample(), "4h") if interval == "4h" else fake_candles(4_400, seed=3, interval="15m")
    with ReplayServer({"BTC_USDT": frame}, interval=interval, label="historical sample") as server:
        place = RunPlace(str(tmp_path), exchange_url=server.url)
        run = open_run(f"BTC_USDT/{interval}", history_days=days, place=place, overrides=SMALL)
        assert len(run.frame) == days * pd.Timedelta("1d") / Interval.parse(interval).delta
        assert ONLY_1H in run._repr_markdown_()
        fallback = publish_fallback(run)
        result = train_pair(run)
        span = walk_test_span(run, result)
        model = convert_model(result.forecaster)
        parity = validate_model(model, result.forecaster, run.frame)
        verdict = judge(run, result, span, parity.max_scaled)
        checks = {check.name: check for check in verdict.checks}
        assert checks["prefix_invariance"].passed and checks["onnx_parity"].passed and checks["enough_hours"].passed
        assert "hours" not in " ".join(check.sentence + check.rule for check in verdict.checks)
        publication = publish_or_refuse(run, result, model, span, verdict, fallback)
        served = publication.version or fallback.version
        assert served, (verdict.reasons, fallback)
        assert f"mkrich forecast BTC_USDT --interval {interval}" in where_next(run, publication).text
        forecast = forecast_pair(f"BTC_USDT/{interval}", run.models, run.candles, run.client)
    assert (forecast.status, forecast.model_version, forecast.interval) == ("ok", served, interval)
    assert pd.Timestamp(forecast.target_close) - pd.Timestamp(forecast.target_open) == Interval.parse(interval).delta
    assert ONLY_1H in forecast.reliability and f"test candles of {interval}" in forecast.reliability
    assert (np.diff(list(forecast.quantiles.values())) >= 0).all()
    none = forecast_pair(f"ETH_USDT/{interval}", run.models, run.candles, None)
    assert (none.reason, none.sentence.endswith(f"`mkrich train ETH_USDT --interval {interval}`")) == ("no_model", True)


def test_two_years_of_days_are_too_few_and_it_says_so(tmp_path):
    with ReplayServer({"BTC_USDT": resampled(load_sample(), "1d")}, interval="1d", label="historical sample") as server:
        run = open_run(
            "BTC_USDT/1d", history_days=700, place=RunPlace(str(tmp_path), exchange_url=server.url), overrides=SMALL
        )
        with pytest.raises(
            CandleError, match=r"^700 candles leave \d+ to train on, at least 121 are needed; fetch a longer history$"
        ):
            train_pair(run)
        assert publish_fallback(run).version == ""
