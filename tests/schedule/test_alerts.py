"""Alerts over real HTTP: told once, over restarts and full disks; no address in any log; the rules on SQLite and PostgreSQL."""

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
from servers import database_url, postgresql  # noqa: F401

from make_us_rich.core.database import connect, migrate, session
from make_us_rich.core.settings import SettingsError
from make_us_rich.core.tables import ForecastRow, RunRow
from make_us_rich.market.series import Series
from make_us_rich.schedule import alerts as module
from make_us_rich.schedule.alerts import Alerts, Condition, open_services, read_state, send_heartbeat, send_test
from make_us_rich.schedule.rules import Watched, database_conditions, exchange_away

NOON = pd.Timestamp("2026-11-24T12:00Z")
HOUR = pd.Timedelta("1h")
FAILED = Condition("run/BTC_USDT/1h/default", "BTC_USDT failed", "kernel died (signal 9)")


@pytest.fixture
def inbox():
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            server.got.append((self.path, json.loads(body) if body[:1] == b"{" else None))
            self.send_response(server.answer)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.got, server.answer, server.port = [], 200, server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def titles(inbox):
    return [body["title"].removeprefix("Make Us Rich: ") for _, body in inbox.got if body]


def test_one_message_per_trouble_and_one_when_it_is_over(inbox, tmp_path):
    url = f"json://127.0.0.1:{inbox.port}"
    for _ in range(4):  # each round is a restart
        alerts = Alerts(url, tmp_path / "alerts.json")
        alerts.update("run", [FAILED])
        alerts.update("disk", [])
    alerts.update("run", [])
    alerts.update("run", [])
    alerts.update("run", [FAILED])  # again: that is new
    assert titles(inbox) == ["BTC_USDT failed", "over: BTC_USDT failed", "BTC_USDT failed"]


def test_nothing_is_lost_while_the_receiver_is_away(inbox, tmp_path):
    inbox.answer = 503
    alerts = Alerts(f"json://127.0.0.1:{inbox.port}", tmp_path / "alerts.json")
    alerts.update("run", [FAILED])
    alerts.update("run", [])
    assert len(inbox.got) == 1, "a receiver that fails is left alone for a while"
    inbox.answer = 200
    inbox.got.clear()
    again = Alerts(f"json://127.0.0.1:{inbox.port}", tmp_path / "alerts.json")
    assert again.deliver() and titles(inbox) == ["BTC_USDT failed", "over: BTC_USDT failed"]
    assert read_state(tmp_path / "alerts.json") == ({}, [])
    assert (tmp_path / "alerts.json").stat().st_mode & 0o077 == 0


def test_a_full_disk_does_not_silence_the_alert_about_it(inbox, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_atomic", full)
    alerts = Alerts(f"json://127.0.0.1:{inbox.port}", tmp_path / "alerts.json")
    alerts.update("disk", [Condition("disk/1", "the disk is nearly full", "12 MB are free")])
    assert titles(inbox) == ["the disk is nearly full"]


def test_no_address_in_logs_errors_or_reprs(inbox, tmp_path, caplog, capfd):  # F95
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore", "urllib3", "apprise", "requests"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    url = f"json://user:canary1@127.0.0.1:{inbox.port}/canary2, tgram://123456789:canary3canary3canary3canary3canary3c/77/"
    alerts = Alerts(url, tmp_path / "alerts.json")
    alerts._urls.popitem()  # telegram is not called here
    alerts.update("run", [FAILED])
    assert send_heartbeat(f"http://127.0.0.1:{inbox.port}/canary4") and not send_heartbeat("http://127.0.0.1:9/canary5")
    assert send_test(f"json://127.0.0.1:{inbox.port}/canary6") == [("JSON", True)]
    with pytest.raises(SettingsError) as caught:
        open_services("nothing://canary7")
    assert [path for path, _ in inbox.got] == ["/canary2", "/canary4", "/canary6"]
    out, err = capfd.readouterr()
    for place in (caplog.text, out, err, str(caught.value), repr(alerts), (tmp_path / "alerts.json").read_text()):
        assert "canary" not in place
    assert logging.getLogger("httpx").level == logging.DEBUG, "the loggers are as they were"


def test_do_not_know_is_not_all_is_well(inbox, tmp_path):
    "A restart while the exchange is away must not announce its return."
    alerts = Alerts(f"json://127.0.0.1:{inbox.port}", tmp_path / "alerts.json")
    for since in (NOON - HOUR, None):
        found = exchange_away(since, NOON)
        assert found is not None
        alerts.update("exchange", found)
        if since is not None:
            assert exchange_away(NOON - pd.Timedelta("2min"), NOON) is None  # just restarted: leave it open
    title = "the exchange has not answered since 2026-11-24T11:00:00Z"
    assert titles(inbox) == [title, f"over: {title}"]


def run(hours_ago, state, **more):
    facts = {
        "run_id": f"r{hours_ago}",
        "cutoff": NOON - hours_ago * HOUR,
        "state": state,
        "reason": "why",
        "started_at": NOON,
    }
    plain = {
        "pair": "BTC_USDT",
        "interval": "1h",
        "recipe": "default",
        "recipe_hash": "0",
        "exit_class": "",
        "version": "",
        "host": "here",
    }
    return RunRow(**facts | plain | {"notebook": "", "log": "", "attempts": 1} | more)


def test_rules_on_both_databases(database_url):  # noqa: F811
    engine = connect(database_url)
    migrate(engine)
    btc = Watched(Series.parse("BTC_USDT"), "default", HOUR, NOON - 100 * HOUR)

    def found(now=NOON):
        with session(engine) as s:
            return {
                c.key.partition("/")[0]
                for conditions in database_conditions(s, [btc], now).values()
                for c in conditions
            }

    assert found() == {"retrain"}  # never trained
    with session(engine) as s:
        s.add_all([run(i, "refused") for i in range(2, 8)])
    assert found() == {"refused"}
    with session(engine) as s:
        s.add(run(1, "failed", retry_at=NOON))
    assert found() == {"refused"}, "a failure that is tried again is not told yet"
    with session(engine) as s:
        s.add(run(0, "failed"))
    assert found() == {"refused", "run"}
    assert found(NOON + 5 * HOUR) == {"refused", "run", "retrain"}
    with session(engine) as s:
        s.add(run(-1, "published"))
        s.add(run(-2, "running"))
        s.add(run(-3, "skipped"))
    assert found() == set()
    opened = NOON - 10 * HOUR
    with session(engine) as s:
        times = {"as_of": opened, "target_open": opened, "target_close": opened + HOUR, "issued_at": opened}
        texts = {"pair": "BTC_USDT", "interval": "1h", "model_version": "v", "status": "ok"}
        s.add(ForecastRow(**times | texts | dict.fromkeys(("reason", "source", "label", "run_id"), "")))
    assert found() == {"forecast", "settle"}
    engine.dispose()
