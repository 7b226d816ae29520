"""The pooled network against scratch and peers: python bench/basket.py [--fold N] [--data FOLDER] [--out FOLDER] [--save]

Protocol: the last year of each series, its last tenth as test, one step ahead, window by window through the graph that is served.
`--fold N` moves the end of every series back to the start of its test span, and N - 1 quarters of a year further: folds for decisions.

No leak by time: series whose test spans start within 60 days of each other form a group, and the group's pooled network learns from
no candle of ANY series that closed after the earliest test start in the group. Fine-tuning sees the series' own year before its test.
Forecasts are kept, one Parquet file for each series and design, so a run that was stopped goes on where it was; a change of the code
starts a new folder.
"""

import argparse
import hashlib
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peers import COLUMNS, HOURS, LEAST, STABLE, forecast, markdown

from make_us_rich.evaluation.calibration import online_width, widen
from make_us_rich.evaluation.scores import coverage, crps, dm_test, hit_rate
from make_us_rich.market.candles import find_gaps, next_returns, scorable_rows
from make_us_rich.market.reading import read
from make_us_rich.models import features, network, pooled, training
from make_us_rich.models.baselines import MEDIAN, RANGES
from make_us_rich.models.network import forecast_returns
from make_us_rich.models.pooled import Pooled, finetune, first_test_candle, pretrain
from make_us_rich.models.recipe import load_recipe
from make_us_rich.models.training import training_loop

ROOT = Path(__file__).resolve().parents[1]
QUARTER = 2_190  # hours between folds
DESIGNS = {"scratch": "default, from scratch", "zero-shot": "pooled, zero-shot", "fine-tuned": "pooled + fine-tune"}
RIVALS = ("base", "GARCH-t", "HAR-t", "LightGBM")


def histories(data: Path, series: list[str]) -> dict[str, pd.DataFrame]:
    "Closed, cleaned candles of every series, but those of a pegged price."
    found = {}
    for path in sorted(data.glob("*.parquet")):
        frame = read(path, "1h")[0]
        if path.name == "BTCUSDT-1h.parquet":  # its last candle was still open when the file was written
            frame = frame[:-1]
        frame = frame.reset_index(drop=True)
        if np.log(frame["close"]).diff().std() > STABLE * 2 and np.ptp(np.log(frame["close"][-HOURS:])) > 0.05:
            found[path.stem] = frame
    return found


def last_year(frame: pd.DataFrame, fold: int) -> pd.DataFrame | None:
    "The year of a fold, or None if it is too short or has a hole of more than a day."
    end = len(frame) - (0 if fold == 0 else round(HOURS / 10) + (fold - 1) * QUARTER)
    year = frame[max(0, end - HOURS) : max(0, end)].reset_index(drop=True)
    holes = [gap.missing for gap in find_gaps(year, "1h")] if len(year) >= LEAST else [99]
    return year if max(holes, default=0) <= 24 else None


