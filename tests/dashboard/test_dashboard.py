"""The dashboard in a real browser: Debian's Chromium through Playwright, Voila as it is started for people, the real API behind it."""

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from dash_kit import HOUR, Stage, answering_stage, make_stage, page_server
from waiting import LONG, until, wait_for

from make_us_rich.api.examples import PASSWORD
from make_us_rich.core.kernels import KERNEL_NAME
from make_us_rich.core.settings import utc_iso
from make_us_rich.dashboard.server import Running

MISSING = "these tests need Chromium and found none; install it with: apt-get install chromium"
CANDLES = ".mur-chart .boxlayer path"
DRAWN = ".mur-chart[data-drawn] .boxlayer path"
WAIT = 1000 * LONG  # a slow machine with other work; nothing waits longer than it must


@pytest.fixture(scope="module")
def browser() -> Iterator:
    sync_api = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(MISSING)
    with sync_api.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Iterator[Stage]:
    with answering_stage(tmp_path_factory.mktemp("dash") / "store", hours=200) as made:
        yield made


PLACES: dict[str, int] = {}


@pytest.fixture(scope="module")
def local(stage) -> Iterator[Running]:
    "A page server of local mode: the viewer is logged in, behind a secret address."
    with page_server(stage, local=True, viewers=4, idle=600) as running:
        PLACES[running.url] = 4
        yield running


@pytest.fixture(scope="module")
def public(stage) -> Iterator[Running]:
    "A page server where people log in; only who says goodbye is forgotten soon."
    with page_server(stage, viewers=2, idle=600) as running:
        PLACES[running.url] = 2
        yield running


INSIDE = {
    "Forecast": "It is not advice to trade",
    "Track record": "The last 50 forecasts",
    "Account": "Your tokens",
    "Admin": "Health of the data",
}


@dataclass
class Viewer:
    "A page, and everything that it did wrong."

    page: object
    outside: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def text(self) -> str:
        return self.page.inner_text("body")

    def until(self, script: str, timeout: int = WAIT) -> None:
        until(self.page, script, timeout)

    def says(self, words: str, timeout: int = WAIT) -> None:
        self.until(f"document.body.innerText.includes({json.dumps(words)})", timeout)

    def tab(self, name: str) -> None:
        "Turn to a view, and wait until what it asked for is there."
        self.page.get_by_role("button", name=name, exact=True).first.click()
        self.until(
            f"[...document.querySelectorAll('.mur-nav button')].find(b => b.innerText === {json.dumps(name)}).classList.contains('mod-active')"
        )
        self.says(INSIDE[name])


@contextmanager
def viewer(browser, running: Running, width: int = 1280, chart: bool = True, **options) -> Iterator[Viewer]:
    address = running.address
    wait_for(lambda: kernels(running) < PLACES[running.url], what="a free place")
    context = browser.new_context(viewport={"width": width, "height": 900}, **({"timezone_id": "Asia/Tokyo"} | options))
    context.set_default_timeout(WAIT)
    seen = Viewer(context.new_page())
    here = urlsplit(address).netloc
    seen.page.on(
        "request",
        lambda r: (
            urlsplit(r.url).scheme in ("http", "https", "ws")
            and urlsplit(r.url).netloc != here
            and seen.outside.append(r.url)
        ),
    )
    seen.page.on("pageerror", lambda e: seen.errors.append(str(e)))
    try:
        seen.page.goto(address)
        if chart:
            seen.page.wait_for_selector(DRAWN, timeout=WAIT, state="attached")
        yield seen
        assert (seen.outside, seen.errors) == ([], [])
    finally:
        seen.page.goto("about:blank")  # the page says goodbye, and its process ends
        context.close()


