"""The model store under kill -9, races, damage and bad input (FAULTS.md F46-F49, F53, F59, F61, F62).

Run as a program (`python tests/test_model_store_faults.py`) this file is a small server that forks one child for each job on its standard
input: a child that is to be killed costs 20 ms, not the second that a new interpreter needs. KILL_ROUNDS sets the number of random kills.
"""

import base64
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import obstore
import pandas as pd
import pytest
from waiting import LONG

from make_us_rich.core import storage
from make_us_rich.core.secrets import shown
from make_us_rich.core.settings import MakeUsRichError, StoreError
from make_us_rich.market.candles import fake_candles
from make_us_rich.registry import manifest
from make_us_rich.registry.manifest import Manifest, draft_manifest, open_manifest, seal_manifest
from make_us_rich.registry.store import ModelStore

PAIR, START = "BTC_USDT", pd.Timestamp("2023-01-01", tz="UTC")
KILL_ROUNDS = int(os.environ.get("KILL_ROUNDS", "20"))
CRASH_POINTS = 20  # at least so many moments before and after calls that touch the disk has one publication
GRAPH = bytes(range(256)) * 400  # 100 kB: to a store a graph is bytes
WINDOW = fake_candles(840, start="2022-11-27")


def draft(hour: int, run_id: str = "", **changes) -> Manifest:
    "What a run would publish for the cut-off `hour` hours after the start of 2023."
    facts = {"cutoff": START + pd.Timedelta(hours=hour), "run_id": run_id or f"run-{hour}"}
    return draft_manifest(PAIR, WINDOW, **facts | changes)


def publish(url: str, hour: int, graph: bytes, run_id: str = "") -> str:
    "One run: publish and promote."
    store = ModelStore(url)
    version = store.publish(draft(hour, run_id), graph)
    store.promote(PAIR, version)
    return version


# ---- the server of children --------------------------------------------------------------------------------------------


def die_at(step: int) -> None:
    "Kill this process before (even) or after (odd) the n-th of all its calls that touch the disk."
    calls = [0]

    def wrapped(real):
        def call(*args, **kwargs):
            for moment in (0, 1):
                if 2 * calls[0] + moment == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                if moment == 0:
                    answer = real(*args, **kwargs)
            calls[0] += 1
            return answer

        return call

    for module, name in ((obstore, "put"), (os, "fsync"), (os, "replace"), (os, "open"), (os, "mkdir")):
        setattr(module, name, wrapped(getattr(module, name)))


def child(job: dict) -> dict:
    if "user" in job:
        os.setuid(job["user"])
    if "die_at" in job:
        die_at(job["die_at"])
    try:
        version, error = publish(job["url"], job["hour"], base64.b64decode(job["graph"]), job.get("run_id", "")), ""
    except MakeUsRichError as e:
        version, error = "", str(e)
    return {"version": version, "error": error}


def serve() -> None:
    for line in sys.stdin:
        answers, (gate, opener) = [], os.pipe()
        for job in json.loads(line):
            reading, writing = os.pipe()
            if (pid := os.fork()) == 0:
                os.close(opener)
                os.read(gate, 1)  # ends when the parent opens the gate: all are there
                os.write(writing, json.dumps(child(job)).encode())
                os._exit(0)
            os.close(writing)
            answers.append((pid, reading))
        os.close(opener)
        os.close(gate)
        for i, (pid, reading) in enumerate(answers):
            with os.fdopen(reading) as f:
                text = f.read()
            os.waitpid(pid, 0)
            answers[i] = json.loads(text) if text else None  # None: killed before it could answer
        print(json.dumps(answers), flush=True)


