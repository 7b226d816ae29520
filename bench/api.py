"""What a GET of a forecast costs: beside an empty FastAPI route, with token and quota, and while models are swapped. Prints ratios.

    python bench/api.py [--rounds 5] [--swaps 100] [--save]

All servers are uvicorn with one worker and the same options; one asyncio loader (raw sockets, keep-alive) asks them in turn, so that a
busy machine harms all alike. CPU per request is the server process's own, so neighbours hardly move it. --save writes bench/results/api.md.
"""

import argparse
import asyncio
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/kits")]

import httpx  # noqa: E402
import pandas as pd  # noqa: E402
from servers import free_port  # noqa: E402

SERVER = """
import os, sys
import uvicorn
kind, port, home, exchange, poll = sys.argv[1:]
if kind == "empty":
    from fastapi import FastAPI
    app = FastAPI()
    @app.get("/")
    async def nothing():
        return {}
else:
    from make_us_rich.api import app
    from make_us_rich.api import logs
    from make_us_rich.api import routing
    from make_us_rich.core.database import connect, migrate
    from make_us_rich.serving.service import Service
    from make_us_rich.core.settings import get_settings
    sys.setswitchinterval(0.0002)  # as serve does
    logs.configure_logging(open(f"{home}-{kind}.log", "w"))
    settings = get_settings(home=home, exchange_url=exchange, poll_seconds=float(poll), monthly_calls=10**9)
    engine = connect(settings.db_url)
    migrate(engine)
    if kind == "open":  # the same route without token and quota, for this measurement only
        from make_us_rich.api.access import Caller
        async def nobody(request, access):
            request.scope["caller"] = Caller(0, "nobody", "member", left=0)
        routing._admit = nobody
    app = app.create_app(Service(settings, engine=engine), engine, settings)
uvicorn.run(app, port=int(port), log_level="error", access_log=False, server_header=False, log_config=None)
"""


def cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def ask(
    port: int, path: str, token: str, seconds: float, connections: int, pause: float = 0.0
) -> tuple[list[float], int]:
    "Seconds of each answered request, and how many failed."
    took: list[float] = []
    failed, end = [0], time.perf_counter() + seconds
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode()

    async def caller() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < end:
            start = time.perf_counter()
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            at = head.index(b"content-length: ") + 16
            await reader.readexactly(int(head[at : head.index(b"\r", at)]))
            took.append(time.perf_counter() - start)
            failed[0] += head[9:12] != b"200"
            if pause:
                await asyncio.sleep(pause)
        writer.close()

    await asyncio.gather(*(caller() for _ in range(connections)))
    return took, failed[0]


def measure(
    server: subprocess.Popen,
    port: int,
    path: str,
    token: str,
    seconds: float,
    connections: int = 16,
    pause: float = 0.0,
) -> dict:
    cpu, start = cpu_of(server.pid), time.perf_counter()
    took, failed = asyncio.run(ask(port, path, token, seconds, connections, pause))
    span, used = time.perf_counter() - start, cpu_of(server.pid) - cpu
    took.sort()
    return {
        "rate": len(took) / span,
        "p50": took[len(took) // 2] * 1000,
        "p99": took[int(len(took) * 0.99)] * 1000,
        "cpu": used / len(took) * 1e6,
        "failed": failed,
        "n": len(took),
    }


def start(kind: str, home: Path, exchange: str, poll: float = 20) -> tuple[subprocess.Popen, int]:
    port = free_port()
    command = [sys.executable, "-c", SERVER, kind, str(port), str(home), exchange, str(poll)]
    process = subprocess.Popen(command, cwd=home.parent, env=os.environ | {"PYTHONPATH": str(ROOT)})
    path = "/" if kind == "empty" else "/readyz"
    for _ in range(600):
        try:
            if httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 200:
                return process, port
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"the server {kind} did not get ready")


