"""Other viewers' pages: every address with a number of a process, as oneself, as another, as nobody; crowds; large messages."""

import asyncio
import contextlib
import json
import re
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import psutil
import pytest
from dash_kit import Stage, answering_stage, page_server
from waiting import LONG, wait_for

from make_us_rich.api.accounts import create_token, get_user
from make_us_rich.core.database import session
from make_us_rich.core.kernels import KERNEL_NAME
from make_us_rich.dashboard.server import Running

SHOWN = re.compile(r'id="jupyter-config-data"[^>]*>(.*?)</script>', re.S)


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Iterator[Stage]:
    with answering_stage(tmp_path_factory.mktemp("viewers") / "store", hours=60) as made:
        yield made


@pytest.fixture(scope="module")
def page(stage) -> Iterator[Running]:
    "Where people log in; nginx would name them by a token."
    with page_server(stage, viewers=4, idle=600) as running:
        yield running


@dataclass
class Visitor:
    "A browser with its cookies, behind a front door that names it by a token if there is one."

    http: httpx.Client
    kernel: str = ""

    def look(self, address: str) -> httpx.Response:
        answer = self.http.get(address)
        if found := SHOWN.search(answer.text):
            self.kernel = json.loads(found[1])["kernelId"]
        return answer

    def goodbye(self, page: Running) -> int:
        headers = {"X-XSRFToken": self.http.cookies.get("_xsrf", "")}
        return self.http.post(f"{page.url}voila/api/shutdown/{self.kernel}", headers=headers).status_code

    @property
    def cookie(self) -> str:
        return "; ".join(f"{name}={value}" for name, value in self.http.cookies.items())


def visitor(token: str = "", address: str = "") -> Visitor:
    headers = {"X-Mur-Token": token} if token else {}
    headers |= {"X-Forwarded-For": address} if address else {}
    return Visitor(httpx.Client(trust_env=False, follow_redirects=True, timeout=LONG, headers=headers))


def kernels(page: Running) -> int:
    found = psutil.Process(page.process.pid).children(recursive=True)
    return sum(p.name() == KERNEL_NAME for p in found if p.is_running())


async def connect(page: Running, path: str, who: Visitor) -> int:
    "What a socket is answered with; 101 if it opens."
    from tornado.httpclient import HTTPClientError, HTTPRequest
    from tornado.websocket import websocket_connect

    headers = {"Cookie": who.cookie} | {k: v for k, v in who.http.headers.items() if k.startswith("x-")}
    try:
        socket = await websocket_connect(HTTPRequest(page.url.replace("http", "ws") + path, headers=headers))
    except HTTPClientError as e:
        return e.code
    socket.close()
    return 101


def opened(page: Running, path: str, who: Visitor) -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, connect(page, path, who)).result()


def test_a_process_belongs_to_its_viewer(page, stage):
    "By every address that takes its number; a new token of the same person opens it, another person's does not."
    with session(stage.engine) as s:
        again, _ = create_token(s, get_user(s, "bob"), "again", stage.now)
    bob, same = visitor(stage.tokens["member"]), visitor(again)
    others = [visitor(stage.tokens["admin"]), visitor()]
    assert bob.look(page.url).status_code == 200 and bob.kernel
    addresses = {
        "GET": ["api/kernels/{}", "api/kernels/{}?x=1", "voila/execution/{}", "voila/query/{}", "?kernel={}"],
        "DELETE": ["api/kernels/{}"],
        "POST": ["api/kernels/{}/interrupt", "api/kernels/{}/restart", "voila/api/shutdown/{}"],
    }
    written = [bob.kernel, bob.kernel.upper(), f"%{ord(bob.kernel[0]):x}{bob.kernel[1:]}"]
    for other in others:
        other.http.get(f"{page.url}voila/static/none")
        headers = {"X-XSRFToken": other.http.cookies.get("_xsrf", "")}
        for method, paths in addresses.items():
            for path in [p.format(number) for p in paths for number in written]:
                answer = other.http.request(method, page.url + path, headers=headers)
                assert answer.status_code in (403, 404), (method, path, answer.status_code)
                assert bob.kernel not in answer.text
        for number in written:
            for path in (f"api/kernels/{number}/channels", f"api/kernels/{number}/channels?session_id=s"):
                assert opened(page, path, other) in (403, 404), path
    assert kernels(page) == 1
    for who in (bob, same):
        assert opened(page, f"api/kernels/{bob.kernel}/channels", who) == 101
    assert opened(page, f"api/kernels/{uuid.uuid4()}/channels", bob) == 404
    assert bob.goodbye(page) == 204
    wait_for(lambda: kernels(page) == 0, what="the end of the page that said goodbye")


