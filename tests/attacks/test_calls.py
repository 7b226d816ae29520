"""Attacks on what is counted and on tokens: calls that are free, calls charged for nothing, counts in two processes, tokens in the wrong place."""

import pytest
from api_kit import make_world

from make_us_rich.api.accounts import Limiter, create_token, get_user, list_tokens, open_page, page_token
from make_us_rich.api.examples import NOW, PASSWORD
from make_us_rich.api.routing import CHECK, COOKIE
from make_us_rich.core.database import session


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
