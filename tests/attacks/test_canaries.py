"""Canaries: a machine full of secrets runs the product, and they are looked for in everything that it leaves and in everything it starts."""

import html
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from servers import free_port
from typer.testing import CliRunner
from waiting import LONG

from make_us_rich.cli.look import read_token
from make_us_rich.cli.main import app
from make_us_rich.core.secrets import WORK, environment_for
from make_us_rich.core.settings import SettingsError, get_settings
from make_us_rich.market.candles import fake_candles
from make_us_rich.market.replay import ReplayServer
from make_us_rich.registry import served_model
from make_us_rich.registry.examples import publish_example
from make_us_rich.registry.store import ModelStore
from make_us_rich.schedule.workers import Worker

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "small_run.ipynb"


def canary(name):
    "A value that stands nowhere by chance, with a slash as passwords have them."
    return f"canary/{name.lower()}/0123456789"


OURS = ("MUR_ALERT_URLS", "MUR_HEARTBEAT_URL", "MUR_SIGNING_KEY")
OF_STORES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "GOOGLE_API_KEY",
)
OF_OTHERS = (
    "GH_TOKEN",
    "OPENAI_API_KEY",
    "PGPASSWORD",
    "SMTP_PASSWORD",
    "MKRICH_TOKEN",
    "PREFECT_API_KEY",
    "PYTHON_SECRET",
)
NAMES = (*OURS, *OF_STORES, *OF_OTHERS, "WANDB_API_KEY", "HTTPS_PROXY", "MUR_EXCHANGE_URL")

LOOK = """
import psutil
seen, each = [], psutil.Process()
while each.pid != 1 and each.pid != {runner}:
    environ = open(f"/proc/{{each.pid}}/environ").read().split(chr(0))
    seen.append([" ".join(each.cmdline()), dict(x.split("=", 1) for x in environ if "=" in x)])
    each = each.parent()
seen.append(["", dict(os.environ)])
Path(home).with_name("seen").write_text(json.dumps(seen))
"""  # every process between the runner and the kernel, and what the kernel itself has
TRACK = """
import pandas as pd
from make_us_rich.models.tracking import track_run
nothing = pd.DataFrame({"step": [], "member": [], "train_loss": [], "valid_loss": []})
assert track_run(Path(home).with_name("tracked"), "run", {"recipe": "default"}, nothing, {"skill": 1.0}, {}) == "offline"
"""
RUNNER = """
import os, sys
from pathlib import Path
from make_us_rich.core.database import connect, migrate
from make_us_rich.core.settings import SettingsError, get_settings
from make_us_rich.market.series import Series
from make_us_rich.models.recipe import load_recipe
from make_us_rich.runs.evidence import keep_page
from make_us_rich.runs.execution import TrainOptions
from make_us_rich.runs.ledger import RunLedger
from make_us_rich.runs.runner import start_warm
from make_us_rich.runs.train import train
settings = get_settings()
settings.home.mkdir()
migrate(engine := connect(settings.db_url))
if sys.argv[3] == "warm":
    start_warm()
act = sys.argv[2].replace("{runner}", str(os.getpid())).replace("{{", "{").replace("}}", "}")
options = TrainOptions(notebook=Path(sys.argv[1]), parameters={"act": act})
outcome = train(Series.parse("BTC_USDT"), load_recipe("default"), settings=settings, ledger=RunLedger(engine), options=options)
print(keep_page(outcome, settings).model_dump_json())
"""


def full_of_secrets(exchange, folder):
    "The environment of such a machine."
    values = {name: canary(name) for name in NAMES}
    values |= {
        "MUR_ALERT_URLS": f"json://me:{canary('alert')}@127.0.0.1:9",
        "HTTPS_PROXY": f"http://me:{canary('proxy')}@127.0.0.1:9",
    }
    values |= {"MUR_HEARTBEAT_URL": f"http://127.0.0.1:9/{canary('heartbeat')}"}
    values |= {"MUR_EXCHANGE_URL": exchange.url.replace("://", "://me:canary-of-exchange@")}
    values |= {
        "MUR_HOME": str(folder / "store"),
        "MUR_RUNS": str(folder / "runs"),
        "MUR_HISTORY_DAYS": "10",
        "WANDB_MODE": "offline",
    }
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MUR_", "WANDB_"))}
    return clean | values


def left_below(folder):
    "Whatever a file, its name or a row of a database says, with the writings of HTML and URLs."
    for path in folder.rglob("*"):
        text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
        yield path, f"{path} {text} {html.unescape(text)}"
    for path in folder.rglob("*.db"):
        with sqlite3.connect(path) as database:
            yield path, "\n".join(database.iterdump())


