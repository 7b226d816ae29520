"""Accuracy of the recipes on real candles: python bench/accuracy.py [--data FOLDER] [--original] [--save]

Protocol: the last year of each series (closed, cleaned rows), its last tenth as test, one step ahead through the graph that is served,
window by window. Nothing is tuned on the test span. Ratios below 1 are better than the rolling base or the last close.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from make_us_rich.evaluation.scores import evaluate
from make_us_rich.market.candles import scorable_rows
from make_us_rich.market.reading import read
from make_us_rich.models.har import HarT
from make_us_rich.models.network import forecast_returns
from make_us_rich.models.recipe import load_recipe
from make_us_rich.models.training import training_loop

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
NAMES = ("BTCUSDT-1h", "SOLUSDT-1h", "LTCUSDT-1h", "ADAUSDT-1h", "ETCUSDT-1h", "XLMUSDT-1h", "BNBUSDT-1h", "DOTUSDT-1h")
PAIRS = [*NAMES, "ETHUSDT-1h.2017-2022"]
HOURS = 8_760


def last_year(path: Path) -> pd.DataFrame:
    "The newest 8,760 closed candles; the report's own BTC file ends with a candle that was still open when it was written."
    frame = read(path, "1h")[0]
    if path.name == "BTCUSDT-1h.parquet":
        frame = frame[:-1]
    return frame[-HOURS:].reset_index(drop=True)


def fit_and_score(
    frame: pd.DataFrame, recipe_name: str, peers: bool = True, **overrides: object
) -> tuple[pd.DataFrame, float]:
    "Scores on the test span, one row for each model, and the CPU seconds of the fit."
    result = training_loop(frame, load_recipe(recipe_name, **overrides), progress=True)
    test = result.split.test
    rows = scorable_rows(frame, np.arange(test.start, test.stop - 1), window=result.forecaster.window)
    forecasts = {recipe_name: forecast_returns(result.forecaster, frame, rows)}
    if peers:
        forecasts["HAR-t"] = HarT().fit(frame, int(rows[0])).quantiles(frame, rows)
    return evaluate(frame, rows, forecasts).table, result.cpu_seconds


def line(pair: str, scores: pd.Series, cpu: float, har: float) -> dict[str, object]:
    "One line of the table in words that the reader knows."
    return {
        "series": pair,
        "hours": int(scores["n"]),
        "CRPS/base": f"{scores['crps/base']:.4f}",
        "DM t": f"{scores['dm_t']:.1f}",
        "HAR-t CRPS/base": f"{har:.4f}",
        "50 %": f"{scores['cov50']:.3f}",
        "80 %": f"{scores['cov80']:.3f}",
        "95 %": f"{scores['cov95']:.3f}",
        "hit rate [95 %]": f"{scores['hit']:.3f} [{scores['hit_low']:.3f}, {scores['hit_high']:.3f}]",
        "MAE/close": f"{scores['mae/naive']:.4f}",
        "RMSE/close": f"{scores['rmse/naive']:.4f}",
        "fit CPU s": f"{cpu:.1f}",
    }


def markdown(rows: list[dict[str, object]]) -> str:
    head = list(rows[0])
    body = [head, ["---"] * len(head), *[[str(value) for value in row.values()] for row in rows]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in body)


def run_default(data: Path) -> str:
    "The default recipe on every series; the goal stands in the last line."
    lines, ratios = [], []
    for pair in PAIRS:
        table, cpu = fit_and_score(last_year(data / f"{pair}.parquet"), "default")
        lines.append(line(pair, table.loc["default"], cpu, table.loc["HAR-t", "crps/base"]))
        ratios.append(table.loc["default", "crps/base"])
        print(lines[-1], flush=True)
    mean, wins = np.mean(ratios), sum(ratio < 1 for ratio in ratios)
    har = np.mean([float(str(row["HAR-t CRPS/base"])) for row in lines])
    reached = "reached" if mean <= 0.985 and wins == len(ratios) else "NOT reached"
    summary = f"Mean CRPS/base {mean:.4f} (HAR-t {har:.4f}), below 1 on {wins} of {len(ratios)} series."
    return f"{markdown(lines)}\n\n{summary} Goal (mean <= 0.985, each < 1): {reached}."


def run_original(data: Path) -> str:
    "The report's recipe on its own example file: its point forecast against the last close."
    table, cpu = fit_and_score(last_year(data / "BTCUSDT-1h.parquet"), "original", peers=False)
    row = table.loc["original"]
    rmse, mae, crps = row["rmse/naive"], row["mae/naive"], row["crps/base"]
    text = f"Recipe `original` on BTCUSDT, {int(row['n'])} hours: RMSE {rmse:.2f} times and MAE {mae:.2f} times that of the last close"
    return f"{text}, CRPS {crps:.2f} times the base's; hit rate {row['hit']:.3f}. Fit: {cpu:.0f} CPU s."


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the Parquet files")
    parser.add_argument("--original", action="store_true", help="the report's recipe instead; takes minutes")
    parser.add_argument("--save", action="store_true", help="keep the table in bench/results/accuracy*.md")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    start = time.time()
    text = run_original(asked.data) if asked.original else run_default(asked.data)
    print(text)
    if asked.save:
        target = ROOT / "bench" / "results" / ("accuracy_original.md" if asked.original else "accuracy.md")
        target.parent.mkdir(exist_ok=True)
        command = "python bench/accuracy.py --save" + (" --original" if asked.original else "")
        title = f"# Accuracy, measured {time.strftime('%Y-%m-%d')}\n\n`{command}` took {time.time() - start:.0f} s."
        target.write_text(f"{title}\n\n{text}\n", encoding="utf-8")
