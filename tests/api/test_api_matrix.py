"""Who gets in where: every route, role and state of a token, from a table that names them all; and Schemathesis over the OpenAPI."""

import os
from collections import Counter

import pandas as pd
import pytest
import schemathesis
from api_kit import make_world
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from make_us_rich.api.accounts import Limiter, add_user, create_token
from make_us_rich.api.examples import PASSWORD
from make_us_rich.api.log_ins import LogIns
from make_us_rich.api.routing import GuardedRoute
from make_us_rich.core.database import session
from make_us_rich.core.tables import Audit

# (method, path): (access, a call that is right but for the caller)
ROUTES = {
    ("GET", "/"): ("public", {}),
    ("GET", "/docs"): ("public", {}),
    ("GET", "/openapi.json"): ("public", {}),
    ("GET", "/healthz"): ("public", {}),
    ("GET", "/readyz"): ("public", {}),
    ("POST", "/v1/login"): ("public", {"json": {"name": "bob", "password": PASSWORD}}),
    ("GET", "/session/login"): ("public", {}),
    ("POST", "/session/login"): ("public", {"data": {"name": "bob", "password": PASSWORD}}),
    ("POST", "/session/logout"): ("public", {}),
    ("GET", "/session/check"): ("known", {}),
    ("GET", "/metrics"): ("local", {}),
    ("PUT", "/predict"): ("counted", {"params": {"currency": "btc", "compare": "usdt"}}),
    ("GET", "/v1/forecasts"): ("counted", {}),
    ("GET", "/v1/forecasts/{pair}"): ("counted", {}),
    ("GET", "/v1/candles/{pair}"): ("counted", {}),
    ("GET", "/v1/overview"): ("counted", {}),
    ("GET", "/v1/forecasts/{pair}/history"): ("known", {}),
    ("GET", "/v1/track-record"): ("known", {}),
    ("GET", "/v1/track-record/{pair}"): ("known", {}),
    ("GET", "/v1/models"): ("known", {}),
    ("GET", "/v1/status"): ("admin", {}),
    ("GET", "/v1/models/{pair}"): ("counted", {}),
    ("GET", "/v1/stream"): ("counted", {}),
    ("GET", "/check_models_number"): ("known", {}),
    ("GET", "/v1/me"): ("known", {}),
    ("GET", "/v1/me/tokens"): ("known", {}),
    ("POST", "/v1/me/tokens"): ("known", {"json": {"name": "phone"}}),
    ("DELETE", "/v1/me/tokens/{token_id}"): ("known", {}),
    ("PUT", "/update_models"): ("admin", {}),
    ("PUT", "/update_date"): ("admin", {}),
    ("POST", "/v1/models/{pair}/rollback"): ("admin", {"json": {"reason": "too narrow"}}),
    ("GET", "/v1/runs"): ("admin", {}),
    ("GET", "/v1/runs/{run_id}/page"): ("known", {}),
    ("GET", "/v1/runs/{run_id}/log"): ("admin", {}),
    ("GET", "/v1/users"): ("admin", {}),
    ("POST", "/v1/users"): ("admin", {"json": {"name": "dan"}}),
    ("PUT", "/v1/users/{name}"): ("admin", {"json": {"disabled": False}}),
}
BAD_TOKENS = ("wrong", "revoked", "expired", "disabled")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUR_HOSTS", "testserver")  # as Schemathesis calls it
        world = make_world(tmp_path_factory.mktemp("matrix") / "home", candles=200)
    world.api.authenticator.guesses = world.api.authenticator.brakes = Limiter(times=10**6)
    world.app.state.api.logins = LogIns(times=10**6)
    world.app.state.api.longest = 0.0  # a stream says hello and ends
    yield world
    world.engine.dispose()


def test_the_table_names_every_route(world):
    found = {(method, route.path): route.access for route in world.app.routes for method in route.methods}
    assert found == {key: access for key, (access, _) in ROUTES.items()}, (
        "declare the route, its access and its right call in ROUTES"
    )
    assert all(type(route) is GuardedRoute for route in world.app.routes)


