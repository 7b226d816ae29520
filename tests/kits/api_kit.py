"""What the tests of the API share beside the examples of its pages (`make_us_rich.api.examples`): real server processes, and callers in a burst."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from servers import free_port
from waiting import LONG, wait_for

from make_us_rich.api.app import create_app
from make_us_rich.api.examples import ExampleApi, add_people, example_api
from make_us_rich.core.database import connect, migrate
from make_us_rich.core.settings import system_clock


def make_world(home: Path, series: Iterable[str] = ("BTC_USDT/1h",), **options) -> ExampleApi:
    "The examples of the pages, with all routes and with the life span of the real application."
    return example_api(home, series, build=create_app, **options)


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


@contextlib.contextmanager
def served_people(home: Path, **env: str) -> Iterator[tuple[Served, dict[str, str]]]:
    "A real server, and the tokens of the people of the examples."
    home.mkdir()
    engine = connect(f"sqlite:///{home / 'mkrich.db'}")
    migrate(engine)
    tokens = add_people(engine, system_clock())
    engine.dispose()
    with served(home, **env) as server:
        yield server, tokens


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
            writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
            await reader.readexactly(int(headers.get("content-length", 0)))
            answers.append((int(head[9:12]), headers))
        writer.close()

    await asyncio.gather(*(caller() for _ in range(connections)))
    return answers
