"""The pooled network: same bytes with one thread and with two, no look past the cut-off, and the way through the store and back."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
import torch

from make_us_rich.core.settings import StoreError, TrainingError, get_settings
from make_us_rich.market.candles import VALUE_COLUMNS, fake_candles
from make_us_rich.market.replay import ReplayServer
from make_us_rich.market.series import POOLED, Interval, Series
from make_us_rich.models.export import convert_model, validate_model
from make_us_rich.models.graph import open_session
from make_us_rich.models.pooled import Pooled, finetune, pack_weights, pretrain
from make_us_rich.models.recipe import load_recipe
from make_us_rich.models.training import training_loop
from make_us_rich.registry.manifest import Manifest, draft_manifest
from make_us_rich.registry.served_model import OnnxModel
from make_us_rich.registry.store import ModelStore, pooled_note, serving_champion
from make_us_rich.runs.pretrain import load_pooled, open_pooled
from make_us_rich.serving.service import Service

TINY = {"epochs": 2, "steps_per_epoch": 6, "batch_size": 8, "members": 2}
FINE = load_recipe("finetune", steps_per_epoch=5)


@pytest.fixture(scope="module")
def frames() -> dict[str, pd.DataFrame]:
    return {"AAA_USDT": fake_candles(3_000, seed=1), "BBB_USDT": fake_candles(2_500, seed=2, start="2025-01-21 20:00")}


@pytest.fixture(scope="module")
def pooled(frames: dict[str, pd.DataFrame]) -> Pooled:
    return pretrain(frames, load_recipe("pooled", **TINY), progress=False).pooled


def manifest_of(pooled: Pooled, model: bytes, frame: pd.DataFrame, **changes: object) -> Manifest:
    facts = {
        "recipe": pooled.recipe.model_dump(),
        "recipe_hash": pooled.recipe.hash,
        "run_id": f"{pooled.cutoff:%Y%m%dT%H}",
        "cutoff": pooled.cutoff,
        "scores": [{"model": "all pairs", "n": 1440, "crps/base": 0.98, "cov80": 0.8}, {}, {}],
    }
    return draft_manifest(Series(POOLED, Interval("1h")), frame, open_session(model), **facts | changes)


def publish(store: ModelStore, pooled: Pooled, frame: pd.DataFrame, weights: str | None = None) -> str:
    model = convert_model(
        pooled.forecaster, {"weights": pack_weights(pooled.forecaster) if weights is None else weights}
    )
    version = store.publish(manifest_of(pooled, model, frame), model)
    store.promote(POOLED, version)
    return version


@pytest.mark.parametrize("way", ["scratch", "pretrain", "finetune"])
def test_one_thread_and_two_give_the_same_bytes(way, frames, pooled, monkeypatch):
    def model(threads: int) -> bytes:
        monkeypatch.setenv("MUR_THREADS", str(threads))
        torch.set_num_threads(threads)
        if way == "scratch":
            forecaster = training_loop(frames["AAA_USDT"], load_recipe(**TINY), progress=False).forecaster
        elif way == "pretrain":
            forecaster = pretrain(frames, load_recipe("pooled", **TINY), progress=False).pooled.forecaster
        else:
            forecaster = finetune(frames["AAA_USDT"], pooled, FINE, progress=False).forecaster
        assert torch.get_num_threads() == threads
        return convert_model(forecaster)

    try:
        assert model(2) == model(1)
    finally:
        torch.set_num_threads(1)


def test_the_exported_median_is_shrunk_as_in_torch(frames, pooled):
    for factor in (0.0, 0.35):
        forecaster = finetune(frames["AAA_USDT"], pooled, FINE, progress=False).forecaster
        forecaster.shrink.fill_(factor)
        parity = validate_model(convert_model(forecaster), forecaster, frames["AAA_USDT"])
        assert parity.max_scaled < 1e-5


def test_later_candles_of_any_pair_change_nothing(frames, pooled):
    other = {name: frame.copy() for name, frame in frames.items()}
    for frame in other.values():
        frame.loc[frame["timestamp"] >= pooled.cutoff, ["open", "high", "low", "close"]] *= 2
    again = pretrain(other, pooled.recipe, cutoff=pooled.cutoff, progress=False).pooled
    assert pack_weights(again.forecaster) == pack_weights(pooled.forecaster)


def test_weights_travel_through_the_store(frames, pooled):
    store = ModelStore("memory://")
    assert load_pooled(store) is None
    publish(store, pooled, frames["AAA_USDT"])
    back = load_pooled(store)
    assert pack_weights(back.forecaster) == pack_weights(pooled.forecaster)
    assert (back.cutoff, back.recipe, back.interval) == (pooled.cutoff, pooled.recipe, pooled.interval)
    tuned = [finetune(frames["AAA_USDT"], network, FINE, progress=False).forecaster for network in (pooled, back)]
    assert pack_weights(tuned[0]) == pack_weights(tuned[1])


def test_only_a_network_that_has_not_seen_the_test_span_is_taken(frames, pooled):
    store = ModelStore("memory://")
    publish(store, pooled, frames["AAA_USDT"])
    newer = dataclasses.replace(pooled, cutoff=pooled.cutoff + pd.Timedelta("7d"))
    publish(store, newer, frames["AAA_USDT"])
    assert load_pooled(store).cutoff == newer.cutoff
    assert load_pooled(store, before=pooled.cutoff).cutoff == pooled.cutoff
    assert load_pooled(store, before=pooled.cutoff - pd.Timedelta("1h")) is None
    with pytest.raises(TrainingError, match="take an earlier pooled network or train from scratch"):
        finetune(frames["AAA_USDT"], newer, FINE, progress=False)


def test_weights_that_are_not_those_of_the_graph_are_refused(frames, pooled):
    store = ModelStore("memory://")
    other = finetune(frames["AAA_USDT"], pooled, FINE, progress=False).forecaster
    publish(store, pooled, frames["AAA_USDT"], weights=pack_weights(other))
    with pytest.raises(StoreError, match="give other prices than its graph"):
        load_pooled(store)
    for damaged in ("", "not base64", pack_weights(pooled.forecaster)[:-40]):
        empty = ModelStore("memory://")
        publish(empty, pooled, frames["AAA_USDT"], weights=damaged)
        with pytest.raises(TrainingError, match="train the pooled network again"):
            open_pooled(empty.load(POOLED))


def test_a_pair_without_history_is_served_at_once(frames, pooled):
    store = ModelStore("memory://")
    assert serving_champion(store, "NEW_USDT") is None
    version = publish(store, pooled, frames["AAA_USDT"])
    key, pointer = serving_champion(store, "NEW_USDT")
    assert (key, pointer.version) == (Series.parse(POOLED), version)
    model, new = OnnxModel(store.load(key)), fake_candles(840, seed=9, price=0.0001)
    quantiles, _ = model.predict(
        new[VALUE_COLUMNS].to_numpy(float)[None], new["timestamp"].astype("int64").to_numpy()[None]
    )
    assert np.isfinite(quantiles).all() and (np.diff(quantiles[0]) >= 0).all()
    assert 0.9 < quantiles[0, 10] / new["close"].iloc[-1] < 1.1
    assert pooled_note("NEW_USDT", model.manifest).startswith("NEW_USDT has no model of its own yet")


def test_a_new_pair_is_served_by_the_pooled_model_until_it_has_its_own(frames, pooled, tmp_path):
    "From the command line and by the service; what it said stays on record, the pair's own champion takes over with the next candle."
    new, hour, label = fake_candles(1_500, seed=9, start="2025-04-01"), pd.Timedelta("1h"), "synthetic candles"
    closed = new["timestamp"].iloc[1_400]
    store = ModelStore.of(get_settings(home=tmp_path))
    version = publish(store, pooled, frames["AAA_USDT"])
    with ReplayServer({"NEW_USDT": new}, now=closed + pd.Timedelta("5s"), label=label) as server:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MUR_")}
        environment |= {"MUR_HOME": str(tmp_path), "MUR_EXCHANGE_URL": server.url}
        command = [str(Path(sys.executable).parent / "mkrich"), "forecast", "NEW_USDT", "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (told,) = json.loads(done.stdout)
        assert (told["status"], told["model_version"]) == ("ok", version)
        assert told["reliability"].startswith("NEW_USDT has no model of its own yet: it is served by the pooled one")

        settings = get_settings(home=tmp_path, exchange_url=server.url, poll_seconds=5)
        services = [Service(settings, clock=server.clock.now, jitter=lambda: 1.0).start()]
        service = services[0]
        try:
            assert list(service.states) == [
                Series.parse("NEW_USDT")
            ]  # found by its candles; the pooled model is no pair
            first = service.answer("NEW_USDT").forecast
            assert (first.status, first.model_version) == ("ok", version) and "the pooled one" in first.reliability
            assert list(first.quantiles.values()) == pytest.approx(list(told["quantiles"].values()), rel=1e-12)

            tuned = convert_model(finetune(frames["AAA_USDT"], pooled, FINE, progress=False).forecaster)
            own = store.publish(
                manifest_of(pooled, tuned, new.iloc[:1_401], pair="NEW_USDT", run_id="own", scores=[]), tuned
            )
            store.promote("NEW_USDT", own)
            assert service.update_models() == 1
            assert service.status()["pairs"][0]["model_version"] == own
            assert service.answer("NEW_USDT").forecast == first  # nobody withdrew what was said about this hour
            services.append(Service(settings, clock=server.clock.now, jitter=lambda: 1.0).start())
            assert services[1].answer("NEW_USDT").forecast.quantiles == first.quantiles  # nor does a restart
            server.clock.set(closed + hour + pd.Timedelta("5s"))
            service.tick()
            second = service.answer("NEW_USDT").forecast
            assert (second.status, second.model_version) == ("ok", own) and "pooled" not in second.reliability
            done = service.ledger.verify("NEW_USDT", store, service.parts.candles)
            assert (done.checked, done.unknown) == (2, 0)
            store.objects.store.delete(
                "NEW_USDT/1h/champion.json"
            )  # its own pointer is lost: no silent way back to the pooled model
            service.update_models()
            assert service.status()["pairs"][0]["model_version"] == own
        finally:
            for each in services:
                each.stop()


def test_the_file_holds_numbers_and_no_code(pooled):
    model = onnx.load_model_from_string(convert_model(pooled.forecaster, {"weights": pack_weights(pooled.forecaster)}))
    assert {item.key for item in model.metadata_props} == {"weights", "window", "columns", "levels"}
    assert convert_model(pooled.forecaster, {"weights": pack_weights(pooled.forecaster)}) == model.SerializeToString(
        deterministic=True
    )
