"""Real servers for the tests: `database_url` gives an empty database, once as a SQLite file and once on a PostgreSQL server of our own.

A test file takes the fixtures by name: `from servers import database_url, postgresql  # noqa: F401`. PostgreSQL must be installed: a test
that did not run proves nothing, so without it these tests fail and say how to install it.
"""

import ctypes
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from waiting import LONG, wait_for

MISSING = "these tests need a PostgreSQL server and found none; install it with: apt-get install postgresql"
USER = "postgres"  # the package makes this user; the server refuses to run as root


@dataclass
class PostgreSQL:
    "A running server; `password` is a real one, asked for by SCRAM."

    port: int
    password: str
    process: subprocess.Popen
    folder: Path

    def url(self, database: str = "postgres", password: str | None = None) -> str:
        return f"postgresql://mur:{self.password if password is None else password}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        "URL of a fresh, empty database."
        name = f"test_{secrets.token_hex(6)}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)


def free_port() -> int:
    "A port below those that the system gives to connections, so that nothing takes it before its server does."
    while True:
        port = 15_000 + secrets.randbelow(17_000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


@contextmanager
def postgresql_server() -> Iterator[PostgreSQL]:
    "A server on a free loopback port, without fsync, gone at the end with its folder, and with this process if that is killed."
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    root = os.geteuid() == 0
    if not found or (root and USER not in {entry.pw_name for entry in pwd.getpwall()}):
        pytest.fail(MISSING, pytrace=False)
    roomy = (
        os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 2**30
    )  # memory: many small files come and go
    folder = Path(
        tempfile.mkdtemp(prefix="mur-pg-", dir="/dev/shm" if roomy else "/tmp")
    )  # pytest's own folders are closed to other users
    try:
        (folder / "password").write_text(password := secrets.token_hex(12))
        person = pwd.getpwnam(USER)
        who = {"user": USER, "group": person.pw_gid, "extra_groups": []} if root else {}
        if root:
            for path in (folder, folder / "password"):
                os.chown(path, person.pw_uid, person.pw_gid)
        init = [
            found[-1],
            "-D",
            folder / "data",
            "-U",
            "mur",
            "--auth=scram-sha-256",
            f"--pwfile={folder / 'password'}",
        ]
        done = subprocess.run(
            [*init, "--no-sync", "-E", "UTF8", "--locale=C"], cwd=folder, capture_output=True, text=True, **who
        )
        assert done.returncode == 0, done.stderr
        server = _start(found[-1].with_name("postgres"), folder, password, who)
        try:
            yield server
        finally:
            server.process.send_signal(signal.SIGQUIT)  # at once
            server.process.wait(LONG)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(program: Path, folder: Path, password: str, who: dict) -> PostgreSQL:
    port = free_port()
    speed = {"fsync": "off", "synchronous_commit": "off", "max_connections": "200"}
    options = speed | {
        "timezone": "Asia/Kolkata",
        "unix_socket_directories": "",
    }  # half an hour off: a time without its zone shows
    settings = [word for key, value in options.items() for word in ("-c", f"{key}={value}")]
    command = [program, "-D", folder / "data", "-h", "127.0.0.1", "-p", str(port), *settings]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, preexec_fn=_die_with_parent, **who)
    server = PostgreSQL(port, password, process, folder)

    def answers() -> bool:
        assert process.poll() is None, f"PostgreSQL did not start: {(folder / 'log').read_text()[-2000:]}"
        with suppress(psycopg.OperationalError):
            psycopg.connect(server.url(), connect_timeout=LONG).close()
            return True
        return False

    wait_for(answers, what="PostgreSQL")
    return server


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGQUIT)  # PR_SET_PDEATHSIG: Linux only, like the paths above


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    with postgresql_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    "URL of an empty database, one of each kind."
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'mkrich.db'}"
    return request.getfixturevalue("postgresql").new_database()
