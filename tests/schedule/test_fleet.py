"""A fleet here: a real Prefect server, PostgreSQL, S3, and two hosts (namespaces of their own) with a worker each; one host dies in the middle."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

import pandas as pd
import psutil
import pytest
from s3_kit import FLEET, s3  # noqa: F401
from servers import _die_with_parent, free_port, postgresql  # noqa: F401
from waiting import LONG, wait_for

from make_us_rich.core.database import connect, migrate
from make_us_rich.core.locks import Locks, series_lock
from make_us_rich.core.settings import get_settings
from make_us_rich.market.candle_store import CandleStore
from make_us_rich.market.candles import fake_candles
from make_us_rich.market.replay import ReplayServer
from make_us_rich.market.series import Series
from make_us_rich.models.recipe import load_recipe
from make_us_rich.registry.store import ModelStore
from make_us_rich.runs.ledger import RunLedger
from make_us_rich.runs.lost import close_lost
from make_us_rich.runs.run import find_notebook, identify
from make_us_rich.schedule.fleet import missing_runs
from make_us_rich.schedule.plan import Plan, read_plan

ROOT = Path(__file__).resolve().parents[2]
SMALL = ROOT / "tests" / "notebooks" / "small_run.ipynb"
KEY = "what-all-hosts-of-this-fleet-share"
PAIRS = ("BTC_USDT", "ETH_USDT")  # one for each host; every run of the engine costs many seconds of processor time
LIST = "pretrain: false\npairs:\n" + "".join(
    f"- {{pair: {pair}, recipe: default, overrides: {{members: 1}}}}\n" for pair in PAIRS
)
needs_prefect = pytest.mark.skipif(not (FLEET / "prefect").exists(), reason="needs .venv-prefect (make fleet)")


@pytest.fixture
def database(postgresql):  # noqa: F811
    url = postgresql.new_database().replace("postgresql://", "postgresql+psycopg://")
    engine = connect(url)
    migrate(engine)
    engine.dispose()
    return url


def test_lock_of_a_killed_process_is_free(database, tmp_path):
    locks, name = Locks(database, tmp_path), series_lock("BTC_USDT/1h")
    program = f"""
import time
from pathlib import Path
from make_us_rich.core.locks import Locks
with Locks({database!r}, Path()).hold([{name!r}, "ticket/1"]):
    print("held", flush=True)
    time.sleep(3600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, preexec_fn=_die_with_parent
    ) as process:
        assert process.stdout.readline() == "held\n"
        assert locks.taken([name, "ticket/1", "ticket/2"]) == {name, "ticket/1"}
        with pytest.raises(Exception, match="somebody else is at series/BTC_USDT/1h"), locks.hold([name]):
            pass
        process.kill()
        process.wait(LONG)
    with locks.hold([name], wait=LONG):
        assert locks.taken([name, "ticket/1"]) == {name}
    wait_for(lambda: not locks.taken([name]))


def test_rows_of_a_dead_host_are_closed_and_wanted_again_three_times(database, tmp_path):
    settings = get_settings(home=tmp_path, runs=tmp_path / "runs", database_url=database)
    ledger, now = RunLedger(connect(database)), pd.Timestamp("2026-11-24T12:05Z")
    plan = Plan(read_plan("[{pair: BTC_USDT, recipe: default}]").entries, "")
    for attempt in (1, 2, 3):
        (wanted,) = missing_runs(plan, ledger, settings, now)
        assert wanted.attempt == attempt and wanted.ticket.endswith(f"/{attempt}")
        ledger.begin(identify(Series.parse("BTC_USDT"), now.floor("h"), load_recipe("default")), settings.runs)
        with Locks(database, tmp_path).hold([series_lock("BTC_USDT/1h")]):
            assert missing_runs(plan, ledger, settings, now) == []  # it is under way
        assert close_lost(ledger, settings, {Series.parse("ETH_USDT")}) == []
    assert missing_runs(plan, ledger, settings, now) == []  # three hosts died over it: enough for this candle
    assert [w.why for w in missing_runs(plan, ledger, settings, now + pd.Timedelta("1h"))] == [
        "the newest one is of 2026-11-24T12:00:00Z"
    ]
    ledger.engine.dispose()


def make_program(folder, hold):
    "`mkrich` of a clone whose run notebook is the small one; it waits in its middle while the file `hold` is there."
    clone, environment = folder / "clone", folder / "environment"
    notebook = clone / find_notebook().relative_to(ROOT)
    notebook.parent.mkdir(parents=True)
    waits = f"while Path({str(hold)!r}).exists():\n    time.sleep(0.1)"
    notebook.write_text(SMALL.read_text().replace('act: str = \\"\\"', f"act: str = {json.dumps(repr(waits))[1:-1]}"))
    assert str(hold) in notebook.read_text()
    for name in ("make_us_rich", ".venv-prefect"):
        (clone / name).symlink_to(ROOT / name)
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "clone.pth").write_text(f"{clone}\n{Path(pd.__file__).parents[1]}\n")
    (environment / "share").symlink_to(Path(sys.prefix) / "share")
    program = environment / "bin" / "mkrich"
    program.write_text(
        f'#!{environment}/bin/python\nfrom make_us_rich.cli.main import main\nif __name__ == "__main__":\n    main()\n'
    )
    program.chmod(0o755)
    return str(program)


