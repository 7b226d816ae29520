"""A kept-alive connection is answered at once: without TCP_NODELAY the kernel holds the second piece of an answer back for 40 ms."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from api_kit import served
from waiting import LONG, wait_for

from make_us_rich.api.app import listening_socket, uvicorn_options
from make_us_rich.core.settings import get_settings
from make_us_rich.core.supervisor import free_port


async def in_two_pieces(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2000")]})
    await send({"type": "http.response.body", "body": b"x" * 2000})


@contextmanager
def behind(listening: socket.socket, **options) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(in_two_pieces, log_level="error", lifespan="off", **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join(LONG)
    listening.close()


def quickest(*urls: str, times: int = 30) -> list[float]:
    "Seconds of the quickest answer of each, asked in turn over kept-alive connections; the first of each is not counted."
    clients = [httpx.Client(trust_env=False, timeout=LONG) for _ in urls]
    took: list[list[float]] = [[] for _ in urls]
    for _ in range(times):
        for client, url, seconds in zip(clients, urls, took, strict=True):
            start = time.perf_counter()
            assert client.get(url).status_code == 200
            seconds.append(time.perf_counter() - start)
    for client in clients:
        client.close()
    return [min(seconds[1:]) for seconds in took]


@pytest.fixture
def settings(tmp_path):
    return get_settings(home=tmp_path, port=free_port())


def test_at_once_on_every_loop(settings):
    "Ours on the standard library's loop, beside the same server on a socket that does not name its protocol."
    ours = listening_socket(settings)
    nameless = socket.create_server(("127.0.0.1", 0))
    plain = {"loop": "asyncio", "http": "h11"}
    with behind(ours, **plain) as mended, behind(nameless, **plain) as held_back:
        fast, slow = quickest(mended, held_back)
    assert slow > 20 * fast, "the fault that this test looks for is not there any more: nothing is shown by it"


def test_the_api_is_not_held_back(tmp_path):
    "The whole server, beside a bare one."
    bare = listening_socket(get_settings(home=tmp_path, port=free_port()))
    with served(tmp_path / "home") as api, behind(bare, **uvicorn_options() | {"log_config": None}) as nothing:
        ours, least = quickest(f"{api.url}/healthz", nothing)
    assert ours < 20 * least
