"""Backtest, leak tests, and the second judgement of a stored model: what a notebook shows on good candles, here on bad ones and end to end."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_model import PAIRS, publish, sample
from typer.testing import CliRunner
from waiting import LONG, wait_for

from make_us_rich.cli.main import app
from make_us_rich.core.settings import CandleError, SettingsError, TrainingError, get_settings
from make_us_rich.evaluation import backtest as module
from make_us_rich.evaluation.backtest import backtest, findings, sign_value, skill_table
from make_us_rich.evaluation.backtest_plots import plot_pit
from make_us_rich.evaluation.gate import gate
from make_us_rich.evaluation.leaktest import leaktest
from make_us_rich.evaluation.peers import PEERS
from make_us_rich.evaluation.walk import QUANTILE_COLUMNS, Pool, Walk, contenders, plan_blocks
from make_us_rich.market.candle_store import CandleStore
from make_us_rich.market.candles import SAMPLE_LABEL, fake_candles, next_returns, scorable_rows
from make_us_rich.market.exchange import BinanceClient
from make_us_rich.market.replay import ReplayServer
from make_us_rich.models.batches import prepare
from make_us_rich.models.har import HarT
from make_us_rich.models.recipe import load_recipe
from make_us_rich.registry.rejudge import regate
from make_us_rich.registry.store import ModelStore

MARKET = fake_candles(2200, seed=23)


def test_no_forecast_knows_a_later_candle():
    "The forecasts of a walk are the same when everything after an hour is cut off, for every hour that was probed."
    whole = backtest(MARKET, ["HAR-t", "EWMA-range"], Walk(MARKET.timestamp[1500], refit_every="5D"))
    for t in (1600, 1777, 2000):
        cut = backtest(MARKET.iloc[: t + 2], ["HAR-t", "EWMA-range"], Walk(MARKET.timestamp[1500], refit_every="5D"))
        for name, Q in cut.forecasts.items():
            np.testing.assert_allclose(Q, whole.forecasts[name][: len(Q)], rtol=1e-12)
            assert cut.rows[-1] == t


def test_a_refit_knows_nothing_after_its_start():
    seen = []

    class Watching(HarT):
        def fit(self, frame, end):
            seen.append((frame["timestamp"].iloc[-1], end == len(frame) - 1))
            return super().fit(frame, end)

    report = backtest(MARKET, {"watching": Watching}, Walk(MARKET.timestamp[1700], refit_every="7D"))
    assert [time + pd.Timedelta("1h") for time, _ in seen] == [block.start for block in report.blocks]
    assert all(last for _, last in seen)


def test_a_model_that_peeks_is_not_scored():
    class Peeking(HarT):
        def quantiles(self, frame, rows):
            return super().quantiles(frame, rows) + 0.05 * np.nan_to_num(next_returns(frame, rows))[:, None]

    with pytest.raises(
        TrainingError, match=r"peeking changes its forecast of .* when later candles are hidden; it looks ahead"
    ):
        backtest(MARKET, {"peeking": Peeking}, Walk(MARKET.timestamp[1900]))


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
        backtest(short, ["HAR-t", "EWMA-range"], Walk(since), out=tmp_path)
    made.clear()
    stop_at[0] = 0
    first = backtest(short, ["HAR-t", "EWMA-range"], Walk(since), out=tmp_path)
    assert len(made) == 2 * len(first.blocks) - 2  # the two finished blocks were kept
    made.clear()
    later = backtest(MARKET, ["HAR-t"], Walk(since), out=tmp_path)
    assert (
        len(made) == len(later.blocks) - len(first.blocks) + 1
    )  # new blocks, and the last one, which has more hours now
    made.clear()
    revised = MARKET.assign(volume=MARKET.volume.where(MARKET.index != 1490, 7.0))
    backtest(revised, ["HAR-t"], Walk(since), out=tmp_path)
    assert len(made) == len(later.blocks)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".parquet"}
    assert list(pd.read_parquet(files[0]).columns) == ["timestamp", *QUANTILE_COLUMNS]


def test_gaps_are_neither_forecast_nor_filled():
    holed = MARKET.drop(index=range(1800, 1810)).reset_index(drop=True)
    report = backtest(holed, ["HAR-t"], Walk(MARKET.timestamp[1700]))
    times = report.frame["timestamp"].iloc[report.rows]
    near = (times >= MARKET.timestamp[1799]) & (times < MARKET.timestamp[1810] + pd.Timedelta("118h"))
    assert not near.any() and np.isfinite(report.y).all() and len(report.y) == len(report.forecasts["HAR-t"])


@pytest.mark.parametrize(("interval", "refit"), [("15m", "2D"), ("4h", "20D"), ("1d", "120D")])
def test_other_intervals_run_and_say_that_skill_was_not_measured_there(interval, refit):
    frame = fake_candles(2200, seed=3, interval=interval)
    tiny = load_recipe("default", members=1, epochs=1, hidden_size=4)
    report = backtest(frame, {"lstm": tiny, "HAR-t": None}, Walk(frame.timestamp[2000], refit_every=refit), interval)
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
        plan_blocks(MARKET, Walk(refit_every="weekly"))
    with pytest.raises(CandleError, match="needs 840 candles before"):
        backtest(MARKET[:700], ["HAR-t"])


def test_a_coin_earns_nothing_and_pays_fees():
    class Coin(HarT):
        def quantiles(self, frame, rows):
            sign = np.sign(np.sin(1e6 * frame["close"].to_numpy()[rows]))  # known at the close, and as good as random
            return super().quantiles(frame, rows) + 1e-4 * sign[:, None]

    worth = sign_value(backtest(MARKET, {"coin": Coin}, Walk(MARKET.timestamp[1300]))).loc["coin"]
    assert worth["low"] < 0.5 < worth["high"] and worth["net high"] < 0 and worth["needed"] > 0.55


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
    models, candles = ModelStore.of(get_settings(home=home)), CandleStore(home / "candles")
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


TINY_POOL = {"members": 1, "epochs": 1, "steps_per_epoch": 6, "batch_size": 8, "hidden_size": 8}


def test_the_pool_knows_no_later_candle_of_any_pair():
    "Every candle after the pre-training of every pair is another one: the same network, the same kept blocks, the same forecasts."
    frames = {"AAA_USDT": MARKET, "BBB_USDT": fake_candles(2200, seed=29, start=MARKET.timestamp[0])}
    recipe, since = load_recipe("pooled", **TINY_POOL), MARKET.timestamp[2050]
    end = since.floor("28D") + pd.Timedelta("2D")
    assert end < MARKET.timestamp[2190]
    altered = {
        name: frame.assign(close=frame.close.where(frame.timestamp < since.floor("28D"), frame.low))
        for name, frame in frames.items()
    }
    pools = [Pool(found, recipe=recipe) for found in (frames, altered)]
    contender = contenders(["pooled"], pool=pools[0])[0]
    block = plan_blocks(MARKET, Walk(since))[0]
    paths = [
        module.block_path(tmp, contenders(["pooled"], pool=pool)[0], MARKET, block)
        for tmp, pool in ((Path(), pool) for pool in pools)
    ]
    assert paths[0] == paths[1]
    Q = [module.forecast_block(contenders(["pooled"], pool=pool)[0], MARKET, block) for pool in pools]
    np.testing.assert_array_equal(*Q)
    assert contender.pool.network(since).cutoff < since
    with pytest.raises(SettingsError, match="finetune learns from many pairs"):
        contenders(["finetune"])


THIRD_BLOCK_WAITS = """
import time, pandas
write, blocks = pandas.DataFrame.to_parquet, []
def write_two(*args, **more):
    blocks.append(1)
    if len(blocks) == 3:
        time.sleep(3600)
    return write(*args, **more)