@pytest.fixture(scope="module")
def run():
    "run([job, ...]) -> [answer or None, ...]; the jobs of one call run side by side."
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # the helpers of tests/kits
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": paths}
    server = subprocess.Popen([sys.executable, __file__], **pipes)

    def ask(jobs: list[dict]) -> list[dict | None]:
        server.stdin.write(json.dumps(jobs) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield ask
    server.stdin.close()
    server.wait(LONG)


def job(url: str, hour: int, graph: bytes = b"", **more) -> dict:
    return {"url": url, "hour": hour, "graph": base64.b64encode(graph or GRAPH + bytes([hour % 251])).decode()} | more


@pytest.fixture
def url(tmp_path) -> str:
    return (tmp_path / "models").as_uri()


def path_of(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def sound_version(url: str, allowed: set[str]) -> str:
    "The champion, loaded strictly; it must be one of `allowed`, and every byte must be right."
    bundle = ModelStore(url).load(PAIR)
    assert bundle.version in allowed and bundle.model.startswith(GRAPH)
    return bundle.version


# ---- kill -9 -----------------------------------------------------------------------------------------------------------


def test_many_kills_in_a_row(run, url):
    "What one killed run leaves is in the way of none that follow, and a tidy folder is left at the end."
    old, seen, dice = publish(url, 3, GRAPH + b"\3"), Counter(), random.Random(1)
    for hour in range(4, 4 + KILL_ROUNDS):
        answer = run([job(url, hour, die_at=dice.randrange(2 * CRASH_POINTS))])[0]  # every second one lives
        new = max(i.version for i in ModelStore(url).versions(PAIR)) if answer is None else answer["version"]
        served = sound_version(url, {old, new})
        seen["new" if served == new != old else "old"] += 1
        seen["left unfinished"] += any(i.problem for i in ModelStore(url).versions(PAIR))
        again = run([job(url, hour)])[0]
        assert again["error"] == "" and sound_version(url, {again["version"]}), again
        assert [i.manifest.run_id for i in ModelStore(url).versions(PAIR) if i.manifest].count(f"run-{hour}") == 1
        old = again["version"]
    print(dict(seen))
    assert seen["old"] > KILL_ROUNDS / 10
    store = ModelStore(url, clock=lambda: pd.Timestamp.now("UTC") + pd.Timedelta("1D"))
    store.clean(keep=5)
    assert sound_version(url, {old}) and not [i for i in store.versions(PAIR) if i.problem]
    assert not [p for p in path_of(url).rglob("*") if "#" in p.name or p.name.endswith(".tmp")]


def test_kill_at_every_step(run, url):
    "Death before and after every call that touches the disk: the champion is old or new, and the same run comes through afterwards."
    old, step, seen = run([job(url, 0)])[0]["version"], 0, Counter()
    while True:
        hour = step + 1
        answer = run([job(url, hour, die_at=step)])[0]
        new = answer["version"] if answer else max(i.version for i in ModelStore(url).versions(PAIR))
        seen["new" if sound_version(url, {old, new}) == new != old else "old"] += 1
        if answer is not None:
            break
        old = run([job(url, hour)])[0]["version"]
        sound_version(url, {old})
        step += 1
    print(f"{step} crash points:", dict(seen))
    assert step >= CRASH_POINTS and seen["old"] >= 10 and seen["new"] >= 2


def can_trace() -> bool:
    command = ["strace", "-f", "-o", "/dev/null", "true"]
    return bool(shutil.which("strace")) and subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(
    not can_trace(), reason="strace is not installed or may not trace; the crash points between calls are covered above"
)
@pytest.mark.parametrize("call", ["linkat", "unlink", "rename"])
def test_kill_inside_the_object_store(call, url):
    "Death at the system calls inside one write of obstore, and at our own rename."
    code = "import sys, test_model_store_faults as t; t.publish(sys.argv[1], int(sys.argv[2]), t.GRAPH + sys.argv[2].encode())"
    old, died = publish(url, 0, GRAPH), 0

    def start(hour: int, *prefix: str) -> int:
        command = [*prefix, sys.executable, "-c", code, url, str(hour)]
        return subprocess.run(command, cwd=Path(__file__).parent, check=False, capture_output=True).returncode

    for n in range(1, 4 if call != "rename" else 2):
        code_of_exit = start(n, "strace", "-f", "-o", "/dev/null", "-e", f"inject={call}:signal=KILL:when={n}")
        died += code_of_exit != 0
        new = max(i.version for i in ModelStore(url).versions(PAIR))
        sound_version(url, {old, new})
        old = publish(url, n, GRAPH + str(n).encode())
        sound_version(url, {old})
    assert died >= 1


# ---- races -------------------------------------------------------------------------------------------------------------


def test_eight_racers_with_one_run(run, url):
    for hour in range(10):
        answers = run([job(url, hour, GRAPH + bytes([i]), run_id=f"race-{hour}") for i in range(8)])
        told = {a["version"] for a in answers}
        assert len(told) == 1 and not any(a["error"] for a in answers), answers
        published = [
            i.version for i in ModelStore(url).versions(PAIR) if i.manifest and i.manifest.run_id == f"race-{hour}"
        ]
        assert published == list(told) and sound_version(url, told)


def test_racers_with_different_cut_offs(run, url):
    for block in range(0, 40, 8):
        answers = run([job(url, hour) for hour in range(block, block + 8)])
        newest = f"{START + pd.Timedelta(hours=block + 7):%Y%m%dT%H%M%SZ}"
        assert ModelStore(url).load(PAIR).version.startswith(newest)
        refused = [a["error"] for a in answers if a["error"]]
        assert all(
            "has an older cut-off than the champion" in e and "mkrich rollback BTC_USDT" in e for e in refused
        ), refused


def test_racers_in_memory():
    "The same two races where the backend has the conditional write, and no lock is taken."
    store = ModelStore("memory:///")

    def one(i: int) -> tuple[str, str, str]:
        same = store.publish(draft(0, "same"), GRAPH + bytes([i]))
        own = store.publish(draft(i + 1), GRAPH + bytes([i]))
        try:
            store.promote(PAIR, own)
        except StoreError as e:
            return same, own, e.reason
        return same, own, "promoted"

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(8)))
    assert len({same for same, _, _ in answers}) == 1
    assert {word for _, _, word in answers} <= {"promoted", "older_cutoff"}
    assert [i.manifest.run_id for i in store.versions(PAIR) if i.manifest].count("same") == 1
    assert store.load(PAIR).version == answers[-1][1]


