"""The page server's door against pages of others, what a browser may do with our page, and what a broken message is answered with."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from dash_kit import Stage, answering_stage, page_server
from waiting import LONG, until

from make_us_rich.dashboard.server import Running

SHOWN = re.compile(r'id="jupyter-config-data"[^>]*>(.*?)</script>', re.S)
FOREIGN = ["evil.example", "evil.example:8866", "127.0.0.1.evil.example", "192.0.2.1"]


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Iterator[Stage]:
    names = "ranges.example.org, 192.0.2.7"
    with answering_stage(tmp_path_factory.mktemp("entrance") / "store", hosts=names) as made:
        yield made


@pytest.fixture(scope="module")
def page(stage) -> Iterator[Running]:
    with page_server(stage, viewers=4, idle=600) as running:
        yield running


@pytest.fixture
def http(page) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=page.url, trust_env=False, follow_redirects=True, timeout=LONG) as client:
        yield client


def in_a_loop(deed) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, deed).result()


@pytest.mark.parametrize("host", FOREIGN)
def test_a_foreign_name_sees_nothing(http, host):
    for path in ("", "api/kernels", f"api/kernels/{uuid.uuid4()}", "voila/static/voila.js"):
        answer = http.get(path, headers={"Host": host})
        assert (answer.status_code, "open_dashboard" in answer.text) == (403, False), path


async def opened(page: Running, path: str, cookie: str, **headers: str):
    from tornado.httpclient import HTTPRequest
    from tornado.websocket import websocket_connect

    address = page.url.replace("http", "ws") + path
    return await websocket_connect(HTTPRequest(address, headers={"Cookie": cookie} | headers))


async def refused(page: Running, path: str, cookie: str, **headers: str) -> int:
    from tornado.httpclient import HTTPClientError

    with pytest.raises(HTTPClientError) as told:
        await opened(page, path, cookie, **headers)
    return told.value.code


def looked_at(http) -> tuple[str, str]:
    "The process of a page, and the cookies that open it."
    kernel = json.loads(SHOWN.search(http.get("").text)[1])["kernelId"]
    return kernel, "; ".join(f"{name}={value}" for name, value in http.cookies.items())


def leave(http, kernel: str) -> None:
    headers = {"X-XSRFToken": http.cookies.get("_xsrf", "")}
    assert http.post(f"voila/api/shutdown/{kernel}", headers=headers).status_code == 204


def test_a_socket_opens_for_our_own_page_only(page, http):
    kernel, cookie = looked_at(http)
    path = f"api/kernels/{kernel}/channels"
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        assert in_a_loop(refused(page, path, cookie, **headers)) == 403, headers
    leave(http, kernel)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]", "ranges.example.org", "192.0.2.7:443"])
def test_our_own_names_are_known(http, host):
    assert http.get("voila/static/voila.js", headers={"Host": host}).status_code == 200


def comm(kind: str, **content) -> str:
    facts = {"msg_id": uuid.uuid4().hex, "msg_type": kind, "username": "", "session": "s", "date": "", "version": "5.3"}
    parts = {"header": facts, "parent_header": {}, "metadata": {}, "content": content, "buffers": []}
    return json.dumps({"channel": "shell"} | parts)


BROKEN = [
    comm("comm_open", comm_id="a", target_name="no.such.target", data={}),
    comm("comm_open", comm_id="b", target_name="jupyter.widget", data={"state": {"_model_module": "os"}}),
    comm("comm_open", comm_id="c", target_name="jupyter.widget", data=7),
    comm("comm_open", comm_id=[], target_name={}, data=None),
    comm("comm_open"),
    comm("comm_msg", comm_id="a", data={"method": "update", "state": 7}),
    comm("comm_msg", comm_id={}, data=[]),
    comm("comm_msg"),
    comm("comm_close", comm_id=[]),
    comm("comm_info_request", target_name=[]),
    comm("kernel_info_request", x=[]),
]


async def answered(page: Running, kernel: str, cookie: str) -> str:
    "All that comes back for broken messages, and for the same to the widgets that the page has."
    socket = await opened(page, f"api/kernels/{kernel}/channels", cookie)
    heard: list[str] = []

    async def hear(seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            while (message := await asyncio.wait_for(socket.read_message(), seconds)) is not None:
                heard.append(message if isinstance(message, str) else message.decode("utf-8", "replace"))

    await socket.write_message(comm("comm_info_request", target_name="jupyter.widget"))
    await hear(3)
    widgets = sorted({found for text in heard for found in re.findall(r'"([0-9a-f]{32})": \{"target_name"', text)})
    assert widgets, "the page has no widgets: nothing would be shown by this test"
    for message in BROKEN:
        await socket.write_message(message)
    for widget in widgets:
        for data in (7, {}, {"method": "update"}, {"method": "update", "state": {"_view_name": []}}, {"method": "x"}):
            await socket.write_message(comm("comm_msg", comm_id=widget, data=data))
        for content in (None, 7, {"event": []}, {"kind": "no such order", "value": {}}, ["/etc/passwd"]):
            await socket.write_message(comm("comm_msg", comm_id=widget, data={"method": "custom", "content": content}))
    await hear(3)
    socket.close()
    return "\n".join(heard)


def test_a_broken_message_is_answered_without_paths(page, http):
    kernel, cookie = looked_at(http)
    heard = in_a_loop(answered(page, kernel, cookie))
    for word in ("site-packages", "Traceback", "/work", "/usr/lib", "make_us_rich/", 'File \\"', str(page.folder)):
        at = heard.find(word)
        assert at < 0, heard[max(0, at - 400) : at + 400]
    leave(http, kernel)


def test_the_policy_lets_nothing_out_and_the_page_works(page, stage):
    "In Chromium: the chart is drawn with no breach of the policy; what an intruder would do is stopped."
    sync_api = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("this needs Chromium")
    said: list[str] = []
    with sync_api.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        shown = chromium.new_context(extra_http_headers={"X-Mur-Token": stage.tokens["member"]}).new_page()
        shown.set_default_timeout(1000 * LONG)
        shown.on("console", lambda message: said.append(message.text))
        shown.add_init_script(
            "window.breaches = []; document.addEventListener('securitypolicyviolation', e => "
            "breaches.push(e.effectiveDirective + ' ' + e.blockedURI))"
        )
        answer = shown.goto(page.url)
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["base-uri"] == "'none'"
        assert {"script-src", "style-src", "connect-src", "img-src", "frame-ancestors", "form-action"} <= set(policy)
        assert not [word for words in policy.values() for word in words.split() if word in ("*", "http:", "https:")]
        assert "'unsafe-eval'" not in policy["script-src"]
        shown.wait_for_selector(".mur-chart[data-drawn] .boxlayer path", state="attached")
        assert shown.evaluate("breaches") == [] and not [text for text in said if "Content Security Policy" in text]
        shown.evaluate(
            """async () => {
                await fetch('http://localhost:9/x').catch(() => 0);
                document.head.append(Object.assign(document.createElement('script'), {src: 'http://localhost:9/x.js'}));
                document.body.append(Object.assign(document.createElement('img'), {src: 'http://localhost:9/x.png'}));
                document.head.append(Object.assign(document.createElement('base'), {href: 'http://localhost:9/'}));
            }"""
        )
        until(shown, "breaches.length >= 4")
        stopped = {breach.split(" ")[0] for breach in shown.evaluate("breaches")}
        assert stopped == {"connect-src", "script-src-elem", "img-src", "base-uri"}
        shown.goto("about:blank")
        chromium.close()
