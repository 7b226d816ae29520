"""How many pairs can be retrained per hour, what a run in a notebook costs over the bare library call, and whether cost is linear in pairs.

    python bench/throughput.py                 # 1 and 10 pairs
    python bench/throughput.py --pairs 1,10,50 --save

Real all the way: a replay exchange over the embedded samples (under as many names as there are pairs), the pooled network trained by its own run
notebook, then `mkrich schedule --once` as a library call: two workers, one process tree and one executed notebook with its page per run,
recipe `finetune`. The bare call is the same work in one warm process: open the run, train, walk the test span, export, validate, fallback, judge,
publish, forecast. What a notebook adds to that is measured with one run at a time, as the bare call is, and taken apart.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import mean

import pandas as pd

HERE = Path(__file__).resolve()
RESULTS = HERE.parent / "results" / "throughput.md"

BARE = """
import json, sys, time
start = time.perf_counter()
from make_us_rich.models.export import convert_model, validate_model
from make_us_rich.serving.forecasting import forecast_pair
from make_us_rich.runs.pretrain import train_pair
from make_us_rich.runs.report import RunPlace, judge, open_run, walk_test_span
from make_us_rich.runs.publish import publish_fallback, publish_or_refuse
imports, steps = time.perf_counter() - start, []
for pair in json.loads(sys.argv[2]):
    marks = [("", time.perf_counter(), time.process_time())]
    mark = lambda name: marks.append((name, time.perf_counter(), time.process_time()))
    run = open_run(pair, recipe="finetune", place=RunPlace(sys.argv[1], exchange_url=sys.argv[3])); mark("open")
    result = train_pair(run); mark("train")
    span = walk_test_span(run, result); mark("test span")
    model = convert_model(result.forecaster, {"pair": pair}); mark("export")
    parity = validate_model(model, result.forecaster, run.frame); mark("validate")
    fallback = publish_fallback(run); mark("fallback")
    verdict = judge(run, result, span, parity.max_scaled); mark("judge")
    publish_or_refuse(run, result, model, span, verdict, fallback); mark("publish")
    forecast_pair(pair, run.models, run.candles, run.client); mark("forecast")
    steps.append({name: (round(b - a, 2), round(d - c, 2)) for (_, a, c), (name, b, d) in zip(marks, marks[1:])})
    assert result.recipe.name == "finetune", result.recipe.name