def one_each(frames: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    "The pool: a series whose span lies inside that of another one of the same pair is not counted twice."
    spans = {
        name: (name.split("-")[0], frame["timestamp"].iloc[0], frame["timestamp"].iloc[-1])
        for name, frame in frames.items()
    }

    def inside(name: str, other: str) -> bool:
        (pair, first, last), (pair2, first2, last2) = spans[name], spans[other]
        return name != other and pair == pair2 and first >= first2 and last <= last2

    return {name: frame for name, frame in frames.items() if not any(inside(name, other) for other in spans)}


def grouped(starts: dict[str, pd.Timestamp]) -> list[list[str]]:
    "Series whose test spans start within 60 days of the first of the group."
    groups: list[list[str]] = []
    for name in sorted(starts, key=lambda name: starts[name]):
        if groups and starts[name] - starts[groups[-1][0]] < pd.Timedelta(days=60):
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def default_folder(fold: int) -> Path:
    "A temporary folder that belongs to this state of the code and the recipes."
    code = b"".join(Path(module.__file__ or "").read_bytes() for module in (features, network, training, pooled))
    code += "".join(load_recipe(name).hash for name in ("default", "pooled", "finetune")).encode()
    return Path(tempfile.gettempdir()) / f"bench-basket-{hashlib.sha256(code).hexdigest()[:8]}" / f"fold{fold}"


def keep(target: Path, year: pd.DataFrame, rows: np.ndarray, forecaster: torch.nn.Module, cpu: float) -> None:
    "Write the forecasts of one design on one series."
    Q = forecast_returns(forecaster, year, rows)
    table = pd.DataFrame(Q, columns=COLUMNS).assign(
        y=next_returns(year, rows), row=rows, cpu=cpu, shrink=float(forecaster.shrink)
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.part")
    table.to_parquet(part)
    part.replace(target)


def run_group(names: list[str], years: dict[str, pd.DataFrame], pool: dict[str, pd.DataFrame], out: Path) -> None:
    "Train and forecast every design on the series of one group, as far as it is not there yet."
    network: Pooled | None = None
    for name in names:
        year, files = years[name], {design: out / name / f"{design}.parquet" for design in DESIGNS}
        rows = scored_rows(year)
        for peer in RIVALS:
            forecast(peer, year, rows, out / name / f"{peer}.parquet")
        if not files["scratch"].is_file():
            result = training_loop(year, load_recipe("default"), progress=False)
            keep(files["scratch"], year, rows, result.forecaster, result.cpu_seconds)
        if files["zero-shot"].is_file() and files["fine-tuned"].is_file():
            continue
        if network is None:
            cutoff = min(first_test_candle(years[other], load_recipe("pooled")) for other in names)
            trained = pretrain(pool, load_recipe("pooled"), cutoff=cutoff, progress=False)
            network, cost = trained.pooled, trained.cpu_seconds
            learned = f"{len(network.pairs)} series, {sum(network.pairs.values()):,} candles"
            print(f"pooled network up to {cutoff:%Y-%m-%d}: {learned}, {cost:.0f} CPU s", flush=True)
            keep(out / f"pool-{names[0]}.parquet", year, rows[:1], network.forecaster, cost)
        keep(files["zero-shot"], year, rows, network.forecaster, 0.0)
        result = finetune(year, network, load_recipe("finetune"), progress=False)
        keep(files["fine-tuned"], year, rows, result.forecaster, result.cpu_seconds)


def scored_rows(year: pd.DataFrame) -> np.ndarray:
    return scorable_rows(year, np.arange(len(year) - round(len(year) / 10), len(year)))


def measure(year: pd.DataFrame, table: pd.DataFrame, shrink: float | None = None) -> dict[str, object]:
    "Numbers of one design on one series; `shrink` replaces the factor of the median that the forecasts were made with."
    y, Q, rows = table["y"].to_numpy(), table[COLUMNS].to_numpy(), scored_rows(year)
    if shrink is not None and table["shrink"].iloc[0] > 0:
        Q = Q + (shrink / table["shrink"].iloc[0] - 1) * Q[:, [MEDIAN]]
    shown = widen(Q, online_width(year, rows, Q))
    low, high = RANGES[80]
    inside = (y >= shown[:, low]) & (y <= shown[:, high])
    weeks = inside[: len(inside) // 168 * 168].reshape(-1, 168).mean(1)
    point = Q[:, MEDIAN]
    return {
        "y": y,
        "point": point,
        "raw": crps(y, Q),
        "loss": crps(y, shown),
        "cpu": float(table["cpu"].iloc[0]),
        "before": [coverage(y, Q, p) for p in RANGES],
        "after": [coverage(y, shown, p) for p in RANGES],
        "week": np.abs(weeks - 0.8).max(),
        "mae": np.abs(y - point).mean() / np.abs(y).mean(),
        "rmse": np.sqrt(((y - point) ** 2).mean() / (y**2).mean()),
    }


def ratios(mine: list[dict], theirs: list[dict], loss: str) -> np.ndarray:
    "CRPS ratio of each series."
    return np.array([a[loss].mean() / b["raw"].mean() for a, b in zip(mine, theirs, strict=True)])


def against(mine: list[dict], theirs: list[dict], loss: str) -> str:
    "Mean CRPS ratio over the series, series won, t across series."
    ratio = ratios(mine, theirs, loss)
    t = (ratio.mean() - 1) / (ratio.std(ddof=1) / np.sqrt(len(ratio))) if len(ratio) > 1 and ratio.std() > 0 else 0.0
    return f"{ratio.mean():.4f} ({(ratio < 1).sum()}/{len(ratio)}, {t:+.1f})"


def summary(label: str, mine: list[dict], rivals: dict[str, list[dict]], loss: str = "raw") -> dict[str, str]:
    "One line of the main table."
    hit = hit_rate(np.concatenate([one["y"] for one in mine]), np.concatenate([one["point"] for one in mine]))
    spread = lambda key: " / ".join(f"{100 * share:.1f}" for share in np.mean([one[key] for one in mine], axis=0))  # noqa: E731
    return {
        "model": label,
        **{f"CRPS/{name}": against(mine, theirs, loss) for name, theirs in rivals.items()},
        "50/80/95 before": spread("before"),
        "after width": spread("after"),
        "worst week, mean (max)": f"{100 * np.mean([one['week'] for one in mine]):.1f} ({100 * max(one['week'] for one in mine):.1f})",
        "hit rate [95 %]": f"{hit.share:.4f} [{hit.low:.4f}, {hit.high:.4f}]" if hit.n else "names none",
        "MAE/close": f"{np.mean([one['mae'] for one in mine]):.4f}",
        "RMSE/close": f"{np.mean([one['rmse'] for one in mine]):.4f}",
        "CPU s/pair": f"{np.mean([one['cpu'] for one in mine]):.2f}",
    }


def goals(mine: list[dict], rivals: dict[str, list[dict]]) -> list[dict[str, str]]:
    "The goals of the pooled + fine-tuned design, with the figure whether reached or not."
    ratio = {name: ratios(mine, theirs, "raw") for name, theirs in rivals.items()}
    below, limits = int((ratio["base"] < 1).sum()), (("GARCH-t", 0.985), ("HAR-t", 1.0), ("LightGBM", 1.0))
    off = np.abs(np.mean([one["after"] for one in mine], axis=0) - [0.5, 0.8, 0.95])
    hit = hit_rate(np.concatenate([one["y"] for one in mine]), np.concatenate([one["point"] for one in mine]))
    week, mae, rmse = (float(np.mean([one[key] for one in mine])) for key in ("week", "mae", "rmse"))
    lines = [
        ("CRPS/base, mean <= .970", f"{ratio['base'].mean():.4f}", ratio["base"].mean() <= 0.970),
        (
            "CRPS/base < 1 on each series",
            f"{below} of {len(mine)}, worst {ratio['base'].max():.4f}",
            below == len(mine),
        ),
        *((f"CRPS/{n} <= {g}", f"{ratio[n].mean():.4f}", ratio[n].mean() <= g) for n, g in limits),
        ("coverage 50/80/95 within 1.5 points", " / ".join(f"{100 * x:.1f}" for x in off), (off <= 0.015).all()),
        ("worst week of the 80 % band <= 5 points (mean of series)", f"{100 * week:.1f}", week <= 0.05),
        ("lower bound of the hit rate > .51", f"{hit.low:.4f}", hit.low > 0.51),
        ("MAE/close <= 1.000", f"{mae:.4f}", mae <= 1.0),
        ("RMSE/close <= 1.002", f"{rmse:.4f}", rmse <= 1.002),
    ]
    return [{"goal": goal, "found": found, "": "reached" if ok else "NOT reached"} for goal, found, ok in lines]


def run(data: Path, fold: int, series: list[str], out: Path) -> str:
    "Forecast what is not there yet, then make the tables."
    frames = histories(data, series)
    found = {name: last_year(frame, fold) for name, frame in frames.items()}
    years = {
        name: year
        for name, year in found.items()
        if year is not None and (not series or any(text in name for text in series))
    }
    groups = grouped({name: first_test_candle(year, load_recipe("pooled")) for name, year in years.items()})
    for names in groups:
        run_group(names, years, one_each(frames), out)
    tables = {
        name: {key: pd.read_parquet(out / name / f"{key}.parquet") for key in (*RIVALS, *DESIGNS)} for name in years
    }
    rivals = {key: [measure(years[name], tables[name][key]) for name in years] for key in RIVALS}
    designs = {key: [measure(years[name], tables[name][key]) for name in years] for key in DESIGNS}
    unshrunk = {key: [measure(years[name], tables[name][key], shrink=1.0) for name in years] for key in DESIGNS}
    main = [summary(label, designs[key], rivals) for key, label in DESIGNS.items()]
    main.append(summary("pooled + fine-tune, after width", designs["fine-tuned"], rivals, loss="loss"))
    main += [summary(key, rivals[key], rivals) for key in RIVALS[1:]]
    shrunk = []
    for key, label in DESIGNS.items():
        factor = np.mean([tables[name][key]["shrink"].iloc[0] for name in years])
        for text, which in (("1 (as trained)", unshrunk), (f"chosen, mean {factor:.2f}", designs)):
            line = summary(label, which[key], {"base": rivals["base"]})
            kept = ("CRPS/base", "hit rate [95 %]", "MAE/close", "RMSE/close")
            shrunk.append({"model": label, "factor of the median": text} | {k: line[k] for k in kept})
    each = []
    for i, name in enumerate(years):
        base = rivals["base"][i]["raw"]
        losses = {DESIGNS.get(key, key): found[i]["raw"] for key, found in (designs | rivals).items() if key != "base"}
        cells = {
            key: f"{loss.mean() / base.mean():.4f} ({dm_test(loss - base)[0]:+.1f})" for key, loss in losses.items()
        }
        times = years[name]["timestamp"].iloc[scored_rows(years[name])]
        span = f"{times.iloc[0]:%Y-%m-%d} to {times.iloc[-1]:%Y-%m-%d}"
        each.append({"series": name, "hours": str(len(base)), "span": span, **cells})
    sizes = ", ".join(f"[{' '.join(names)}]" for names in groups)
    hours = sum(len(one["y"]) for one in rivals["base"])
    note = f"{len(years)} series, {hours:,} hours. Groups with one pooled network each: {sizes}."
    note += " Ratios: mean over series (series below 1, t across series). Coverage in %. MAE, RMSE against the last close; CPU s of a fit."
    aims = markdown(goals(designs["fine-tuned"], rivals))
    parts = [
        markdown(main),
        note,
        "Goals, for pooled + fine-tune:",
        aims,
        "The median, shrunk and not:",
        markdown(shrunk),
    ]
    return "\n\n".join([*parts, "CRPS/base (DM t) of each series:", markdown(each)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=shared, help="folder with the Parquet files")
    parser.add_argument("--fold", type=int, default=0, help="0: the test span; 1, 2 ...: before it")
    parser.add_argument(
        "--series", nargs="+", default=[], help="only score series whose name contains one of these; the pool keeps all"
    )
    parser.add_argument("--out", type=Path, help="where forecasts are kept; default: a temporary folder")
    parser.add_argument(
        "--save",
        action="store_true",
        help="keep the tables in bench/results/basket.md (test span) or basket_fold<N>.md",
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    text = run(asked.data, asked.fold, asked.series, asked.out or default_folder(asked.fold))
    print(text)
    if asked.save:
        target = ROOT / "bench" / "results" / ("basket.md" if asked.fold == 0 else f"basket_fold{asked.fold}.md")
        target.parent.mkdir(exist_ok=True)
        what = "the test span" if asked.fold == 0 else f"fold {asked.fold}, before the test span"
        command = "python bench/basket.py --save" + (f" --fold {asked.fold}" if asked.fold else "")
        head = f"# Basket, {what}, measured {time.strftime('%Y-%m-%d')} by `{command}`"
        target.write_text(f"{head}\n\n{text}\n", encoding="utf-8")
