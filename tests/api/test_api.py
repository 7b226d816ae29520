"""The API among people, programs and troubles (FAULTS D and F): in-process where that shows it, else in real server processes."""

import asyncio
import json
import os
import socket
import sqlite3
import stat
import threading

import httpx
import pandas as pd
import pytest
from api_kit import burst, make_world, served
from servers import database_url, postgresql  # noqa: F401
from sqlalchemy import text
from tiny_model import publish, sample
from waiting import LONG, wait_for

from make_us_rich.api import limits
from make_us_rich.api.accounts import create_token, get_user, list_users
from make_us_rich.api.app import create_app
from make_us_rich.api.client import Client
from make_us_rich.api.examples import NOW, PASSWORD, a_forecast, add_people
from make_us_rich.api.limits import STREAM
from make_us_rich.api.stream import read_news
from make_us_rich.core.database import connect, migrate, session
from make_us_rich.core.settings import SettingsError, get_settings, utc_iso
from make_us_rich.market.candles import SAMPLE_LABEL
from make_us_rich.market.replay import ReplayServer
from make_us_rich.market.series import Series
from make_us_rich.registry.store import ModelStore
from make_us_rich.serving.events import Events
from make_us_rich.serving.forecast import Forecast


@pytest.fixture
def world(tmp_path):
    world = make_world(tmp_path / "home")
    yield world
    world.engine.dispose()


# --- tokens and quotas, in-process


def test_wrong_tokens_are_slowed_down_and_right_ones_are_not(world):  # F64
    tries = [world.client("wrong").get("/v1/me").status_code for _ in range(12)]
    assert tries == [401] * 10 + [429] * 2
    assert world.client("wrong").get("/v1/me").headers["retry-after"] == "60"
    assert world.client().get("/v1/me").status_code == 200  # same address
    world.ticks[0] += 60
    assert world.client("wrong").get("/v1/me").status_code == 401


def test_log_ins_are_slowed_down(world):
    tries = [
        world.client(None).post("/v1/login", json={"name": "ana", "password": f"guess number {n}"}).status_code
        for n in range(12)
    ]
    assert tries == [401] * 10 + [429] * 2
    words = {
        world.client(None).post("/v1/login", json={"name": name, "password": "x"}).json()["error"]
        for name in ("ana", "nobody")
    }
    assert words == {"too_many_tries"}
    world.ticks[0] += 60
    assert world.client(None).post("/v1/login", json={"name": "ana", "password": PASSWORD}).status_code == 200


def test_a_log_in_gives_a_token_that_lives_thirty_days(world):
    made = world.client(None).post("/v1/login", json={"name": "bob", "password": PASSWORD}).json()
    assert (made["expires_at"], world.client(made["token"]).get("/v1/me").json()["name"]) == (
        "2023-12-23T19:02:00Z",
        "bob",
    )


def test_a_revoked_token_ends_here_at_once_and_in_other_workers_within_a_second(world):  # F66
    ticks = [0.0]  # another worker: its own authenticator over the same database
    other = create_app(world.service, world.engine, world.settings, lambda: NOW, ticks=lambda: ticks[0])
    elsewhere = type(world)(world.settings, world.engine, world.service, other, world.tokens, ticks)
    made = world.client().post("/v1/me/tokens", json={"name": "watch"}).json()
    assert elsewhere.client(made["token"]).get("/v1/me").status_code == 200
    world.client().delete(f"/v1/me/tokens/{made['id']}")
    assert world.client(made["token"]).get("/v1/me").status_code == 401
    codes = []
    for seconds in (0.0, 0.9, 1.0):
        ticks[0] = seconds
        codes.append(elsewhere.client(made["token"]).get("/v1/me").status_code)
    assert codes == [200, 200, 401]
    assert world.client("admin").put("/v1/users/bob", json={"disabled": True}).json()["disabled"] is True
    assert world.client().get("/v1/me").status_code == 401


def test_nobody_sees_or_ends_the_tokens_of_others(world):
    mine, theirs = (world.client(who).get("/v1/me/tokens").json()["tokens"] for who in ("member", "admin"))
    assert {t["id"] for t in mine}.isdisjoint(t["id"] for t in theirs)
    assert world.client().delete(f"/v1/me/tokens/{theirs[0]['id']}").json()["error"] == "unknown_token"
    assert world.client("admin").delete(f"/v1/me/tokens/{mine[0]['id']}").status_code == 404


