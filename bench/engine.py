"""What the engine costs: python bench/engine.py [--data FOLDER] [--quick] [--save]

CPU seconds of a fit from scratch and of a fine-tuning (whole calls of the library, one pair, a year of candles), rows of features a second
(one pass over a long history, one thread), the time of one forecast through `OnnxModel.predict` beside a bare ONNX Runtime session with
the same bytes, and whether the same data and seed give the same file, with one thread and with two. CPU seconds bear a busy machine;
times of single forecasts do not, so they come in rounds and the load is printed. Goals: <= 10 s, <= 1 s, >= 1 M rows/s, p99 < 2 ms.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accuracy import DATA, ROOT, last_year

from make_us_rich.market.candles import SAMPLE_LABEL, VALUE_COLUMNS, fake_candles
from make_us_rich.models.export import convert_model
from make_us_rich.models.features import CandleFeatures, frame_tensors
from make_us_rich.models.pooled import Pooled, finetune, pretrain
from make_us_rich.models.recipe import load_recipe
from make_us_rich.models.training import training_loop
from make_us_rich.registry.manifest import draft_manifest
from make_us_rich.registry.served_model import OnnxModel, open_graph
from make_us_rich.registry.store import ModelStore

SERIES = "BTCUSDT-1h.parquet"


def fits(frame: pd.DataFrame, runs: int) -> tuple[list[float], list[float]]:
    "CPU seconds of fits from scratch, and of fine-tunings of a pooled network of the real size (what it has learned costs nothing)."
    recipe = load_recipe("pooled", epochs=1, steps_per_epoch=5)
    pooled: Pooled = pretrain({"BTC_USDT": frame}, recipe, progress=False).pooled
    tuned, scratch = [], []
    for _ in range(runs):
        scratch.append(training_loop(frame, load_recipe(), progress=False).cpu_seconds)
        tuned += [finetune(frame, pooled, load_recipe("finetune")).cpu_seconds for _ in range(2)]
    return scratch, tuned


def feature_rate(rows: int, passes: int) -> tuple[float, float]:
    "Rows a CPU second of one pass over `rows` candles: the median pass and the best."
    candles, open_time = frame_tensors(fake_candles(rows))
    features, seconds = CandleFeatures(), []
    with torch.inference_mode():
        for _ in range(passes + 2):
            start = time.process_time()
            features(candles, open_time)
            seconds.append(time.process_time() - start)
    return rows / float(np.median(seconds[2:])), rows / min(seconds[2:])


def published(frame: pd.DataFrame, model: bytes) -> OnnxModel:
    "The bytes as a version in a store, loaded as the product loads it."
    store = ModelStore("memory://")
    version = store.publish(draft_manifest("BTC_USDT", frame, open_graph(model), source=SAMPLE_LABEL), model)
    return OnnxModel(store.load("BTC_USDT", version))


def forecast_times(frame: pd.DataFrame, model: bytes, rounds: int, calls: int = 500) -> tuple[np.ndarray, np.ndarray]:
    "Milliseconds [rounds, calls] of a forecast by the product and of a bare session run, taking turns."
    product, bare, spent = published(frame, model), open_graph(model), np.empty((2, rounds, calls))
    values, times = frame[VALUE_COLUMNS].to_numpy("float64"), frame["timestamp"].astype("int64").to_numpy()
    one, window = np.ones(1), product.window
    ways: tuple[Callable[[np.ndarray, np.ndarray], object], ...] = (
        product.predict,
        lambda candles, moment: bare.run(None, {"candles": candles, "open_time": moment, "width": one}),
    )
    for i in range(rounds):
        for k in range(-20, calls):  # the first twenty warm up
            end = len(frame) - k % 100
            candles, moment = values[None, end - window : end], times[None, end - window : end]
            for way in (0, 1):
                start = time.perf_counter()
                ways[way](candles, moment)
                if k >= 0:
                    spent[way, i, k] = (time.perf_counter() - start) * 1e3
    return spent[0], spent[1]


def file_of(frame: pd.DataFrame) -> bytes:
    return convert_model(training_loop(frame, load_recipe(), progress=False).forecaster)


def hash_with(threads: int, data: Path) -> str:
    "SHA-256 of the file that a fresh process with so many threads makes."
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "MUR_THREADS": str(threads)}
    command = [sys.executable, __file__, "--hash", str(threads), "--data", str(data)]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return done.stdout.split()[-1]


def report(data: Path, quick: bool) -> str:
    "The table."
    frame, lines = last_year(data / SERIES), []

    def line(what: str, found: str, goal: str, reached: bool) -> None:
        lines.append(f"| {what} | {found} | {goal} | {'reached' if reached else 'NOT reached'} |")

    scratch, tuned = fits(frame, 1 if quick else 3)
    for what, seconds, goal in (("fit from scratch", scratch, 10), ("fine-tuning", tuned, 1)):
        found = f"{np.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        line(f"{what}, 3 networks, CPU s", found, f"<= {goal}", bool(np.median(seconds) <= goal))
    for rows in (8_760, 60_000):
        usual, best = feature_rate(rows, 10 if quick else 40)
        found = f"{usual / 1e6:.2f} M (best pass {best / 1e6:.2f} M)"
        line(f"features, one pass over {rows:,} candles, rows a CPU s", found, ">= 1 M", usual >= 1e6)
    model = file_of(frame)
    ours, bare = forecast_times(frame, model, 3 if quick else 10)
    p99, floor = np.percentile(ours, 99, axis=1), np.percentile(bare, 99, axis=1)
    calm = (
        f"median {np.median(ours):.2f}, p99 of the calmest round {p99.min():.2f}, of all {np.percentile(ours, 99):.2f}"
    )
    line("one forecast, ms", calm, "p99 < 2", np.percentile(ours, 99) < 2)
    line(
        "the same over a bare session",
        f"median {np.median(ours) / np.median(bare):.3f}, p99 {np.median(p99 / floor):.3f}",
        "-",
        True,
    )
    hashes = [hashlib.sha256(model).hexdigest(), hash_with(1, data), hash_with(2, data)]
    line(
        "same bytes in other processes, 1 and 2 threads",
        " ".join(text[:12] for text in hashes),
        "all the same",
        len(set(hashes)) == 1,
    )
    facts = f"BTCUSDT, {len(frame):,} candles; load of the machine at the end {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores."
    return "\n".join([facts, "", "| what | found | goal | |", "| --- | --- | --- | --- |", *lines]).replace(
        "| - | reached |", "| | |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the Parquet files")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--save", action="store_true", help="keep the text in bench/results/engine.md")
    parser.add_argument(
        "--hash", type=int, metavar="THREADS", help="only print the hash of the file that so many threads make"
    )
    asked = parser.parse_args()
    torch.set_num_threads(asked.hash or 1)
    if asked.hash:
        print(hashlib.sha256(file_of(last_year(asked.data / SERIES))).hexdigest())
    else:
        text = report(asked.data, asked.quick)
        print(text)
        if asked.save:
            title = f"# Cost of the engine, measured {time.strftime('%Y-%m-%d')} by `python bench/engine.py --save`"
            (ROOT / "bench" / "results" / "engine.md").write_text(f"{title}\n\n{text}\n", encoding="utf-8")