def swaps(told, store, pair: str, closed: pd.Timestamp, number: int, port: int, token: str) -> None:
    "Publish champions one after the other, every fourth one bad; in a process, since the loader must not share a GIL with it."
    from tiny_model import publish

    os.nice(10)  # as every training run
    served, bad, headers = set(), 0, {"Authorization": f"Bearer {token}"}
    for n in range(1, number + 1):
        is_bad = n % 4 == 0
        version = publish(store, pair, closed - pd.Timedelta(hours=2) + pd.Timedelta(seconds=n), mark=n, broken=is_bad)
        for _ in range(300):
            model = httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=headers, timeout=30).json()["models"][0]
            if model["champion"] == version and (is_bad or model["version"] == version):
                break
            time.sleep(0.25)  # what is not counted is braked: 300 a minute
        served.add(model["version"])
        bad += is_bad and model["version"] != version
    told.put({"swaps": len(served), "bad refused": bad})
    told.close()
    told.join_thread()
    os._exit(0)  # without the ends of the parent's libraries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    from tiny_model import publish, sample

    from make_us_rich.api.accounts import add_user, create_token
    from make_us_rich.core.database import connect, migrate, session
    from make_us_rich.core.settings import get_settings
    from make_us_rich.market.candles import SAMPLE_LABEL
    from make_us_rich.market.replay import ReplayServer
    from make_us_rich.registry.store import ModelStore

    frame, now = sample("BTC_USDT"), pd.Timestamp.now("UTC")
    closed = frame["timestamp"].iloc[3000] + pd.Timedelta("1h")
    opening = closed + pd.Timedelta("5s")
    with (
        tempfile.TemporaryDirectory() as folder,
        ReplayServer({"BTC_USDT": frame}, now=opening, label=SAMPLE_LABEL) as exchange,
    ):
        home = Path(folder) / "home"
        store = ModelStore.of(get_settings(home=home), exchange.clock.now)
        publish(store, "BTC_USDT", closed - pd.Timedelta("3h"))
        engine = connect(f"sqlite:///{home / 'mkrich.db'}")
        migrate(engine)
        with session(engine) as s:
            token, _ = create_token(s, add_user(s, "bench", now, role="admin", monthly_calls=10**9), "bench", now)
        processes = {}
        try:
            processes = {kind: start(kind, home, exchange.url) for kind in ("empty", "open", "token")}
            idle = {kind: cpu_of(process.pid) for kind, (process, _) in processes.items()}
            time.sleep(5)
            idle = {kind: (cpu_of(process.pid) - idle[kind]) / 5 for kind, (process, _) in processes.items()}
            paths = {"empty": "/", "open": "/v1/forecasts/BTC_USDT", "token": "/v1/forecasts/BTC_USDT"}
            rounds = [
                {kind: measure(*processes[kind], paths[kind], token, options.seconds) for kind in processes}
                for _ in range(options.rounds)
            ]
            if refused := {kind for each in rounds for kind in each if each[kind]["failed"]}:
                raise SystemExit(f"calls of {', '.join(sorted(refused))} were refused, so their figures mean nothing")
            middle = {
                kind: {key: statistics.median(r[kind][key] for r in rounds) for key in rounds[0][kind]}
                for kind in processes
            }
            swapping = processes["swaps"] = start("swaps", home, exchange.url, 0.3)
            still = measure(*swapping, paths["token"], token, max(options.seconds, 10), 4, 0.02)
            fork = multiprocessing.get_context("fork")  # it inherits the trained graph
            told = fork.Queue()
            changing = fork.Process(
                target=swaps, args=(told, store, "BTC_USDT", closed, options.swaps, swapping[1], token)
            )
            changing.start()
            moving: list[dict] = []
            while changing.is_alive():
                moving.append(measure(*swapping, paths["token"], token, 5, 4, 0.02))
            done = told.get(timeout=10)
        finally:
            for process, _ in processes.values():
                process.send_signal(signal.SIGTERM)
        engine.dispose()
    ratio = {
        "rate": statistics.median(r["open"]["rate"] / r["empty"]["rate"] for r in rounds),
        "cpu": statistics.median(r["empty"]["cpu"] / r["open"]["cpu"] for r in rounds),
    }
    p99, asked, failed = (
        statistics.median(m["p99"] for m in moving),
        sum(m["n"] for m in moving),
        sum(m["failed"] for m in moving),
    )
    lines = [
        "| route | requests/s | p50 ms | p99 ms | server CPU us |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {m['rate']:.0f} | {m['p50']:.2f} | {m['p99']:.2f} | {m['cpu']:.0f} |"
            for name, m in middle.items()
        ),
        "",
        f"- GET of a forecast / empty route: throughput **{ratio['rate']:.2f}**, by CPU **{ratio['cpu']:.2f}** (wanted: >= 0.7).",
        f"- Token and quota add {middle['token']['cpu'] - middle['open']['cpu']:.0f} us of CPU to a call (SQLite, calls taken in advance).",
        f"- With nobody asking, the service's own thread takes {idle['open'] * 100:.1f} % of one core.",
        f"- {done.get('swaps')} models swapped in, {done.get('bad refused')} bad ones refused, while 4 connections ask with 20 ms pauses:",
        f"  median p99 {p99:.1f} ms during, {still['p99']:.1f} ms before, ratio **{p99 / still['p99']:.2f}** (wanted: <= 1.5);",
        f"  {failed} of {asked} requests failed.",
        f"- {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} (neighbours), Python {platform.python_version()}.",
    ]
    print("\n".join(lines))
    if options.save:
        (ROOT / "bench/results").mkdir(exist_ok=True)
        (ROOT / "bench/results/api.md").write_text("# API\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