def test_the_month_ends_and_calls_come_back(tmp_path):  # F69
    time_ = [pd.Timestamp("2023-11-30T23:59:58Z")]
    world = make_world(tmp_path / "home", clock=lambda: time_[0])
    with session(world.engine) as s:
        s.execute(text("UPDATE users SET monthly_calls = 2"))
    codes = [world.client().get("/v1/forecasts").status_code for _ in range(3)]
    over = world.client().get("/v1/forecasts")
    assert codes == [200, 200, 429]
    assert (over.headers["retry-after"], over.json()["error"]) == ("3", "quota")
    assert world.client().get("/v1/me").json()["left"] == 0  # can still be looked up
    time_[0] += pd.Timedelta(seconds=int(over.headers["retry-after"]))
    assert world.client().get("/v1/forecasts").headers["x-calls-left"] == "1"
    world.engine.dispose()


def test_our_faults_are_not_charged(world, monkeypatch):  # F70
    class Broken(dict):
        def get(self, *_):
            raise RuntimeError("no such file: /srv/secret/model.onnx, password=hunter2")

        __contains__ = values = get

    monkeypatch.setattr(world.service, "states", Broken())
    answer = world.client().get("/v1/forecasts/BTC_USDT")
    assert (answer.status_code, world.used()) == (500, 0)
    assert "/srv" not in answer.text and "hunter2" not in answer.text and "Traceback" not in answer.text  # F81
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    monkeypatch.undo()
    world.client().get("/v1/forecasts/BTC_USDT")
    assert world.used() == 1


def test_not_yet_is_a_documented_503_and_free(world):
    world.service.states[Series.parse("BTC_USDT")].answering.answer = None
    answer = world.client().get("/v1/forecasts/BTC_USDT")
    assert (answer.status_code, answer.json()["error"], answer.headers["retry-after"], world.used()) == (
        503,
        "no_forecast",
        "5",
        0,
    )


@pytest.mark.parametrize("harm", ["locked", "read_only", "damaged"])
def test_no_free_calls_while_the_database_is_in_trouble(tmp_path, harm):  # F79
    world = make_world(tmp_path / "home", wait=0.1)
    file = tmp_path / "home" / "mkrich.db"
    holder = sqlite3.connect(file, isolation_level=None)
    if harm == "locked":
        holder.execute("BEGIN EXCLUSIVE")
    elif harm == "read_only":
        holder.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        world.engine.dispose()
        unwritable = connect(f"sqlite:///file:{file}?mode=ro&uri=true", wait=0.1)
        world.api.authenticator.engine = world.api.authenticator.leases.engine = unwritable
    else:
        holder.close()
        world.engine.dispose()
        file.write_bytes(b"SQLite format 3\0" + os.urandom(8192))
        for extra in ("-wal", "-shm"):
            file.with_name(file.name + extra).unlink(missing_ok=True)
    answer = world.client().get("/v1/forecasts/BTC_USDT")
    word = "database_busy" if harm == "locked" else "database"
    assert (answer.status_code, answer.json()["error"], answer.headers["retry-after"]) == (503, word, "5")
    assert str(tmp_path) not in answer.text and "sqlite" not in answer.text.lower()
    assert world.client(None).get("/healthz").status_code == 200
    world.engine.dispose()


# --- odd input


