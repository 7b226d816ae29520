"""The quick gates, in order: notebooks clean, library in step, imports point down, cells readable, run notebooks sound, README in step.

Works on copies, so it changes nothing and does not care what is committed. Exits 1 with one line for each finding.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import air

from make_us_rich.core.secrets import canaries

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LIBRARY = "make_us_rich"
CEILING: dict[str, int] = {}  # exceptions of tools/air.py that are left; a ceiling only falls


def notebooks() -> list[Path]:
    return sorted(
        p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.parts)
    )


def cells(path: Path, kind: str = "code") -> list[str]:
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def module_of(path: Path) -> str | None:
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(cells(path)), re.M)
    return found[1] if found else None


def scratch(folder: Path) -> Path:
    "A copy of what nbdev reads; of the library only what no notebook exports (nbdev indexes it)."
    shutil.copytree(ROOT / "nbs", folder / "nbs")
    for path in (ROOT / LIBRARY).rglob("*.py"):
        if by_hand(path):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    shutil.copy(ROOT / "settings.ini", folder)
    return folder


def by_hand(path: Path) -> bool:
    "Whether a Python file of the library is none of a notebook's: what lies deeper than a room's pages, and `__init__`."
    return len(path.relative_to(ROOT / LIBRARY).parts) > 2 or path.name == "__init__.py"


def nbdev(command: str, folder: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # with it nbdev_export does nothing
    subprocess.run([BIN / command], cwd=folder, check=True, env=env, capture_output=True)


def not_clean() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        copy = scratch(Path(folder))
        nbdev("nbdev_clean", copy)
        dirty = [p.name for p in notebooks() if p.read_text() != (copy / p.relative_to(ROOT)).read_text()]
    leaks = [f"{p.name}: holds {each!r}" for p in notebooks() for each in canaries("\n".join(_visible(p)))]
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
        want, have = ({str(p.relative_to(r)): p.read_text() for p in (r / LIBRARY).rglob("*.py")} for r in (copy, ROOT))
    differ = sorted(n for n in want.keys() | have.keys() if want.get(n) != have.get(n))
    remedy = {True: "no notebook exports it; delete it", False: "not what the notebooks export; run make export"}
    return [f"{n}: {remedy[n not in want]}" for n in differ]


def upward_imports() -> list[str]:
    "A page imports, in any of its cells, from pages that stand before it; `nbs/pages` and `nbs/explore` stand after all."
    page = {m: str(p.relative_to(ROOT / "nbs")) for p in notebooks() if (m := module_of(p))}
    found = []
    for p in notebooks():
        here = str(p.relative_to(ROOT / "nbs"))
        if here not in page.values():
            continue
        for name in imported("\n".join(cells(p))):
            if (there := page.get(name, "")) >= here:
                found.append(f"{here}: imports {name} from {there}; imports point to earlier pages only")
            elif not there:
                found.append(f"{here}: imports {name}, which no page exports; name the page's module")
    shared = [m for m in page if sum(module_of(p) == m for p in notebooks()) > 1]
    return found + [f"two notebooks export to {m}; one module has one notebook" for m in shared]


def imported(code: str) -> set[str]:
    "The modules of the library that this code imports, as `room.page`; the package itself and a room's own files are not meant."
    names = set(re.findall(rf"(?:from|import)\s+{LIBRARY}\.(\w+\.\w+)", code))
    for room, pages in re.findall(rf"from\s+{LIBRARY}\.(\w+)\s+import\s+([\w, ]+)", code):
        names |= {f"{room}.{page.split()[0]}" for page in pages.split(",") if page.strip()}
    return names


def too_dense() -> list[str]:
    "What tools/air.py finds: a rule has no exceptions but those counted in CEILING, which only falls."
    found = {rule: n for rule, n in air.figures(ROOT).items() if rule not in air.SIZES}
    over = [
        f"{found.get(rule, 0)} places are against the rule '{rule}', {CEILING.get(rule, 0)} are allowed; tools/air.py names them"
        for rule in sorted(found)
        if found.get(rule, 0) > CEILING.get(rule, 0)
    ]
    return over + [
        f"the rule '{rule}' has {found.get(rule, 0)} exceptions left: lower its ceiling"
        for rule, most in CEILING.items()
        if found.get(rule, 0) < most
    ]


def public_names(path: Path) -> set[str]:
    "The public names that a module defines itself; the functions of commands are typer's words."
    nodes, names = ast.parse(path.read_text()).body, set()
    for node in nodes:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            command = any("command" in ast.unparse(d) for d in node.decorator_list)
            names |= set() if command else {node.name}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def two_meanings() -> list[str]:
    "A public name is defined in one module; but the face (evaluation/research) says the researcher's words again."
    where: dict[str, list[str]] = {}
    for path in air.modules(ROOT):
        module = f"{path.parent.name}.{path.stem}"
        for name in public_names(path) if module != "evaluation.research" else ():
            where.setdefault(name, []).append(module)
    shared = {name: modules for name, modules in sorted(where.items()) if len(modules) > 1}
    return [f"{name}: {', '.join(modules)}; the lower room keeps the name" for name, modules in shared.items()]


def broken_walls() -> list[str]:
    "What import-linter says about the contracts of .importlinter."
    done = subprocess.run([BIN / "lint-imports", "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True)
    return (
        re.findall(r"^.+ (?:BROKEN|not configured.*)$|^- .+$|^ *-   .+$", done.stdout, re.M) if done.returncode else []
    )


def stale_house() -> list[str]:
    done = subprocess.run([sys.executable, ROOT / "tools" / "house.py", "--check"], capture_output=True, text=True)
    return [done.stderr.strip()] if done.returncode else []


def unsound_runs() -> list[str]:
    found = []
    for p in notebooks():
        if p.name.startswith("run_"):
            nb = json.loads(p.read_text())
            if sum("parameters" in c["metadata"].get("tags", []) for c in nb["cells"]) != 1:
                found.append(
                    f"{p.name}: one cell has the tag `parameters`, or papermill trains the default pair for every pair"
                )
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
    return (
        []
        if pins[0] == pins[1]
        else [f"settings.ini and environment.yml pin nbdev's helpers differently: {sorted(pins[0] ^ pins[1])}"]
    )


GATES = {
    "notebooks are clean": not_clean,
    "the library is what they export": not_in_step,
    "imports point down": upward_imports,
    "walls stand": broken_walls,
    "cells can be read": too_dense,
    "a public name means one thing": two_meanings,
    "run notebooks are sound": unsound_runs,
    "README.md is in step": stale_readme,
    "docs/house.md is in step": stale_house,
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
