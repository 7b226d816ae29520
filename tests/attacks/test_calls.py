"""Attacks on what is counted and on tokens: calls that are free, calls charged for nothing, counts in two processes, tokens in the wrong place."""

import asyncio
import os
import re
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pandas as pd
import pytest
from api_kit import burst, make_world, served
from servers import database_url, postgresql  # noqa: F401
from sqlalchemy import event, select, text
from waiting import LONG, wait_for

from make_us_rich.api.access import Authenticator
from make_us_rich.api.accounts import Limiter, create_token, get_user, list_tokens, set_disabled
from make_us_rich.api.examples import NOW, PASSWORD, a_forecast, add_people
from make_us_rich.api.page_sessions import open_page, page_token
from make_us_rich.api.refusals import Refusal
from make_us_rich.api.routing import CHECK, COOKIE
from make_us_rich.core.database import connect, migrate, session
from make_us_rich.core.settings import StoreError
from make_us_rich.core.tables import Usage
from make_us_rich.market.series import Series


@pytest.fixture
def world(tmp_path):
    world = make_world(tmp_path / "home")
    yield world
    world.engine.dispose()


# --- tokens in the wrong place


def logged_in(world) -> str:
    "The cookie of a browser that logged in as bob."
    form = {"name": "bob", "password": PASSWORD}
    answer = world.client(None).post("/session/login", data=form, follow_redirects=False)
    assert answer.status_code == 303
    return answer.cookies[COOKIE]


def knock(world, cookie: str):
    return world.client(None).get(CHECK, headers={"Cookie": f"{COOKIE}={cookie}"})


def test_a_cookie_is_no_token_and_a_token_is_no_cookie(world):
    cookie = logged_in(world)
    assert knock(world, cookie).headers["x-mur-user"] == "bob"
    assert world.client(cookie).get("/v1/me").status_code == 401
    assert [knock(world, world.tokens[who]).status_code for who in ("member", "admin")] == [401, 401]
    handed_on = knock(world, cookie).headers["x-mur-token"]
    assert world.client(handed_on).get("/v1/me").json()["name"] == "bob"
    assert knock(world, handed_on).status_code == 401


def test_a_log_out_ends_the_session_and_nothing_else(world):
    with session(world.engine) as s:
        named, _ = create_token(s, get_user(s, "bob"), "page", NOW)  # an API token of that name
    cookie, elsewhere = logged_in(world), logged_in(world)
    handed_on = knock(world, cookie).headers["x-mur-token"]
    leaving = world.client(None)
    leaving.post("/session/logout", headers={"Cookie": f"{COOKIE}={cookie}"})
    assert [knock(world, cookie).status_code, world.client(handed_on).get("/v1/me").status_code] == [401, 401]
    leaving.post("/session/logout", headers={"Cookie": f"{COOKIE}={named}"})
    assert [world.client(named).get("/v1/me").status_code, knock(world, elsewhere).status_code] == [200, 200]


def test_a_person_has_few_sessions_and_is_never_locked_out(world):
    world.api.authenticator.guesses = Limiter(times=10**6)
    cookies = [logged_in(world) for _ in range(5)]
    with session(world.engine) as s:
        cookies += [open_page(s, get_user(s, "bob"), NOW, 7) for _ in range(60)]
    codes = [knock(world, cookie).status_code for cookie in cookies]
    assert codes == [401] * 55 + [200] * 10
    with session(world.engine) as s:
        assert not {token.sha256 for token in list_tokens(s)} & set(cookies) and page_token("x") != page_token("y")


