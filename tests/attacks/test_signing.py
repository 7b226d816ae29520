"""A store that others can write: what this home has not sealed is never loaded, served, promoted or finished."""

import json
import stat

import pandas as pd
import pytest

from make_us_rich.core.secrets import Signer
from make_us_rich.core.settings import StoreError, get_settings
from make_us_rich.market.candles import SAMPLE_LABEL, fake_candles
from make_us_rich.market.replay import ReplayServer
from make_us_rich.registry.examples import example_manifest, hand_made_graph, publish_example
from make_us_rich.registry.manifest import seal_manifest
from make_us_rich.registry.store import ModelReader, ModelStore
from make_us_rich.serving.service import Service

BTC, SPREAD = "BTC_USDT", 0.09  # a range that nobody would call honest
HOUR = pd.Timedelta("1h")
FRAME = fake_candles(1_100, seed=5)
CLOSED = FRAME["timestamp"].iloc[1_000]


def no_key(root):
    "Seals as anybody can make them."
    return ModelStore(root.as_uri())


def other_key(root):
    "Those of another home."
    return ModelStore(root.as_uri(), signer=lambda: Signer((b"the key of somebody else",)))


FOREIGN = {"a seal without a key": no_key, "the seal of another home": other_key}


class Home:
    "A home with a champion, and a service that answers with it."

    def __init__(self, folder, exchange):
        self.root = folder / "home" / "models"
        self.settings = get_settings(home=folder / "home", exchange_url=exchange.url, poll_seconds=5)
        self.exchange, self.clock = exchange, exchange.clock.now
        self.store = ModelStore.of(self.settings, self.clock)
        self.champion = publish_example(self.store, BTC, CLOSED - 3 * HOUR)
        self.service = Service(self.settings, clock=self.clock, jitter=lambda: 1.0).start()

    def version_after(self, seconds):
        "Which version serves after one more look at the store."
        self.exchange.clock.set(CLOSED + pd.Timedelta(seconds=seconds))
        self.service.tick()
        answer = self.service.answer(BTC).forecast
        assert answer.status == "ok", answer.sentence
        return self.service.status()["pairs"][0]["model_version"]


@pytest.fixture
def home(tmp_path):
    with ReplayServer({BTC: FRAME}, now=CLOSED + pd.Timedelta("5s"), label=SAMPLE_LABEL) as exchange:
        made = Home(tmp_path, exchange)
        yield made
        made.service.stop()


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_version_is_never_served(home, kind):
    "Published and made champion by somebody who can write into the store, its pointer newer than ours."
    foreign = publish_example(FOREIGN[kind](home.root), BTC, CLOSED - HOUR, spread=SPREAD)
    pointer = json.loads((home.root / BTC / "1h" / "champion.json").read_text())
    assert pointer["version"] == foreign != home.champion
    assert home.version_after(60) == home.champion
    (told,) = [text for text in home.service.status()["degraded"] if foreign in text]
    assert "was not made by this home" in told and "MUR_SIGNING_KEY" in told
    for attack in (
        lambda: home.store.load(BTC),
        lambda: home.store.load(BTC, foreign),
        lambda: home.store.promote(BTC, foreign),
        lambda: home.store.rollback(BTC, to=foreign),
    ):
        with pytest.raises(StoreError, match="was not made by this home") as refused:
            attack()
        assert refused.value.reason == "damaged_version"
    problems = {info.version: info.problem for info in home.store.versions(BTC)}
    assert problems[home.champion] == "" and "was not made by this home" in problems[foreign]
    assert home.store.rollback(BTC) == home.champion
    assert home.version_after(120) == home.champion


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_run_is_not_given_away_by_a_claim(home, kind):
    "A claim and a version for a run that is about to publish: nothing of it is adopted, and the run publishes its own."
    draft = example_manifest(BTC, CLOSED - HOUR)
    planted = FOREIGN[kind](home.root).publish(draft, hand_made_graph(SPREAD))
    assert (home.root / BTC / "1h" / "runs" / f"{draft.run_id}.json").is_file()
    assert home.store.of_run(BTC, draft.run_id) is None and home.store.adopt(BTC, draft.run_id) is None
    ours = home.store.publish(draft, hand_made_graph())
    assert ours != planted and home.store.of_run(BTC, draft.run_id).version == ours
    assert home.store.promote(BTC, ours).version == ours and home.version_after(60) == ours


def test_a_manifest_planted_at_our_own_version_is_written_anew(home):
    "The place of the version that a run will have is known to whoever has its model."
    draft, model = example_manifest(BTC, CLOSED - HOUR), hand_made_graph()
    lie = draft.model_copy(update={"verdict": {"passed": True, "lie": 1}})
    foreign = no_key(home.root).publish(lie, model)
    assert home.store.publish(draft, model) == foreign  # the same bytes, so the same name
    assert "lie" not in home.store.load(BTC, foreign).manifest.verdict


def test_a_version_from_before_is_trusted_and_a_later_one_is_not(tmp_path, caplog):
    "Once, when the key is made; and told."
    settings = get_settings(home=tmp_path)
    stranger = ModelStore(settings.store_url)
    before = publish_example(stranger, BTC, CLOSED - 3 * HOUR)
    ours = ModelStore.of(settings)
    assert ours.load(BTC).version == before
    assert "manifests from before are trusted (1)" in caplog.text
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("signing.key", "signing.trusted")} == {0o600}
    later = publish_example(stranger, BTC, CLOSED - 2 * HOUR)
    for store in (ours, ModelStore.of(settings)):
        with pytest.raises(StoreError, match="was not made by this home"):
            store.load(BTC, later)
        assert store.load(BTC, before).version == before
    sealed = seal_manifest(example_manifest(BTC, CLOSED - 3 * HOUR, spread=SPREAD), hand_made_graph(SPREAD))
    (tmp_path / "models" / BTC / "1h" / before / "manifest.json").write_bytes(sealed)  # over the one that is trusted
    with pytest.raises(StoreError, match="was not made by this home"):
        ours.load(BTC, before)


def test_hosts_with_the_same_key_share_a_store(tmp_path):
    shared = {"models_url": (tmp_path / "models").as_uri(), "signing_key": "what-both-hosts-are-told"}
    one, two = (get_settings(home=tmp_path / name, **shared) for name in ("one", "two"))
    version = publish_example(ModelStore.of(one), BTC, CLOSED)
    assert ModelStore.of(two).load(BTC).version == version
    assert not (tmp_path / "one" / "signing.key").exists()
    alone = get_settings(home=tmp_path / "three", models_url=shared["models_url"], signing_key="another-key-altogether")
    with pytest.raises(StoreError, match="MUR_SIGNING_KEY"):
        ModelReader.of(alone).load(BTC)