@pytest.mark.parametrize(
    "typed",
    [
        "DOGE_USDT",
        "btc",
        "x" * 300,
        "..%2f..%2fetc%2fpasswd",
        "' OR 1=1--",
        "BTC_USDT%00",
        "%F0%9F%92%A9",
        "BTC_USDT%0A",
        "${jndi:x}",
        "BTC%2FUSDT",
        "%C0%AE",
    ],
)
def test_odd_pairs(world, typed):  # F62, F72
    for path in ("/v1/forecasts/", "/v1/candles/", "/v1/track-record/", "/v1/models/"):
        assert world.client().get(path + typed).status_code in (404, 422)
    answer = world.client("admin").post(f"/v1/models/{typed}/rollback", json={"reason": "x"})
    assert answer.status_code in (404, 422)
    assert sorted(p.name for p in world.settings.home.glob("candles/*")) in ([], ["BTC_USDT"])


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/v1/candles/BTC_USDT?hours=" + "9" * 24, {}, 422),
        ("GET", "/v1/candles/BTC_USDT?hours=-1", {}, 422),
        ("DELETE", "/v1/me/tokens/" + "9" * 24, {}, 422),
        ("POST", "/v1/me/tokens", {"json": {"name": "a\x00b"}}, 422),
        (
            "POST",
            "/v1/me/tokens",
            {"content": b'{"name": "\\ud800"}', "headers": {"content-type": "application/json"}},
            422,
        ),
        ("POST", "/v1/me/tokens", {"json": {"name": "phone", "role": "admin"}}, 422),
        ("POST", "/v1/me/tokens", {"json": {"name": "phone", "days": 10**24}}, 422),
        ("POST", "/v1/me/tokens", {"content": b"[" * 5000, "headers": {"content-type": "application/json"}}, 400),
        (
            "POST",
            "/v1/me/tokens",
            {"content": b"{" + b" " * 20_000 + b"}", "headers": {"content-type": "application/json"}},
            413,
        ),
        ("PUT", "/predict", {"params": {"currency": "b'c", "compare": "usdt"}}, 422),
        ("PUT", "/predict", {"params": {"currency": "btc"}}, 422),
        ("GET", "/v1/forecasts", {"headers": {"x-padding": "y" * 100_000}}, 431),
        ("PATCH", "/v1/me", {}, 405),
        ("GET", "/v1/me/", {}, 404),
        (
            "POST",
            "/v1/login",
            {
                "content": b'{"name": "ana", "password": "\\ud800\\ud800\\ud800"}',
                "headers": {"content-type": "application/json"},
            },
            422,
        ),
    ],
)
def test_odd_calls(world, method, path, options, status):  # F73
    answer = world.client().request(method, path, **options)
    assert (answer.status_code, answer.json().keys()) == (status, {"error", "message", "request_id"})


def test_the_sender_alone_decides_nothing(world):
    answer = world.client(None, **{"X-Request-ID": "mur_AbCdEfGhIjKl\n"}).get("/healthz")
    assert "mur_" not in answer.headers["x-request-id"]
    foreign = world.client(Origin="https://evil.example", **{"Access-Control-Request-Method": "GET"})
    for answer in (foreign.get("/v1/forecasts"), foreign.options("/v1/forecasts")):  # F80
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_model_that_yields_nonsense_is_valid_json(world):  # F74
    def strict(name):
        raise AssertionError(name)

    world.show(a_forecast(median=float("nan"), quantiles={0.5: float("inf")}))
    json.loads(world.client().get("/v1/forecasts/BTC_USDT").content, parse_constant=strict)
    refused = a_forecast(
        status="abstain",
        reason="model_output_invalid",
        sentence="the model gave prices that are not finite",
        median=None,
        quantiles={},
        p_up=None,
    )
    world.show(refused)
    answer = world.client().get("/v1/forecasts/BTC_USDT")
    assert (answer.status_code, answer.json()["reason"]) == (
        200,
        "model_output_invalid",
    )  # "I do not know" is a normal answer


def test_metrics_are_for_this_machine_and_admins(world):
    asyncio_client = httpx.ASGITransport(world.app, client=("127.0.0.1", 1))

    async def get(**headers):
        async with httpx.AsyncClient(transport=asyncio_client, base_url="http://127.0.0.1") as client:
            return (await client.get("/metrics", headers=headers)).status_code

    assert asyncio.run(get()) == 200
    assert asyncio.run(get(**{"X-Forwarded-For": "203.0.113.9"})) == 401  # through a front door on this machine


# --- answers


def test_etags(world):
    first = world.client().get("/v1/forecasts/BTC_USDT")
    tag = first.headers["etag"]
    codes = [
        world.client(**{"If-None-Match": sent}).get("/v1/forecasts/BTC_USDT").status_code
        for sent in (tag, f"W/{tag}", f'"x", {tag}', "*", '"x"', b"\xff")
    ]
    assert codes == [304, 304, 304, 304, 200, 200]
    assert first.headers["cache-control"] == "private, max-age=3479"  # 58 minutes to the close
    world.show(a_forecast(median=37_001.0))
    assert world.client(**{"If-None-Match": tag}).get("/v1/forecasts/BTC_USDT").json()["median"] == 37_001.0


