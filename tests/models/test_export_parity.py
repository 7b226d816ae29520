"""The exported graph answers like torch, for coins priced from 0.00001 to 100,000, and is the same file every time (F40, F43, F51).

The price paths are real: from the embedded sample, always, and from the shared data (SHARED_DATA, or ../shared/data) where it exists.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from make_us_rich.core.settings import TrainingError
from make_us_rich.market.candles import load_sample
from make_us_rich.market.reading import read
from make_us_rich.models.baselines import LEVELS
from make_us_rich.models.export import check_graph, convert_model, validate_model
from make_us_rich.models.features import CandleFeatures, OriginalFeatures, frame_tensors, windows
from make_us_rich.models.graph import INPUTS, open_session
from make_us_rich.models.network import CandleForecaster, LSTMRegressor, OriginalForecaster, QuantileHead, student4

SHARED = Path(os.environ.get("SHARED_DATA") or Path(__file__).parents[3] / "shared/data")
PRICES = [1e-5, 1e-3, 0.1, 1.0, 100.0, 1e5]


def make_forecaster() -> CandleForecaster:
    "The default recipe's graph with two members; weights are moved off their zeros so that each path of the network matters."
    torch.manual_seed(3)
    features = CandleFeatures()
    size = {"n_features": features.n_features, "hidden_size": 32, "n_outputs": QuantileHead.n_inputs, "skip": True}
    forecaster = CandleForecaster(features, [nn.Sequential(LSTMRegressor(**size), QuantileHead()) for _ in range(2)])
    with torch.no_grad():
        for weight in forecaster.parameters():
            weight.add_(0.05 * torch.randn(weight.shape))
    return forecaster.eval()


def make_original(frame: pd.DataFrame) -> OriginalForecaster:
    nine = OriginalFeatures()(*frame_tensors(frame))[0]
    torch.manual_seed(4)
    forecaster = OriginalForecaster(LSTMRegressor(9, 128, 2, 0.2), nine.amin(0), nine.amax(0)).eval()
    forecaster.misses.copy_(0.01 * student4(LEVELS))
    return forecaster


def at_price(frame: pd.DataFrame, price: float) -> pd.DataFrame:
    "The same market, quoted so that the last close is `price` (each coin is split, so the quote volume stays)."
    factor, frame = price / frame["close"].iloc[-1], frame.copy()
    frame[["open", "high", "low", "close"]] *= factor
    frame[["volume", "tb_base_av"]] /= factor
    return frame


def shared_frames() -> dict[str, Path]:
    return {p.name.partition("-")[0]: p for p in sorted(SHARED.glob("*-1h.parquet"))}


@pytest.fixture(scope="module", params=["BTC_USDT", "SOL_USDT"])
def sample(request) -> pd.DataFrame:
    return load_sample(request.param).iloc[-3000:].reset_index(drop=True)


@pytest.fixture(scope="module")
def original_graph() -> tuple[OriginalForecaster, bytes]:
    forecaster = make_original(load_sample().iloc[-3000:])
    return forecaster, convert_model(forecaster)


@pytest.fixture(scope="module")
def real(original_graph) -> tuple[CandleForecaster, bytes]:
    "Forecaster and graph; exported after another model, so that a counter of the exporter that goes on would show in the bytes."
    forecaster = make_forecaster()
    return forecaster, convert_model(forecaster, {"pair": "BTC_USDT"})


@pytest.mark.parametrize("price", PRICES)
def test_sample_at_any_price(real, sample, price):
    forecaster, graph = real
    parity = validate_model(graph, forecaster, at_price(sample, price))
    assert parity.rows == 64 and parity.max_scaled < 1e-5 and parity.max_price < 1e-6, parity


@pytest.mark.parametrize(
    "name", shared_frames() or [pytest.param("none", marks=pytest.mark.skip(f"no *-1h.parquet in {SHARED}"))]
)
def test_shared_pairs(real, name):
    forecaster, graph = real
    frame = read(shared_frames()[name], "1h")[0].iloc[-3001:-1].reset_index(drop=True)
    for price in (frame["close"].iloc[-1], 1e-5, 1e5):
        parity = validate_model(graph, forecaster, at_price(frame, price))
        assert parity.max_scaled < 1e-5 and parity.max_price < 1e-6, (price, parity)


def test_prices_do_not_change_the_answer(real, sample):
    "In units of the last close, a coin at 0.00001 gets the very forecast of a coin at 100,000."
    _, graph = real
    session, answers = open_session(graph), []
    for price in (1e-5, 1e5):
        candles, open_time = windows(at_price(sample, price), 840, np.arange(839, len(sample), 100))
        batch = {"candles": candles.numpy(), "open_time": open_time.numpy(), "width": np.ones(len(candles))}
        quantiles, scale = session.run(None, batch)
        answers.append((quantiles / candles[:, -1, 3:4].numpy(), scale))
    assert np.abs(answers[0][0] / answers[1][0] - 1).max() < 1e-4
    assert np.abs(answers[0][1] / answers[1][1] - 1).max() < 1e-5


def test_original_recipe(original_graph):
    forecaster, graph = original_graph
    parity = validate_model(graph, forecaster, load_sample().iloc[-3000:].reset_index(drop=True))
    assert parity.max_price < 1e-6, parity


def test_same_model_same_bytes(real, tmp_path):
    "In another process, another folder and with another hash seed; and the exporter says nothing and leaves no file."
    here = Path(__file__).resolve().parent
    code = (
        f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parents[1])!r}]; import test_export_parity as t; "
        "print(t.sha(t.convert_model(t.make_forecaster(), {'pair': 'BTC_USDT'})))"
    )
    env = os.environ | {"PYTHONHASHSEED": "5", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == (sha(real[1]), "")
    assert list(tmp_path.iterdir()) == []


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_graph_is_pure(real):
    "No other file, no foreign operator, nothing about the machine or the code that made it."
    _, graph = real
    model = check_graph(graph)
    assert {n.domain for n in model.graph.node} == {""} and not model.functions
    for weight in model.graph.initializer:
        weight.ClearField("raw_data")  # numbers may spell anything
    words = [str(Path.cwd()), sys.prefix, "site-packages", ".py", "CandleForecaster", "stack_trace", "aten", "torch.nn"]
    assert [w for w in words if w.encode() in model.SerializeToString()] == []
    assert {p.key: p.value for p in model.metadata_props}["window"] == "840"


class Swapped(nn.Module):
    "A forecaster that is fed the candles with two columns exchanged: the classical silent fault."

    def __init__(self, forecaster: nn.Module, one: int, two: int):
        super().__init__()
        self.forecaster, self.window = forecaster, forecaster.window
        self.order = list(range(9))
        self.order[one], self.order[two] = two, one

    def forward(self, candles, open_time, width):
        return self.forecaster(candles[..., self.order], open_time, width)


@pytest.mark.parametrize(("one", "two"), [(0, 3), (1, 2), (4, 6), (5, 7)])
def test_swapped_columns(real, sample, one, two):
    forecaster, graph = real
    with pytest.raises(
        TrainingError, match=r"^the exported graph differs from the trained model by .*; it is not published, see"
    ):
        validate_model(graph, Swapped(forecaster, one, two), sample)


WRONG = [("candles", lambda x: x[:, 1:]), ("candles", lambda x: x.astype("f4")), ("width", lambda x: x[:, None])]


@pytest.mark.parametrize(("name", "change"), WRONG)
def test_wrong_shape_or_type(real, sample, name, change):
    candles, open_time = windows(sample, 840, np.array([900, 901]))
    batch = dict(zip(INPUTS, (candles.numpy(), open_time.numpy(), np.ones(2)), strict=True))
    with pytest.raises(Exception, match=r"Got: 839 Expected: 840|tensor\(float\)|Invalid rank"):
        open_session(real[1]).run(None, batch | {name: change(batch[name])})


def test_model_that_cannot_be_exported():
    class Impossible(nn.Module):
        window = 5

        def forward(self, candles, open_time, width):
            return candles[candles[0, 0, 0].item() :], width

    with pytest.raises(
        TrainingError, match=r"^the model cannot be written as ONNX: .*; `mkrich doctor` shows the versions in use$"
    ) as e:
        convert_model(Impossible())
    assert "\n" not in str(e.value)
