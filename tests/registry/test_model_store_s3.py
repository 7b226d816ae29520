"""The model store on a real S3 server: publish, promote, roll back, and writers that race."""

import threading
from concurrent.futures import ThreadPoolExecutor

import obstore
import pytest
from s3_kit import s3  # noqa: F401
from test_model_store_faults import GRAPH, PAIR, draft, publish

from make_us_rich.core.settings import StoreError
from make_us_rich.registry.store import ModelStore


@pytest.fixture
def url(s3, monkeypatch):  # noqa: F811
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3.new_store()


def test_publish_promote_load_roll_back(url):
    first, second = publish(url, 1, GRAPH), publish(url, 2, GRAPH + b"2")
    store = ModelStore(url)
    assert [i.version for i in store.versions(PAIR)] == [second, first] and store.champion(PAIR).version == second
    assert store.load(PAIR).model == GRAPH + b"2"
    store.rollback(PAIR, reason="worse than it looked")
    assert store.champion(PAIR).version == first and store.load(PAIR).model == GRAPH
    with pytest.raises(StoreError, match="older cut-off"):
        store.promote(PAIR, publish_only(url, 0))


def publish_only(url: str, hour: int, graph: bytes = GRAPH, run_id: str = "") -> str:
    return ModelStore(url).publish(draft(hour, run_id), graph)


def test_eight_writers_of_one_run_make_one_version(url):
    together = threading.Barrier(8)

    def write(number: int) -> str:
        together.wait()
        return publish_only(url, 5, GRAPH + bytes([number]), "the-run")

    with ThreadPoolExecutor(8) as pool:
        versions = set(pool.map(write, range(8)))
    whole = [
        i.version for i in ModelStore(url).versions(PAIR) if not i.problem
    ]  # a loser leaves its model, never a manifest
    assert len(versions) == 1 and whole == list(versions)


def test_eight_promotions_at_once_lose_no_step(url):
    versions = [publish_only(url, hour, GRAPH + bytes([hour])) for hour in range(8)]
    together = threading.Barrier(8)

    def promote(version: str) -> str:
        together.wait()
        try:
            ModelStore(url).promote(PAIR, version)
        except StoreError as e:
            if e.reason != "older_cutoff":
                raise
            return ""
        return version

    with ThreadPoolExecutor(8) as pool:
        went = {v for v in pool.map(promote, versions) if v}
    pointer = ModelStore(url).champion(PAIR)
    assert pointer.version == versions[-1] and {s.version for s in pointer.steps} == went and pointer.seq == len(went)


def test_damaged_object_is_found_and_the_last_good_one_is_sound(url):
    first, second = publish(url, 1, GRAPH), publish(url, 2, GRAPH + b"2")
    objects = ModelStore(url).objects
    obstore.put(objects.store, f"{PAIR}/1h/{second}/model.onnx", b"half of it")
    infos = {i.version: i.problem for i in ModelStore(url).versions(PAIR)}
    assert infos[first] == "" and infos[second].startswith("model.onnx is missing or has another size")
    with pytest.raises(StoreError, match=r"model\.onnx has 10 bytes"):
        ModelStore(url).load(PAIR, second)
    assert ModelStore(url).load(PAIR, first).version == first


def test_wrong_keys_are_one_sentence(url, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(
        StoreError,
        match=r"^the model store s3://\S+ cannot be written: .*; check MUR_MODELS_URL, its rights and its disk$",
    ):
        publish(url, 1, GRAPH)