def test_docs_load_nothing_from_elsewhere(world):
    page = world.client(None).get("/docs").text
    assert not [
        word for word in ("<script", "<link", "<img", "url(", "@import", "https://", "http://cdn") if word in page
    ]
    schema = world.client(None).get("/openapi.json").json()
    route = schema["paths"]["/v1/forecasts/{pair}"]["get"]
    assert route["parameters"][0]["schema"]["examples"] == ["BTC_USDT"]
    Forecast.model_validate(route["responses"]["200"]["content"]["application/json"]["example"])


def test_a_busy_service_says_so(tmp_path):  # F77
    world = make_world(tmp_path / "home", most=2)
    hold, arrived = threading.Event(), []

    def slow(*_):
        arrived.append(1)
        hold.wait(LONG)
        return b"{}"

    world.service.record_body = slow
    callers = [threading.Thread(target=lambda: world.client().get("/v1/track-record")) for _ in range(2)]
    for caller in callers:
        caller.start()
    wait_for(lambda: len(arrived) == 2)
    answer = world.client().get("/v1/forecasts")
    assert (answer.status_code, answer.headers["retry-after"], answer.json()["error"]) == (503, "1", "busy")
    assert world.client(None).get("/healthz").status_code == 200
    hold.set()
    for caller in callers:
        caller.join()
    assert world.client().get("/v1/forecasts").status_code == 200
    world.engine.dispose()


# --- the stream


async def a_stream():
    events, welcome = Events(), [True]
    reader = events.subscribe()

    async def still_welcome():
        return welcome[0]

    heard = read_news(reader, still_welcome, heartbeat=0.01)
    assert [(await anext(heard)).retry, (await anext(heard)).comment] == [5000, "still here"]
    events.send("forecast", NOW, "BTC_USDT", "1h", {"x": 1})
    while not (news := await anext(heard)).event:
        pass
    assert (news.event, news.id, json.loads(news.raw_data)["data"]) == ("forecast", "1", {"x": 1})
    welcome[0] = False  # its token is revoked
    assert [news async for news in heard] == []


def test_a_stream_from_hello_to_the_end():
    asyncio.run(asyncio.wait_for(a_stream(), 60))


def test_a_stream_lasts_an_hour():
    async def hear():
        ticks = [0.0]

        async def still_welcome():
            return True

        heard = read_news(Events().subscribe(), still_welcome, heartbeat=0.01, ticks=lambda: ticks[0])
        first = [await anext(heard) for _ in range(3)]
        ticks[0] = 3600.0
        return len(first), [news async for news in heard]

    assert asyncio.run(asyncio.wait_for(hear(), 60)) == (3, [])


def test_one_fan_out_of_news(world):
    "A thread beside the API and a caller on the line are readers of the same events, which end for both."
    events = world.service.events
    inside, heard = events.subscribe(), []

    def tell():
        wait_for(lambda: len(events.readers) == 2, what="the caller")
        events.send("model", NOW, "BTC_USDT", "1h")
        wait_for(lambda: not events.readers[1].waiting, what="the caller to read")
        heard.append(inside.get(0))
        events.close()

    teller = threading.Thread(target=tell)
    teller.start()
    lines = world.client().get(STREAM).text.splitlines()
    teller.join()
    assert f"id: {heard[0].id}" in lines and "event: model" in lines
    assert inside.over and inside.get() is None
    assert events.readers == (inside,)


@pytest.mark.parametrize("client", ["leaves", "takes nothing"])
def test_a_client_that_is_gone_leaves_nothing(world, monkeypatch, client):
    monkeypatch.setattr(limits, "SEND_SECONDS", 0.05)
    headers = [(b"authorization", f"Bearer {world.tokens['member']}".encode())]
    scope = {
        "type": "http",
        "method": "GET",
        "path": STREAM,
        "raw_path": STREAM.encode(),
        "query_string": b"",
        "headers": headers,
    }
    events, taken = world.service.events, []

    async def call():
        gone, never = asyncio.Event(), asyncio.Event()

        async def receive():
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.body":
                taken.append(len(events.readers))
                gone.set() if client == "leaves" else await never.wait()

        await world.app(scope, receive, send)

    if client == "leaves":
        asyncio.run(asyncio.wait_for(call(), 60))
    else:
        with pytest.raises(ExceptionGroup) as told:
            asyncio.run(asyncio.wait_for(call(), 60))
        assert told.group_contains(TimeoutError)
    assert taken[0] == 1 and events.readers == ()