def test_server_that_ignores_conditions(monkeypatch):
    real = obstore.put
    monkeypatch.setattr(storage.obs, "put", lambda store, key, data, mode="overwrite": real(store, key, data))
    with pytest.raises(
        StoreError, match="ignores conditional writes, so two publishers could overwrite each other; use another server"
    ):
        ModelStore("memory:///").publish(draft(0), GRAPH)


# ---- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(url):
    "A store with two versions: (store, the champion's folder, the version before it)."
    before, champion = publish(url, 1, GRAPH + b"1"), publish(url, 2, GRAPH + b"2")
    return ModelStore(url), path_of(url) / PAIR / "1h" / champion, before


def refused(store: ModelStore, folder: Path, before: str) -> str:
    "Assert that the champion is not loaded and the version before is sound; returns the sentence."
    with pytest.raises(
        StoreError, match=r"^version .* of BTC_USDT cannot be used: .*; run `mkrich rollback BTC_USDT` to serve"
    ) as e:
        store.load(PAIR)
    assert "\n" not in str(e.value) and len(str(e.value)) < 300, e.value
    assert folder.name in str(e.value) and store.load(PAIR, before).version == before
    return str(e.value)


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
def test_truncated(two, name):
    store, folder, before = two
    whole = (folder / name).read_bytes()
    for cut in np.linspace(0, len(whole) - 1, 100).astype(int):
        (folder / name).write_bytes(whole[:cut])
        refused(store, folder, before)
        with pytest.raises(StoreError, match="cannot be used"):
            store.load(PAIR, version=folder.name)
    (folder / name).write_bytes(whole)
    assert store.load(PAIR).version == folder.name


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
def test_one_bit_flipped(two, name):
    store, folder, before = two
    whole, dice = (folder / name).read_bytes(), random.Random(2)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        (folder / name).write_bytes(damaged)
        refused(store, folder, before)
        with pytest.raises(
            StoreError, match="cannot be used"
        ):  # named directly there is no pointer to vouch for it: the seal does
            store.load(PAIR, version=folder.name)


def test_files_missing(two):
    store, folder, before = two
    (folder / "model.onnx").unlink()
    assert "model.onnx is missing" in refused(store, folder, before)
    (folder / "manifest.json").unlink()
    assert "manifest.json is missing, so it was never finished" in refused(store, folder, before)


def reseal(folder: Path, **changes) -> None:
    "A manifest with other facts and a right seal: the work of somebody who knows how."
    facts = json.loads((folder / "manifest.json").read_bytes()) | changes | {"seal": ""}
    text = json.dumps(facts, indent=1, sort_keys=True)
    (folder / "manifest.json").write_text(text.replace('"seal": ""', f'"seal": "{manifest.sha256(text.encode())}"'))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loader": "pickle"}, "extra inputs are not permitted"),
        ({"files": {"../../x": {"sha256": "0" * 64, "size": 9}}}, "input should be 'model.onnx'"),
        (
            {"files": {"model.onnx": {"sha256": "0" * 64, "size": 9}}},
            "belongs to BTC_USDT 1h 20230101T020000Z-000000000000",
        ),
        ({"files": {"model.onnx": {"sha256": "0" * 64, "size": 1 << 40}}}, "less than or equal to 67108864"),
        ({"files": {}}, "names no model"),
        ({"pair": "ETH_USDT"}, "belongs to ETH_USDT"),
        ({"pair": "../../../etc"}, ""),
        ({"schema_version": 2}, "input should be 1"),
    ],
)
def test_forged_manifest(two, changes, words):
    store, folder, before = two
    reseal(folder, **changes)
    with pytest.raises(MakeUsRichError) as e:
        store.load(PAIR, version=folder.name)
    assert words in str(e.value)
    assert "the pointer says" in refused(store, folder, before)