pandas.DataFrame.to_parquet = write_two
"""


def run_command(home, *args, before="", **more):
    "A command in a process of its own, as the shell starts it."
    env = os.environ | {
        "MUR_HOME": f"{home}/store",
        "MUR_RUNS": f"{home}/runs",
        "MUR_EXCHANGE_URL": "http://127.0.0.1:9",
        "COLUMNS": "200",
    }
    return subprocess.Popen(
        [sys.executable, "-c", f"{before}\nfrom make_us_rich.cli.main import main; main()", *args],
        env=env | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def test_ctrl_c_keeps_the_finished_blocks_and_the_same_command_goes_on(tmp_path):
    sample("BTC_USDT").tail(2500).to_parquet(tmp_path / "candles.parquet")
    asked = [
        "backtest",
        "BTC_USDT",
        "--file",
        str(tmp_path / "candles.parquet"),
        "--models",
        "HAR-t,EWMA-range",
        "--refit-every",
        "2D",
    ]
    kept = tmp_path / "runs" / "backtests" / "BTC_USDT" / "1h" / "forecasts"
    first = run_command(
        tmp_path,
        *asked,
        before=THIRD_BLOCK_WAITS,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(lambda: len(list(kept.rglob("*.parquet"))) == 2 or first.poll() is not None, what="the second block")
    first.send_signal(signal.SIGINT)
    said = first.communicate(timeout=LONG)[1]
    assert first.returncode == 130 and "the same command goes on from there" in said
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*.parquet")}
    assert len(before) == 2
    second = run_command(tmp_path, *asked)
    shown, said = second.communicate(timeout=LONG)
    assert second.returncode == 0, said
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(list(kept.rglob("*.parquet"))) == 22
    assert (
        "504 forecasts of 1h candles from 2023-12-11 to 2023-12-31, 11 refits." in shown
        and "EWMA-range: CRPS / base" in shown
    )
    page = Path(shown.rpartition("report: ")[2].strip())
    assert page.suffix == ".html" and "HAR-t: CRPS / base" in page.read_text()


def command(home, *args):
    "Exit code and error text of a command in this process."
    env = {"MUR_HOME": f"{home}/store", "MUR_RUNS": f"{home}/runs", "MUR_EXCHANGE_URL": "http://127.0.0.1:9"}
    end = CliRunner().invoke(app, list(args), env=env)
    return end.exit_code if isinstance(end.exception, SystemExit) else getattr(
        end.exception, "exit_code", end.exit_code
    ), str(end.exception or "")


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        ("backtest BTC_USDT --sample --models lsmt", 2, "did you mean 'lstm'"),
        ("backtest BTC_USDT --sample --since 2023-12-01 --until 2023-11-01", 2, "give an earlier since"),
        ("backtest BTC_USDT --sample --interval 4h", 2, "the embedded sample has 1h candles, not 4h"),
        ("backtest BTC_USDT", 3, "fetch them with: mkrich candles BTC_USDT"),
        ("backtest BTC_USDT --file {here}", 3, "no rows of candles"),
        ("gate BTC_USDT", 3, "no model of BTC_USDT 1h is published yet"),
        ("gate BTC_USDT --version abc", 1, "a version looks like 20231231T230000Z"),
        ("leaktest BTC_USDT --sample --recipe finetune", 2, "leak tests train a quantile recipe from scratch"),
    ],
)
def test_wrong_lines_are_answered_before_any_work(tmp_path, line, code, text):
    found = command(tmp_path, *line.format(here=__file__).split())
    assert found[0] == code and text in found[1], found
    assert not list(tmp_path.rglob("*.ipynb")) and not list(tmp_path.rglob("*.parquet"))


def test_gate_by_command_judges_on_the_stored_candles_when_the_exchange_is_away(stores, tmp_path):
    _, candles = stores
    end = CliRunner().invoke(
        app,
        ["gate", PAIRS[0]],
        env={"MUR_HOME": str(candles.root.parent), "MUR_RUNS": str(tmp_path), "MUR_EXCHANGE_URL": "http://127.0.0.1:9"},
    )
    # the tiny model of these stores has learned from all there is: no verdict, but a sentence, and the exchange's absence is told
    assert "judging on the stored candles" in end.stderr
    assert "no later hour can be scored yet" in str(end.exception)
