"""The service over days of real hours: python bench/replay_service.py [--hours 200] [--retrain 50] [--data FOLDER]

Five pairs of real candles, moved by whole weeks to common dates, behind a replay exchange whose clock jumps from hour to hour. Each pair
is trained before the start and again every `--retrain` hours, on what was known then; once a day the service is restarted. It must show:
one forecast and one exchange call per pair and hour, all settled but the newest, every one recomputed from closed candles, and no open
candle in the store. It prints counts, ratios and CPU times.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from make_us_rich.core.settings import get_settings
from make_us_rich.market.reading import read
from make_us_rich.market.replay import ReplayServer
from make_us_rich.models.export import convert_model
from make_us_rich.models.recipe import load_recipe
from make_us_rich.models.training import training_loop
from make_us_rich.registry.manifest import draft_manifest
from make_us_rich.registry.served_model import open_graph
from make_us_rich.registry.store import ModelStore
from make_us_rich.serving.ledger import load_record
from make_us_rich.serving.service import Service
from make_us_rich.serving.track_record import record_sentence

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
FILES = {
    "BTC_USDT": "BTCUSDT-1h",
    "SOL_USDT": "SOLUSDT-1h",
    "LTC_USDT": "LTCUSDT-1h",
    "ADA_USDT": "ADAUSDT-1h",
    "XLM_USDT": "XLMUSDT-1h",
}
HOUR, LABEL = pd.Timedelta("1h"), "historical candles, dates moved"


def moved_frames(data: Path) -> dict[str, pd.DataFrame]:
    "The newest 8,000 closed candles of each pair, moved by whole weeks so that they overlap."
    frames = {pair: read(data / f"{name}.parquet", "1h")[0][:-1].tail(8000) for pair, name in FILES.items()}
    first = max(frame["timestamp"].iloc[0] for frame in frames.values())
    moved = {}
    for pair, frame in frames.items():
        shift = pd.Timedelta(weeks=(first - frame["timestamp"].iloc[0]) // pd.Timedelta("7d"))
        times = {name: (frame[name] + shift).astype(frame[name].dtype) for name in ("timestamp", "close_time")}
        moved[pair] = frame.assign(**times).reset_index(drop=True)
    return moved


def train_and_publish(store: ModelStore, pair: str, known: pd.DataFrame, options: dict) -> float:
    "Fit on `known`, publish and promote whatever comes out (no gate: this is about the service); CPU seconds."
    begun = time.process_time()
    recipe = load_recipe("default", **options)
    model = convert_model(training_loop(known, recipe, progress=False).forecaster)
    facts = {"recipe": recipe.model_dump(mode="json"), "recipe_hash": recipe.hash, "scores": []}
    manifest = draft_manifest(pair, known, open_graph(model), source=LABEL, **facts)
    store.promote(pair, store.publish(manifest, model))
    return time.process_time() - begun


def replay(frames: dict[str, pd.DataFrame], hours: int, retrain: int, options: dict, home: Path) -> None:
    closed = min(frame["timestamp"].iloc[-1] for frame in frames.values()) - (hours + 1) * HOUR
    with ReplayServer(frames, now=closed, label=LABEL) as server:
        store, fits, ticks = ModelStore.of(get_settings(home=home), server.clock.now), [], []
        settings = get_settings(home=home, exchange_url=server.url)
        service = None
        for hour in range(hours):
            now = closed + hour * HOUR
            server.clock.set(now + pd.Timedelta("3s"))
            begun, calls = time.process_time(), len(server.calls)
            if service is not None:
                service.tick()
                ticks.append(time.process_time() - begun)
                assert len(server.calls) - calls == len(frames), "not one call per pair and hour"
            if hour % retrain == 0:
                known = {pair: frame[frame["timestamp"] + HOUR <= now] for pair, frame in frames.items()}
                fits += [
                    train_and_publish(store, pair, frame.reset_index(drop=True), options)
                    for pair, frame in known.items()
                ]
            if service is None:
                service = Service(settings, clock=server.clock.now, jitter=lambda: 1.0).start()
            elif hour % 24 == 23:  # a restart a day
                service.stop()
                service = Service(settings, clock=server.clock.now, jitter=lambda: 1.0).start()
        assert service is not None
        report(service, store, frames, hours, closed)
        service.stop()
    cost = 1e3 * np.mean(ticks) / len(frames)
    print(
        f"\n{len(fits)} fits, {np.mean(fits):.1f} CPU s each; one hour of one pair costs the service {cost:.0f} CPU ms"
    )
    print(
        f"(replay exchange included; median of a turn over {len(frames)} pairs {np.median(ticks):.2f} CPU s, worst {max(ticks):.2f})"
    )


def report(
    service: Service, store: ModelStore, frames: dict[str, pd.DataFrame], hours: int, closed: pd.Timestamp
) -> None:
    for pair, frame in frames.items():
        rows = load_record(service.engine, pair)
        assert list(rows["target_open"]) == [closed + n * HOUR for n in range(hours)], f"{pair}: not one row an hour"
        assert rows["settled"].sum() == hours - 1
        begun = time.process_time()
        done = service.ledger.verify(pair, store, service.parts.candles)
        cpu = (time.process_time() - begun) / done.checked
        stored = service.parts.candles.read(pair)
        final = frame[frame["timestamp"].isin(stored["timestamp"])].reset_index(drop=True)
        assert stored.equals(final), f"{pair}: an open candle was stored"
        versions, abstained = rows["model_version"].nunique(), int((rows["status"] == "abstain").sum())
        print(f"{pair}: {hours} hours, {versions} versions, {abstained} abstentions, 0 open candles stored")
        print(f"    {done.checked} verified, {1e3 * cpu:.0f} CPU ms each")
        print(f"    {record_sentence(service.ledger.track_record(pair))}")
    print("\n".join(["", *service.ledger.track_record().badge.sentences]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=int, default=200)
    parser.add_argument("--retrain", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--members", type=int, default=1)
    parser.add_argument("--data", type=Path, default=DATA)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        replay(
            moved_frames(told.data),
            told.hours,
            told.retrain,
            {"epochs": told.epochs, "members": told.members},
            Path(home),
        )


if __name__ == "__main__":
    main()