@pytest.mark.parametrize("who", ["member", "wrong"])
def test_a_pasted_token_is_no_name(world, who):
    "Nor does a sentence repeat it."
    pasted = world.tokens[who]
    admin = world.client("admin")
    tries = [
        admin.post("/v1/users", json={"name": pasted}),
        admin.post("/v1/users", json={"name": f"x-{pasted}"}),
        admin.put(f"/v1/users/{pasted}", json={"disabled": True}),
        admin.post("/v1/me/tokens", json={"name": pasted}),
        world.client(None).post("/v1/login", json={"name": pasted, "password": "correct horse battery"}),
    ]
    assert [answer.status_code for answer in tries] == [422, 422, 404, 422, 401]
    assert not [answer.text for answer in tries if pasted[4:] in answer.text]
    form = world.client(None).post("/session/login", data={"name": pasted, "password": "x"})
    assert form.status_code == 401 and pasted[4:] not in form.text
    with session(world.engine) as s:
        names = [user["name"] for user in admin.get("/v1/users").json()["users"]] + [t.name for t in list_tokens(s)]
    assert not [name for name in names if "mur_" in name]


# --- calls that are free


MARKS = [37_000 + 1e-3 * (n + 1) * 7919 for n in range(21)]  # prices that stand nowhere else


@pytest.fixture
def running(world):
    "The running hour is on record and shown, everywhere where forecasts are shown."
    quantiles = dict(zip(map(str, a_forecast().quantiles), MARKS, strict=True))
    forecast = a_forecast(quantiles=quantiles, median=MARKS[10])
    world.service.ledger.record(forecast, None, NOW)
    world.show(forecast)
    world.service.states[Series.parse("BTC_USDT")].settling.count(world.service.ledger)
    return world


RIGHT = {
    "/v1/login": {"json": {"name": "bob", "password": PASSWORD}},
    "/session/login": {"data": {"name": "bob", "password": PASSWORD}},
    "/v1/me/tokens": {"json": {"name": "phone"}},
}


def numbers_in(text: str) -> set[float]:
    return {float(number) for number in re.findall(r"\d+\.\d+", text)}


def test_no_uncounted_route_shows_the_running_hour(running):
    "Every route that openapi.json says is not counted, in every form it has, to somebody with no calls left too."
    schema = running.client(None).get("/openapi.json").json()
    routes = {
        (method.upper(), path): route["x-access"]
        for path, way in schema["paths"].items()
        for method, route in way.items()
    }
    shown = running.client().get("/v1/forecasts/BTC_USDT").text
    assert numbers_in(shown) >= set(MARKS), "the search would find them"
    running.limit_calls("bob", 0)
    free = [key for key, access in routes.items() if access in ("known", "public")]
    assert ("GET", "/v1/forecasts/{pair}/history") in free and len(free) > 15
    for method, path in free:
        options = RIGHT.get(path, {}) if method == "POST" else {}
        typed = path.format(pair="BTC_USDT", token_id=2_000_000, name="nobody", run_id="BTC_USDT-1h-none")
        for query in ("", "?limit=1", "?limit=720", "?interval=1h"):
            answer = running.client().request(method, typed + query, follow_redirects=False, **options)
            assert not numbers_in(answer.text) & set(MARKS), (method, typed + query)
    assert [running.client().get(p).status_code for p in ("/v1/stream", "/v1/overview", "/v1/forecasts")] == [429] * 3


def test_history_is_of_settled_hours(running):
    assert running.client().get("/v1/forecasts/BTC_USDT/history?limit=1").json()["rows"] == []
    with session(running.engine) as s:
        s.execute(text("UPDATE forecasts SET settled_at = target_close, actual = 37000"))
    (row,) = running.client().get("/v1/forecasts/BTC_USDT/history?limit=1").json()["rows"]
    assert set(row["quantiles"].values()) == set(MARKS)


def test_what_is_not_counted_has_a_brake(world):
    codes = Counter(world.client().get("/v1/models").status_code for _ in range(310))
    assert codes == {200: 300, 429: 10}
    braked = world.client().get("/v1/models")
    assert (braked.json()["error"], braked.headers["retry-after"]) == ("too_fast", "60")
    assert world.client().get("/v1/forecasts").status_code == 200  # what is counted is counted
    assert world.client("admin").get("/v1/models").status_code == 200  # and others are not slowed down
    world.ticks[0] += 60
    assert world.client().get("/v1/models").status_code == 200


