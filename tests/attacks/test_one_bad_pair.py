"""One pair gets a version that nobody thought of: only that pair is told, and keeps its champion; all others go on."""

import json
import threading

import pandas as pd
import pytest
from waiting import wait_for

from make_us_rich.core.settings import get_settings, utc_iso
from make_us_rich.market.candles import SAMPLE_LABEL, fake_candles
from make_us_rich.market.replay import ReplayServer
from make_us_rich.registry import served_model
from make_us_rich.registry.examples import example_manifest, hand_made_graph, publish_example
from make_us_rich.registry.manifest import NO_KEY, seal_manifest
from make_us_rich.registry.store import ModelStore
from make_us_rich.serving import choice
from make_us_rich.serving.service import Service

PAIRS = ("AAA_USDT", "BTC_USDT", "ZZZ_USDT")  # the bad one is the first that is looked at, or the last
HOUR = pd.Timedelta("1h")
FRAMES = {pair: fake_candles(1_100, seed=seed) for seed, pair in enumerate(PAIRS)}
CLOSED = FRAMES[PAIRS[0]]["timestamp"].iloc[1_000]


class Home:
    "Three pairs with a champion each, and a service that answers with them."

    def __init__(self, folder, exchange):
        self.settings = get_settings(home=folder, exchange_url=exchange.url, poll_seconds=5)
        self.exchange = exchange
        self.store = ModelStore.of(self.settings, exchange.clock.now)
        self.champions = {pair: publish_example(self.store, pair, CLOSED - 4 * HOUR) for pair in PAIRS}
        self.service = Service(self.settings, clock=exchange.clock.now, jitter=lambda: 1.0)

    def serving(self):
        return {each["pair"]: each["model_version"] for each in self.service.status()["pairs"]}

    def publish_all_but(self, bad):
        "A new champion for each of the others."
        return {pair: publish_example(self.store, pair, CLOSED - 2 * HOUR) for pair in PAIRS if pair != bad}

    def look(self, seconds=60):
        self.exchange.clock.set(CLOSED + pd.Timedelta(seconds=seconds))
        self.service.tick()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "try_model", lambda bundle: None)  # a trial costs a second; where it matters it is real
    with ReplayServer(FRAMES, now=CLOSED + pd.Timedelta("5s"), label=SAMPLE_LABEL) as exchange:
        made = Home(tmp_path, exchange)
        yield made
        made.service.stop()


def plant(home, pair, change):
    "A new champion whose manifest our own key has sealed, whatever stands in it: a mistake of ours, not of a stranger."
    signer = home.store.objects.signer
    version = publish_example(home.store, pair, CLOSED - 2 * HOUR)
    path = home.settings.home / "models" / pair / "1h" / version / "manifest.json"
    facts = json.loads(path.read_text())
    change(facts)
    text = json.dumps(facts | {"seal": ""}, indent=1, sort_keys=True)
    path.write_text(text.replace('"seal": ""', f'"seal": "{signer.seal(text.encode())}"'))
    pointer = path.parents[1] / "champion.json"
    told = json.loads(pointer.read_text())
    pointer.write_text(json.dumps(told | {"manifest_sha256": NO_KEY.seal(path.read_bytes())}))
    return version


def into_golden(**changes):
    return lambda facts: facts["golden"].update(changes)


ODD = {
    "a window of nothing": (lambda facts: facts.update(window=0), "greater than 0"),
    "a window of years": (lambda facts: facts.update(window=100_000), "less than or equal to 10000"),
    "another window than its graph": (lambda facts: facts.update(window=25), "another size|looks at 24 candles"),
    "golden numbers that are no base64": (into_golden(candles="@@@"), "golden"),
    "golden numbers that are not packed": (into_golden(candles="aGVsbG8="), "golden"),
    "a golden answer that is none": (into_golden(quantiles=[None] * 21), "should be a valid number"),
    "other golden prices": (into_golden(quantiles=[1.0] * 21), "computes other prices here"),
    "a cut-off of another world": (lambda facts: facts.update(cutoff="9999-12-31T23:59:59Z"), "AAA_USDT|ZZZ_USDT"),
    "columns that we do not have": (lambda facts: facts.update(columns=["x"], levels=[]), None),
}


@pytest.mark.parametrize(
    ("kind", "bad"), [*((kind, PAIRS[0]) for kind in ODD), ("golden numbers that are not packed", PAIRS[-1])]
)
def test_an_odd_version_stops_nobody_else(home, kind, bad, monkeypatch):
    home.service.start()
    really = served_model.try_model
    monkeypatch.setattr(choice, "try_model", lambda bundle: really(bundle) if bundle.manifest.pair == bad else None)
    change, words = ODD[kind]
    new = home.publish_all_but(bad)
    version = plant(home, bad, change)
    home.look()
    expected = home.champions | new
    if words is None:  # nothing that a forecast rests on: it serves
        expected |= {bad: version}
    assert home.serving() == expected
    told = home.service.status()["degraded"]
    assert len(told) == (words is not None)
    if words:
        assert pd.Series(told).str.contains(words).all() and bad in told[0]
    home.exchange.clock.set(CLOSED + HOUR + pd.Timedelta("5s"))
    home.service.tick()
    for pair in PAIRS:
        forecast = home.service.answer(pair).forecast
        assert (forecast.status, forecast.model_version) == ("ok", expected[pair]), forecast.sentence
        assert forecast.target_open == utc_iso(CLOSED + HOUR)


