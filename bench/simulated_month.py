"""A month in minutes: the real schedule over a replay exchange, with dying kernels, outages, a full disk, killed workers and schedules.

    python bench/simulated_month.py                       # 10 pairs, 30 days, light kernels
    python bench/simulated_month.py --pairs 3 --hours 24  # the short form
    python bench/simulated_month.py --kernels --pairs 2 --hours 6    # whole notebooks in real kernels
    python bench/simulated_month.py --idle 120            # what a schedule costs that has nothing to do

The exchange's clock is moved hour by hour; each hour ends when every pair has its final row in the run ledger. Everything is real
(processes, locks, SQLite, the model store, the alerts over HTTP) but the notebook: the light kernel is a small process that publishes noise
instead of a model. At the end the ledger is compared with what should have run, with the model store and with what processes are left.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import psutil

HERE = Path(__file__).resolve()
NOTEBOOK = HERE.parents[1] / "tests" / "notebooks" / "small_run.ipynb"
FINAL = ("published", "refused", "failed")


# --- inside the worker: a light kernel ----------------------------------------------------------------------------------------------------


def light_run(training):
    "`execute_newest` as it is, with another `run_notebook` under it."
    from dataclasses import replace

    from make_us_rich.runs import execution

    if os.environ.get("MKRICH_SIM_KERNELS") != "1":
        execution.run_notebook = light_notebook
    act = f"exec(open({os.environ['MKRICH_SIM_ACT']!r}).read())" if os.environ.get("MKRICH_SIM_KERNELS") == "1" else ""
    more = {"notebook": NOTEBOOK, "history_days": 3, "parameters": {"act": act} if act else {}}
    return execution.execute_newest(replace(training, options=replace(training.options, **more)))


def chaos(run_id):
    "What happens to this attempt; the same in every simulation with this seed."
    counts = Path(os.environ["MKRICH_SIM_FOLDER"]) / "attempts"
    counts.mkdir(exist_ok=True)
    with (counts / run_id[:60]).open("a") as f:
        f.write(".")
        attempt = f.tell()
    if f"-{os.environ['MKRICH_SIM_DISK_FULL']}-" in run_id and attempt == 1:
        return "disk_full"
    dice = random.Random(f"{os.environ['MKRICH_SIM_SEED']} {run_id} {attempt}").random()
    for what, share in (("kill", 0.05), ("late", 0.02), ("hang", 0.003), ("refuse", 0.06), ("bug", 0.01)):
        if dice < share:
            return what
        dice -= share
    return ""


def light_notebook(notebook, output, parameters, *, deadline=900, threads=1, environment=None, on_progress=None):
    "What `run_notebook` does, without papermill and Jupyter: a child process, a publication, a file."
    from make_us_rich.runs.runner import Execution

    output.parent.mkdir(parents=True, exist_ok=True)
    what = chaos(parameters["run_id"])
    program = "import os, sys, time; w = sys.argv[2]; time.sleep(30 if w == 'hang' else .01); os.kill(os.getpid(), 9) if w == 'kill' else 0"
    child = subprocess.Popen([sys.executable, "-S", "-c", program, f"sim-kernel-{os.environ['MKRICH_SIM_MARK']}", what])
    try:
        code = child.wait(2)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return Execution("timeout", "not finished after 2 s, stopped in cell 4 of 5: Act")
    if code < 0:
        return Execution("kernel_died", f"kernel died (signal {-code}) in cell 4 of 5: Act")
    if what == "bug":
        return Execution("cell_error", "KeyError: 'x' (in cell 4 of 5: Act)", error="KeyError: 'x'")
    if what == "disk_full":
        error = "OSError: [Errno 28] No space left on device"
        return Execution("cell_error", f"{error} (in cell 5 of 5: Publish)", error=error)
    result = {
        "run_id": parameters["run_id"],
        "state": "refused",
        "version": "",
        "reasons": ["the CRPS is above the base's"],
    }
    if what != "refuse":
        result |= {"state": "published", "version": publish(parameters, promote=what != "late"), "reasons": []}
        if what == "late":
            return Execution("kernel_died", "kernel died (signal 9) in cell 5 of 5: Publish")
    Path(parameters["result_path"]).write_text(json.dumps(result))
    output.write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    return Execution("ok", "")


def publish(parameters, promote):
    from make_us_rich.core.settings import get_settings
    from make_us_rich.market.candle_store import CandleStore
    from make_us_rich.registry.manifest import draft_manifest
    from make_us_rich.registry.store import ModelStore
    from make_us_rich.runs.run import read_run_id

    frame = CandleStore(Path(parameters["home"]) / "candles").read(parameters["pair"], rows=24)
    run_id = parameters["run_id"]
    facts = {"recipe": {}, "recipe_hash": read_run_id(run_id).recipe_hash, "run_id": run_id, "scores": []}
    draft = draft_manifest(parameters["pair"], frame, source="synthetic", cutoff=parameters["cutoff"], **facts)
    models = ModelStore.of(get_settings(home=parameters["home"], models_url=parameters["models_url"]))
    version = models.publish(draft, b"noise " + os.urandom(16))
    if promote:
        models.promote(parameters["pair"], version)
    return version


REAL_ACT = """
import sys
sys.path.insert(0, %r)
from simulated_month import chaos
what = chaos(run_id)
if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
if what == "bug": {}["x"]
if what == "disk_full": raise OSError(28, "No space left on device")
"""


# --- the schedule, as a process of its own ------------------------------------------------------------------------------------------------


def schedule_process(spec):
    "The schedule that the simulation starts and kills."
    from make_us_rich.core.settings import get_settings
    from make_us_rich.schedule.plan import PlanFile
    from make_us_rich.schedule.schedule import Options, Schedule, run_forever

    sys.modules.setdefault("simulated_month", sys.modules[__name__])
    schedule = Schedule(get_settings(**spec["settings"]), PlanFile(Path(spec["plan"])), Options(**spec["options"]))
    run_forever(schedule, wait=5)


class Child:
    "The schedule process and its folder."

    def __init__(self, folder, spec):
        self.folder, self.spec, self.process = folder, spec, None

    def start(self):
        log = (self.folder / "schedule.log").open("a")
        command = [sys.executable, str(HERE), "--child", json.dumps(self.spec)]
        env = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def kill_a_worker(self):
        workers = [p for p in psutil.Process(self.process.pid).children() if "serve_worker" in " ".join(p.cmdline())]
        for worker in workers[:1]:
            worker.kill()
        return bool(workers)


# --- outside ------------------------------------------------------------------------------------------------------------------------------


class Inbox:
    "Receives apprise's json:// posts."

    def __init__(self):
        self.titles = []
        titles = self.titles

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                titles.append(
                    json.loads(self.rfile.read(int(self.headers["content-length"])))["title"].removeprefix(
                        "Make Us Rich: "
                    )
                )
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"json://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Simulation:
    "The month; `run()` plays it, `verdict()` compares."

    def __init__(self, folder, pairs, hours, seed=1, kernels=False, jobs=2, tick=0.3, say=print):
        from make_us_rich.core.database import connect, migrate
        from make_us_rich.core.settings import get_settings
        from make_us_rich.market.candles import fake_candles
        from make_us_rich.market.replay import ReplayServer

        self.folder, self.hours, self.jobs, self.say = folder, hours, jobs, say
        names = [
            "BTC",
            "ETH",
            "SOL",
            "XRP",
            "ADA",
            "DOT",
            "LTC",
            "LINK",
            "AVAX",
            "DOGE",
            *(f"C{i:02}" for i in range(40)),
        ][:pairs]
        self.pairs = [f"{name}_USDT" for name in names]
        frames = {pair: fake_candles(hours + 120, seed=i) for i, pair in enumerate(self.pairs)}
        self.begin = frames[self.pairs[0]]["timestamp"].iloc[96]
        self.server = ReplayServer(frames, now=self.begin + pd.Timedelta("3min"), label="synthetic candles").start()
        self.inbox = Inbox()
        self.token = f"{os.getpid()}-{seed}"
        full = self.begin + pd.Timedelta(hours=hours // 2)
        os.environ |= {
            "MKRICH_SIM_FOLDER": str(folder),
            "MKRICH_SIM_SEED": str(seed),
            "MKRICH_SIM_MARK": self.token,
            "MKRICH_SIM_KERNELS": "1" if kernels else "0",
            "MKRICH_SIM_DISK_FULL": f"{full:%Y%m%dT%H%M%SZ}",
            "MKRICH_SIM_ACT": str(folder / "act.py"),
        }
        (folder / "act.py").write_text(REAL_ACT % str(HERE.parent))
        (folder / "pairs.yaml").write_text("pairs: [" + ", ".join(self.pairs) + "]\npretrain: false\n")
        shared = {
            "home": str(folder / "store"),
            "runs": str(folder / "runs"),
            "exchange_url": self.server.url,
            "history_days": 3,
        }
        self.settings = get_settings(**shared, deadline=60)
        options = {
            "jobs": jobs,
            "tick": tick,
            "pause": 0.2,
            "runner": "simulated_month:light_run",
            "alert_urls": self.inbox.url,
        }
        self.child = Child(
            folder, {"settings": shared | {"deadline": 60}, "plan": str(folder / "pairs.yaml"), "options": options}
        )
        (folder / "store").mkdir()
        self.engine = connect(self.settings.db_url)
        migrate(self.engine)
        self.expected: list[pd.Timestamp] = []
        self.events: Counter = Counter()
        self.problems: list[str] = []
        self.leftovers: set[str] = set()

    def rows(self, cutoff=None):
        from sqlalchemy import select

        from make_us_rich.core.database import session
        from make_us_rich.core.tables import RunRow

        with session(self.engine) as s:
            return list(s.scalars(select(RunRow).where(*([RunRow.cutoff == cutoff] if cutoff is not None else []))))

    def finished(self, cutoff):
        rows = self.rows(cutoff)
        return len(rows) == len(self.pairs) and all(r.state in FINAL and r.retry_at is None for r in rows)

    def wait(self, cutoff, seconds=120):
        until = time.monotonic() + seconds
        while not self.finished(cutoff):
            if time.monotonic() > until:
                found = [(r.pair, r.state, r.exit_class, r.retry_at) for r in self.rows(cutoff)]
                self.problems.append(f"{cutoff}: not finished after {seconds} s: {found}")
                return
            time.sleep(0.03)

    def run(self):
        from make_us_rich.market.replay import Faults

        hours = self.hours
        outages = set(range(hours // 4, hours // 4 + max(1, hours // 200)))
        restarts = {hours // 3: 0, 2 * hours // 3: max(1, min(5, hours // 8))}  # at this hour, down for so many hours
        worker_kills = {hours // 5, hours // 2 + 1, hours - 2} if hours > 24 else {hours // 2 + 1}
        started, hour = time.monotonic(), 0
        self.child.start()
        while hour < hours:
            cutoff = self.begin + pd.Timedelta(hours=hour)
            self.server.faults = Faults(status=503) if hour in outages else Faults()
            self.server.clock.set(cutoff + pd.Timedelta("3min"))
            if hour in worker_kills:
                time.sleep(0.6)
                self.events["worker killed"] += self.child.kill_a_worker()
            down = restarts.get(hour)
            if down is not None:
                time.sleep(0.9)
                self.child.kill()
                self.events["schedule killed"] += 1
                if down:
                    self.lost_at = cutoff
                hour += down
                cutoff = self.begin + pd.Timedelta(hours=hour)
                self.server.clock.set(cutoff + pd.Timedelta("3min"))
                self.child.start()
            self.expected.append(cutoff)
            before = time.monotonic()
            self.wait(cutoff)
            if os.environ.get("MKRICH_SIM_TIMES"):
                self.say(
                    f"hour {hour}: {time.monotonic() - before:.2f} s {dict(Counter(r.exit_class for r in self.rows(cutoff)))}"
                )
            self.events["outage hours"] += hour in outages
            if hour % 24 == 23:
                self.look_at_store()
                self.clean()
                self.say(f"day {hour // 24 + 1}: {len(self.rows())} runs, {time.monotonic() - started:.0f} s")
            hour += 1
        time.sleep(1.5)
        self.look_at_store()
        self.clean()
        self.child.process.terminate()
        self.child.process.wait(30)
        self.seconds = time.monotonic() - started

    def clean(self):
        "Remove old versions and leftovers, and see that the leftovers are gone."
        from make_us_rich.registry.store import ModelStore

        models = ModelStore.of(self.settings)
        models.clean(keep=24, grace="0s")
        left = [f"{pair} {i.version}" for pair in self.pairs for i in models.versions(pair) if i.problem]
        self.problems += [f"{name} was not cleaned" for name in left]

    def look_at_store(self):
        """No half-published version, at most one version per cut-off, the champion is the newest published.

        A manifest is written last, so an upload that was killed before it is not a version: nothing loads or points to it, and `clean`
        takes it away. Such leftovers are counted, at most one for each killed worker, and must be gone after a cleaning.
        """
        from make_us_rich.registry.store import ModelStore

        models, rows = ModelStore.of(self.settings), self.rows()
        for pair in self.pairs:
            infos = models.versions(pair)
            unfinished = {i.version for i in infos if i.problem.startswith("not finished")}
            self.leftovers |= unfinished
            self.problems += [
                f"{pair} {i.version}: {i.problem}" for i in infos if i.problem and i.version not in unfinished
            ]
            infos = [i for i in infos if i.version not in unfinished]
            runs = Counter(i.manifest.run_id for i in infos if i.manifest)
            self.problems += [f"{pair}: {n} versions of {run_id}" for run_id, n in runs.items() if n > 1]
            published = {r.version: r for r in rows if r.pair == pair and r.state == "published"}
            named = {
                r.version for r in rows if r.pair == pair
            }  # also by a failure: "version ... was published, then: kernel died"
            unknown = [i.version for i in infos if i.version not in named]
            self.problems += [f"{pair} {version} is in the store, the ledger does not know it" for version in unknown]
            newest = max(published.values(), key=lambda r: r.cutoff, default=None)
            champion = models.champion(pair)
            if newest is not None and (champion is None or champion.version != newest.version):
                self.problems.append(
                    f"{pair}: the champion is {champion and champion.version}, the newest published is {newest.version}"
                )

    def verdict(self):
        "Problems (none is the goal) and figures."
        rows = self.rows()
        found = Counter((r.pair, r.cutoff) for r in rows)
        wanted = {(pair, cutoff) for pair in self.pairs for cutoff in self.expected}
        problems = list(self.problems)
        problems += [f"{key}: {found[key]} rows" for key in wanted if found[key] != 1]
        extra = [r for r in rows if (r.pair, r.cutoff) not in wanted]
        problems += [
            f"{r.pair} {r.cutoff} ran though it need not: {r.state}"
            for r in extra
            if r.cutoff != getattr(self, "lost_at", None)
        ]
        problems += [f"{r.pair} {r.cutoff} still says running" for r in rows if r.state == "running"]
        problems += [f"{r.pair} {r.cutoff} has no reason" for r in rows if r.state != "published" and not r.reason]
        commands = {p.pid: " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])}
        marks = (f"sim-kernel-{self.token}", str(self.folder))
        commands.pop(os.getpid(), None)
        problems += [f"orphan {pid}" for pid, words in commands.items() if any(mark in words for mark in marks)]
        killed = self.events["worker killed"] + self.events["schedule killed"] * self.jobs
        problems += (
            [f"{len(self.leftovers)} unfinished uploads after {killed} killed workers"]
            if len(self.leftovers) > killed
            else []
        )
        problems += self.check_alerts(rows)
        states = Counter(r.state if r.state != "failed" else f"failed: {r.exit_class}" for r in rows)
        retried = sum(r.attempts > 1 for r in rows)
        alerts = len(self.inbox.titles)
        found = {"runs": len(rows), "states": dict(states), "retried": retried, "events": dict(self.events)}
        return problems, found | {"leftovers": len(self.leftovers), "alerts": alerts}

    def check_alerts(self, rows):
        """Each trouble is told once until it is over.

        A schedule that is killed while it tells may repeat that batch: at most a trouble and its end for each pair
        and for the exchange.
        """
        last, repeated, problems = {}, [], []
        for title in self.inbox.titles:
            what = title.removeprefix("over: ")
            repeated += [title] if last.get(what, f"over: {what}") == title else []
            last[what] = title
        if len(repeated) > self.events["schedule killed"] * 2 * (len(self.pairs) + 1):
            problems.append(f"{len(repeated)} messages were told twice: {repeated}")
        if self.events["outage hours"] and not any(
            t.startswith("the exchange has not answered") for t in self.inbox.titles
        ):
            problems.append("the outage was not told")
        if any(r.exit_class == "disk_full" for r in rows) and not any(
            "the run with recipe" in t for t in self.inbox.titles
        ):
            problems.append("the full disk was not told")
        return problems

    def close(self):
        if self.child.process and self.child.process.poll() is None:
            self.child.kill()
        self.server.stop()
        self.inbox.server.shutdown()
        self.inbox.server.server_close()
        self.engine.dispose()


def measure_idle(seconds):
    "CPU share and memory of a schedule that waits, after it has done its work once."
    with tempfile.TemporaryDirectory() as name:
        sim = Simulation(Path(name), 3, 24, tick=60)
        sim.child.start()
        try:
            sim.wait(sim.begin)
            time.sleep(25)  # the workers go home
            process = psutil.Process(sim.child.process.pid)
            before = process.cpu_times()
            time.sleep(seconds)
            after, memory = process.cpu_times(), process.memory_full_info()
            cpu = (after.user + after.system - before.user - before.system) / seconds
            sizes = f"RSS {memory.rss >> 20} MB, of its own (USS) {memory.uss >> 20} MB"
            print(f"idle: {cpu:.2%} of a core over {seconds} s, {sizes}, {len(process.children())} children")
        finally:
            sim.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--hours", type=int, default=720)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--kernels", action="store_true", help="real notebooks in real kernels")
    parser.add_argument("--idle", type=int, metavar="SECONDS")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return schedule_process(json.loads(args.child))
    if args.idle:
        return measure_idle(args.idle)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that nothing stays behind
    with tempfile.TemporaryDirectory() as name:
        sim = Simulation(Path(name), args.pairs, args.hours, args.seed, args.kernels, args.jobs)
        try:
            sim.run()
            problems, figures = sim.verdict()
        finally:
            sim.close()
        print(json.dumps(figures, indent=1))
        print(f"{figures['runs'] / sim.seconds * 3600:.0f} runs per hour; {sim.seconds:.0f} s")
        print("\n".join(problems) or "no problem: every pair and cut-off that should have run has one true outcome")
        if problems:
            print((Path(name) / "schedule.log").read_text()[-3000:])
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