# --- charged and refused


@contextmanager
def statements(engine):
    "What is said to the database meanwhile."
    said: list[str] = []

    def listen(conn, cursor, statement, *more):
        said.append(statement)

    event.listen(engine, "before_cursor_execute", listen)
    yield said
    event.remove(engine, "before_cursor_execute", listen)


def test_a_refusal_of_somebody_used_up_needs_no_database(world):
    world.limit_calls("bob", 2)
    assert [world.client().get("/v1/forecasts").status_code for _ in range(3)] == [200, 200, 429]
    with statements(world.engine) as said:
        answers = [world.client().get("/v1/forecasts") for _ in range(20)]
    assert ({answer.status_code for answer in answers}, said) == ({429}, [])
    assert answers[0].json()["error"] == "quota" and int(answers[0].headers["retry-after"]) > 600_000
    world.ticks[0] += 1
    with statements(world.engine) as said:
        assert world.client().get("/v1/forecasts").status_code == 429
    assert said  # asked again


def test_a_counted_call_in_memory_needs_no_thread_and_no_database(world, monkeypatch):
    for _ in range(2):
        world.client().get("/v1/forecasts")

    async def no_thread(*_):
        raise AssertionError("a thread was asked")

    monkeypatch.setattr("make_us_rich.api.access.run_in_threadpool", no_thread)
    with statements(world.engine) as said:
        left = [world.client().get("/v1/forecasts").headers["x-calls-left"] for _ in range(30)]
    assert (left, said) == ([str(n) for n in range(997, 967, -1)], [])
    monkeypatch.undo()
    assert world.used() == 32


@contextmanager
def held(engine, user: int | None = None):
    "Another process writes and does not end; with `user` on PostgreSQL only their row is held."
    with engine.connect() as other:
        if engine.dialect.name == "sqlite":
            other.exec_driver_sql("BEGIN IMMEDIATE")
        elif user is None:
            other.exec_driver_sql("LOCK TABLE usage, tokens IN EXCLUSIVE MODE")
        else:
            other.exec_driver_sql(f"SELECT * FROM usage WHERE user_id = {user} FOR UPDATE")
        yield
        other.rollback()


@pytest.fixture
def impatient(tmp_path, database_url):  # noqa: F811
    "A world whose database waits .3 seconds for a lock, and an engine of another process."
    world = make_world(tmp_path / "home", database_url=database_url, wait=0.3)
    other = connect(database_url)
    yield world, other
    world.engine.dispose()
    other.dispose()


def used_by(engine) -> dict[int, int]:
    with session(engine) as s:
        return {row.user_id: row.used for row in s.scalars(select(Usage))}


def test_under_a_write_lock_callers_are_told_and_not_charged(impatient):
    world, other = impatient
    world.client("admin").get("/v1/forecasts")  # known, and nothing left in memory
    with held(other), ThreadPoolExecutor(10) as pool:
        who = ["member", "admin"] * 15
        answers = list(pool.map(lambda each: world.client(each).get("/v1/forecasts"), who))
    told = Counter(
        (answer.status_code, answer.json().get("error"), answer.headers.get("retry-after")) for answer in answers
    )
    assert told == {(503, "database_busy", "5"): 30}
    assert (world.used("member"), world.used("admin")) == (0, 1)
    assert [world.client(each).get("/v1/forecasts").status_code for each in who[:2]] == [200, 200]
    assert (world.used("member"), world.used("admin")) == (1, 2)


def test_what_is_in_memory_goes_on_under_a_lock(impatient):
    world, other = impatient
    for _ in range(2):
        world.client().get("/v1/forecasts")
    with held(other):
        assert {world.client().get("/v1/forecasts").status_code for _ in range(63)} == {200}
        assert world.client().get("/v1/forecasts").json()["error"] == "database_busy"
        world.api.authenticator.leases.give_back()
    assert world.used() == 65


