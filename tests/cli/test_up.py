"""`mkrich up` as one person on one machine meets it: real processes, real ports; what dies comes back, and nothing stays behind."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import pandas as pd
import psutil
import pytest
from servers import free_port
from tiny_model import publish
from waiting import LONG, wait_for

from make_us_rich.cli.parts import DEMO_PLAN, DEMO_START
from make_us_rich.core.database import connect, migrate
from make_us_rich.core.settings import get_settings
from make_us_rich.registry.store import ModelStore
from make_us_rich.runs.ledger import RunLedger
from make_us_rich.runs.run import identify
from make_us_rich.schedule.plan import read_plan

MKRICH = str(Path(sys.executable).parent / "mkrich")
HOUR = pd.Timedelta("1h")


def get(url, token=""):
    "Status and body; status 0 if nobody answers."
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=LONG) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read()
    except OSError:
        return 0, b""


def family(mark):
    "All living processes with this mark in their environment: number and command line."
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("MKRICH_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = " ".join(process.cmdline())
    return found


class Up:
    "A running `mkrich up`; every process that it starts, however deep, carries its mark in the environment."

    def __init__(self, folder, *options):
        self.mark, self.folder, self.home = secrets.token_hex(8), folder, folder / "store" / "up-demo"
        self.page, self.api = free_port(), free_port()
        self.temporary = Path(tempfile.mkdtemp(prefix="up-"))  # short: Voila keeps sockets in it
        env = {k: v for k, v in os.environ.items() if not k.startswith("MUR_")}
        env |= {
            "MUR_HOME": str(folder / "store"),
            "MUR_RUNS": str(folder / "runs"),
            "OMP_NUM_THREADS": "1",
            "MKRICH_MARK": self.mark,
            "TMPDIR": str(self.temporary),
        }
        command = [MKRICH, "up", "--port", str(self.page), "--api-port", str(self.api), *options]
        options = {"env": env, "cwd": folder, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        with (folder / "err").open("w") as errors:
            self.process = subprocess.Popen(command, stderr=errors, **options)

    def said(self):
        return (self.folder / "err").read_text()

    def family(self):
        return family(self.mark)

    def part(self, word):
        "Process id of the part whose command line has this word."
        return next((pid for pid, line in self.family().items() if word in line), None)

    def clean_up(self):
        self.process.kill()
        self.process.wait(LONG)
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.stdout.close()
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture
def demo(tmp_path):
    "A demo whose pairs have a (tiny) model already, so that nothing is trained."
    settings = get_settings(
        home=tmp_path / "store" / "up-demo", runs=tmp_path / "runs" / "up-demo", exchange_url="http://127.0.0.1:9"
    )
    store, engine = ModelStore.of(settings), connect(settings.db_url)
    migrate(engine)
    ledger = RunLedger(engine)
    for entry in read_plan(DEMO_PLAN).entries.values():
        publish(store, entry.pair, DEMO_START.floor("h"))
        run = identify(entry.series, DEMO_START.floor("h"), entry.load_recipe())
        ledger.begin(run, settings.runs)
        ledger.finish(run, "published")
    engine.dispose()
    started = []

    def start(*options):
        started.append(Up(tmp_path, "--demo", *options))
        return started[-1]

    yield start
    for up in started:
        up.clean_up()


def test_a_life(demo):
    up = demo("--speed", "360")  # an hour in 10 seconds
    address = up.process.stdout.readline().strip()
    assert address.startswith(f"http://127.0.0.1:{up.page}/?token="), up.said()
    assert "360 times as fast as life" in up.said() and "Nothing here is about today" in up.said()

    api, token = f"http://127.0.0.1:{up.api}", (up.home / "local-token").read_text()
    wait_for(lambda: get(f"{api}/readyz")[0] == 200, what="ready")
    forecast = wait_for(lambda: json.loads(get(f"{api}/v1/forecasts/BTC_USDT", token)[1]), what="a forecast")
    assert forecast["status"] == "ok" and forecast["source"] == "historical sample"

    def next_hour():
        "The service keeps up with the clock."
        told = json.loads(get(f"{api}/v1/forecasts/BTC_USDT", token)[1])
        return told["as_of"] > forecast["as_of"] and told["status"] == "ok" and told["data_age_minutes"] < 60

    wait_for(next_hour, LONG, "a forecast of the next hour")
    assert get(f"http://127.0.0.1:{up.page}/voila/static/main.js")[0] in (401, 403, 404)  # not without the secret
    status, page = get(address)
    assert status == 200 and b"Make Us Rich" in page

    again = [MKRICH, "up", "--demo", "--port", str(free_port()), "--api-port", str(free_port())]
    second = subprocess.run(
        again, capture_output=True, text=True, timeout=LONG, env=os.environ | {"MUR_HOME": str(up.folder / "store")}
    )
    assert (second.returncode, second.stdout) == (2, "") and "another `mkrich up` runs on" in second.stderr

    os.kill(up.part("_voila"), signal.SIGKILL)
    wait_for(
        lambda: "the dashboard has died (signal 9); it is started again" in up.said() and get(address)[0] == 200,
        what="the page is back at its address",
    )
    (server,) = [pid for pid in up.family() if up.api in listening(pid)]
    os.kill(server, signal.SIGKILL)
    wait_for(
        lambda: "the API has died (signal 9)" in up.said() and get(f"{api}/readyz")[0] == 200, what="the API is back"
    )

    assert len(up.family()) >= 5 and "running" not in {
        row.state for row in RunLedger(connect(f"sqlite:///{up.home / 'mkrich.db'}")).rows()
    }
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(LONG) == 0, up.said()
    assert up.said().rstrip().endswith("stopping") and "Traceback" not in up.said()
    assert up.process.stdout.read() == ""  # one address, nothing else
    assert up.family() == {}
    assert list(up.temporary.glob("mur-page-*")) == []
    for port in (up.page, up.api):
        with socket.create_server(("127.0.0.1", port)):
            pass


def listening(pid):
    "Ports that a process listens on."
    with contextlib.suppress(psutil.Error):
        return [c.laddr.port for c in psutil.Process(pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    return []


def test_nothing_outlives_a_killed_caretaker(demo):
    up = demo()
    assert "token=" in up.process.stdout.readline(), up.said()
    assert len(up.family()) >= 5
    up.process.kill()
    wait_for(lambda: not up.family(), what="the end of all parts")
    assert list(up.temporary.glob("mur-page-*")) == []


def test_sigterm_while_it_starts(tmp_path):
    up = Up(tmp_path, "--demo")
    try:
        wait_for(
            lambda: "fetching candles" in up.said(), what="the first training begins"
        )  # an empty folder: it trains first
        up.process.terminate()
        assert up.process.wait(LONG) == 0, up.said()
        assert up.process.stdout.read() == "" and "Traceback" not in up.said()
        assert up.family() == {}
    finally:
        up.clean_up()


def test_nobody_trains_without_an_exchange(tmp_path):
    "Live, no model yet, and no network: one sentence, and nothing is left running."
    env = {k: v for k, v in os.environ.items() if not k.startswith("MUR_")} | {
        "MKRICH_MARK": (mark := secrets.token_hex(8))
    }
    env |= {"MUR_HOME": str(tmp_path / "s"), "MUR_EXCHANGE_URL": "http://127.0.0.1:9"}
    command = [MKRICH, "up", "BTC_USDT", "--port", str(free_port()), "--api-port", str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG, cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (1, "") and "Traceback" not in done.stderr
    assert (
        "the first training has failed (exit status 1), see above; try again, or look at `mkrich up --demo`"
        in done.stderr
    )
    assert family(mark) == {}
