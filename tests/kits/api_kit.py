"""What the tests of the API share: a service that was filled by hand, people with tokens of every kind, and real server processes."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import httpx
import orjson
import pandas as pd
from servers import free_port
from sqlalchemy import Engine
from waiting import LONG, wait_for

from make_us_rich.api.accounts import add_user, create_token, get_user, revoke_token, set_disabled
from make_us_rich.api.app import create_app
from make_us_rich.api.forecasts import EXAMPLE
from make_us_rich.core.database import connect, migrate, session
from make_us_rich.core.settings import Settings, get_settings
from make_us_rich.market.candles import SAMPLE_LABEL, load_sample
from make_us_rich.market.exchange import BinanceClient
from make_us_rich.market.replay import ReplayServer
from make_us_rich.market.series import Interval, Pair
from make_us_rich.serving.forecast import Forecast
from make_us_rich.serving.refresh import Answer, PairState
from make_us_rich.serving.service import Service

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from fastapi.testclient import TestClient

NOW = pd.Timestamp("2023-11-23T19:02Z")
PASSWORD = "correct horse battery"


def a_forecast(**changes) -> Forecast:
    "The example of the documentation, changed."
    return Forecast(**EXAMPLE.model_dump() | changes)


@dataclass
class World:
    "One application with its parts."

    settings: Settings
    engine: Engine
    service: Service
    app: object
    tokens: dict[str, str]
    ticks: list[float]  # seconds on the clock of the limits; step them

    def client(self, who: str | None = "member", **headers: str) -> TestClient:
        if who:
            headers["Authorization"] = f"Bearer {self.tokens.get(who, who)}"
        return TestClient(self.app, headers=headers, raise_server_exceptions=False)

    @property
    def gate(self):
        return self.app.state.api.gate

    def used(self, name: str = "bob") -> int:
        return (
            self.client(name).get("/v1/me").json()["used"]
            if name in self.tokens
            else self.client().get("/v1/me").json()["used"]
        )

    def show(self, forecast: Forecast) -> None:
        self.service.states["BTC_USDT", "1h"].answer = Answer.of(forecast, NOW)


def make_people(engine: Engine, now: pd.Timestamp = NOW) -> dict[str, str]:
    "An admin and a member, and tokens that are no good any more."
    with session(engine) as s:
        ana = add_user(s, "ana", now, role="admin", password=PASSWORD)
        bob = add_user(s, "bob", now, password=PASSWORD)
        add_user(s, "eve", now)
        revoked, row = create_token(s, bob, "revoked", now)
        revoke_token(s, row.id, now)
        tokens = {
            "revoked": revoked,
            "expired": create_token(s, bob, "expired", now - pd.Timedelta("2D"), expires=now - pd.Timedelta("1D"))[0],
            "disabled": create_token(s, get_user(s, "eve"), "eve", now)[0],
            "admin": create_token(s, ana, "ana", now)[0],
            "member": create_token(s, bob, "bob", now)[0],
            "wrong": "mur_" + "x" * 43,
        }
        set_disabled(s, "eve", True, now)
    return tokens


def make_world(home: Path, url: str = "", clock=lambda: NOW, wait: float = 5.0, candles: int = 0, **options) -> World:
    ticks = [0.0]
    settings = get_settings(home=home, database_url=url or None, exchange_url="http://127.0.0.1:9")
    engine = connect(settings.db_url, wait=wait)
    migrate(engine)
    service = Service(settings, engine=engine, clock=lambda: NOW)
    service.start = service.run_forever = service.tick = service.update_models = lambda *_: (
        None
    )  # what it shows was put there by hand
    state = PairState(Pair("BTC", "USDT"), Interval("1h"))
    state.model = SimpleNamespace(manifest=SimpleNamespace(version="20231123T180000Z-0123456789ab", cutoff=NOW))
    state.record_body = orjson.dumps(service.ledger.track_record("BTC_USDT").to_dict())
    service.states = {("BTC_USDT", "1h"): state}
    if candles:
        with ReplayServer({"BTC_USDT": load_sample("BTC_USDT")}, now=NOW, label=SAMPLE_LABEL) as exchange:
            service.parts.candles.update(BinanceClient(exchange.url), "BTC_USDT", rows=candles)
    app = create_app(service, engine, settings, clock, ticks=lambda: ticks[0], **options)
    world = World(settings, engine, service, app, make_people(engine), ticks)
    world.show(a_forecast())
    return world


@dataclass
class Served:
    "A running `serve`."

    url: str
    process: subprocess.Popen
    home: Path
    log: Path
    said: Path

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(LONG)


@contextlib.contextmanager
def served(home: Path, **env: str) -> Iterator[Served]:
    "The real server in a process of its own, with `MUR_` settings by name."
    port = free_port()
    log, said = home.parent / f"{home.name}.log", home.parent / f"{home.name}.said"
    values = {"home": str(home), "port": str(port), "exchange_url": "http://127.0.0.1:9", "threads": "1"} | env
    environment = os.environ | {f"MUR_{k.upper()}" if k.islower() else k: str(v) for k, v in values.items()}
    code = "from make_us_rich.api.app import serve; from make_us_rich.core.settings import get_settings; serve(get_settings())"
    with open(log, "wb") as err, open(said, "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", code], stdout=out, stderr=err, env=environment, cwd=home.parent
        )
    try:
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            assert process.poll() is None, log.read_text() + said.read_text()
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{url}/healthz", timeout=LONG).status_code == 200
            return False

        wait_for(answers, what="the API", progress=lambda: log.stat().st_size)
        yield Served(url, process, home, log, said)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


async def burst(
    port: int, path: str, token: str, total: int, connections: int = 32
) -> list[tuple[int, dict[str, str]]]:
    "So many GETs over so many keep-alive connections; status and headers of each answer."
    answers: list[tuple[int, dict[str, str]]] = []
    left = [total]

    async def caller() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while left[0] > 0:
            left[0] -= 1
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
            await reader.readexactly(int(headers.get("content-length", 0)))
            answers.append((int(head[9:12]), headers))
        writer.close()

    await asyncio.gather(*(caller() for _ in range(connections)))
    return answers
