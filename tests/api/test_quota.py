"""People, tokens and exact counting when many processes and threads come at once, on SQLite and on a real PostgreSQL."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from forks import FORKS, preloading
from servers import database_url, postgresql  # noqa: F401
from sqlalchemy import select, text
from waiting import LONG

from make_us_rich.api.accounts import (
    add_user,
    count_call,
    create_token,
    find_token,
    revoke_token,
    set_disabled,
    set_password,
    uncount_call,
    usage,
    verify_password,
)
from make_us_rich.core.database import connect, migrate, session
from make_us_rich.core.settings import AuthError, MakeUsRichError, SettingsError
from make_us_rich.core.tables import Audit, Usage, User

NOVEMBER = pd.Timestamp("2026-11-30T23:59:59.9Z")
DECEMBER = pd.Timestamp("2026-12-01T00:00:00Z")
forks = preloading(connect.__module__, add_user.__module__, "alembic.command", "psycopg")
PROCESSES, THREADS, CALLS = 2, 16, 100  # 3,200 calls


@pytest.fixture
def engine(database_url):  # noqa: F811
    made = connect(database_url, wait=LONG, connections=THREADS)  # nobody waits for a place, and everybody for his turn
    migrate(made)
    with session(made) as s:
        add_user(s, "ana", NOVEMBER)
    yield made
    made.dispose()


def count_well(engine, limit, now):
    with session(engine) as s:
        return count_call(s, 1, limit, now)


def count_badly(engine, limit, think):
    "The control: look, think, write."
    with session(engine) as s:
        used = s.scalar(select(Usage.used).where(Usage.user_id == 1)) or 0
    think()
    if used >= limit:
        return None
    with session(engine) as s:
        s.execute(text("UPDATE usage SET used = :n WHERE user_id = 1"), {"n": used + 1})
    return used + 1


def load(url, limit, turn, clock, barrier, results):
    "One process: 16 threads with 100 calls each; puts the list of (month, counter) of the calls that were let through. At the `turn`-th the month ends."
    engine, taken = connect(url, wait=LONG, connections=THREADS), []

    def work(_):
        for _ in range(CALLS):
            now = DECEMBER if clock.value else NOVEMBER
            if (used := count_well(engine, limit, now)) is not None:
                taken.append((now.month, used))
                if used == turn:
                    clock.value = 1

    try:
        barrier.wait(LONG)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(work, range(THREADS)))
        results.put(taken)
    except BaseException as e:
        results.put(repr(e))
    engine.dispose()


def run_load(engine, limit, turn=0):
    "What both processes together were let through, as a list of (month, counter)."
    url = engine.url.render_as_string(hide_password=False)
    clock, barrier, results = FORKS.Value("b", 0), FORKS.Barrier(PROCESSES), FORKS.Queue()
    processes = [FORKS.Process(target=load, args=(url, limit, turn, clock, barrier, results)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=LONG) for _ in processes]
    for process in processes:
        process.join(LONG)
    assert all(isinstance(answer, list) for answer in answers), answers
    return [each for answer in answers for each in answer]


def rows(engine):
    with session(engine) as s:
        return {row.month: row.used for row in s.scalars(select(Usage))}


# --- the count (F67, F68, F69, F70) -------------------------------------------------------------------------------------------------


def test_of_3200_calls_exactly_1000_are_let_through(engine):
    taken = run_load(engine, 1000)
    assert sorted(used for _, used in taken) == list(range(1, 1001))
    assert rows(engine) == {"2026-11": 1000}
    assert count_well(engine, 1000, NOVEMBER) is None


def test_look_think_write_lets_more_through(engine):
    "The test above can fail: of sixteen callers for one place, all have looked before one writes, and all are let through; the right way lets one."
    with session(engine) as s:
        s.add(Usage(user_id=1, month="2026-11", used=0))
    everybody = threading.Barrier(THREADS, timeout=LONG)
    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(lambda _: count_badly(engine, 1, everybody.wait), range(THREADS))) == [1] * THREADS
        assert Counter(pool.map(lambda _: count_well(engine, 1, DECEMBER), range(THREADS))) == {1: 1, None: THREADS - 1}


def test_the_month_ends_in_the_middle_of_the_load(engine):
    taken = run_load(engine, 700, turn=300)
    for month, name in ((11, "2026-11"), (12, "2026-12")):
        counters = sorted(used for each, used in taken if each == month)
        assert counters == list(range(1, rows(engine)[name] + 1)), (
            name
        )  # none lost, none twice: no reset happened to either
    assert 300 <= rows(engine)["2026-11"] <= 700
    assert rows(engine)["2026-12"] == 700


def test_limits_at_the_border(engine):
    assert count_well(engine, 0, NOVEMBER) is None
    assert rows(engine) == {}
    assert [count_well(engine, 1, NOVEMBER) for _ in range(3)] == [1, None, None]
    assert [count_well(engine, 2, NOVEMBER) for _ in range(2)] == [2, None]  # raised
    assert count_well(engine, 1, NOVEMBER) is None  # lowered again
    assert count_well(engine, -1, DECEMBER) is None
    with session(engine) as s:
        assert usage(s, s.get_one(User, 1), 1, NOVEMBER).left == 0


def test_our_faults_are_given_back_and_never_more(engine):
    def call_that_fails(n):
        used = count_well(engine, 1000, NOVEMBER)
        if n % 2:
            with session(engine) as s:
                uncount_call(s, 1, NOVEMBER)
        return used

    count_well(engine, 1000, DECEMBER)
    with ThreadPoolExecutor(16) as pool:
        assert None not in list(pool.map(call_that_fails, range(200)))
    assert rows(engine) == {"2026-11": 100, "2026-12": 1}

    def give_back(_):
        with session(engine) as s:
            uncount_call(s, 1, NOVEMBER)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(give_back, range(130)))
    assert rows(engine) == {"2026-11": 0, "2026-12": 1}


def test_a_call_that_was_rolled_back_is_not_counted(engine):
    def fault():
        with session(engine) as s:
            count_call(s, 1, 10, NOVEMBER)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fault()
    assert rows(engine) == {}


# --- people and tokens (F66) --------------------------------------------------------------------------------------------------------


def test_one_of_sixteen_gets_the_name(engine):
    def add(_):
        try:
            with session(engine) as s:
                add_user(s, "bob", NOVEMBER)
            return "added"
        except SettingsError as e:
            return e.reason

    with ThreadPoolExecutor(16) as pool:
        assert Counter(pool.map(add, range(16))) == {"added": 1, "name_taken": 15}
    with session(engine) as s:
        assert len(s.scalars(select(Audit).where(Audit.target == "bob")).all()) == 1


def words_of(act):
    try:
        act()
    except MakeUsRichError as e:
        return type(e), str(e), e.reason
    raise AssertionError("it was let in")


def test_every_way_to_be_refused_has_the_same_words(engine):
    hour = pd.Timedelta("1h")
    with session(engine) as s:
        ana = s.get_one(User, 1)
        bob = add_user(s, "bob", NOVEMBER, password="correct horse battery")
        good, _ = create_token(s, ana, "good", NOVEMBER)
        revoked, row = create_token(s, ana, "revoked", NOVEMBER)
        expired, _ = create_token(s, ana, "expired", NOVEMBER, expires=NOVEMBER + hour)
        locked_out, _ = create_token(s, bob, "bob", NOVEMBER)
    other = connect(engine.url.render_as_string(hide_password=False))  # another worker

    def find(raw, by=engine):
        with session(by) as s:
            return find_token(s, raw, NOVEMBER + hour).name

    assert [find(raw, other) for raw in (good, revoked, locked_out)] == ["ana", "ana", "bob"]
    with session(engine) as s:
        revoke_token(s, row.id, NOVEMBER)
        set_disabled(s, "bob", True, NOVEMBER)
    tokens = (revoked, expired, locked_out, "mur_unknown")
    refused = {words_of(lambda raw=raw, by=by: find(raw, by)) for raw in tokens for by in (engine, other)}
    assert len(refused) == 1
    assert refused.pop()[0] is AuthError
    assert find(good, other) == "ana"

    def sign_in(name, password):
        with session(engine) as s:
            verify_password(s, name, password)

    tries = [("bob", "correct horse battery"), ("bob", "wrong"), ("ana", "no password"), ("nobody", "wrong")]
    assert len({words_of(lambda t=t: sign_in(*t)) for t in tries}) == 1
    other.dispose()


def everything_on_disk(engine, postgresql):  # noqa: F811
    "Every byte that the database wrote: its files, its write-ahead log, and the server's own log."
    if engine.dialect.name == "sqlite":
        folder = Path(engine.url.database).parent
    else:
        folder = postgresql.folder
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("CHECKPOINT"))
    return b"\n".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_no_token_and_no_password_is_on_the_disk(engine, postgresql):  # noqa: F811
    password = "correct horse battery staple"
    with session(engine) as s:
        bob = add_user(s, "bob", NOVEMBER, password=password)
        raw, token = create_token(s, bob, "laptop", NOVEMBER)
    with session(engine) as s:
        find_token(s, raw, NOVEMBER)
        verify_password(s, "bob", password)
        set_password(s, "bob", password + "!", NOVEMBER)
    words_of(lambda: add_again(engine, password))
    disk = everything_on_disk(engine, postgresql)
    assert token.sha256.encode() in disk  # the search finds what is there
    for secret in (raw, raw[4:], raw[12:], raw[-20:], password):
        assert secret.encode() not in disk


def add_again(engine, password):
    with session(engine) as s:
        add_user(s, "bob", NOVEMBER, password=password)


def test_every_change_leaves_one_line(engine):
    with session(engine) as s:
        bob = add_user(s, "bob", NOVEMBER, role="admin", actor="ana")
        _, token = create_token(s, bob, "laptop", NOVEMBER, actor="ana")
        for _ in range(2):
            revoke_token(s, token.id, DECEMBER, actor="bob")
            set_disabled(s, "bob", True, DECEMBER, actor="ana")
        set_disabled(s, "bob", False, DECEMBER, actor="ana")
        set_password(s, "bob", "correct horse battery", DECEMBER, actor="ana")
    with session(engine) as s:
        found = s.scalars(select(Audit).where(Audit.target == "bob").order_by(Audit.id))
        lines = [(a.at, a.actor, a.action, a.target, a.detail) for a in found]
    assert lines == [
        (NOVEMBER, "ana", "user.added", "bob", "admin"),
        (NOVEMBER, "ana", "token.created", "bob", f"{token.id} laptop"),
        (DECEMBER, "bob", "token.revoked", "bob", f"{token.id} laptop"),
        (DECEMBER, "ana", "user.disabled", "bob", ""),
        (DECEMBER, "ana", "user.enabled", "bob", ""),
        (DECEMBER, "ana", "user.password", "bob", ""),
    ]


def test_the_database_fails_closed(engine):
    "When the database is locked nobody calls for free and nobody is let in (F79)."
    with session(engine) as s:
        raw, _ = create_token(s, s.get_one(User, 1), "laptop", NOVEMBER)
    impatient = connect(engine.url.render_as_string(hide_password=False), wait=0.2)
    done = threading.Event()

    def hold(ready):
        with engine.connect() as other:
            lock = (
                "BEGIN EXCLUSIVE"
                if engine.dialect.name == "sqlite"
                else "LOCK TABLE usage, tokens IN ACCESS EXCLUSIVE MODE"
            )
            other.exec_driver_sql(lock)
            ready.set()
            done.wait(LONG)
            other.rollback()

    ready = threading.Event()
    holder = threading.Thread(target=hold, args=(ready,))
    holder.start()
    assert ready.wait(LONG)

    def call():
        with session(impatient) as s:
            find_token(s, raw, NOVEMBER)
            count_call(s, 1, 1000, NOVEMBER)

    kind, _, reason = words_of(call)
    done.set()
    holder.join()
    assert (kind.__name__, reason) == ("StoreError", "database_locked")
    assert rows(engine) == {}
    impatient.dispose()
