"""One stranger or one member who takes all they can: everybody else is served, and what is given back can be taken again."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from api_kit import Served, make_world, served_people
from waiting import LONG

from make_us_rich.api.accounts import create_token, get_user
from make_us_rich.api.examples import NOW, PASSWORD
from make_us_rich.api.limits import STREAM
from make_us_rich.core.database import session

LOG_IN = {"name": "bob", "password": PASSWORD}


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> tuple[Served, dict[str, str]]:
    "A real server, and tokens."
    with served_people(tmp_path_factory.mktemp("starving") / "home") as server:
        yield server


@contextlib.contextmanager
def unfinished(server: Served, number: int, token: str = "") -> Iterator[list[socket.socket]]:
    "Connections that promise a body of 100 bytes and send one."
    head = f"POST /v1/login HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n{token}\r\n" + "{"
    port = int(server.url.rsplit(":", 1)[1])
    links = [socket.create_connection(("127.0.0.1", port), timeout=LONG) for _ in range(number)]
    for link in links:
        link.sendall(head.encode())
    yield links
    for link in links:
        link.close()


def test_unfinished_bodies_leave_everybody_served(people):
    "Sixty-four strangers' bodies, and as many again: calls with and without a body are answered meanwhile."
    server, tokens = people
    with unfinished(server, 64), unfinished(server, 64, f"Authorization: Bearer {tokens['member']}\r\n"):
        for _ in range(5):
            mine = httpx.get(
                f"{server.url}/v1/me", headers={"Authorization": f"Bearer {tokens['admin']}"}, timeout=LONG
            )
            assert (mine.status_code, mine.json()["name"]) == (200, "ana")
            assert httpx.post(f"{server.url}/v1/login", json=LOG_IN, timeout=LONG).status_code == 200
            assert httpx.get(f"{server.url}/readyz", timeout=LONG).json()["error"] == "not_ready"


def test_a_slow_body_is_ended_in_words(people):
    server, _ = people
    with unfinished(server, 1) as (link,):
        answer = b"".join(iter(lambda: link.recv(4096), b""))  # until it is closed
    assert answer.startswith(b"HTTP/1.1 408") and b"retry-after: 1" in answer and b'"slow_body"' in answer


def scope_of(path: str, token: str, address: str) -> dict:
    headers = [(b"authorization", f"Bearer {token}".encode())] if token else []
    facts = {"raw_path": path.encode(), "query_string": b"", "headers": headers, "client": (address, 1)}
    return {"type": "http", "method": "GET", "path": path, **facts}


class Line:
    "A call that stays open until it is told to end; `status` is what it was answered."

    def __init__(self, app, path: str, token: str = "", address: str = "127.0.0.1") -> None:
        self.status, self.begun, self.gone = 0, asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(app(scope_of(path, token, address), self._receive, self._send))

    async def _receive(self) -> dict:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict) -> None:
        self.status = self.status or message.get("status", 0)
        self.begun.set()

    async def answered(self) -> int:
        await asyncio.wait_for(self.begun.wait(), LONG)
        return self.status

    async def end(self) -> None:
        self.gone.set()
        await asyncio.wait_for(self.task, LONG)


@pytest.fixture
def world(tmp_path):
    world = make_world(tmp_path / "home", heartbeat=0.05)
    world.limit_calls("bob", 10_000)
    yield world
    world.engine.dispose()


def tokens_of(world, name: str, number: int) -> list[str]:
    with session(world.engine) as s:
        return [create_token(s, get_user(s, name), f"t{n}", NOW)[0] for n in range(number)]


async def _streams(app, tokens: list[str], addresses: list[str], number: int) -> list[Line]:
    lines = []
    for n in range(number):
        lines.append(Line(app, STREAM, tokens[n % len(tokens)], addresses[n % len(addresses)]))
        await lines[-1].answered()
    return lines


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["203.0.113.9"], [f"203.0.113.{n}" for n in range(40)]])
def test_one_member_with_200_streams_leaves_places(world, addresses):
    "With several tokens, from one address and from many: fifty open, the rest are refused in words and not counted."
    tokens = tokens_of(world, "bob", 4)

    async def attack():
        lines = await _streams(world.app, tokens, addresses, 200)
        codes = [line.status for line in lines]
        other = await Line(world.app, STREAM, world.tokens["admin"], "192.0.2.1").answered()
        for line in lines:
            await line.end()
        again = Line(world.app, STREAM, world.tokens["member"], addresses[0])
        after = await again.answered()
        await again.end()
        return codes, other, after

    codes, other, after = asyncio.run(attack())
    assert codes == [200] * 50 + [503] * 150 and (other, after) == (200, 200)
    assert world.used() == 51


def test_one_address_with_many_members_leaves_places(world):
    tokens = [world.tokens["member"], world.tokens["admin"]]

    async def attack():
        lines = await _streams(world.app, tokens, ["203.0.113.9"], 100)
        near = await _streams(world.app, tokens, ["127.0.0.1"], 30)  # the page server calls for many
        for line in [*lines, *near]:
            await line.end()
        return [line.status for line in lines], {line.status for line in near}

    codes, near = asyncio.run(attack())
    assert codes == [200] * 50 + [503] * 50 and near == {200}


class Slow:
    "Answers of the record that wait."

    def __init__(self, world) -> None:
        self.arrived, self.hold = 0, threading.Event()
        world.service.record_body = self._wait

    def _wait(self, *_) -> bytes:
        self.arrived += 1
        self.hold.wait(LONG)
        return b"{}"


@pytest.mark.parametrize("address", ["127.0.0.1", "203.0.113.9"])
def test_one_members_slow_calls_leave_places(world, address):
    "A member keeps as many calls open as they can get; half of the places and threads are left, and a call is answered meanwhile."
    slow = Slow(world)

    async def attack():
        lines = [Line(world.app, "/v1/track-record", world.tokens["member"], address) for _ in range(64)]
        while sum(line.status == 503 for line in lines) + slow.arrived < 64:
            await asyncio.sleep(0.01)
        other = await Line(world.app, "/v1/me", world.tokens["admin"], "192.0.2.1").answered()
        slow.hold.set()
        return [await line.answered() for line in lines], other

    codes, other = asyncio.run(attack())
    assert other == 200
    assert codes.count(503) >= 64 - 40 and codes.count(200) >= 16
    assert world.client("member").get("/v1/me").status_code == 200


def test_who_is_refused_a_place_is_told_so_and_not_charged(world):
    places = world.api.streams
    mine = [places.take("127.0.0.1", "caller bob") for _ in range(50)]
    answer = world.client().get(STREAM)
    assert (answer.status_code, answer.headers["retry-after"], world.used()) == (503, "60", 0)
    assert answer.json()["message"].startswith("50 streams of yours are open just now")
    assert [place.give_back() for place in mine] == [None] * 50
    assert (places.total, sum(places.held.values())) == (0, 0)


def test_a_port_knocked_on_by_many_threads(people):
    "Places are exact after a storm: nothing stays taken."
    server, tokens = people
    headers = {"Authorization": f"Bearer {tokens['admin']}"}
    with ThreadPoolExecutor(16) as pool, httpx.Client(base_url=server.url, timeout=LONG, headers=headers) as client:
        codes = list(pool.map(lambda n: client.get("/v1/me" if n % 2 else "/none").status_code, range(200)))
    assert set(codes) == {200, 404}
    assert httpx.get(f"{server.url}/v1/me", headers=headers, timeout=LONG).status_code == 200