def processes(running: Running) -> list[psutil.Process]:
    "The viewers' processes; those that end while we look are left out."
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for p in psutil.Process(running.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if p.status() != psutil.STATUS_ZOMBIE and p.name() == KERNEL_NAME:
                    found.append(p)
    return found


def kernels(running: Running) -> int:
    return len(processes(running))


def test_a_morning(browser, local, stage):
    "Everything drawn, both pairs, news without a reload, each tab; and two viewers do not see each other's choice."
    with viewer(browser, local) as one, viewer(browser, local, timezone_id="UTC") as two:
        assert "token" not in one.page.url and stage.tokens["admin"] not in one.page.content()
        assert one.page.locator(CANDLES).count() == 120
        bars = one.page.locator(".mur-chart").first.evaluate("box => box.data.map(t => [t.name, t.x.length])")
        drawn = dict(map(tuple, bars))
        assert drawn["past range, held"] + drawn["past range, missed"] == 120 and drawn["past range, held"] > 80
        assert {"next hour, 50 %", "next hour, 80 %", "next hour, 95 %"} <= set(drawn)
        assert one.page.locator(".mur-chart").first.get_attribute("aria-label").startswith("Candles of BTC / USDT")
        low, high = (stage.forecast().quantiles[level] for level in (0.1, 0.9))
        one.says(f"{low:,.2f} to {high:,.2f}")
        assert one.page.locator(".mur-facts time").first.inner_text().endswith("08:00") and two.page.locator(
            ".mur-facts time"
        ).first.inner_text().endswith("23:00")

        one.page.locator("[data-series='SOL_USDT/1h']").click()
        one.until("document.querySelector('.mur-chart').getAttribute('aria-label').includes('SOL')")
        one.until("document.querySelector('.mur-chart').data.find(t => t.type === 'candlestick').close.at(-1) < 1000")
        one.says("SOL / USDT at")
        assert "BTC / USDT at" in two.text()

        stage.change(median=stage.forecast().median, sentence="news", reliability="a fresh word about reliability")
        two.says("a fresh word about reliability")
        moved = round(stage.forecast().last_close * 1.01, 2)
        two.tab("Account")  # a chart that nobody sees is drawn when it comes into view
        stage.change(median=moved)
        two.until("document.querySelector('.mur-rise')")
        two.tab("Forecast")
        two.until(f"document.querySelector('.mur-chart').data.find(t => t.name === 'median').y[0] === {moved}")

        one.tab("Track record")
        one.says("Why it is")
        one.until("document.querySelectorAll('.mur-scroll tbody tr').length >= 50")
        one.until("[...document.querySelectorAll('.mur-chart[data-drawn]')].filter(c => c.offsetParent).length === 2")
        assert "after fees" in one.text()
        one.page.locator(".mur-link:visible").first.click()
        frame = one.page.frame_locator("dialog iframe")
        frame.get_by_role("heading", name="The executed notebook").wait_for()
        assert one.page.evaluate("window.bad") is None  # nothing runs in a report
        one.page.keyboard.press("Escape")
        one.until("!document.querySelector('dialog')")
        one.tab("Account")
        one.says("calls of")
        one.tab("Admin")
        one.says("Health of the data")
        one.says("locked out")
        one.says("the disk of the store is full")
        one.page.locator("[data-run='log:run-2']:visible").click()
        one.page.frame_locator("dialog iframe").get_by_text("cell 4 of 18: no room <b>left</b>").wait_for()
        one.page.keyboard.press("Escape")


def test_a_home_with_models_of_four_hours_only(browser, tmp_path):
    "Its page shows the forecast of the next candle, and how earlier ones turned out."
    stage = make_stage(tmp_path / "store", hours=100, interval="4h")
    stage.up()
    try:
        with page_server(stage, local=True, viewers=2, idle=600) as running:
            PLACES[running.url] = 2
            with viewer(browser, running) as seen:
                seen.says("In 8 of 10 such candles of 4 hours the close lies in this range")
                text = seen.text()
                low, high = stage.service.answer("BTC_USDT/4h").forecast.range(80)
                assert f"{low:,.2f}" in text and f"{high:,.2f}" in text
                assert "BTC / USDT 4h" in text and "no forecast" not in text.lower()
                seen.tab("Track record")
    finally:
        stage.down()
        stage.engine.dispose()


def test_phone(browser, local):
    "Nothing sticks out, and what may be pressed has a name."
    with viewer(browser, local, width=420, color_scheme="light") as phone:
        for tab in ("Forecast", "Track record", "Account", "Admin"):
            phone.tab(tab)
            assert phone.page.evaluate("document.documentElement.scrollWidth") <= 420, tab
        unnamed = "[...document.querySelectorAll('.mur button, .mur input, .mur select')].filter(e => !(e.innerText || e.ariaLabel || e.labels?.length && e.labels[0].innerText)).map(e => e.outerHTML)"
        assert phone.page.evaluate(unnamed) == []
        assert phone.page.evaluate("document.documentElement.dataset.theme") == "light"
        phone.tab("Forecast")
        phone.page.get_by_role("button", name="dark or light colours").click()
        phone.until("getComputedStyle(document.body).backgroundColor === 'rgb(12, 16, 22)'")
        days = phone.page.locator(".mur-chart").first.evaluate(
            "box => (new Date(box.layout.xaxis.range[1]) - new Date(box.layout.xaxis.range[0])) / 864e5"
        )
        assert 2 < days < 3


CONTRAST = """() => {
  const lum = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const parse = t => t.match(/[\\d.]+/g).map(Number);
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > .9) return c; } return [255, 255, 255]; };
  const bad = [];
  for (const e of document.querySelectorAll('.mur *')) {
    if (!e.offsetParent || ![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const [a, b] = [lum(parse(getComputedStyle(e).color).slice(0, 3)), lum(behind(e).slice(0, 3))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) bad.push(e.className + ': ' + e.textContent.slice(0, 40));
  }
  return bad;
}"""


def test_contrast(browser, local):
    "Every text has a contrast of 4.5 to 1 at least, in dark and in light colours."
    with viewer(browser, local, color_scheme="dark") as one:
        for scheme in ("dark", "light"):
            assert one.page.evaluate("document.documentElement.dataset.theme") == scheme
            for tab in ("Forecast", "Track record", "Account", "Admin"):
                one.tab(tab)
                assert one.page.evaluate(CONTRAST) == [], (scheme, tab)
            one.page.get_by_role("button", name="dark or light colours").click()


def test_abstention_and_markup(browser, local, stage):
    "An abstention says why and draws no range; what looks like HTML is shown as text."
    before = stage.forecast()
    evil = "<img src=x onerror=window.bad=1><script>window.bad=1</script>"
    stage.show(
        before.model_copy(
            update={
                "status": "abstain",
                "reason": "stale_data",
                "quantiles": None,
                "median": None,
                "p_up": None,
                "sentence": f"the newest candle is old {evil}",
            }
        )
    )
    try:
        with viewer(browser, local) as one:
            one.says("No forecast for this hour")
            assert evil in one.text() and one.page.evaluate("window.bad") is None
            names = one.page.locator(".mur-chart").first.evaluate("box => box.data.map(t => t.name)")
            assert (
                not [name for name in names if name.startswith("next hour")]
                and one.page.locator(CANDLES).count() == 120
            )
            assert "no forecast for this hour" in one.page.locator("[data-series='BTC_USDT/1h']").inner_text()
    finally:
        stage.show(before)


def test_stale(browser, local, stage):
    "Data older than it should be is called old."
    before = stage.forecast()
    stage.change(as_of=utc_iso(stage.now.floor("h") - 3 * HOUR))
    try:
        with viewer(browser, local) as one:
            one.says("Old data")
    finally:
        stage.show(before)


def test_api_goes_away_and_returns(browser, local, stage):
    "The old picture stays, with the cause and the age of the data; later everything goes on without a reload."
    with viewer(browser, local) as one:
        one.says("live")
        stage.down()
        try:
            one.says("No connection")
            assert "cannot be reached" in one.text() and "What is shown was asked for" in one.text()
            assert one.page.locator(CANDLES).count() == 120
        finally:
            stage.up()
        one.until("!document.body.innerText.includes('No connection')")
        one.says("live")


@pytest.fixture
def forgetful(stage) -> Iterator[Running]:
    "A page server that forgets soon who leaves without a word, but not while a slow machine still loads the page."
    with page_server(stage, local=True, viewers=2, idle=15) as running:
        PLACES[running.url] = 2
        yield running


def test_a_viewer_who_vanishes(browser, forgetful, stage):
    "A browser that dies says no goodbye: its process ends although news keep coming; and a page whose process is gone says so."
    context = browser.new_context()
    page = context.new_page()
    page.goto(forgetful.address)
    page.wait_for_selector(DRAWN, timeout=WAIT, state="attached")
    [process] = processes(forgetful)
    context.close()  # this runs no goodbye
    median, more = stage.forecast().median, itertools.count(1)

    def ended() -> bool:
        stage.change(median=median + next(more) / 1000)
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(1)  # news every second
        return not process.is_running()

    wait_for(ended, LONG, "the end of a process that nobody looks at")

    with viewer(browser, forgetful) as one:
        one.says("live")
        processes(forgetful)[0].kill()
        one.says("This page is cut off")


def test_log_in(browser, public, stage):
    "A wrong password is a sentence, a right one the page; a token is made, shown once, and revoked."
    with viewer(browser, public, chart=False) as one:
        assert public.address == public.url
        one.says("Log in")
        fields = one.page.locator(".mur input:visible")
        fields.nth(0).fill("bob")
        fields.nth(1).fill("not the password")
        one.page.get_by_role("button", name="Log in", exact=True).click()
        one.says("do not belong together")
        fields.nth(1).fill(PASSWORD)
        one.page.get_by_role("button", name="Log in", exact=True).click()
        one.page.wait_for_selector(DRAWN, timeout=WAIT)
        assert one.page.get_by_role("button", name="Admin", exact=True).count() == 0
        one.tab("Account")
        one.says("bob")
        one.page.get_by_label("What it is for").fill("phone")
        one.page.get_by_role("button", name="Make a token").click()
        one.says("Keep it now")
        raw = one.page.locator(".mur-secret code").inner_text()
        assert httpx.get(f"{stage.url}/v1/me", headers={"Authorization": f"Bearer {raw}"}).json()["name"] == "bob"
        one.page.locator(".mur-row", has_text=raw[:8]).get_by_role("button", name="Revoke").click()
        one.until("!document.body.innerText.includes('Keep it now')")
        assert httpx.get(f"{stage.url}/v1/me", headers={"Authorization": f"Bearer {raw}"}).status_code == 401
        one.page.get_by_role("button", name="Log out").click()
        one.says("Or use a token")
        one.page.get_by_label("Token").fill(stage.tokens["revoked"])
        one.page.get_by_role("button", name="Use token").click()
        one.says("not valid")
        assert PASSWORD not in one.page.content()
        assert kernels(public) == 1
    wait_for(
        lambda: kernels(public) == 0, what="the end of the process of a closed tab, long before its quiet time is over"
    )


def test_limit(browser, public):
    "The third viewer of two gets a kind page; the others go on, and may reload; who only knocks does not hold a place for long."
    with viewer(browser, public, chart=False) as one, viewer(browser, public, chart=False) as two:
        one.says("Log in")
        two.says("Log in")
        refused = httpx.get(public.address, timeout=WAIT / 1000, trust_env=False)
        assert refused.status_code == 503
        assert "All places are taken" in refused.text and "Traceback" not in refused.text and "://" not in refused.text
        one.page.reload()
        one.says("Log in")
    knocks = [httpx.get(public.address, timeout=WAIT / 1000, trust_env=False).status_code for _ in range(2)]
    assert knocks[0] == 200
    wait_for(lambda: httpx.get(public.address, timeout=WAIT / 1000, trust_env=False).status_code == 200)


def test_what_a_viewer_cannot_do(browser, local, stage):
    "No files, no code, nobody else's process, no entrance without the secret."
    assert httpx.get(local.url, trust_env=False).status_code == 302  # to the log-in form
    assert httpx.get(f"{local.url}?token=wrong", trust_env=False).status_code == 302
    with httpx.Client(trust_env=False, follow_redirects=True, timeout=LONG) as http:
        page = http.get(local.address).text
        for path in (
            "voila/files/dashboard.ipynb",
            "voila/files/.env",
            "voila/files/../share",
            "voila/tree",
            "api/contents",
            "api/kernels",
            "api/sessions",
            "api/terminals",
            f"api/kernels/{uuid.uuid4()}",
            "voila/render/dashboard.ipynb",
            "voila/templates/makeusrich/static/../index.html.j2",
            "voila/static/../../etc/passwd",
            "files/dashboard.ipynb",
        ):
            answer = http.get(local.url + path)
            assert answer.status_code in (403, 404) or (
                "open_dashboard" not in answer.text and "root:" not in answer.text and '"id"' not in answer.text[:300]
            ), path
        assert "open_dashboard" not in page and "Traceback" not in page and stage.tokens["admin"] not in page
        assert "makeusrich" in http.get(f"{local.url}?template=lab").text  # no other template can be asked for
        kernel = json.loads(re.search(r'id="jupyter-config-data"[^>]*>(.*?)</script>', page, re.S)[1])["kernelId"]
        assert http.delete(f"{local.url}api/kernels/{kernel}").status_code == 403
        cookie = "; ".join(f"{name}={value}" for name, value in http.cookies.items())
        with ThreadPoolExecutor(1) as pool:  # Playwright has a loop of its own in this thread
            pool.submit(asyncio.run, _attack(local, kernel, cookie)).result()


async def _attack(local: Running, kernel: str, cookie: str) -> None:
    from tornado.httpclient import HTTPClientError, HTTPRequest
    from tornado.websocket import websocket_connect

    address = local.url.replace("http", "ws") + f"api/kernels/{kernel}/channels"
    with pytest.raises(HTTPClientError, match="403"):
        await websocket_connect(HTTPRequest(address))  # no secret
    with pytest.raises(HTTPClientError, match="404"):
        await websocket_connect(HTTPRequest(address.replace(kernel, str(uuid.uuid4())), headers={"Cookie": cookie}))
    socket = await websocket_connect(HTTPRequest(address, headers={"Cookie": cookie}))
    mark = local.folder / "attacked"
    codes = {
        "execute_request": {
            "code": f"open({str(mark)!r}, 'w')",
            "silent": False,
            "store_history": False,
            "user_expressions": {},
            "allow_stdin": False,
        },
        "complete_request": {"code": "import os; os.", "cursor_pos": 14},
        "inspect_request": {"code": "os", "cursor_pos": 2, "detail_level": 1},
        "history_request": {"hist_access_type": "tail", "n": 9},
        "input_reply": {"value": "x"},
        "debug_request": {"command": "evaluate"},
    }
    for channel in ("shell", "control", "stdin"):
        for kind, content in codes.items():
            header = {
                "msg_id": uuid.uuid4().hex,
                "msg_type": kind,
                "username": "",
                "session": "s",
                "date": "",
                "version": "5.3",
            }
            await socket.write_message(
                json.dumps(
                    {
                        "channel": channel,
                        "header": header,
                        "parent_header": {},
                        "metadata": {},
                        "content": content,
                        "buffers": [],
                    }
                )
            )
    replies = set()
    try:
        while True:
            message = await asyncio.wait_for(socket.read_message(), 2)
            if message is None:
                break
            if isinstance(message, str):
                replies.add(json.loads(message)["msg_type"])
    except TimeoutError:
        pass
    assert not mark.exists() and not {
        kind for kind in replies if kind.endswith("_reply") and not kind.startswith(("kernel_info", "comm"))
    }
    socket.close()


def test_the_kernel_is_light(local):
    "What a viewer costs: no pandas, no torch, no onnxruntime, no plotly in their process."
    import subprocess
    import sys

    code = "import sys, make_us_rich.dashboard.page; print([m for m in ('pandas', 'numpy', 'torch', 'onnxruntime', 'plotly', 'pydantic', 'sqlalchemy') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
    wait_for(lambda: kernels(local) < PLACES[local.url])
    assert httpx.get(local.address, timeout=WAIT / 1000, trust_env=False, follow_redirects=True).status_code == 200
    sizes = [p.memory_info().rss / 2**20 for p in processes(local)]
    assert sizes and max(sizes) < 130
