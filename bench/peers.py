"""Every peer on real candles: python bench/peers.py [--data FOLDER] [--peers NAME ...] [--series TEXT ...] [--out FOLDER] [--save]

Protocol: the last year of each series (closed, cleaned rows), its last tenth as test, one step ahead, refits on each peer's own schedule.
Nothing is tuned on the test span. A series counts if it has a year of candles without a hole of more than a day. Forecasts are kept,
one Parquet file for each series and peer, so a run that was stopped goes on where it was; a change of the code starts a new folder.
"""

import argparse
import hashlib
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from make_us_rich.evaluation import peers, scores
from make_us_rich.evaluation.peers import PEERS, make_peer
from make_us_rich.evaluation.scores import coverage, crps, dm_test, hit_rate
from make_us_rich.market.candles import find_gaps, next_returns, scorable_rows
from make_us_rich.market.reading import read
from make_us_rich.models import har
from make_us_rich.models.baselines import LEVELS, MEDIAN

ROOT = Path(__file__).resolve().parents[1]
HOURS, LEAST = 8_760, 8_700  # a year; a year with some hours missing
STABLE = 5e-4  # a series whose hourly returns spread less than this is a stablecoin
COLUMNS = [f"q{level}" for level in LEVELS]


def last_year(path: Path) -> pd.DataFrame | None:
    "The newest 8,760 closed candles, or None if there are fewer than 8,700 or a hole of more than a day is among them."
    frame = read(path, "1h")[0]
    if path.name == "BTCUSDT-1h.parquet":  # its last candle was still open when the file was written
        frame = frame[:-1]
    frame = frame[-HOURS:].reset_index(drop=True)
    holes = [gap.missing for gap in find_gaps(frame, "1h")]
    return frame if len(frame) >= LEAST and max(holes, default=0) <= 24 else None


def default_folder() -> Path:
    "A temporary folder that belongs to this state of the code."
    code = b"".join(Path(module.__file__ or "").read_bytes() for module in (peers, scores, har))
    return Path(tempfile.gettempdir()) / f"bench-peers-{hashlib.sha256(code).hexdigest()[:8]}"


def forecast(name: str, frame: pd.DataFrame, rows: np.ndarray, target: Path) -> pd.DataFrame:
    "Forecasts of one peer on one series (columns y, cpu and one for each level), from the file if it is there."
    if not target.is_file():
        start = time.process_time()
        Q = make_peer(name).fit(frame, int(rows[0])).quantiles(frame, rows)
        table = pd.DataFrame(Q, columns=COLUMNS).assign(
            opened=frame["timestamp"].to_numpy()[rows], y=next_returns(frame, rows)
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}.part")
        table.assign(cpu=time.process_time() - start).to_parquet(part)
        part.replace(target)
    return pd.read_parquet(target)


def measure(table: pd.DataFrame) -> dict[str, object]:
    "Losses and numbers of one peer on one series."
    y, Q = table["y"].to_numpy(), table[COLUMNS].to_numpy()
    point = Q[:, MEDIAN]
    error = y - point
    return {
        "y": y,
        "point": point,
        "loss": crps(y, Q),
        **{f"cov{percent}": coverage(y, Q, percent) for percent in (50, 80, 95)},
        "mae": np.abs(error).mean() / np.abs(y).mean(),
        "rmse": np.sqrt((error**2).mean() / (y**2).mean()),
        "cpu": float(table["cpu"].iloc[0]),
    }


def against(mine: list[np.ndarray], theirs: list[np.ndarray]) -> str:
    "Mean ratio over the series, series won, and two t values: of the ratio across series, and Diebold-Mariano over all hours."
    ratio = np.array([a.mean() / b.mean() for a, b in zip(mine, theirs, strict=True)])
    if np.allclose(ratio, 1, rtol=0, atol=1e-12):
        return "1"
    hours = np.concatenate([(a - b) / b.mean() for a, b in zip(mine, theirs, strict=True)])
    across = (ratio.mean() - 1) / (ratio.std(ddof=1) / np.sqrt(len(ratio))) if len(ratio) > 1 else float("nan")
    return f"{ratio.mean():.4f} ({(ratio < 1).sum()}/{len(ratio)}, {across:+.1f}, {dm_test(hours, 24)[0]:+.1f})"