def test_streams_are_bounded(world):
    for _ in range(world.service.events.most):
        world.service.events.subscribe()
    answer = world.client().get(STREAM)
    assert (answer.status_code, answer.headers["retry-after"], answer.json()["error"]) == (503, "60", "busy")
    assert world.used() == 0


# --- real processes


def connect_home(home, url=""):
    engine = connect(url or f"sqlite:///{home / 'mkrich.db'}")
    migrate(engine)
    return engine


def test_quota_is_exact_with_two_workers_and_32_connections(tmp_path, database_url):  # noqa: F811
    "F67, F68."
    engine = connect_home(tmp_path, database_url)
    now = pd.Timestamp.now("UTC")
    tokens = add_people(engine, now)
    with session(engine) as s:
        second, _ = create_token(s, get_user(s, "bob"), "second", now)
    (tmp_path / "home").mkdir()
    with served(tmp_path / "home", database_url=database_url, workers="2") as server:
        port = int(server.url.rsplit(":", 1)[1])

        async def both():
            return await asyncio.gather(
                burst(port, "/v1/forecasts", tokens["member"], 700, 16), burst(port, "/v1/forecasts", second, 700, 16)
            )

        answers = [answer for part in asyncio.run(both()) for answer in part]
        codes = [code for code, _ in answers]
        assert (codes.count(200), codes.count(429), len(codes)) == (1000, 400, 1400)
        month = pd.Timestamp(now.strftime("%Y-%m-01"), tz="UTC") + pd.DateOffset(months=1)
        waits = {int(headers["retry-after"]) for code, headers in answers if code == 429}
        assert (month - pd.Timestamp.now("UTC")).total_seconds() - 1 < min(waits) and max(waits) < (
            month - now
        ).total_seconds() + 1
        with session(engine) as s:
            assert s.execute(text("SELECT used FROM usage")).scalars().all() == [1000]
        metrics = httpx.get(f"{server.url}/metrics").text  # both workers together
        counts = [
            float(line.rsplit(" ", 1)[1])
            for line in metrics.splitlines()
            if line.startswith("mur_request_seconds_count") and '"/v1/forecasts"' in line
        ]
        assert sum(counts) == 1400
        assert server.stop() == 0
    engine.dispose()


def test_a_stop_answers_what_is_in_flight(tmp_path):  # F78
    (tmp_path / "home").mkdir()
    engine = connect_home(tmp_path / "home")
    token = add_people(engine, pd.Timestamp.now("UTC"))["member"]
    with session(engine) as s:
        s.execute(text("UPDATE users SET monthly_calls = 1000000"))
    with served(tmp_path / "home") as server:
        port = int(server.url.rsplit(":", 1)[1])
        torn, done, stop = [], [], threading.Event()

        def ask():
            with socket.create_connection(("127.0.0.1", port)) as link:
                while not stop.is_set():
                    try:
                        link.sendall(
                            f"GET /v1/forecasts HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
                        )
                        got = b""
                        while not got.endswith(b'{"forecasts":[]}'):
                            part = link.recv(65536)
                            if not part:
                                break
                            got += part
                    except OSError:
                        got = b""
                    (done if got.startswith(b"HTTP/1.1 200") and got.endswith(b"]}") else torn).append(got)
                    if not got.endswith(b"]}"):
                        return

        threads = [threading.Thread(target=ask) for _ in range(8)]
        stream = socket.create_connection(("127.0.0.1", port))
        stream.sendall(f"GET /v1/stream HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
        for thread in threads:
            thread.start()
        wait_for(lambda: len(done) >= 100, progress=lambda: len(done))
        assert server.stop() == 0  # although a stream is open
        stop.set()
        for thread in threads:
            thread.join(LONG)
        assert torn == [got for got in torn if got == b""], (
            "an answer was cut"
        )  # a connection may close between answers, never inside one
        news = b"".join(iter(lambda: stream.recv(65536), b""))
        assert news.startswith(b"HTTP/1.1 200") and news.endswith(b"\r\n0\r\n\r\n"), news[-200:]  # ended, not cut
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), timeout=LONG)
    engine.dispose()