def test_one_users_row_that_is_locked_stops_nobody_else(tmp_path, postgresql):  # noqa: F811
    world = make_world(tmp_path / "home", database_url=postgresql.new_database(), wait=0.3)
    world.client().get("/v1/forecasts")
    bob = next(iter(used_by(world.engine)))
    with held(world.engine, bob):
        assert world.client().get("/v1/forecasts").json()["error"] == "database_busy"
        assert {world.client("admin").get("/v1/forecasts").status_code for _ in range(20)} == {200}
    assert world.client().get("/v1/forecasts").status_code == 200
    assert (world.used(), world.used("admin")) == (2, 20)
    world.engine.dispose()


@pytest.mark.parametrize(
    ("fault", "status"),
    [(RuntimeError("x"), 500), (StoreError("x", "database_busy"), 503), (asyncio.CancelledError(), 0)],
)
def test_whatever_happens_after_the_count_gives_back(world, monkeypatch, fault, status):
    def fails(*_):
        raise fault

    async def get():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(world.app), base_url="http://localhost") as client:
            headers = {"Authorization": f"Bearer {world.tokens['member']}"}
            return (await client.get("/v1/forecasts/BTC_USDT", headers=headers)).status_code

    monkeypatch.setattr("make_us_rich.api.forecasts.state_of", fails)
    if status:
        assert asyncio.run(get()) == status
    else:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(get())
    monkeypatch.undo()
    assert world.used() == 0
    assert world.client().get("/v1/forecasts/BTC_USDT").status_code == 200
    assert world.used() == 1


def test_a_caller_who_leaves_while_the_database_is_asked_is_not_counted(impatient):
    world, other = impatient
    authenticator, header = world.api.authenticator, f"Bearer {world.tokens['member']}"

    async def leave():
        with held(other):
            first = asyncio.create_task(authenticator.enter(header, "", "counted"))
            second = asyncio.create_task(authenticator.enter(header, "", "counted"))
            await asyncio.sleep(0.1)
            first.cancel()
            others = await asyncio.gather(first, second, return_exceptions=True)
        assert isinstance(others[0], asyncio.CancelledError) and isinstance(others[1], StoreError)
        assert (await authenticator.enter(header, "", "counted")).left == 999

    asyncio.run(leave())
    assert world.used() == 1


def test_no_row_of_the_database_leaves_its_session(world):
    "The person in memory is a plain value: a session that fails elsewhere takes nothing from it."
    world.client().get("/v1/forecasts")
    (remembered,) = [person for person, _ in world.api.authenticator.recent._known.values()]
    assert not hasattr(remembered, "_sa_instance_state") and remembered.name == "bob"


# --- leases over processes


def authenticators(url: str, number: int = 2, wait: float = LONG):
    "Workers: each its own engine and memory, as processes have them."
    return [Authenticator(connect(url, wait=wait), lambda: pd.Timestamp.now("UTC"), 1000) for _ in range(number)]


@pytest.fixture
def people(database_url):  # noqa: F811
    engine = connect(database_url, wait=LONG)
    migrate(engine)
    tokens = add_people(engine, pd.Timestamp.now("UTC"))
    yield engine, tokens
    engine.dispose()


def ends(act) -> str:
    try:
        act()
        return "let in"
    except Refusal as e:
        return e.error
    except Exception as e:
        return type(e).__name__


def test_revoked_here_at_once_and_elsewhere_within_a_second(people, database_url):  # noqa: F811
    "Also with calls in memory, which are nobody's then and go back."
    engine, tokens = people
    here, there = workers = authenticators(database_url)
    header = f"Bearer {tokens['member']}"
    for worker in workers:
        for _ in range(3):
            worker.admit(header, "", "counted")
        assert worker.leases.held(2, pd.Timestamp.now("UTC")) > 0
    with session(engine) as s:
        set_disabled(s, "bob", True, pd.Timestamp.now("UTC"))
    started = time.monotonic()
    here.forget()
    assert ends(lambda: here.admit(header, "", "counted")) == "AuthError"
    wait_for(lambda: ends(lambda: there.admit(header, "", "counted")) == "AuthError")
    taken = time.monotonic() - started
    while time.monotonic() < started + 1.0:
        time.sleep(0.05)
    assert ends(lambda: there.admit(header, "", "counted")) == "AuthError" and taken > 0
    for worker in workers:
        worker.leases.give_back()
        worker.engine.dispose()


