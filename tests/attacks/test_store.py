"""Attacks through the store: graphs that do more than compute, links, listings without end, folders that are no pairs."""

import http.server
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx
import pandas as pd
import pytest
from onnx import helper, numpy_helper
from tiny_model import publish, sample, tiny_graph

from make_us_rich.core.settings import StoreError
from make_us_rich.core.storage import Objects, list_objects
from make_us_rich.registry.served_model import open_graph
from make_us_rich.registry.store import ModelStore

CUTOFF = pd.Timestamp("2026-11-23T19:00:00Z")


def spoiled(change) -> bytes:
    "The graph of a real model with one thing added."
    model = onnx.load_model_from_string(tiny_graph())
    change(model)
    return model.SerializeToString()


def outside(location: str) -> onnx.TensorProto:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "stolen")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def _subgraph(model: onnx.ModelProto) -> None:
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["k"], value=outside("key"))],
        "inner",
        [],
        [helper.make_tensor_value_info("k", 1, [4])],
    )
    always = numpy_helper.from_array(np.array(True), "always")
    model.graph.initializer.append(always)
    model.graph.node.append(helper.make_node("If", ["always"], ["out"], then_branch=inner, else_branch=inner))


def _sparse(model: onnx.ModelProto) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(outside("../../../etc/hostname"))
    sparse.dims.append(4)


def _function(model: onnx.ModelProto) -> None:
    body = [helper.make_node("Constant", [], ["y"], value=outside("/etc/hostname"))]
    model.functions.append(helper.make_function("ours", "Steal", [], ["y"], body, [helper.make_opsetid("", 20)]))


GRAPHS = {
    "weights elsewhere": lambda m: m.graph.initializer.append(outside("/etc/hostname")),
    "weights above": lambda m: m.graph.initializer.append(outside("../../../../etc/hostname")),
    "an attribute elsewhere": lambda m: m.graph.node.append(
        helper.make_node("Constant", [], ["k"], value=outside("key"))
    ),
    "a list of attributes elsewhere": lambda m: m.graph.node[0].attribute.append(
        helper.make_attribute("several", [outside("key")])
    ),
    "a branch": _subgraph,
    "sparse values elsewhere": _sparse,
    "a function": _function,
    "another domain": lambda m: m.graph.node.append(helper.make_node("Any", [], ["k"], domain="com.microsoft")),
    "an imported domain": lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3)),
    "chance": lambda m: m.graph.node.append(helper.make_node("RandomNormal", [], ["k"], shape=[2])),
    "a million operators": lambda m: m.graph.node.extend([helper.make_node("Identity", ["width"], ["k"])] * 20_001),
    "a second input": lambda m: m.graph.input.append(helper.make_tensor_value_info("more", 1, [1])),
    "training": lambda m: m.training_info.add(),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_only_computes(name):
    with pytest.raises(StoreError, match="the graph") as refused:
        open_graph(spoiled(GRAPHS[name]))
    assert refused.value.reason == "unfit_model" and "rollback" in str(refused.value)


def test_a_store_follows_no_link(tmp_path):
    "Neither to a file nor through a folder, to read or to write."
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_bytes(b"stolen")
    root = tmp_path / "models"
    store = ModelStore(root.as_uri())
    version = publish(store, "BTC_USDT", CUTOFF)
    model = root / "BTC_USDT" / "1h" / version / "model.onnx"
    moved = model.rename(tmp_path / "model.onnx")
    model.symlink_to(moved)  # even to the very bytes
    with pytest.raises(StoreError, match="is a link"):
        store.load("BTC_USDT")
    objects = Objects(root.as_uri())
    (root / "SOL_USDT").symlink_to(secret)
    for attack in (lambda: objects.read("SOL_USDT/key", 100), lambda: publish(store, "SOL_USDT", CUTOFF)):
        with pytest.raises(StoreError, match="is a link"):
            attack()
    assert [p.name for p in secret.iterdir()] == ["key"]


def test_a_folder_that_is_no_pair_stops_nobody(tmp_path):
    store = ModelStore((tmp_path / "models").as_uri())
    version = publish(store, "BTC_USDT", CUTOFF)
    for name in ("lost+found", "BTC", "a b", "BTC_USDT_OLD"):
        for interval in ("1h", "7h"):
            target = tmp_path / "models" / name / interval / version
            target.mkdir(parents=True)
            (target / "manifest.json").write_text("{}")
    assert [str(series) for series in store.series()] == ["BTC_USDT/1h"]
    assert store.clean() == []


PAGE = """<?xml version="1.0"?><ListBucketResult><Name>b</Name><IsTruncated>true</IsTruncated>
<NextContinuationToken>{token}</NextContinuationToken>{keys}</ListBucketResult>"""
KEY = "<Contents><Key>models/BTC_USDT/1h/{name}</Key><LastModified>2026-11-23T19:00:00Z</LastModified><ETag>1</ETag><Size>1</Size></Contents>"


@contextmanager
def bucket_that(names, token) -> Iterator[list[str]]:
    "An S3 server whose pages of a listing hold `names(n)` and go on with `token(n)`; what it was asked."
    asked: list[str] = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(urllib.parse.urlsplit(self.path).query)
            n = len(asked)
            body = PAGE.format(token=token(n), keys="".join(KEY.format(name=name) for name in names(n))).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.MonkeyPatch.context() as env:
            facts = {"ENDPOINT": f"http://127.0.0.1:{server.server_port}", "ALLOW_HTTP": "true", "REGION": "r"}
            for name, value in (facts | {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s"}).items():
                env.setenv(f"AWS_{name}", value)
            yield asked
        server.shutdown()


def test_a_listing_that_repeats_itself_ends():
    names = [f"{i}" for i in range(100)]
    with (
        bucket_that(lambda n: names, lambda n: "again") as asked,
        pytest.raises(StoreError, match="tells the same names again and again"),
    ):
        list_objects(Objects("s3://bucket/models"))
    assert len(asked) <= 4


def test_a_listing_without_end_ends():
    with (
        bucket_that(lambda n: [f"{n}-{i}" for i in range(1000)], lambda n: f"t{n}") as asked,
        pytest.raises(StoreError, match="more than 100,000 objects"),
    ):
        list_objects(Objects("s3://bucket/models"))
    assert len(asked) <= 110


def test_empty_pages_without_end_end():
    "There is no name to count, so the time ends it; and nothing is asked afterwards."
    with bucket_that(lambda n: [], lambda n: f"t{n}") as asked:
        with pytest.raises(StoreError, match="did not come to an end within 1 s"):
            list_objects(Objects("s3://bucket/models"), seconds=1)
        before = len(asked)
        with pytest.raises(StoreError, match="did not come to an end"):
            list_objects(Objects("s3://bucket/models"), "another", seconds=0.5)
        assert all("another" in query for query in asked[before + 1 :])


def test_what_is_read_has_a_bound(tmp_path):
    "Also where a pointer is changed."
    store = ModelStore((tmp_path / "models").as_uri())
    publish(store, "BTC_USDT", CUTOFF)
    (tmp_path / "models" / "BTC_USDT" / "1h" / "champion.json").write_bytes(b" " * (2 << 20))
    for attack in (lambda: store.champion("BTC_USDT"), lambda: publish(store, "BTC_USDT", CUTOFF, mark=1)):
        with pytest.raises(StoreError, match="more than the 1,048,576 allowed"):
            attack()


def test_the_graph_before_it_was_spoiled_serves():
    assert open_graph(tiny_graph()).get_inputs()[0].shape[1] <= len(sample("BTC_USDT"))
