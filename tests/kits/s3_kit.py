"""A real S3 server for the tests: SeaweedFS (`weed mini`) on loopback, in memory, gone at the end. The package is in requirements/s3.txt."""

import os
import secrets
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from servers import _die_with_parent, free_port
from waiting import LONG, wait_for

ROOT = Path(__file__).resolve().parents[2]
FLEET = ROOT / ".venv-prefect" / "bin"  # `make fleet` makes it, with the server in it
PARTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port.grpc",
    "admin.port",
    "admin.port.grpc",
)


@dataclass
class S3:
    "A running server; `environment` is what a client needs besides the URL of its store."

    endpoint: str
    environment: dict[str, str]

    def new_store(self, name: str = "models") -> str:
        "URL of a folder in a fresh bucket."
        import obstore

        bucket = f"test-{secrets.token_hex(6)}"
        request = urllib.request.Request(f"{self.endpoint}/{bucket}", method="PUT")
        try:
            urllib.request.urlopen(request, timeout=LONG).close()
        except urllib.error.HTTPError:  # anonymous requests are refused: the server makes a bucket at the first write
            config = {k.removeprefix("AWS_").lower(): v for k, v in self.environment.items()}
            obstore.put(obstore.store.S3Store(bucket, config=config, client_options={"allow_http": True}), "made", b"")
        return f"s3://{bucket}/{name}"


def weed() -> str:
    found = shutil.which("weed", path=f"{FLEET}{os.pathsep}{os.environ['PATH']}")
    return found or pytest.skip("needs an S3 server (weed) and found none; make one with: make fleet")


@contextmanager
def s3_server() -> Iterator[S3]:
    "SeaweedFS on free loopback ports, with keys of its own."
    program, folder, port = weed(), Path(tempfile.mkdtemp(prefix="mur-s3-")), free_port()
    keys = {"AWS_ACCESS_KEY_ID": "test" + secrets.token_hex(8), "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16)}
    ports = [f"-{name}={free_port()}" for name in PARTS]
    off = [
        "-webdav=false",
        "-admin.ui=false",
        "-s3.iam=false",
        "-s3.port.iceberg=0",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64",
    ]
    command = [
        program,
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-s3.port={port}",
        *ports,
        *off,
    ]
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | keys, stdout=out, stderr=out, preexec_fn=_die_with_parent
        )
    try:
        endpoint = f"http://127.0.0.1:{port}"
        _wait(process, endpoint, log)
        more = {"AWS_ENDPOINT": endpoint, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
        yield S3(endpoint, keys | more)
    finally:
        process.kill()
        process.wait(LONG)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(process: subprocess.Popen, endpoint: str, log: Path) -> None:
    def answers() -> bool:
        assert process.poll() is None, f"the S3 server did not start: {log.read_text(errors='replace')[-2000:]}"
        try:
            urllib.request.urlopen(endpoint + "/healthz", timeout=LONG).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    wait_for(answers, what="the S3 server", progress=lambda: log.stat().st_size)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server