print(json.dumps({"imports": imports, "steps": steps}))
"""


def make_frames(names):
    "The two samples under many names, all on the dates of BTC_USDT."
    from make_us_rich.market.candles import load_sample

    btc, sol = load_sample("BTC_USDT"), load_sample("SOL_USDT")
    rows = min(len(btc), len(sol))
    btc, sol = btc.tail(rows).reset_index(drop=True), sol.tail(rows).reset_index(drop=True)
    shift = btc["timestamp"].iloc[-1] - sol["timestamp"].iloc[-1]
    sol = sol.assign(timestamp=sol["timestamp"] + shift, close_time=sol["close_time"] + shift)
    return {name: (btc, sol)[i % 2] for i, name in enumerate(names)}


def play(settings, names, jobs):
    "Retrain each pair once, as `mkrich schedule --once` does; figures."
    from make_us_rich.runs.ledger import RunLedger
    from make_us_rich.schedule.plan import Entry, Plan
    from make_us_rich.schedule.schedule import Options, Schedule, run_once

    entries = {e.key: e for e in (Entry(pair=name) for name in names)}
    schedule = Schedule(settings, Plan(entries, ""), Options(jobs=jobs))
    wall = time.perf_counter()
    run_once(schedule)
    wall = time.perf_counter() - wall
    rows = sorted(RunLedger(schedule.watch.engine).rows(limit=len(names)), key=lambda row: row.started_at)
    schedule.watch.engine.dispose()
    warm = rows[jobs:] or rows  # a worker's first run waits for its fork server
    return {
        "pairs": len(names),
        "jobs": jobs,
        "wall": wall,
        "inside": mean(r.seconds for r in warm),
        **parts(warm),
        "states": dict(Counter(r.state for r in rows)),
        "reasons": [r.reason[:90] for r in rows if r.state == "failed"],
    }


def parts(rows):
    "Mean seconds that the cells, the pictures among them, and papermill with its kernel took."
    pictures, cells, papermill = [], [], []
    for row in rows:
        notebook = json.loads(Path(row.notebook).read_text())
        took = [
            (c["metadata"]["papermill"]["duration"] or 0, "".join(c["source"]))
            for c in notebook["cells"]
            if c["cell_type"] == "code"
        ]
        cells.append(sum(seconds for seconds, _ in took))
        pictures.append(sum(seconds for seconds, source in took if source.startswith("plot_")))
        papermill.append(notebook["metadata"]["papermill"]["duration"] - cells[-1])
    return {"cells": mean(cells), "pictures": mean(pictures), "papermill": mean(papermill)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="1,10")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--store", type=Path, help="a folder that keeps the pooled network for the next call; all else in it is removed"
    )
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    from make_us_rich.core.database import connect, migrate
    from make_us_rich.core.settings import get_settings
    from make_us_rich.market.replay import ReplayServer
    from make_us_rich.market.series import POOLED, Series
    from make_us_rich.models.recipe import load_recipe
    from make_us_rich.registry.store import ModelStore
    from make_us_rich.runs.execution import TrainOptions
    from make_us_rich.runs.ledger import RunLedger
    from make_us_rich.runs.train import train

    counts = [int(n) for n in args.pairs.split(",")]
    names = [f"P{i:02}_USDT" for i in range(max(counts))]
    frames = make_frames(names)
    end = frames[names[0]]["timestamp"].iloc[-1]
    with (
        tempfile.TemporaryDirectory() as scratch,
        ReplayServer(frames, now=end - pd.Timedelta("19h30min"), label="historical sample") as server,
    ):
        home = args.store or Path(scratch)
        settings = get_settings(home=home / "store", runs=home / "runs", exchange_url=server.url)
        for old in (*(home / "store" / "models").glob("P[0-9]*"), *(home / "store").glob("mkrich.db*"), home / "runs"):
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
        if ModelStore.of(settings).champion("POOLED_ALL") is None:
            settings.home.mkdir(parents=True, exist_ok=True)
            engine = connect(settings.db_url)
            migrate(engine)
            options, pooled = TrainOptions(feed=tuple(map(Series.parse, names[:2]))), load_recipe("pooled")
            about = {"settings": settings, "ledger": RunLedger(engine), "options": options}
            done = train(Series.parse(POOLED), pooled, **about)
            engine.dispose()
            print(f"pooled network: {done.state} {done.reason} {done.seconds:.0f} s", flush=True)
        server.clock.advance("1h")
        bare = json.loads(
            subprocess.run(
                [sys.executable, "-c", BARE, str(settings.home), json.dumps(names[:3]), server.url],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        print(json.dumps(bare), flush=True)
        found = []
        for jobs, count in [(1, min(5, max(counts))), *((args.jobs, n) for n in counts)]:
            server.clock.advance("1h")
            found.append(play(settings, names[:count], jobs))
            print({k: round(v, 1) if isinstance(v, float) else v for k, v in found[-1].items()}, flush=True)
    text = report(bare, found, os.getloadavg()[1])
    print(text)
    if args.save:
        RESULTS.write_text(text)


def report(bare, found, load):
    steps = bare["steps"][1:]  # the first call warms caches
    step = {name: [mean(s[name][i] for s in steps) for i in (0, 1)] for name in steps[0]}
    wall, cpu = (sum(v[i] for v in step.values()) for i in (0, 1))
    lines = [
        "# Throughput of retraining",
        "",
        f"`python bench/throughput.py --save`, {os.cpu_count()} cores, load of the last five minutes {load:.1f} (other programs were at work if that is above 2.5).",
        "Recipe `finetune` from a pooled network, a year of hourly candles, whole runs: process tree, executed notebook with its pictures, gate, store, ledger, HTML page.",
        "W&B is off. The start of the workers and of their nurseries (imports, once per worker) is part of each wall time.",
        "",
        "| pairs | at once | wall s | s inside a run | runs per hour | outcomes |",
        "|--:|--:|--:|--:|--:|---|",
    ]
    for f in found:
        outcomes = ", ".join(f"{n} {state}" for state, n in f["states"].items())
        rate = f["pairs"] / f["wall"] * 3600
        lines.append(f"| {f['pairs']} | {f['jobs']} | {f['wall']:.1f} | {f['inside']:.1f} | {rate:.0f} | {outcomes} |")
    alone, few, many = found[0], found[1], found[-1]
    lines += [
        "",
        f"Bare library call in one warm process: **{wall:.1f} s** wall, {cpu:.1f} s CPU ("
        + ", ".join(f"{k} {v[1]:.2f}" for k, v in step.items())
        + ").",
    ]
    lines.append(f"A process that starts from nothing imports for another {bare['imports']:.1f} s.")
    if many["pairs"] > few["pairs"]:
        more = (many["wall"] - few["wall"]) / (many["pairs"] - few["pairs"])
        lines.append(
            f"One more pair costs {more:.1f} s wall with {many['jobs']} at once, that is {3600 / more:.0f} runs per hour once the workers are warm."
        )
    work = alone["cells"] - alone["pictures"] - wall
    rest = alone["inside"] - alone["cells"] - alone["papermill"]
    lines += [
        f"Overhead of the notebook over the bare call, one run at a time, the worker warm: **{alone['inside'] - wall:.1f} s** a run: pictures {alone['pictures']:.1f} s,",
        f"papermill with its kernel {alone['papermill']:.1f} s, start and end of the process tree {rest:.1f} s, tables and what a fresh process does slower {work:.1f} s.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
