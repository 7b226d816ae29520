"""The front of the API: pages and names of others, where an answer leads, guesses, the log, and what the documentation costs."""

import re

import httpx
import pytest
from api_kit import make_world, served
from waiting import LONG

from make_us_rich.api import pages
from make_us_rich.api.accounts import Limiter
from make_us_rich.api.examples import PASSWORD, add_people
from make_us_rich.core.database import connect, migrate, session
from make_us_rich.core.settings import system_clock
from make_us_rich.core.tables import Token

HERE = "http://127.0.0.1"
FORM = {"name": "bob", "password": PASSWORD}
FOREIGN = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1.evil.example"},
    {"Origin": "http://127.0.0.1:81"},
    {"Origin": "http://127.0.0.1@evil.example"},
    {"Origin": ""},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": HERE},
]


@pytest.fixture
def world(tmp_path):
    world = make_world(tmp_path / "home", candles=50)
    yield world
    world.engine.dispose()


def tokens_made(world) -> int:
    with session(world.engine) as s:
        return s.query(Token).count()


# --- pages of others


@pytest.mark.parametrize("headers", FOREIGN)
def test_a_page_elsewhere_logs_nobody_in_or_out(world, headers):
    before, browser = tokens_made(world), world.client(None)
    forged = browser.post("/session/login", data=FORM, headers=headers, follow_redirects=False)
    assert (forged.status_code, forged.json()["error"], "set-cookie" in forged.headers) == (403, "foreign_page", False)
    assert tokens_made(world) == before
    mine = browser.post("/session/login", data=FORM, headers={"Origin": HERE}, follow_redirects=False)
    facts = {part.strip().lower() for part in mine.headers["set-cookie"].split(";")}
    assert mine.status_code == 303 and {"samesite=lax", "httponly", "path=/"} <= facts
    out = browser.post("/session/logout", headers=headers, follow_redirects=False)
    assert (out.status_code, "set-cookie" in out.headers) == (403, False)
    assert "You are logged in as bob." in browser.get("/session/login").text


def test_a_program_needs_no_origin(world):
    browser = world.client(None)
    assert browser.post("/session/login", data=FORM, follow_redirects=False).status_code == 303
    assert browser.post("/session/logout", follow_redirects=False).status_code == 303


def test_a_page_by_https_takes_no_form_by_http(world):
    browser = world.client(None, Origin=HERE)
    browser.base_url = httpx.URL("https://127.0.0.1")
    assert browser.post("/session/login", data=FORM, follow_redirects=False).status_code == 403


# --- names of others


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8750", "127.0.0.1.evil.example", "192.0.2.1", "localhost@evil.example", ""]
)
def test_a_foreign_name_is_refused_everywhere(world, host):
    admin = world.client("admin", Host=host)
    for path in ("/v1/me", "/docs", "/healthz", "/session/login", "/none"):
        answer = admin.get(path)
        assert (answer.status_code, answer.json()["error"]) == (421, "foreign_host")
        assert not host or host not in answer.text
    assert world.used("admin") == 0


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8750", "[::1]:8750", "LOCALHOST", "127.9.9.9"])
def test_this_machine_is_known_by_its_own_names(world, host):
    assert world.client("admin", Host=host).get("/v1/me").status_code == 200


def test_names_of_the_setting_are_known(tmp_path, monkeypatch):
    monkeypatch.setenv("MUR_HOSTS", "ranges.example.org, other.example")
    world = make_world(tmp_path / "home")
    codes = [
        world.client("admin", Host=host).get("/v1/me").status_code
        for host in ("ranges.example.org", "Other.Example:443", "example.org", "a.ranges.example.org")
    ]
    assert codes == [200, 200, 421, 421]
    world.engine.dispose()


def test_where_an_answer_leads_is_never_made_from_the_host(world):
    browser = world.client(None, Host="localhost:4711")
    leads = [
        browser.get("/", follow_redirects=False),
        browser.post("/session/login", data=FORM, follow_redirects=False),
        browser.post("/session/logout", follow_redirects=False),
    ]
    assert [answer.headers["location"] for answer in leads] == ["/docs", "/", "/session/login"]


# --- methods, policies, documentation


