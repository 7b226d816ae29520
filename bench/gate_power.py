"""The gate on real candles: python bench/gate_power.py [--data FOLDER] [--segments N] [--series TEXT ...] [--out FOLDER] [--save]

Each segment is a year of candles that a model may learn from and the 2,076 hours after it, which it has not seen. On them the gate judges
windows as a run hands them in: 876 hours, of which the last 720 count, one window every 168 hours. The good models are the default recipe
and HAR-t; the champion is the same recipe with another seed, or HAR-t without refits. Bad candidates are made from the good one. Goal: a
good model passes >= 80 % of the windows; flipped sign, width x 1.5 and bias of 0.3 s pass <= 5 %. Forecasts are kept, so a run goes on
where it was stopped; a change of the code starts a new folder.
"""

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from make_us_rich.evaluation import gate as gate_page
from make_us_rich.evaluation import scores
from make_us_rich.evaluation.calibration import widen
from make_us_rich.evaluation.gate import gate
from make_us_rich.evaluation.peers import peer_features
from make_us_rich.evaluation.scores import crps
from make_us_rich.market.candles import find_gaps, next_returns, scorable_rows
from make_us_rich.market.reading import read
from make_us_rich.models import features, training
from make_us_rich.models import har as har_page
from make_us_rich.models import network as network_page
from make_us_rich.models.baselines import LEVELS, MEDIAN, Base
from make_us_rich.models.har import HarT
from make_us_rich.models.network import forecast_returns
from make_us_rich.models.recipe import load_recipe
from make_us_rich.models.training import training_loop

ROOT = Path(__file__).resolve().parents[1]
YEAR, HELD, SPAN, STEP = 8_760, 2_076, 876, 168
STABLE = 5e-4  # a series whose hourly returns spread less than this is a stablecoin


def segments(path: Path, count: int) -> list[pd.DataFrame]:
    "The newest `count` pieces of a year and 2,076 hours, held-out hours not overlapping, without a hole of more than a day."
    frame = read(path, "1h")[0]
    frame = frame[:-1] if path.name == "BTCUSDT-1h.parquet" else frame
    pieces = [frame[end - YEAR - HELD : end].reset_index(drop=True) for end in range(len(frame), YEAR + HELD, -HELD)]
    sound = [piece for piece in pieces if max((gap.missing for gap in find_gaps(piece, "1h")), default=0) <= 24]
    return [piece for piece in sound if np.log(piece["close"]).diff().std() > STABLE][:count]


def folder_of_code() -> Path:
    "A temporary folder that belongs to this state of the models."
    code = b"".join(
        Path(module.__file__ or "").read_bytes()
        for module in (gate_page, scores, har_page, features, network_page, training)
    )
    return Path(tempfile.gettempdir()) / f"bench-gate-{hashlib.sha256(code).hexdigest()[:8]}"


def network(seed: int) -> Callable[[pd.DataFrame, np.ndarray], np.ndarray]:
    def forecasts(frame: pd.DataFrame, rows: np.ndarray) -> np.ndarray:
        result = training_loop(frame[: rows[0] + 1], load_recipe("default", seed=seed), progress=False)
        return forecast_returns(result.forecaster, frame, rows)

    return forecasts


def har(refit: int) -> Callable[[pd.DataFrame, np.ndarray], np.ndarray]:
    return lambda frame, rows: HarT(refit=refit).fit(frame, int(rows[0])).quantiles(frame, rows)


MODELS = {"LSTM": (network(42), network(142)), "HAR-t": (har(168), har(10**9))}


def kept(target: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    "Forecasts [n, 21] from the file, or made now and kept."
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}.part")
        pd.DataFrame(make(), columns=[f"q{level}" for level in LEVELS]).to_parquet(part)
        part.replace(target)
    return pd.read_parquet(target).to_numpy()


def candidates(frame: pd.DataFrame, rows: np.ndarray, Q: np.ndarray) -> dict[str, np.ndarray]:
    "The good forecasts and those made bad on purpose."
    centre, s = Q[:, [MEDIAN]], peer_features(frame)[1]
    scale = s[rows][:, None]
    return {
        "good": Q,
        "flipped sign": Q - 2 * centre,
        "width x 1.5": widen(Q, 1.5),
        "width x 0.67": widen(Q, 0.67),
        "bias +0.3 s": Q + 0.3 * scale,
        "bias -0.3 s": Q - 0.3 * scale,
        "no location": Q - centre,
        "volatility 24 h old": Q * (s[rows - 24] / s[rows])[:, None],
    }


