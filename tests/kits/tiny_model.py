"""A real model, small and quickly made, and what tests of the serving side need to publish it again and again."""

import functools

import pandas as pd

from make_us_rich.market.candles import SAMPLE_LABEL, load_sample
from make_us_rich.market.series import Series
from make_us_rich.registry.manifest import draft_manifest
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


def publish(
    store: ModelStore, name: str, cutoff: pd.Timestamp, mark: int = 0, promote: bool = True, broken: bool = False
) -> str:
    "Publish the tiny graph with a cut-off; `mark` makes another file of it, `broken` a version that computes other prices than it says."
    frame, session = sample(str(Series.parse(name).pair)), open_graph(tiny_graph())
    window = session.get_inputs()[0].shape[1]
    golden = draft_manifest(
        name, frame.head(window), session
    ).golden  # of its oldest window, so that any history has it
    if broken:
        golden = golden.model_copy(update={"quantiles": [q * 1.01 for q in golden.quantiles]})
    run_id = f"{Series.parse(name).pair}-{cutoff:%Y%m%dT%H%M}-{mark}"
    facts = {"cutoff": cutoff, "golden": golden, "run_id": run_id, "recipe": {}, "recipe_hash": "0" * 64, "scores": []}
    manifest = draft_manifest(name, frame, window=window, source=SAMPLE_LABEL, **facts)
    version = store.publish(manifest, _marked(mark))
    if promote:
        store.promote(name, version)
    return version


@functools.cache
def _marked(mark: int) -> bytes:
    import onnx

    model = onnx.load_from_string(tiny_graph())
    entry = model.metadata_props.add()
    entry.key, entry.value = "mark", str(mark)
    return model.SerializeToString()