def call(world, who, method, path, options, **headers):
    typed = path.format(pair="BTC_USDT", token_id=2_000_000, name="nobody", run_id="BTC_USDT-1h-none")
    return world.client(who, **headers).request(method, typed, follow_redirects=False, **options)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_who_gets_in(world, method, path):
    access, options = ROUTES[method, path]
    strangers = [call(world, None, method, path, options)] + [
        call(world, who, method, path, options) for who in BAD_TOKENS
    ]
    strangers.append(call(world, None, method, path, options, Authorization="Basic Ym9iOg=="))
    member, admin = call(world, "member", method, path, options), call(world, "admin", method, path, options)
    if access == "public":
        assert {answer.status_code for answer in [*strangers, member, admin]} <= {200, 303, 307, 503}
        return
    for answer in strangers:  # F63, F66
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="make-us-rich"')
        assert answer.json().keys() == {"error", "message", "request_id"}
    assert member.status_code == 403 if access in ("admin", "local") else member.status_code in (200, 201, 404)
    assert admin.status_code in (200, 201, 404, 409)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_token_in_the_url_is_refused_everywhere(world, method, path):
    options = dict(ROUTES[method, path][1])
    for name in ("token", "access_token", "x"):
        options["params"] = options.get("params", {}) | {name: world.tokens["admin"]}
        answer = call(world, "admin", method, path, options)
        assert (answer.status_code, answer.json()["error"]) == (401, "token_in_url")


@pytest.mark.parametrize(
    ("method", "path"), [key for key, (access, _) in ROUTES.items() if access not in ("public", "local")]
)
def test_a_broken_body_says_nothing_to_strangers(world, method, path):
    for content in (b"{", b"\xff\xfe", b'{"x": NaN}'):
        answer = call(world, None, method, path, {"content": content, "headers": {"Content-Type": "application/json"}})
        assert answer.status_code == 401


def test_a_member_at_an_admin_route_leaves_a_line_and_no_effect(world):  # F71
    before = len(world.client("admin").get("/v1/users").json()["users"])
    world.api.authenticator.scoldings = Limiter(clock=lambda: 0.0)  # all within a minute

    def lines() -> int:
        about = (Audit.action == "refused", Audit.target == "POST /v1/users", Audit.actor == "bob")
        with session(world.engine) as s:
            return s.query(Audit).filter(*about).count()

    known = lines()
    for _ in range(30):
        assert world.client().post("/v1/users", json={"name": "mallory", "role": "admin"}).status_code == 403
    assert len(world.client("admin").get("/v1/users").json()["users"]) == before
    assert lines() - known == 10  # ten a minute are enough evidence


def test_schemathesis(world):
    "No 5xx, no answer against its schema, no ignored authentication, nothing right refused and nothing wrong taken; CASES=2000 for more."
    cases = int(os.environ.get("CASES", "300"))
    now = pd.Timestamp("2023-11-23T19:00Z")
    with session(world.engine) as s:  # an admin whose token no generated id hits
        raw, token = create_token(s, add_user(s, "fuzz", now, role="admin", monthly_calls=10**8), "fuzz", now)
        token.id = 1_987_654_321
    headers = {"Authorization": f"Bearer {raw}"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", world.app)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.label for operation in operations} == {f"{method} {path}" for method, path in ROUTES} - {
        "GET /openapi.json"
    }
    takes = [operation for operation in operations if operation.path_parameters or operation.query or operation.body]
    modes = [(operation, GenerationMode.POSITIVE) for operation in operations] + [
        (operation, GenerationMode.NEGATIVE) for operation in takes
    ]
    done = []

    def run(operation, mode):
        @settings(
            max_examples=-(-cases // len(modes)),
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def one(case):
            response = case.call(headers=headers)
            done.append(response.status_code)
            case.validate_response(response, headers=headers)

        one()

    for operation, mode in modes:
        run(operation, mode)
    print(f"{len(done)} cases, answers: {dict(sorted(Counter(done).items()))}")
    assert len(done) >= cases / 3
    assert set(done) <= {200, 201, 303, 307, 400, 401, 404, 409, 422, 429, 503}