def judge(frame: pd.DataFrame, rows: np.ndarray, Q: np.ndarray, champion: np.ndarray) -> list[dict[str, object]]:
    "One row for each window and candidate: its cost, passed without and with the champion, and the rules that refused."
    found: list[dict[str, object]] = []
    y, base = next_returns(frame, rows), Base().quantiles(frame, rows)
    for name, bad in candidates(frame, rows, Q).items():
        cost = 100 * (crps(y, bad) - crps(y, Q)).mean() / crps(y, base).mean()
        for end in range(SPAN, len(rows) + 1, STEP):
            part = slice(end - SPAN, end)
            verdict = gate(frame[: rows[end - 1] + 2], rows[part], bad[part], incumbent=champion[part])
            refused = [check.name for check in verdict.checks if check.refuses and not check.passed]
            alone = not set(refused) - {"not_worse"}
            found.append({"candidate": name, "cost": cost, "alone": alone, "champion": not refused, "refused": refused})
            if name == "flipped sign" and cost > 1:
                found.append(found[-1] | {"candidate": "flipped sign where that costs > 1 %"})
    return found


def table(found: pd.DataFrame) -> str:
    "Markdown: share of windows that pass, and how often each rule refused."
    rules = sorted({rule for refused in found["refused"] for rule in refused})
    head = ["model", "candidate", "CRPS cost, % of base", "windows", "passes without champion", "passes with champion"]
    head += [f"{rule} refused" for rule in rules]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (model_name, candidate), group in found.groupby(["model", "candidate"], sort=False):
        shares = [f"{group[name].mean():.0%}" for name in ("alone", "champion")]
        shares += [f"{np.mean([rule in refused for refused in group['refused']]):.0%}" for rule in rules]
        lines.append(
            "| "
            + " | ".join([str(model_name), str(candidate), f"{group['cost'].mean():+.2f}", str(len(group)), *shares])
            + " |"
        )
    return "\n".join(lines)


def run(data: Path, count: int, series: list[str], out: Path) -> str:
    found = []
    pieces = [
        (path.stem, i, piece)
        for path in sorted(data.glob("*.parquet"))
        for i, piece in enumerate(segments(path, count))
    ]
    pieces = [piece for piece in pieces if not series or any(text in piece[0] for text in series)]
    if not pieces:
        raise SystemExit(f"{data} holds no series of {YEAR + HELD:,} candles; name another folder with --data")
    for name, (good, other) in MODELS.items():
        for stem, i, frame in pieces:
            rows = scorable_rows(frame, np.arange(YEAR - 1, len(frame) - 1))
            Q, champion = (
                kept(
                    out / f"{stem}-{i}" / f"{name}-{role}.parquet",
                    lambda make=make, frame=frame, rows=rows: make(frame, rows),
                )
                for role, make in (("good", good), ("champion", other))
            )
            judged = pd.DataFrame(judge(frame, rows, Q, champion)).assign(model=name, series=f"{stem} {i}")
            found.append(judged)
            print(
                name, stem, i, judged.groupby("candidate", sort=False)["champion"].mean().round(2).to_dict(), flush=True
            )
    everything = pd.concat(found)
    note = f"{len(pieces)} held-out segments of {len({stem for stem, _, _ in pieces})} series. Windows overlap: they are not independent."
    small = "The served median is shrunk towards the last close by what it was worth in the past. Where that left little of it, turning"
    design = "its sign costs little, and the rule against the champion lets pass what costs less than 0.5 % of the base, by design."
    return f"{table(everything)}\n\n{note} {small} {design}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=shared, help="folder with the Parquet files")
    parser.add_argument("--segments", type=int, default=1, help="segments of each series, newest first")
    parser.add_argument("--series", nargs="+", default=[], help="only series whose file name contains one of these")
    parser.add_argument(
        "--out", type=Path, default=folder_of_code(), help="where forecasts are kept; default: a temporary folder"
    )
    parser.add_argument("--save", action="store_true", help="keep the table in bench/results/gate_power.md")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    text = run(asked.data, asked.segments, asked.series, asked.out)
    print(text)
    if asked.save:
        target = ROOT / "bench" / "results" / "gate_power.md"
        target.parent.mkdir(exist_ok=True)
        head = f"# Power of the gate, measured {time.strftime('%Y-%m-%d')} by `python bench/gate_power.py --save`"
        target.write_text(f"{head}\n\n{text}\n", encoding="utf-8")