def summary(name: str, found: dict[str, dict[str, dict]]) -> dict[str, str]:
    "One line of the main table: `name` over all series of `found[series][peer]`."
    mine = [by_peer[name] for by_peer in found.values()]
    losses = {peer: [by_peer[peer]["loss"] for by_peer in found.values()] for peer in next(iter(found.values()))}
    rivals = [peer for peer in ("GARCH-t", "HAR-t") if peer in losses]
    ratio = np.array([a.mean() / b.mean() for a, b in zip(losses[name], losses["base"], strict=True)])
    hit = hit_rate(np.concatenate([one["y"] for one in mine]), np.concatenate([one["point"] for one in mine]))
    mean = {key: np.mean([one[key] for one in mine]) for key in ("cov50", "cov80", "cov95", "mae", "rmse", "cpu")}
    return {
        "peer": name,
        "CRPS/base": f"{ratio.mean():.4f}",
        "worst": f"{ratio.max():.4f}",
        "< base": f"{(ratio < 1).sum()}/{len(ratio)}",
        **{
            f"against {peer} (wins, t over series, t over hours)": against(losses[name], losses[peer])
            for peer in rivals
        },
        "50/80/95 %": " / ".join(f"{mean[f'cov{percent}']:.3f}" for percent in (50, 80, 95)),
        "hit rate [95 %]": f"{hit.share:.3f} [{hit.low:.3f}, {hit.high:.3f}]" if hit.n else "names none",
        "MAE/close": f"{mean['mae']:.4f}",
        "RMSE/close": f"{mean['rmse']:.4f}",
        "CPU s/pair": f"{mean['cpu']:.2f}",
    }


def one_series(series: str, by_peer: dict[str, dict]) -> dict[str, str]:
    "One line of the second table: CRPS/base of every peer with its DM t, and the CPU seconds of all of them."
    base = by_peer["base"]["loss"]
    losses = {name: one["loss"] for name, one in by_peer.items() if name != "base"}
    cells = {name: f"{loss.mean() / base.mean():.4f} ({dm_test(loss - base)[0]:+.1f})" for name, loss in losses.items()}
    return {
        "series": series,
        "hours": str(len(base)),
        **cells,
        "CPU s": f"{sum(one['cpu'] for one in by_peer.values()):.1f}",
    }


def markdown(rows: list[dict[str, str]]) -> str:
    head = list(rows[0])
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *[list(row.values()) for row in rows]]
    )


def run(data: Path, names: list[str], series: list[str], out: Path) -> str:
    "Forecast what is not there yet, then print both tables."
    found: dict[str, dict[str, dict]] = {}
    left_out = []
    for path in sorted(data.glob("*.parquet")):
        if series and not any(text in path.stem for text in series):
            continue
        frame = last_year(path)
        if frame is None:
            left_out.append(path.stem)
            continue
        rows = scorable_rows(frame, np.arange(len(frame) - round(len(frame) / 10), len(frame)))
        found[path.stem] = {
            name: measure(forecast(name, frame, rows, out / path.stem / f"{name}.parquet")) for name in names
        }
        print(one_series(path.stem, found[path.stem]), flush=True)
    if not found:
        raise SystemExit(
            f"{data} holds no series of {LEAST:,} candles without a hole of more than a day; name another folder with --data"
        )
    basket = {series: by_peer for series, by_peer in found.items() if by_peer["base"]["y"].std() > STABLE} or found
    pegged = [series for series in found if series not in basket]
    total = sum(len(by_peer["base"]["loss"]) for by_peer in basket.values())
    note = f"{len(basket)} series, {total:,} hours. Left out (too short, or a hole of more than a day): {', '.join(left_out) or 'none'}."
    note += (
        f" Only in the second table, because a pegged price moves on a grid of ticks: {', '.join(pegged)}."
        if pegged
        else ""
    )
    return "\n\n".join(
        [
            markdown([summary(name, basket) for name in names]),
            note,
            markdown([one_series(*item) for item in found.items()]),
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=shared, help="folder with the Parquet files")
    parser.add_argument(
        "--peers", nargs="+", default=list(PEERS), choices=list(PEERS), help="only these; base is always among them"
    )
    parser.add_argument("--series", nargs="+", default=[], help="only series whose file name contains one of these")
    parser.add_argument(
        "--out", type=Path, default=default_folder(), help="where forecasts are kept; default: a temporary folder"
    )
    parser.add_argument("--save", action="store_true", help="keep the tables in bench/results/peers.md")
    asked = parser.parse_args()
    text = run(asked.data, list(dict.fromkeys(["base", *asked.peers])), asked.series, asked.out)
    print(text)
    if asked.save:
        target = ROOT / "bench" / "results" / "peers.md"
        target.parent.mkdir(exist_ok=True)
        head = f"# Peers, measured {time.strftime('%Y-%m-%d')} by `python bench/peers.py --save`"
        target.write_text(f"{head}\n\n{text}\n", encoding="utf-8")