@pytest.mark.parametrize("kind", ["window", "golden"])
def test_a_window_that_does_not_fit_its_own_golden_numbers(home, kind):
    "Sealed and published as a run would do it, with a graph of another window."
    home.service.start()
    window = 24 if kind == "golden" else 30
    draft = example_manifest(PAIRS[0], CLOSED - 2 * HOUR, window=30)
    assert seal_manifest(draft, hand_made_graph(window=24))
    version = home.store.publish(draft.model_copy(update={"window": window}), hand_made_graph(window=24))
    home.store.promote(PAIRS[0], version)
    home.look()
    assert home.serving() == home.champions
    (told,) = home.service.status()["degraded"]
    assert version in told and PAIRS[0] in told


TRIALS = {
    "it hangs": ("import time; time.sleep(600)", "no answer within"),
    "it is killed": ("import os; os.kill(os.getpid(), 9)", "signal 9"),
    "it ends": ("import sys; sys.exit(3)", "signal -3|exit"),
    "it spins": ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass", "signal"),
    "it talks without end": ("import os\nfor _ in range(1000): os.write(2, b'x' * 10000)\nraise SystemExit(1)", "xxx"),
}


@pytest.mark.parametrize("kind", TRIALS)
def test_a_trial_that_goes_wrong_is_told_of_its_pair(home, kind, monkeypatch):
    program, words = TRIALS[kind]

    def try_one(bundle):
        if bundle.manifest.pair == PAIRS[0]:
            monkeypatch.setattr(served_model, "TRIAL", program)
            served_model.try_model(bundle, seconds=2 if kind == "it hangs" else 30)

    home.service.start()
    monkeypatch.setattr(choice, "try_model", try_one)
    new = home.publish_all_but(PAIRS[0])
    version = publish_example(home.store, PAIRS[0], CLOSED - 2 * HOUR)
    home.look()
    assert home.serving() == home.champions | new
    (told,) = home.service.status()["degraded"]
    assert version in told and "failed its trial run" in told
    assert pd.Series([told]).str.contains(words).all() and len(told) < 500


def test_a_trial_keeps_no_answer_waiting_and_is_alone(home, monkeypatch):
    "One that lasts as long as it likes, while an hour ends: all pairs get their forecast, that one with its champion."
    going_on, end, most, now = threading.Event(), threading.Event(), [0], [0]

    def try_long(bundle):
        now[0] += 1
        most[0] = max(most[0], now[0])
        going_on.set()
        assert end.wait(60)
        now[0] -= 1

    home.service.start()
    monkeypatch.setattr(choice, "try_model", try_long)
    for pair in PAIRS:
        publish_example(home.store, pair, CLOSED - 2 * HOUR)
    threads = [threading.Thread(target=home.service.run_forever, args=(0.05,), daemon=True)]
    threads[0].start()
    try:
        home.exchange.clock.set(CLOSED + pd.Timedelta("1min"))
        assert going_on.wait(60)
        threads += [threading.Thread(target=home.service.update_models, daemon=True) for _ in range(2)]
        for thread in threads[1:]:
            thread.start()
        home.exchange.clock.set(CLOSED + HOUR + pd.Timedelta("5s"))
        wanted = utc_iso(CLOSED + HOUR)
        for pair in PAIRS:
            wait_for(lambda p=pair: home.service.answer(p).forecast.target_open == wanted, what=f"the hour of {pair}")
        assert home.serving() == home.champions and not end.is_set()
        end.set()
        wait_for(lambda: not set(home.serving().values()) & set(home.champions.values()), what="the new champions")
        assert most == [1]
    finally:
        end.set()
        home.service.stop()
        for thread in threads:
            thread.join(60)


def test_a_store_that_fails_for_one_pair_is_told_of_that_pair(home, monkeypatch):
    "With an error that nobody has thought of."
    home.service.start()
    real = ModelStore.champion

    def champion(self, series):
        if str(series).startswith(PAIRS[0]):
            raise RuntimeError("a mistake of ours")
        return real(self, series)

    monkeypatch.setattr(ModelStore, "champion", champion)
    new = home.publish_all_but(PAIRS[0])
    home.look()
    assert home.serving() == home.champions | new
    (told,) = home.service.status()["degraded"]
    assert PAIRS[0] in told and "RuntimeError" in told
