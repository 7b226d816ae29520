"""Backtest, leak tests, and the second judgement of a stored model: what a notebook shows on good candles, here on bad ones and end to end."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tiny_model import PAIRS, publish, sample

from make_us_rich import backtest as module
from make_us_rich.backtest import COLUMNS, backtest, contenders, findings, plan_blocks, plot_pit, sign_value, skill_table
from make_us_rich.candle_store import CandleStore
from make_us_rich.candles import SAMPLE_LABEL, fake_candles
from make_us_rich.evaluation import HarT, gate, next_returns, scorable_rows
from make_us_rich.exchange import BinanceClient
from make_us_rich.leaktest import leaktest
from make_us_rich.model_store import ModelStore
from make_us_rich.peers import PEERS
from make_us_rich.recipe import load_recipe
from make_us_rich.regate import regate
from make_us_rich.replay import ReplayServer
from make_us_rich.runs import find_notebook, run_notebook
from make_us_rich.settings import CandleError, SettingsError, TrainingError
from make_us_rich.training import prepare

MARKET = fake_candles(2200, seed=23)


def test_no_forecast_knows_a_later_candle():
    "The forecasts of a walk are the same when everything after an hour is cut off, for every hour that was probed."
    whole = backtest(MARKET, ["HAR-t", "EWMA-range"], since=MARKET.timestamp[1500], refit_every="5D")
    for t in (1600, 1777, 2000):
        cut = backtest(MARKET.iloc[: t + 2], ["HAR-t", "EWMA-range"], since=MARKET.timestamp[1500], refit_every="5D")
        for name, Q in cut.forecasts.items():
            np.testing.assert_allclose(Q, whole.forecasts[name][: len(Q)], rtol=1e-12)
            assert cut.rows[-1] == t


def test_a_refit_knows_nothing_after_its_start():
    seen = []

    class Watching(HarT):
        def fit(self, frame, end):
            seen.append((frame["timestamp"].iloc[-1], end == len(frame) - 1))
            return super().fit(frame, end)

    report = backtest(MARKET, {"watching": Watching}, since=MARKET.timestamp[1700], refit_every="7D")
    assert [time + pd.Timedelta("1h") for time, _ in seen] == [block.start for block in report.blocks]
    assert all(last for _, last in seen)


def test_a_model_that_peeks_is_not_scored():
    class Peeking(HarT):
        def quantiles(self, frame, rows):
            return super().quantiles(frame, rows) + 0.05 * np.nan_to_num(next_returns(frame, rows))[:, None]

    with pytest.raises(TrainingError, match=r"peeking changes its forecast of .* when later candles are hidden; it looks ahead"):
        backtest(MARKET, {"peeking": Peeking}, since=MARKET.timestamp[1900])


def test_a_stopped_backtest_goes_on_and_never_reads_stale_blocks(tmp_path, monkeypatch):
    made, stop_at = [], [3]
    honest = module.forecast_block

    def counting(*args):
        made.append(args[0].name)
        if len(made) == stop_at[0]:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(module, "forecast_block", counting)
    since, short = MARKET.timestamp[1500], MARKET[:2100]
    with pytest.raises(KeyboardInterrupt):
        backtest(short, ["HAR-t", "EWMA-range"], since, out=tmp_path)
    made.clear()
    stop_at[0] = 0
    first = backtest(short, ["HAR-t", "EWMA-range"], since, out=tmp_path)
    assert len(made) == 2 * len(first.blocks) - 2  # the two finished blocks were kept
    made.clear()
    later = backtest(MARKET, ["HAR-t"], since, out=tmp_path)
    assert len(made) == len(later.blocks) - len(first.blocks) + 1  # new blocks, and the last one, which has more hours now
    made.clear()
    revised = MARKET.assign(volume=MARKET.volume.where(MARKET.index != 1490, 7.0))
    backtest(revised, ["HAR-t"], since, out=tmp_path)
    assert len(made) == len(later.blocks)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".parquet"}
    assert list(pd.read_parquet(files[0]).columns) == ["timestamp", *COLUMNS]


def test_gaps_are_neither_forecast_nor_filled():
    holed = MARKET.drop(index=range(1800, 1810)).reset_index(drop=True)
    report = backtest(holed, ["HAR-t"], since=MARKET.timestamp[1700])
    times = report.frame["timestamp"].iloc[report.rows]
    near = (times >= MARKET.timestamp[1799]) & (times < MARKET.timestamp[1810] + pd.Timedelta("118h"))
    assert not near.any() and np.isfinite(report.y).all() and len(report.y) == len(report.forecasts["HAR-t"])


@pytest.mark.parametrize(("interval", "refit"), [("15m", "2D"), ("4h", "20D"), ("1d", "120D")])
def test_other_intervals_run_and_say_that_skill_was_not_measured_there(interval, refit):
    frame = fake_candles(2200, seed=3, interval=interval)
    tiny = load_recipe("default", members=1, epochs=1, hidden_size=4)
    report = backtest(frame, {"lstm": tiny, "HAR-t": None}, since=frame.timestamp[2000], refit_every=refit, interval=interval)
    assert len(report.y) > 150 and "measured on 1h candles only" in findings(report)[0]
    assert skill_table(report)["CRPS / base"].between(0.7, 1.3).all()
    assert len(plot_pit(report).axes) >= 2


def test_every_name_takes_part_and_a_wrong_one_is_told_before_any_work():
    assert [c.name for c in contenders(["LSTM", "original", *PEERS])] == ["lstm", "original", *PEERS]
    seen = []
    with pytest.raises(SettingsError, match="did you mean 'EWMA-range'"):
        backtest(MARKET, ["HAR-t", "EWMA"], progress=lambda *step: seen.append(step))
    assert seen == []
    with pytest.raises(SettingsError, match="refit_every is a time such as 7D"):
        plan_blocks(MARKET, refit_every="weekly")
    with pytest.raises(CandleError, match="needs 840 candles before"):
        backtest(MARKET[:700], ["HAR-t"])


def test_a_coin_earns_nothing_and_pays_fees():
    class Coin(HarT):
        def quantiles(self, frame, rows):
            sign = np.sign(np.sin(1e6 * frame["close"].to_numpy()[rows]))  # known at the close, and as good as random
            return super().quantiles(frame, rows) + 1e-4 * sign[:, None]

    worth = sign_value(backtest(MARKET, {"coin": Coin}, since=MARKET.timestamp[1300])).loc["coin"]
    assert worth["low"] < 0.5 < worth["high"] and worth["net high"] < 0 and worth["needed"] > 0.55


def test_the_run_notebook_runs_with_other_parameters(tmp_path):
    sample("BTC_USDT").tail(2500).to_parquet(tmp_path / "candles.parquet")
    parameters = {"models": ["EWMA-range"], "file": str(tmp_path / "candles.parquet"), "out": str(tmp_path / "kept"), "refit_every": "10D"}
    end = run_notebook(find_notebook("run_backtest.ipynb"), tmp_path / "backtest.ipynb", parameters, deadline=300)
    assert end.exit_class == "ok", (tmp_path / "log.txt").read_text()[-2000:]
    assert len(list((tmp_path / "kept").rglob("*.parquet"))) == 3


def test_leaktest_finds_a_scaling_by_the_whole_history():
    frame, recipe = sample("BTC_USDT").tail(3500).reset_index(drop=True), load_recipe("default", hidden_size=8)

    def leaky(candles):
        data = prepare(candles, recipe)
        return replace(data, x=data.x / data.x.std(0).clamp_min(1e-6))

    report = leaktest(frame, recipe, quick=True, build=leaky)
    failed = [check.name for check in report.verdict.checks if not check.passed]
    assert "prefix_invariance" in failed and not report.verdict.passed
    assert {"honest data", "shuffled targets", "target as a feature"} <= set(report.table.index)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    models, candles = ModelStore(f"file://{home}/models"), CandleStore(home / "candles")
    with ReplayServer({PAIRS[0]: sample(PAIRS[0])}, label=SAMPLE_LABEL) as exchange:
        candles.update(BinanceClient(exchange.url), PAIRS[0], rows=4500)
    return models, candles


def test_a_stored_model_is_judged_only_on_hours_after_its_cutoff(stores):
    models, candles = stores
    frame = candles.read(PAIRS[0])
    version = publish(models, PAIRS[0], frame["timestamp"].iloc[-900] + pd.Timedelta("1h"))
    # the manifest of the tiny model says rows up to the end of the sample, and no share for a test
    with pytest.raises(CandleError, match=f"version {version} .* no later hour can be scored yet"):
        regate(models, candles, PAIRS[0])


def test_gate_compares_with_the_champion_hour_by_hour():
    rows = scorable_rows(MARKET, np.arange(1400, 2199))
    har = HarT().fit(MARKET, 1400).quantiles(MARKET, rows)
    noisy = har + 0.25 * (har[:, [18]] - har[:, [2]]) * np.sign(np.sin(np.arange(len(rows))))[:, None]
    verdict = gate(MARKET, rows, noisy, incumbent=har)
    check = next(check for check in verdict.checks if check.name == "not_worse")
    assert not check.passed and "keep the champion" in check.sentence
    assert "not_worse" not in [check.name for check in gate(MARKET, rows, har).checks]
