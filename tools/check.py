"""The quick gates, in order: notebooks clean, library in step, imports point down, run notebooks sound, README in step.

Works on copies, so it changes nothing and does not care what is committed. Exits 1 with one line for each finding.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from make_us_rich.secrets import canaries

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LIBRARY = "make_us_rich"


def notebooks() -> list[Path]:
    return sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.parts))


def cells(path: Path, kind: str = "code") -> list[str]:
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def module_of(path: Path) -> str | None:
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(cells(path)), re.M)
    return found[1] if found else None


def scratch(folder: Path) -> Path:
    "A copy of what nbdev reads; of the library only what no notebook exports (nbdev indexes it)."
    shutil.copytree(ROOT / "nbs", folder / "nbs")
    for part in (p for p in (ROOT / LIBRARY).iterdir() if p.is_dir() and p.name != "__pycache__"):
        shutil.copytree(part, folder / LIBRARY / part.name, ignore=shutil.ignore_patterns("__pycache__", "*.parquet"))
    shutil.copy(ROOT / "settings.ini", folder)
    return folder


def nbdev(command: str, folder: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # with it nbdev_export does nothing
    subprocess.run([BIN / command], cwd=folder, check=True, env=env, capture_output=True)


def not_clean() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        copy = scratch(Path(folder))
        nbdev("nbdev_clean", copy)
        dirty = [p.name for p in notebooks() if p.read_text() != (copy / p.relative_to(ROOT)).read_text()]
    leaks = [f"{p.name}: holds {found[0]!r}" for p in notebooks() if (found := canaries("\n".join(_visible(p))))]
    counts = [p.name for p in notebooks() if '"execution_count": null' not in p.read_text() and cells(p)]
    return [f"{name}: not clean; run make export" for name in dirty + counts] + [f"{leak}; remove it" for leak in leaks]


def _visible(path: Path) -> list[str]:
    "Outputs and metadata of a notebook; its sources may name papermill."
    nb = json.loads(path.read_text())
    return [json.dumps(nb["metadata"])] + [json.dumps([c.get("outputs", []), c["metadata"]]) for c in nb["cells"]]


def not_in_step() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        copy = scratch(Path(folder))
        nbdev("nbdev_export", copy)
        want, have = ({p.name: p.read_text() for p in (r / LIBRARY).glob("*.py")} for r in (copy, ROOT))
    differ = sorted(n for n in want.keys() | have.keys() if want.get(n) != have.get(n))
    orphan = [n for n in differ if n not in want]
    remedy = {True: "no notebook exports it; delete it", False: "not what the notebooks export; run make export"}
    return [f"{LIBRARY}/{n}: {remedy[n in orphan]}" for n in differ]


def upward_imports() -> list[str]:
    number = {m: p.name for p in notebooks() if (m := module_of(p)) and re.match(r"\d\d", p.name)}
    found = []
    for p in notebooks():
        if not re.match(r"\d\d", p.name):
            continue
        for name in re.findall(rf"(?:from|import)\s+{LIBRARY}\.(\w+)", "\n".join(cells(p))):
            if number.get(name, "99") > p.name:
                found.append(f"{p.name}: imports {name} from {number.get(name, 'nowhere')}; imports point to lower numbers only")
    shared = [m for m in number if sum(module_of(p) == m for p in notebooks()) > 1]
    return found + [f"two notebooks export to {m}; one module has one notebook" for m in shared]


def unsound_runs() -> list[str]:
    found = []
    for p in notebooks():
        if p.name.startswith("run_"):
            nb = json.loads(p.read_text())
            if sum("parameters" in c["metadata"].get("tags", []) for c in nb["cells"]) != 1:
                found.append(f"{p.name}: one cell has the tag `parameters`, or papermill trains the default pair for every pair")
            if nb["metadata"].get("kernelspec", {}).get("name") != "python3":
                found.append(f"{p.name}: its kernel is python3")
            if re.search(r"^#\||nbdev_export", "\n".join(cells(p)), re.M):
                found.append(f"{p.name}: holds an nbdev directive, which papermill ignores")
    return found


def stale_readme() -> list[str]:
    done = subprocess.run([sys.executable, ROOT / "tools" / "readme.py", "--check"], capture_output=True, text=True)
    return [done.stderr.strip()] if done.returncode else []


def uneven_pins() -> list[str]:
    "nbdev's three upper bounds stand in settings.ini and environment.yml: the same ones."
    pins = [
        set(re.findall(r"(?:nbdev|execnb|fastcore|ghapi)[=<>][^\s]+", (ROOT / name).read_text()))
        for name in ("settings.ini", "environment.yml")
    ]
    return [] if pins[0] == pins[1] else [f"settings.ini and environment.yml pin nbdev's helpers differently: {sorted(pins[0] ^ pins[1])}"]


GATES = {
    "notebooks are clean": not_clean,
    "the library is what they export": not_in_step,
    "imports point down": upward_imports,
    "run notebooks are sound": unsound_runs,
    "README.md is in step": stale_readme,
    "pins agree": uneven_pins,
}

if __name__ == "__main__":
    bad = 0
    for title, gate in GATES.items():
        problems = gate()
        print(f"{'ok  ' if not problems else 'FAIL'} {title}")
        for problem in problems:
            print(f"     {problem}")
        bad += len(problems)
    sys.exit(1 if bad else 0)