def bytes_read() -> int:
    "What this process has read so far."
    return int(re.search(r"^rchar: (\d+)", Path("/proc/self/io").read_text(), re.M)[1])


def test_huge_object_is_refused_unread(two):
    store, folder, before = two
    with (folder / "model.onnx").open("wb") as f:
        f.truncate(2 << 30)
    before_reading = bytes_read()
    with pytest.raises(
        StoreError, match="has 2,147,483,648 bytes, more than the 67,108,864 allowed; it was not fetched"
    ) as e:
        store.load(PAIR)
    assert bytes_read() - before_reading < 1 << 20 and e.value.reason == "too_large"
    assert store.load(PAIR, before).version == before


def test_nothing_sound_is_left(two):
    store, folder, _ = two
    for path in folder.parent.glob("2*/model.onnx"):
        path.write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be used"):
        store.load(PAIR)
    with pytest.raises(StoreError, match="has no earlier champion to go back to"):
        store.rollback(PAIR)


def test_rollback_passes_over_a_damaged_version(two):
    store, folder, before = two
    third = publish(store.url, 3, GRAPH + b"3")
    (folder / "model.onnx").write_bytes(b"torn")
    assert store.rollback(PAIR) == before != third
    assert store.champion(PAIR).seq == 4


# ---- bad input ---------------------------------------------------------------------------------------------------------

BAD = [
    "../x",
    "..",
    "/etc/passwd",
    "a/b/c",
    "BTC_USDT/../..",
    "",
    " ",
    "\0",
    "ÄÖ_USDT",
    "𝔹TC_USDT",
    "B" * 300,
    "%2e%2e",
    "file:///x",
    ".",
]


@pytest.mark.parametrize("text", BAD)
def test_paths_never_leave_the_store(two, text):
    store, folder, _ = two
    outside = folder.parents[3]
    before = sorted(outside.rglob("*"))
    for call in (
        lambda: store.load(text),
        lambda: store.load(PAIR, text),
        lambda: store.load(PAIR, text),
        lambda: store.promote(PAIR, text),
        lambda: store.rollback(PAIR, to=text),
        lambda: store.versions(text),
    ):
        with pytest.raises(MakeUsRichError) as e:
            call()
        assert "\n" not in str(e.value) and len(str(e.value)) < 250
    with pytest.raises(ValueError, match="run_id"):
        draft(1, text or "-")
    assert sorted(outside.rglob("*")) == before


def test_read_only_folder(run):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        url, user = (
            (folder / "models").as_uri(),
            {"user": 65534} if os.geteuid() == 0 else {},
        )  # root may write anywhere: be nobody
        version = publish(url, 1, GRAPH)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() and user else 0o555 if path.is_dir() else 0o444)
        error = run([job(url, 2, **user)])[0]["error"]
        assert error.startswith(f"the model store {url} cannot be locked: ") and "Permission denied" in error
        assert error.endswith("check MUR_MODELS_URL, its rights and its disk")
        sound_version(url, {version})
        for path in folder.rglob("*"):
            path.chmod(0o755)


@pytest.mark.parametrize(
    "url",
    ["", "models", "ftp://host/x", "file://models", "file:///", "file:///proc/models", "file:///dev/null/x", "s3://"],
)
def test_broken_url(url):
    with pytest.raises(StoreError) as e:
        ModelStore(url).load(PAIR)
    assert str(e.value).startswith(f"the model store {shown(url)} cannot be opened: ") and "\n" not in str(e.value), (
        e.value
    )
    assert "check MUR_MODELS_URL" in str(e.value)


def test_unreachable_bucket(monkeypatch):
    keys = {
        "AWS_ENDPOINT": "http://127.0.0.1:9",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "SECRETKEY",
    }
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        StoreError, match=r"the model store s3://bucket/models cannot be read: .*; check MUR_MODELS_URL"
    ) as e:
        ModelStore("s3://bucket/models").load(PAIR)
    assert "\n" not in str(e.value) and "SECRETKEY" not in str(e.value)


def test_no_pickle_is_opened(two):
    "Other files in a version's folder are never looked at."
    store, folder, _ = two
    (folder / "model.pkl").write_bytes(b"\x80\x04cos\nsystem\n")
    (folder / "model.ckpt").write_bytes(b"PK")
    assert store.load(PAIR).version == folder.name


def test_seal_covers_every_byte():
    sealed = seal_manifest(draft(1), GRAPH)
    for position in range(0, len(sealed), 7):
        with pytest.raises(ValueError, match="manifest"):
            open_manifest(sealed[:position] + bytes([sealed[position] ^ 1]) + sealed[position + 1 :])


if __name__ == "__main__":
    serve()