class Fleet:
    "The servers, and hosts that come and go."

    def __init__(self, folder, environment):
        self.folder, self.environment, self.hosts = folder, environment, {}
        self.hold = folder / "hold"
        self.program = make_program(folder, self.hold)
        self.api = f"http://127.0.0.1:{free_port()}/api"

    def start(self, name, *words, host=False, **more):
        "A program of `mkrich` in the background; as a host it has a name, a home and processes of its own."
        home = self.folder / name
        home.mkdir(parents=True)
        command, env = (
            [self.program, *words],
            self.environment | {"MUR_HOME": str(home / "store"), "MUR_RUNS": str(home / "runs")} | more,
        )
        if host:
            inside = ["sh", "-c", 'hostname "$0" && exec "$@"', name, *command]
            command = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child", *inside]
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(
                command, env=env, cwd=home, stdout=log, stderr=log, preexec_fn=_die_with_parent, start_new_session=True
            )
        self.hosts[name] = process
        return process

    def log(self):
        return "\n".join(
            f"== {p.parent.name}\n{p.read_text(errors='replace')[-3000:]}" for p in self.folder.glob("*/log")
        )

    def ask(self, path, told=None):
        request = urllib.request.Request(
            f"{self.api}/{path}", json.dumps(told or {}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=LONG) as answer:
            return json.load(answer)

    def is_up(self):
        try:
            return urllib.request.urlopen(f"{self.api}/health", timeout=LONG).status == 200
        except OSError:
            return False

    def sweep(self, deployment):
        "One look for what is missing, asked for by hand: a sweep costs seconds of processor time, so none comes by itself."
        told = {"parameters": {"grace": 15}}
        run = self.ask(f"deployments/{deployment}/create_flow_run", told)["id"]

        def state():
            return self.ask("flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})[0]["state_type"]

        ended = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        wait_for(lambda: state() in ended, what="the end of a sweep", progress=state)

    def runs(self):
        return self.ask(
            "flow_runs/filter",
            {
                "flows": {"name": {"any_": ["mkrich-train"]}},
                "flow_runs": {"state": {"type": {"not_any_": ["SCHEDULED"]}}},
            },
        )

    def stop(self):
        for process in self.hosts.values():
            family = (
                [p for q in psutil.Process(process.pid).children(recursive=True) for p in [q]]
                if process.poll() is None
                else []
            )
            for member in [*family, process]:
                try:
                    member.kill()
                except psutil.NoSuchProcess:
                    continue
            process.wait(LONG)


@pytest.fixture
def fleet(tmp_path, s3, database, postgresql):  # noqa: F811
    with ReplayServer(
        {pair: fake_candles(400, seed) for seed, pair in enumerate(PAIRS)}, label="synthetic candles"
    ) as exchange:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MUR_", "PREFECT_")) and k != "PYTHONPATH"}
        ours = {
            "MUR_HISTORY_DAYS": "10",
            "MUR_EXCHANGE_URL": exchange.url,
            "MUR_DATABASE_URL": database,
            "MUR_MODELS_URL": (models := s3.new_store("models")),
            "MUR_SIGNING_KEY": KEY,
        }
        ours |= {
            "MUR_CANDLES_URL": models.replace("/models", "/candles"),
            "WANDB_MODE": "disabled",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "OMP_NUM_THREADS": "1",
        }
        fleet = Fleet(tmp_path, clean | s3.environment | ours)
        fleet.exchange, fleet.database = (
            exchange,
            postgresql.new_database().replace("postgresql://", "postgresql+asyncpg://"),
        )
        try:
            yield fleet
        finally:
            fleet.stop()


def command(fleet, *words):
    done = subprocess.run(
        [fleet.program, *words],
        env=fleet.environment | {"MUR_HOME": str(fleet.folder / "me")},
        cwd=fleet.folder,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    return done


@needs_prefect
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="hosts of their own need root and unshare")
def test_one_of_two_hosts_dies_and_every_pair_gets_one_version(fleet, monkeypatch):
    away = command(fleet, "deploy-schedule", "BTC_USDT", "--server", fleet.api)
    assert away.returncode == 2 and f"{fleet.api} does not answer; start one with `mkrich fleet server`" in away.stderr

    fleet.start(
        "server",
        "fleet",
        "server",
        "--port",
        fleet.api.rpartition(":")[2].partition("/")[0],
        PREFECT_API_DATABASE_CONNECTION_URL=fleet.database,
    )
    try:
        wait_for(fleet.is_up, what="the Prefect server")
    except AssertionError as e:
        raise AssertionError(f"{e}\n{fleet.log()}") from e
    (fleet.folder / "pairs.yaml").write_text(LIST + "- {pair: XRP_USDT, recipe: default}\n")
    deploy = (
        "deploy-schedule",
        "--file",
        str(fleet.folder / "pairs.yaml"),
        "--server",
        fleet.api,
        "--limit",
        "4",
        "--sweep",
        "86400",
    )
    first = command(fleet, *deploy)
    assert first.returncode == 0, first.stderr
    (fleet.folder / "pairs.yaml").write_text(LIST)
    done = command(fleet, *deploy)
    assert (
        done.stdout.count("deployed") == len(PAIRS) + 1 and "removed mkrich-train/XRP_USDT.1h.default" in done.stdout
    ), done.stdout + done.stderr
    deployed = fleet.ask("deployments/filter")
    assert {d["name"] for d in deployed} == {f"{pair}.1h.default" for pair in PAIRS} | {"sweep"}
    assert {s["schedule"]["interval"] for d in deployed for s in d["schedules"]} == {3600.0, 86400.0}

    fleet.hold.touch()
    for name in ("host-a", "host-b"):
        fleet.start(name, "fleet", "worker", "--server", fleet.api, "--jobs", "1", host=True)
    settings = get_settings(database_url=fleet.environment["MUR_DATABASE_URL"])
    ledger = RunLedger(connect(settings.db_url))
    try:

        def accounts():
            rows = [(r.run_id, r.state, r.attempts, r.reason) for r in ledger.rows()]
            assert not [row for row in rows if row[1] == "failed"], rows
            return rows

        def running():
            "The rows whose notebook has begun."
            return [r for r in ledger.rows(state="running") if Path(r.notebook).with_name("outcome.json").exists()]

        (sweep,) = [d["id"] for d in deployed if d["name"] == "sweep"]
        fleet.sweep(sweep)
        victim = wait_for(running, what="a run in its notebook", seconds=3 * LONG, progress=accounts)[0]
        host = victim.host.partition("/")[0]
        assert host in ("host-a", "host-b")
        fleet.hosts[host].send_signal(signal.SIGKILL)  # and all that runs there dies with it, at once
        fleet.hold.unlink()

        def all_done():
            "Looks again after each sweep: the first may come before the dead run is old enough to be called dead."
            if len(ledger.rows(state="published")) + len(ledger.rows(state="refused")) == len(PAIRS):
                return True
            fleet.sweep(sweep)
            return False

        wait_for(all_done, what="an outcome of every pair", seconds=3 * LONG, progress=accounts)
        rows = {r.pair: r for r in ledger.rows()}
        assert sorted(rows) == sorted(r.pair for r in ledger.rows()) == list(PAIRS)
        other = {"host-a": "host-b", "host-b": "host-a"}[host]
        again = rows[victim.pair]
        assert (again.attempts, again.host.partition("/")[0]) == (2, other)
        for name, value in fleet.environment.items():
            if name.startswith("AWS_"):
                monkeypatch.setenv(name, value)
        store = ModelStore.of(get_settings(models_url=fleet.environment["MUR_MODELS_URL"], signing_key=KEY))
        for pair, row in rows.items():
            infos = store.versions(pair)
            whole = [i.version for i in infos if i.manifest and i.manifest.run_id == row.run_id]
            assert not [i for i in infos if i.manifest and i.manifest.run_id != row.run_id]
            assert (row.state, whole, store.champion(pair).version) == ("published", [row.version], row.version), (
                pair,
                row.state,
                row.reason,
            )
        wait_for(
            lambda: not [r for r in fleet.runs() if r["state_type"] in ("RUNNING", "PENDING")],
            what="the end of all runs in Prefect",
        )
        states = [r["state_type"] for r in fleet.runs()]
        assert states.count("CRASHED") >= 1 and states.count("COMPLETED") >= len(PAIRS), states
        mine, shared = CandleStore(fleet.folder / other / "store" / "candles"), fleet.environment["MUR_CANDLES_URL"]
        from make_us_rich.market.mirror import CandleMirror

        fresh = CandleStore(fleet.folder / "me" / "candles")
        assert CandleMirror(shared, fresh).pull(victim.pair) and fresh.info(victim.pair) == mine.info(victim.pair)
        assert (
            command(fleet, "fleet", "plan", "--file", str(fleet.folder / "pairs.yaml")).stdout.strip()
            == "nothing is missing"
        )
    except AssertionError as e:
        raise AssertionError(
            f"{e}\n{[(r.pair, r.state, r.host, r.attempts, r.reason) for r in ledger.rows()]}\n{fleet.log()}"
        ) from e
    finally:
        ledger.engine.dispose()