def test_allow_names_all_methods(world):
    schema = world.client(None).get("/openapi.json").json()["paths"]
    for path, methods in schema.items():
        typed = re.sub(r"\{\w+\}", "1", path)
        right = sorted(method.upper() for method in methods)
        for wrong in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FROB"} - set(right):
            answer = world.client("admin").request(wrong, typed)
            assert (answer.status_code, answer.headers["allow"]) == (405, ", ".join(right)), (wrong, path)


@pytest.mark.parametrize("path", ["/docs", "/session/login"])
def test_pages_have_a_full_policy(world, path):
    policy = world.client(None).get(path).headers["content-security-policy"]
    said = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert said["default-src"] == "'none'" and said["base-uri"] == said["frame-ancestors"] == "'none'"
    assert "form-action" in said and "script-src" not in said


def test_documentation_is_made_once(world, monkeypatch):
    "Whoever asks for it needs no token, so it must cost nothing."
    stranger = world.client(None)
    first = [stranger.get(path).content for path in ("/docs", "/openapi.json")]

    def made_again(*_):
        raise AssertionError("it was made again")

    monkeypatch.setattr(pages, "_docs_page", made_again)
    monkeypatch.setattr(pages, "_openapi", made_again)
    assert [stranger.get(path).content for path in ("/docs", "/openapi.json")] == first


# --- guesses


def log_in(world, name: str, password: str, address: str, path: str = "/v1/login") -> int:
    sent = {"name": name, "password": password}
    client = world.client(None)
    client._transport.client = (address, 1)
    body = {"json": sent} if path == "/v1/login" else {"data": sent}
    return client.post(path, follow_redirects=False, **body).status_code


@pytest.mark.parametrize(("path", "right"), [("/v1/login", 200), ("/session/login", 303)])
def test_right_passwords_are_not_counted(world, path, right):
    assert [log_in(world, "bob", PASSWORD, "192.0.2.1", path) for _ in range(15)] == [right] * 15
    assert [log_in(world, "bob", "a wrong one", "192.0.2.1", path) for _ in range(12)] == [401] * 10 + [429] * 2


@pytest.mark.parametrize("path", ["/v1/login", "/session/login"])
def test_a_crowd_of_addresses_guesses_slowly_and_locks_nobody_out(world, path):
    "Forty addresses with four guesses each at one account; its owner comes in, even with one mistake of their own."
    codes = [log_in(world, "bob", f"guess {n}", f"203.0.113.{n // 4}", path) for n in range(160)]
    assert codes[:20] == [401] * 20 and codes[20:].count(429) == 35
    assert log_in(world, "bob", "a slip of mine", "192.0.2.1", path) == 401
    assert log_in(world, "bob", PASSWORD, "192.0.2.1", path) in (200, 303)
    assert log_in(world, "bob", PASSWORD, "203.0.113.39", path) == 429
    world.ticks[0] += 3601
    assert log_in(world, "bob", PASSWORD, "203.0.113.39", path) in (200, 303)


def test_both_ways_in_share_a_brake(world):
    codes = [log_in(world, "bob", f"guess {n}", "192.0.2.1", ("/v1/login", "/session/login")[n % 2]) for n in range(12)]
    assert codes == [401] * 10 + [429] * 2


# --- what the log keeps


def test_a_token_in_an_address_is_in_no_log(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    engine = connect(f"sqlite:///{home / 'mkrich.db'}")
    migrate(engine)
    tokens = add_people(engine, system_clock())
    raw = tokens["member"]
    with served(home) as server:
        for path in (f"/v1/{raw}", f"/v1/forecasts/{raw}", f"/v1/users/{raw}", f"/v1/me?x={raw}", f"/%6dur_{raw[4:]}"):
            for method in ("GET", "PUT", "FROB"):
                headers = {"Authorization": f"Bearer {tokens['admin']}"}
                answer = httpx.request(method, server.url + path, headers=headers, timeout=LONG)
                assert 400 <= answer.status_code < 500 and raw not in answer.text
        assert server.stop() == 0
    told = server.log.read_text() + server.said.read_text()
    assert '"event":"request"' in told and raw not in told and raw[4:] not in told
    engine.dispose()


def test_wrong_tokens_do_not_fill_a_disk(world):
    "Ten thousand addresses that guess: the memory of them is bounded."
    limiter = Limiter(keep=100)
    for n in range(10_000):
        limiter.take(f"198.51.{n // 256}.{n % 256}")
    assert len(limiter._tries) == 100