@pytest.fixture(scope="module")
def exchange():
    with ReplayServer({"BTC_USDT": fake_candles(400, 0)}, label="synthetic candles") as server:
        yield server


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_a_run_has_what_it_needs_and_leaves_no_secret(exchange, tmp_path, start):
    env = full_of_secrets(exchange, tmp_path)
    command = [sys.executable, "-c", RUNNER, str(NOTEBOOK), LOOK + (TRACK if start == "warm" else ""), start]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LONG, cwd=tmp_path)
    outcome = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    assert outcome.get("state") == "published" and outcome["page"], done.stdout + done.stderr
    seen = json.loads((tmp_path / "seen").read_text())
    (tmp_path / "seen").unlink()
    assert len(seen) > 2
    for command, environment in seen:
        held = {name for name in NAMES if environment.get(name) == env[name]}
        assert held <= {"MUR_SIGNING_KEY", "MUR_EXCHANGE_URL", "HTTPS_PROXY"}, (
            command
        )  # W&B is offline, the store a folder
        assert "canary" not in command
    assert seen[-1][1]["MUR_SIGNING_KEY"] == env["MUR_SIGNING_KEY"]  # it seals its model, and asks the exchange
    told = [*left_below(tmp_path), ("what it said", done.stdout + done.stderr)]
    assert len(told) > 10 and any(str(place).endswith(".wandb") for place, _ in told) == (start == "warm")
    found = {str(place) for place, text in told if "canary" in text or quote("canary/", safe="") in text}
    assert not found
    told_papermill = json.loads(next((tmp_path / "runs").rglob("train.ipynb")).read_text())["metadata"]["papermill"]
    assert told_papermill["parameters"]["exchange_url"] == ""  # that of the settings; without a password it is named


def test_a_worker_has_no_secret_but_those_of_a_training(exchange, tmp_path, monkeypatch):
    for name, value in full_of_secrets(exchange, tmp_path).items():
        monkeypatch.setenv(name, value)
    worker = Worker(tmp_path / "log")
    try:
        settings = get_settings().model_dump(mode="json")
        assert worker.ask({"do": "migrate", "settings": settings}, LONG)["revision"]
        environment = psutil.Process(worker.process.pid).environ()
        assert "canary" not in " ".join(psutil.Process(worker.process.pid).cmdline())
    finally:
        worker.close()
    held = {name for name in NAMES if name in environment}
    assert held == {*OF_STORES, "PGPASSWORD", "WANDB_API_KEY", "HTTPS_PROXY"}
    assert held == {name for name in NAMES if name in environment_for(*WORK)}


def test_the_page_server_and_its_fork_server_have_no_secret(exchange, tmp_path):
    program = f"""
import psutil
from make_us_rich.core.settings import SettingsError, get_settings
from make_us_rich.dashboard.server import PageOptions, start_dashboard
running = start_dashboard(get_settings(), PageOptions(api_url="http://127.0.0.1:9", port={free_port()}, token="canary-of-page"))
try:
    family = [psutil.Process(running.process.pid), *psutil.Process(running.process.pid).children(recursive=True)]
    print(len(family), [(each.cmdline(), each.environ()) for each in family])
finally:
    running.stop()
"""
    command, env = [sys.executable, "-c", program], full_of_secrets(exchange, tmp_path)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LONG, cwd=tmp_path)
    assert done.returncode == 0 and int(done.stdout.split()[0]) >= 2, done.stderr
    assert "canary" not in done.stdout + done.stderr


def test_a_trial_has_no_secret(exchange, tmp_path, monkeypatch):
    for name, value in full_of_secrets(exchange, tmp_path).items():
        monkeypatch.setenv(name, value)
    store, asked = ModelStore("memory://"), []
    version = publish_example(store, "BTC_USDT", "2026-11-23T19:00:00Z")
    really = subprocess.run
    monkeypatch.setattr(served_model.subprocess, "run", lambda *a, **k: asked.append(k["env"]) or really(*a, **k))
    served_model.try_model(store.load("BTC_USDT", version))
    assert asked and "canary" not in str(asked) and not set(NAMES) & set(asked[0])


def test_no_token_and_no_password_stands_on_a_command_line(tmp_path):
    "Refused before anything is asked, in a sentence that does not repeat it; a file and the variable will do."
    for words in (
        ("forecast", "--api", "http://127.0.0.1:9", "--token", "canary-of-token"),
        ("fleet", "server", "--database", "postgresql+asyncpg://me:canary@127.0.0.1/x"),
    ):
        refused = CliRunner().invoke(app, words)
        assert isinstance(refused.exception, SettingsError)
        assert "can be read by everybody on this machine" in str(refused.exception)
        assert "canary" not in str(refused.exception) + refused.output
    assert "--token " not in CliRunner().invoke(app, ("forecast", "--help")).output
    (tmp_path / "token").write_text("mur_in_a_file\n")
    assert read_token(str(tmp_path / "token")) == "mur_in_a_file"