def test_a_limit_that_is_lowered_is_never_exceeded_after_a_second(people, database_url):  # noqa: F811
    engine, tokens = people
    (worker,) = authenticators(database_url, 1)
    header = f"Bearer {tokens['member']}"
    for _ in range(5):
        worker.admit(header, "", "counted")
    with session(engine) as s:
        get_user(s, "bob").monthly_calls = 8
    worker.forget()
    assert [ends(lambda: worker.admit(header, "", "counted")) for _ in range(5)] == ["let in"] * 3 + ["quota"] * 2
    with session(engine) as s:
        get_user(s, "bob").monthly_calls = 10
    worker.forget()
    assert [ends(lambda: worker.admit(header, "", "counted")) for _ in range(3)] == ["let in"] * 2 + ["quota"]
    assert list(used_by(engine).values()) == [10]
    worker.engine.dispose()


def serve_two(tmp_path, database_url):  # noqa: F811
    "Two real processes that know nothing of each other but the database."
    for name in ("one", "two"):
        (tmp_path / name).mkdir(exist_ok=True)
    return (served(tmp_path / name, database_url=database_url) for name in ("one", "two"))


def port_of(server) -> int:
    return int(server.url.rsplit(":", 1)[1])


def test_two_processes_a_kill_and_an_exact_end(tmp_path, people, database_url):  # noqa: F811
    "Never more than the limit; the killed one takes at most 64 and those under way with it; the other one ends at the limit exactly."
    engine, tokens = people
    limit = 600
    with session(engine) as s:
        get_user(s, "bob").monthly_calls = limit
    one, two = serve_two(tmp_path, database_url)
    with one as killed, two as other:

        async def both():
            return await asyncio.gather(
                *(burst(port_of(server), "/v1/forecasts", tokens["member"], 100, 8) for server in (killed, other))
            )

        first = [code for part in asyncio.run(both()) for code, _ in part]
        assert first == [200] * 200
        assert limit >= sum(used_by(engine).values()) >= 200
        asyncio.run(burst(port_of(killed), "/v1/forecasts", tokens["member"], 3, 1))
        os.kill(killed.process.pid, signal.SIGKILL)
        killed.process.wait(LONG)
        rest = [code for code, _ in asyncio.run(burst(port_of(other), "/v1/forecasts", tokens["member"], 600, 8))]
        assert set(rest) == {200, 429}
        answered = 203 + rest.count(200)
        assert limit - 64 <= answered <= limit
        assert list(used_by(engine).values()) == [limit]


def test_what_nobody_fetches_is_given_back_after_a_second_and_at_sigterm(tmp_path, people, database_url):  # noqa: F811
    engine, tokens = people
    one, two = serve_two(tmp_path, database_url)
    with one as server, two as other:
        for each in (server, other):
            answers = asyncio.run(burst(port_of(each), "/v1/forecasts", tokens["member"], 10, 1))
            assert [code for code, _ in answers] == [200] * 10
        wait_for(lambda: list(used_by(engine).values()) == [20], what="leases to be given back")
        me = httpx.get(f"{other.url}/v1/me", headers={"Authorization": f"Bearer {tokens['member']}"}, timeout=LONG)
        assert (me.json()["used"], me.json()["left"]) == (20, 980)
        for each in (server, other):
            asyncio.run(burst(port_of(each), "/v1/forecasts", tokens["member"], 10, 1))
            assert each.stop() == 0
    assert list(used_by(engine).values()) == [40]
