"""The front door of `deploy/nginx` with the real nginx: who is let in where, and a browser that logs in and sees the dashboard through it."""

import os
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from dash_kit import Stage, make_stage, page_server
from servers import free_port
from waiting import LONG, until, wait_for

from make_us_rich.api.accounts import get_user, list_tokens
from make_us_rich.api.examples import PASSWORD
from make_us_rich.api.log_ins import LogIns
from make_us_rich.api.page_sessions import page_token
from make_us_rich.core.database import session

CONFIG = Path(__file__).parents[2] / "deploy" / "nginx" / "make-us-rich.conf"
WAIT = 1000 * LONG
HTTP = """daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
{door} }}"""


def needed(*programs: str) -> str:
    found = next(
        (path for name in programs if (path := shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin"))), None
    )
    if found is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
            f"this needs {programs[0]}; install it with: apt-get install {programs[0]}"
        )
    return str(found)


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Iterator[Stage]:
    made = make_stage(tmp_path_factory.mktemp("door") / "store", hours=200)
    made.app.state.api.logins = LogIns(times=1000)
    made.up()
    yield made
    made.down()
    made.engine.dispose()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("nginx")


@pytest.fixture(scope="module")
def by_https() -> int:
    "The port at which nginx speaks https too."
    return free_port()


def a_certificate(folder: Path) -> str:
    "What nginx is told to use a fresh certificate of nobody."
    command = [
        needed("openssl"),
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    subprocess.run(
        [*command, "-keyout", folder / "key.pem", "-out", folder / "full.pem"], check=True, capture_output=True
    )
    return f"ssl_certificate {folder}/full.pem; ssl_certificate_key {folder}/key.pem;"


@pytest.fixture(scope="module")
def door(stage, folder, by_https) -> Iterator[str]:
    "The address of nginx, before the API of the stage and a page server."
    program, port = needed("nginx"), free_port()
    with page_server(stage, viewers=8, idle=600) as page:
        text = (
            CONFIG.read_text()
            .replace("127.0.0.1:8750", f"127.0.0.1:{stage.settings.port}")
            .replace("127.0.0.1:8866", page.url[7:-1])
        )
        listen = f"listen 127.0.0.1:{port}; listen 127.0.0.1:{by_https} ssl; {a_certificate(folder)}"
        text = text.replace("    listen 80;\n", f"    {listen}\n").replace(
            "/var/log/nginx/make-us-rich.log", str(folder / "access.log")
        )
        (folder / "nginx.conf").write_text(HTTP.format(folder=folder, door=text))
        command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf")]
        checked = subprocess.run([*command, "-t"], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda: status(f"http://127.0.0.1:{port}/healthz") == 200)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(LONG)


def status(url: str) -> int:
    try:
        return httpx.get(url, timeout=LONG).status_code
    except httpx.TransportError:
        return 0


def guest(door: str, **headers: str) -> httpx.Client:
    return httpx.Client(base_url=door, headers=headers, timeout=LONG)


def log_in(visitor: httpx.Client, password: str = PASSWORD) -> httpx.Response:
    return visitor.post("/session/login", data={"name": "bob", "password": password})


def test_strangers_see_the_log_in_page_and_nothing_else(door, stage):
    with guest(door) as stranger:
        answer = stranger.get("/")
        assert (answer.status_code, answer.headers["location"]) == (303, "/session/login")
        form = stranger.get("/session/login")
        assert (
            form.status_code == 200
            and 'type="password"' in form.text
            and "form-action 'self'" in form.headers["content-security-policy"]
        )
        upgrade = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "x" * 22 + "==",
        }
        for path in ("/voila/static/voila.js", "/api/kernels", "/static/main.js", "/voila/render/x.ipynb", "/?token=x"):
            assert stranger.get(path).status_code in (401, 303), path
        assert stranger.get("/api/kernels/x/channels", headers=upgrade).status_code == 401
        for path in ("/metrics", "/session/check", "/_known", "/session/other"):
            assert stranger.get(path).status_code in (401, 404), path
    for headers in (
        {"Cookie": "mur_session=mur_" + "x" * 43},
        {"X-Mur-Token": stage.tokens["member"]},
        {"Authorization": f"Bearer {stage.tokens['admin']}"},
    ):
        with guest(door, **headers) as liar:  # a token in a header is for the API, a forged cookie for nothing
            assert liar.get("/").status_code == 303
            assert liar.get("/api/kernels").status_code == 401


def test_wrong_right_and_out(door, stage):
    with guest(door) as visitor:
        wrong = log_in(visitor, "not the password")
        assert wrong.status_code == 401 and "set-cookie" not in wrong.headers
        assert 'role="alert"' in wrong.text and 'type="password"' in wrong.text and "not the password" not in wrong.text
        right = log_in(visitor)
        assert (right.status_code, right.headers["location"]) == (303, "/")
        facts = [part.strip().lower() for part in right.headers["set-cookie"].split(";")]
        assert {"httponly", "samesite=lax", "path=/", "max-age=604800"} <= set(facts) and "secure" not in facts
        assert "You are logged in as bob." in visitor.get("/session/login").text
        raw = visitor.cookies["mur_session"]
        assert visitor.get("/v1/me").status_code == 401  # the cookie opens the page, not the API
        out = visitor.post("/session/logout")
        assert out.status_code == 303 and out.headers["location"].endswith("/session/login")
        with guest(door, Cookie=f"mur_session={raw}") as thief:  # a copy of the cookie is worthless too
            assert thief.get("/").status_code == 303
            assert thief.get("/api/kernels").status_code == 401
    with session(stage.engine) as s:
        (token,) = [t for t in list_tokens(s, get_user(s, "bob")) if page_token(raw).startswith(t.prefix)]
        assert token.name == "page" and token.revoked_at is not None


def test_the_log_names_people_and_no_secret(door, folder):
    with guest(door) as visitor:
        assert log_in(visitor).status_code == 303
        visitor.get("/api/none?token=mur_AbCdEfGh-12345678_x")
        visitor.post("/session/logout")
    log = (folder / "access.log").read_text()
    assert " bob [" in log and '"POST /session/login" 303' in log
    assert "mur_" not in log and PASSWORD not in log and "token=" not in log


def test_secure_where_the_door_speaks_https(stage):
    with guest(stage.url, **{"X-Forwarded-Proto": "https"}) as visitor:  # as nginx says it then
        assert "Secure" in log_in(visitor).headers["set-cookie"]


def test_https_is_promised_where_it_is_spoken(door, by_https):
    with httpx.Client(base_url=f"https://127.0.0.1:{by_https}", verify=False, timeout=LONG) as visitor:
        answers = [visitor.get(path) for path in ("/session/login", "/v1/me", "/none", "/")]
        assert {answer.headers.get("strict-transport-security") for answer in answers} == {"max-age=31536000"}
        assert "Secure" in log_in(visitor).headers["set-cookie"]
    for newest, works in ((ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)):
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, newest
        with socket.create_connection(("127.0.0.1", by_https)) as link:
            try:
                context.wrap_socket(link).close()
                spoke = True
            except ssl.SSLError:
                spoke = False
        assert spoke == works, newest
    with guest(door) as visitor:
        assert "strict-transport-security" not in visitor.get("/session/login").headers


def test_a_claimed_name_leads_nowhere(door):
    "Nor is anything shown to a page elsewhere whose name leads here."
    for path in ("/", "/v1/me", "/docs", "/session/login", "/api/kernels"):
        with guest(door, Host="evil.example") as visitor:
            answer = visitor.get(path)
            assert answer.headers.get("location", "/").startswith("/"), path
            assert answer.status_code in (303, 401, 403, 421) and "evil.example" not in answer.text, path


def test_guessing_is_counted_by_visitor(door, stage):
    api, before = stage.app.state.api, stage.app.state.api.logins
    api.logins = LogIns(times=3)
    try:
        with guest(door, **{"X-Forwarded-For": "192.0.2.9"}) as visitor:  # an address cannot be chosen
            answers = [log_in(visitor, f"guess {n}").status_code for n in range(4)]
        assert answers == [401, 401, 401, 429]
        assert set(api.logins.addresses._tries) == {"127.0.0.1"}
    finally:
        api.logins = before


def test_the_api_through_the_same_door(door, stage):
    with guest(door, Authorization=f"Bearer {stage.tokens['member']}") as program:
        assert program.get("/v1/me").json()["name"] == "bob"
        assert program.get("/v1/forecasts/BTC_USDT").json()["status"] == "ok"
        assert program.get("/docs").status_code == 200
        assert program.get("/v1/status").status_code == 403
        with program.stream(
            "GET", "/v1/stream"
        ) as news:  # unbuffered: the first line comes at once, and what happens comes when it happens
            lines = news.iter_lines()
            assert next(lines).startswith("retry")
            stage.change("SOL_USDT", p_up=0.61)
            assert next(line for line in lines if line.startswith("event")) == "event: forecast"
    with guest(door) as stranger:
        assert stranger.get("/v1/me").status_code == 401


def test_a_browser_goes_through(door, stage):
    "Log-in page, wrong and right; then the dashboard is logged in already, live, and nothing is asked of any other host."
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = os.environ.get("CHROMIUM") or needed("chromium", "chromium-browser")
    outside: list[str] = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page()
        page.set_default_timeout(WAIT)
        sockets: list[str] = []
        page.on(
            "request",
            lambda r: outside.append(r.url) if r.url.startswith("http") and not r.url.startswith(door) else None,
        )
        page.on("websocket", lambda w: sockets.append(w.url))
        page.goto(door)
        assert page.url == f"{door}/session/login"
        page.get_by_label("Name").fill("bob")
        page.get_by_label("Password").fill("a guess")
        page.get_by_role("button", name="Log in").click()
        page.get_by_role("alert").wait_for()
        page.get_by_label("Name").fill("bob")
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Log in").click()
        page.wait_for_selector(
            ".mur-chart[data-drawn] .boxlayer path"
        )  # the chart is drawn by what comes over the socket
        assert (
            page.url == f"{door}/"
            and sockets
            and all(re.match(r"ws://127\.0\.0\.1:\d+/api/kernels/", url) for url in sockets)
        )
        assert "bob" in page.inner_text("header")
        assert page.evaluate("document.cookie").find("mur_session") < 0
        if picture := os.environ.get("PICTURE"):
            page.screenshot(path=picture)
        stage.change("BTC_USDT", p_up=0.77)  # news from the API reach the open page
        until(page, "document.body.innerText.includes('77 %')")
        page.goto(f"{door}/session/login")
        page.get_by_role("button", name="Log out").click()
        page.get_by_label("Password").wait_for()
        page.goto(door)
        assert page.url == f"{door}/session/login"
        browser.close()
    assert outside == []


def test_who_hammers_is_slowed_down_in_words(door, folder):
    "Log-ins of one address, after a burst of twenty; and nothing of it stands in the error log."
    with guest(door) as visitor:
        answers = [visitor.post("/v1/login?token=mur_AbCdEfGh-12345678", json={}) for _ in range(40)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) >= 10 and {answer.headers["retry-after"] for answer in refused} == {"1"}
        assert refused[0].json()["message"] == "too many requests come from this address; wait a second"
        assert visitor.get("/v1/me").status_code == 401  # only log-ins are
    assert "mur_AbC" not in (folder / "error.log").read_text() + (folder / "access.log").read_text()