def test_local_mode_and_its_end(tmp_path):  # F94, F100
    home = tmp_path / "home"
    home.mkdir()
    with served(home) as server:
        file = home / "local-token"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert "local mode" in server.said.read_text() and file.read_text() not in server.said.read_text()
        assert (
            httpx.get(f"{server.url}/v1/me", headers={"Authorization": f"Bearer {file.read_text()}"}).json()["role"]
            == "admin"
        )
        assert httpx.get(f"{server.url}/v1/me").status_code == 401
        readiness = httpx.get(f"{server.url}/readyz")
        assert (readiness.status_code, readiness.json()["error"]) == (
            503,
            "not_ready",
        )  # F55: no store, no model, alive
        assert server.stop() == 0
    with (
        pytest.raises(
            AssertionError, match=r"others can reach 0.0.0.0, so at least one user .* make one with: mkrich users add"
        ),
        served(home, host="0.0.0.0"),
    ):
        pass


def test_slow_and_idle_sockets_harm_nobody(tmp_path):  # F73, F82
    (tmp_path / "home").mkdir()
    with served(tmp_path / "home") as server:
        port = int(server.url.rsplit(":", 1)[1])
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
        for link in idle[::2]:
            link.sendall(b"GET /v1/me HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
        answers = [httpx.get(f"{server.url}{path}", timeout=LONG).status_code for path in ("/healthz", "/v1/me")]
        assert answers == [200, 401]  # and all of the others are still waiting

        def raw(data: bytes) -> bytes:
            with socket.create_connection(("127.0.0.1", port), timeout=LONG) as link:
                link.sendall(data)
                return link.recv(4096)

        login = b"POST /v1/login HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        odd = [
            b"GET /\x00 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
            b"GET /v1/\xff\xfe HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"GET /v1/me HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
            login + b"Content-Length: 1000000\r\n\r\n{",
            login + b"Transfer-Encoding: chunked\r\n\r\n",
            login + b"Content-Length: -1\r\n\r\n",
            b"GET /v1/me HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
        ]
        for data in odd:
            assert raw(data).split(b" ")[1][:1] == b"4", data[:60]
        assert httpx.get(f"{server.url}/healthz", timeout=LONG).status_code == 200
        for link in idle:
            link.close()
        assert "Traceback" not in server.log.read_text()


def test_secrets_are_nowhere(tmp_path, postgresql):  # noqa: F811
    "F65, F81, F95."
    url = postgresql.new_database()
    engine = connect_home(tmp_path, url)
    tokens = add_people(engine, pd.Timestamp.now("UTC"))
    (tmp_path / "home").mkdir()
    canaries = {"AWS_SECRET_ACCESS_KEY": "canary-aws-0123456789", "WANDB_API_KEY": "canary-wandb-0123456789"}
    pages = []
    with served(tmp_path / "home", database_url=url, **canaries) as server:

        def call(method, path, token=None, **options):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            pages.append(httpx.request(method, server.url + path, headers=headers, timeout=LONG, **options).text)

        member = tokens["member"]
        call("GET", f"/v1/forecasts?token={member}")
        call("GET", f"/v1/forecasts/{member}", member)
        call("GET", f"/{member}", member)
        call("GET", f"/v1/me#{member}", member)
        call("PUT", "/predict", member, params={"currency": member[:20], "compare": "usdt"})
        call("POST", "/v1/login", json={"name": "bob", "password": PASSWORD, "extra": PASSWORD})
        call("POST", "/v1/login", json={"name": PASSWORD, "password": PASSWORD})
        call("POST", "/v1/login", json={"name": "bob", "password": PASSWORD + "!"})
        call("POST", "/v1/me/tokens", member, json={"name": member})
        call("POST", "/v1/users", tokens["admin"], json={"name": "dan", "password": "another good password"})
        call("GET", "/v1/users", tokens["admin"])
        for path in (
            "/v1/forecasts",
            "/v1/models",
            "/v1/track-record",
            "/v1/me/tokens",
            "/metrics",
            "/docs",
            "/openapi.json",
        ):
            call("GET", path, member)
        call("GET", "/v1/me", tokens["wrong"])
        with session(engine) as s:
            s.execute(text("ALTER TABLE usage RENAME TO gone"))  # a fault of ours, deep inside
        call("GET", "/v1/me", member)
        assert '"error":"database"' in pages[-1]
        dump = ""
        with session(engine) as s:
            s.execute(text("ALTER TABLE gone RENAME TO usage"))
            for table in ("users", "tokens", "usage", "audit"):
                dump += str(s.execute(text(f"SELECT * FROM {table}")).all())
        assert len(list_users_of(engine)) == 4
    secrets = [
        member,
        tokens["admin"],
        tokens["wrong"],
        PASSWORD,
        "another good password",
        postgresql.password,
        *canaries.values(),
    ]
    places = {
        "log": server.log.read_text(),
        "said": server.said.read_text(),
        "pages": "\n".join(pages),
        "database": dump,
    }
    found = [(place, secret[:12]) for place, content in places.items() for secret in secrets if secret in content]
    assert found == [] and str(tmp_path) not in places["pages"]
    lines = [json.loads(line) for line in places["log"].splitlines()]
    assert {line["event"] for line in lines if line.get("route") == "/v1/login"} == {"request"}
    assert all("timestamp" in line for line in lines)
    engine.dispose()


