"""A real model, small and quickly made, and what tests of the serving side need to publish it again and again."""

import functools

import numpy as np
import pandas as pd

from make_us_rich.market.candles import SAMPLE_LABEL, VALUE_COLUMNS, load_sample
from make_us_rich.market.series import Series
from make_us_rich.models.baselines import LEVELS
from make_us_rich.registry.manifest import DataSpan, Golden, Manifest
from make_us_rich.registry.served_model import open_graph
from make_us_rich.registry.store import ModelStore

PAIRS = ("BTC_USDT", "SOL_USDT")


@functools.cache
def sample(pair: str) -> pd.DataFrame:
    "5,000 candles of the embedded sample; those of SOL moved to the dates of BTC."
    dates = load_sample("BTC_USDT").tail(5000).reset_index(drop=True)
    frame = load_sample(pair).tail(5000).reset_index(drop=True)
    return frame.assign(timestamp=dates["timestamp"], close_time=dates["close_time"])


@functools.cache
def tiny_graph() -> bytes:
    "An ONNX graph of the default recipe, one member, one epoch: real features, real shapes, little skill."
    from make_us_rich.models.export import convert_model
    from make_us_rich.models.recipe import load_recipe
    from make_us_rich.models.training import training_loop

    recipe = load_recipe("default", members=1, epochs=1, hidden_size=8)
    result = training_loop(sample("BTC_USDT").head(3000), recipe, progress=False)
    return convert_model(result.forecaster)


@functools.cache
def _golden(pair: str) -> tuple[int, Golden]:
    session = open_graph(tiny_graph())
    window = int(session.get_inputs()[0].shape[1])
    tail = sample(pair).head(window)
    candles, times = tail[VALUE_COLUMNS].to_numpy("float64"), tail["timestamp"].astype("int64").to_numpy()
    quantiles, scale = session.run(None, {"candles": candles[None], "open_time": times[None], "width": np.ones(1)})
    return window, Golden.of(candles, times, quantiles[0], float(scale[0]))


def publish(
    store: ModelStore, name: str, cutoff: pd.Timestamp, mark: int = 0, promote: bool = True, broken: bool = False
) -> str:
    "Publish the tiny graph with a cut-off; `mark` makes another file of it, `broken` a version that computes other prices than it says."
    series = Series.parse(name)
    pair = str(series.pair)
    window, golden = _golden(pair)
    if broken:
        golden = golden.model_copy(update={"quantiles": [q * 1.01 for q in golden.quantiles]})
    frame = sample(pair)
    first, last = frame["timestamp"].iloc[[0, -1]]
    span = DataSpan(
        source=SAMPLE_LABEL, label=SAMPLE_LABEL, first=first, last=last, rows=len(frame), gaps=0, content_hash=""
    )
    manifest = Manifest(
        pair=pair,
        interval=str(series.interval),
        window=window,
        columns=VALUE_COLUMNS,
        levels=list(LEVELS),
        recipe={},
        recipe_hash="0" * 64,
        data=span,
        cutoff=cutoff.to_pydatetime(),
        created_at=cutoff.to_pydatetime(),
        scores=[],
        verdict={"passed": True},
        golden=golden,
        libraries={},
        git_revision="",
        run_id=f"{pair}-{cutoff:%Y%m%dT%H%M}-{mark}",
    )
    version = store.publish(manifest, _marked(mark))
    if promote:
        store.promote(series, version)
    return version


@functools.cache
def _marked(mark: int) -> bytes:
    import onnx

    model = onnx.load_from_string(tiny_graph())
    entry = model.metadata_props.add()
    entry.key, entry.value = "mark", str(mark)
    return model.SerializeToString()
