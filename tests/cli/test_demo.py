"""`mkrich demo` as a stranger meets it: an environment of requirements/train.txt alone, an empty folder, and a page that opens.

pip needs two minutes and 2 GB for such an environment; links to the same files of the running one, distribution by distribution, need seconds.
What the lock does not name cannot be imported there, and a version that is not the lock's is refused.
"""

import html
import os
import re
import subprocess
import sys
import venv
from collections import defaultdict
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "from make_us_rich.cli.main import main; main()"


def locked(name):
    "Name -> version of what a lock installs on this machine."
    lines = re.findall(r"^[\w.\[\]-]+==[^\\\n]+", (ROOT / "requirements" / f"{name}.txt").read_text(), re.M)
    wanted = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate()]
    return {r.name: str(r.specifier).removeprefix("==") for r in wanted}


def brought_by(name, known):
    "Names of a distribution and of what it needs, as far as no lock names it (PyTorch's libraries for GPUs)."
    found = {name}
    for need in map(Requirement, distribution(name).requires or []):
        if need.name not in found | known and (need.marker is None or need.marker.evaluate({"extra": ""})):
            found |= brought_by(need.name, known | found)
    return found


def owners():
    "Name of a file or folder in site-packages -> numbers of the distributions that have something there."
    found = defaultdict(set)
    for number, each in enumerate(distributions()):
        for file in each.files or []:
            found[file.parts[0]].add(number)
    return found


def link(distribution, prefix, owners):
    "What an installed distribution has, at its place below another environment: whole folders where they are its own; no programs."
    own = {file.parts[0] for file in distribution.files if len(owners[file.parts[0]]) == 1}
    for file in [*own, *(file for file in distribution.files if file.parts[0] not in own)]:
        source = Path(os.path.normpath(distribution.locate_file(file)))
        place = source.relative_to(sys.prefix)
        if place.parts[0] not in ("bin", "Scripts"):
            target = prefix / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    "The Python of an environment that holds what requirements/train.txt names, PyTorch, and this clone."
    prefix, lock, owned = tmp_path_factory.mktemp("train"), locked("train"), owners()
    venv.create(prefix, symlinks=True)
    for name, version in lock.items():
        installed = distribution(name)
        assert installed.version == version, (
            f"{name} {installed.version} is installed, the lock says {version}; renew the environment with make"
        )
        link(installed, prefix, owned)
    for name in brought_by("torch", set(locked("dev"))):
        link(distribution(name), prefix, owned)
    (packages,) = prefix.glob("lib/python*/site-packages")
    (packages / "clone.pth").write_text(f"{ROOT}\n")
    return prefix / "bin" / "python"


@pytest.fixture(scope="module")
def demo(python, tmp_path_factory):
    "The finished command and the folder where it ran."
    folder = tmp_path_factory.mktemp("empty")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MUR_", "JUPYTER", "PYTHON", "WANDB", "IN_TEST"))}
    env |= {"HOME": str(folder / "home"), "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    (folder / "home").mkdir()
    return subprocess.run([python, "-c", PROGRAM, "demo"], cwd=folder, env=env, capture_output=True, text=True), folder


def test_environment_holds_the_lock_alone(python):
    code = "import importlib.util as u; print([n for n in ('torch', 'papermill', 'pytest', 'nbdev', 'jupyterlab', 'voila') if u.find_spec(n)])"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['torch', 'papermill']"


def test_demo_ends_well_and_prints_no_traceback(demo):
    done, _ = demo
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("Traceback", "could not be made"):
        assert word not in done.stdout + done.stderr, done.stderr


def test_every_path_that_it_prints_exists(demo):
    done, folder = demo
    paths = re.findall(r"(?<!\S)\.?/\S+|\S*(?:store|runs)/\S+", done.stdout + done.stderr)
    assert paths and not [path for path in paths if not (folder / path).exists()], paths


def test_it_ends_with_a_page_that_shows_the_forecast(demo):
    done, folder = demo
    page = folder / done.stdout.split()[-1]
    assert page.name == "train.html"
    shown = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page.read_text())).split())
    median = re.search(r"^median +([\d,.]+)", done.stdout, re.M)[1]
    assert "BTC_USDT, 1h, cut-off 2023-12-31 23:00 UTC" in shown and median in shown