def list_users_of(engine):
    with session(engine) as s:
        return list_users(s)


def test_from_a_published_model_to_a_client(tmp_path, monkeypatch):
    "The whole way, in processes: exchange, store, service, API, client; a new champion is news, and a rollback works."
    frame = sample("BTC_USDT")
    closed, home = frame["timestamp"].iloc[3000] + pd.Timedelta("1h"), tmp_path / "home"
    with ReplayServer({"BTC_USDT": frame}, now=closed + pd.Timedelta("5s"), label=SAMPLE_LABEL) as exchange:
        store = ModelStore.of(get_settings(home=home), exchange.clock.now)
        first = publish(store, "BTC_USDT", closed - pd.Timedelta("3h"))
        with served(home, exchange_url=exchange.url, poll_seconds="0.3") as server:
            client = Client(server.url, (home / "local-token").read_text())
            wait_for(lambda: httpx.get(f"{server.url}/readyz", timeout=LONG).status_code == 200, what="a ready service")
            forecast = client.forecast("btc-usdt")
            assert (forecast.status, forecast.model_version, forecast.as_of, forecast.label) == (
                "ok",
                first,
                utc_iso(closed),
                SAMPLE_LABEL,
            )
            assert client.candles("BTC_USDT", 24)["timestamp"].iloc[-1] + pd.Timedelta("1h") == closed  # no open candle
            assert client.track_record("BTC_USDT")["n"] == 0
            with pytest.raises(SettingsError, match="has no earlier champion"):
                client.rollback("BTC_USDT", "too narrow")
            calls, used = len(exchange.calls), client.me()["used"]
            news = client.stream()

            def publish_when_somebody_listens():
                with Client(server.url, (home / "local-token").read_text()) as other:
                    wait_for(lambda: other.me()["used"] > used)
                publish(store, "BTC_USDT", closed - pd.Timedelta("2h"), mark=1)

            threading.Thread(target=publish_when_somebody_listens).start()
            told = next(news)
            assert (told.kind, told.data["from_version"]) == ("model", first)
            news.close()
            assert client.models()[0]["version"] == told.data["to_version"]
            assert client.forecast("BTC_USDT") == forecast  # this hour's answer stays
            assert client.rollback("BTC_USDT", "too narrow") == first
            assert client.update_models() == ["BTC_USDT"]
            assert (len(exchange.calls), client.me()["used"]) == (
                calls,
                used + 2,
            )  # the stream and the forecast; no exchange call
            assert 'mur_inference_seconds_count{pair="BTC_USDT"}' in httpx.get(f"{server.url}/metrics").text
            client.close()
            assert server.stop() == 0
    engine = connect(f"sqlite:///{home / 'mkrich.db'}")
    with session(engine) as s:
        assert s.execute(text("SELECT actor, target FROM audit WHERE action = 'model.rollback'")).all() == [
            ("local", "BTC_USDT")
        ]
    engine.dispose()
