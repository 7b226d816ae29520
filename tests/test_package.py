"""The package as a stranger gets it: what a wheel carries, what an import costs, what the two READMEs promise."""

import ast
import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from a copy of the tracked files, unpacked as pip would."
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, tracked.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(build, check=True, capture_output=True)
    site = out / "site"
    zipfile.ZipFile(next(out.glob("*.whl"))).extractall(site)
    return site


def run(code, site=ROOT, **env):
    "Run a snippet against the package in `site`, away from the clone."
    environment = {**os.environ, "PYTHONPATH": str(site), **env}
    return subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_a_wheel_carries_notebooks_sample_recipes_and_types(wheel):
    names = {str(p.relative_to(wheel / "make_us_rich")) for p in (wheel / "make_us_rich").rglob("*") if p.is_file()}
    wanted = {
        "notebooks/run_train.ipynb",
        "notebooks/run_pretrain.ipynb",
        "notebooks/run_backtest.ipynb",
        "notebooks/dashboard.ipynb",
        "runs/templates/run.html",
        "market/sample/NOTICE",
        "market/sample/BTC_USDT-1h.parquet",
        "market/sample/SOL_USDT-1h.parquet",
        "models/recipes/default.yaml",
        "models/recipes/original.yaml",
        "py.typed",
        "api/templates/page.html",
        "api/templates/login.html",
        "api/templates/docs.html",
    }
    assert wanted <= names, wanted - names
    assert not any(n.endswith((".onnx", ".ckpt", ".pkl")) for n in names)


def test_an_installed_wheel_finds_its_notebook_and_sample(wheel):
    code = (
        "import make_us_rich; from make_us_rich.runs.run import find_notebook; from make_us_rich.market.candles import load_sample;"
        "print(make_us_rich.__file__); print(find_notebook('run_train.ipynb')); print(len(load_sample()))"
    )
    module, notebook, rows = run(code, wheel).splitlines()
    assert module.startswith(str(wheel)), module
    assert notebook.startswith(str(wheel)), notebook
    assert rows == "17495"


def test_import_is_light():
    code = (
        "import sys, socket; socket.socket = None; import make_us_rich; "
        "print([m for m in ('torch', 'pandas', 'onnxruntime', 'binance') if m in sys.modules])"
    )
    assert run(code) == "[]"


def test_the_serving_side_needs_no_torch():
    rooms = ("core", "market", "registry", "serving", "api")
    modules = sorted(f"{room}.{file.stem}" for room in rooms for file in (ROOT / "make_us_rich" / room).glob("*.py"))
    modules += ["evaluation.gate", "cli.main"]
    code = (
        f"import sys, importlib; [importlib.import_module('make_us_rich.' + m) for m in {modules}]; "
        "print([m for m in ('torch', 'pytorch_lightning', 'sklearn', 'wandb', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    assert run(code) == "[]"


def test_onnxruntime_sends_no_telemetry(tmp_path):
    code = "import make_us_rich.registry.served_model, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run(code, HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache")) == "1"
    assert not list(tmp_path.rglob("*onnxruntime*"))


def test_sample_stays_small():
    files = list((ROOT / "make_us_rich" / "market" / "sample").glob("*.parquet"))
    assert len(files) == 2
    assert sum(p.stat().st_size for p in files) < 2_000_000


@pytest.mark.parametrize("path", [*(ROOT / "bench").glob("*.py"), *(ROOT / "tools").glob("*.py")], ids=lambda p: p.stem)
def test_what_a_script_imports_is_there(path):
    "Scripts that no test runs: a name that moved would be missed by the next person who needs it."
    sys.path[:0] = [str(path.parent), str(ROOT / "tests" / "kits")]
    try:
        for node in ast.walk(ast.parse(path.read_text())):
            for module in [alias.name for alias in node.names] if isinstance(node, ast.Import) else []:
                importlib.import_module(module)
            if isinstance(node, ast.ImportFrom):
                found = importlib.import_module(node.module)
                is_kit = (ROOT / "tests" / "kits" / f"{node.module}.py").is_file()
                assert not is_kit or "kits" in path.read_text(), f"{path.name} does not say where {node.module} lies"
                for alias in node.names:
                    if not hasattr(found, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")
    finally:
        del sys.path[:2]