def test_a_crowd_finds_as_many_places_as_there_are(page, stage):
    "Forty at once, from forty addresses: four pages, thirty-six sentences, no fault, and never a fifth process."
    crowd = [visitor(address=f"10.0.0.{i}") for i in range(40)]
    seen, over = [], []
    with ThreadPoolExecutor(41) as pool:
        watch = pool.submit(lambda: [seen.append(kernels(page)) for _ in iter(lambda: bool(over), True)])
        answers = list(pool.map(lambda who: who.look(page.url), crowd))
        over.append(True)
        watch.result()
    codes = [answer.status_code for answer in answers]
    assert sorted(codes) == [200] * 4 + [503] * 36 and max(seen) <= 4
    assert all("All places are taken" in answer.text for answer in answers if answer.status_code == 503)
    for who in crowd:
        if who.kernel:
            assert who.goodbye(page) == 204
    wait_for(lambda: kernels(page) == 0)


def test_one_viewer_does_not_lock_out_the_rest(page, stage):
    "Somebody who opens six pages has the last two; strangers at one address have three places; others still find one."
    greedy = [visitor(stage.tokens["member"]) for _ in range(6)]
    for who in greedy:
        assert who.look(page.url).status_code == 200
    wait_for(lambda: kernels(page) == 2)
    alive = [opened(page, f"api/kernels/{who.kernel}/channels", who) for who in greedy]
    assert alive == [404] * 4 + [101] * 2
    strangers = [visitor(address="10.1.1.1") for _ in range(2)]
    assert [who.look(page.url).status_code for who in strangers] == [200, 200]
    for who in (greedy[4], *strangers[:1]):
        assert who.goodbye(page) == 204
    wait_for(lambda: kernels(page) == 2)
    last = visitor(stage.tokens["admin"])
    assert last.look(page.url).status_code == 200
    for who in (greedy[5], strangers[1], last):
        assert who.goodbye(page) == 204
    wait_for(lambda: kernels(page) == 0)


async def _shout(page: Running, who: Visitor) -> None:
    from tornado.httpclient import HTTPRequest
    from tornado.websocket import WebSocketClosedError, websocket_connect

    address = page.url.replace("http", "ws") + f"api/kernels/{who.kernel}/channels"
    socket = await websocket_connect(HTTPRequest(address, headers={"Cookie": who.cookie}))
    with contextlib.suppress(WebSocketClosedError):
        await socket.write_message(json.dumps({"channel": "shell", "content": "x" * 9_000_000}))
    while await asyncio.wait_for(socket.read_message(), LONG) is not None:
        pass


def test_large_messages(page):
    "A message of nine megabytes ends its connection, a body of as many is refused."
    who = visitor()
    assert who.look(page.url).status_code == 200
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, _shout(page, who)).result()
    try:
        refused = who.http.post(f"{page.url}voila/api/shutdown/{who.kernel}", content=b"x" * 9_000_000).status_code
    except httpx.TransportError:
        refused = 413  # the connection was closed while we still sent
    assert refused in (400, 413)
    assert who.goodbye(page) == 204
