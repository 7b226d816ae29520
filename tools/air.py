"""How dense the library's lines are: tools/air.py prints each place that a rule names, and the figures of docs/house.md. The rules are a gate of tools/check.py.

A newcomer reads the prose and then the cell under it. So a cell of the library packs no three assignments into one line, hides no
conditional in another, tests nothing that it assigns in the filter of a comprehension, hands on at most eight parameters, keeps to 120
characters, and says in a line what each function is for, the private ones too. A cell has at most 60 lines, a module
400, as `wc -l` counts.
"""

import ast
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = "make_us_rich"
WIDTH, MOST_PARAMETERS, MOST_LINES, MOST_CELL_LINES = 120, 8, 400, 60
SIZES = ("modules", "lines", "AST nodes", "AST nodes a line", "private functions", "of them with a docstring")
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def modules(root: Path = ROOT) -> list[Path]:
    "What the notebooks export."
    return [p for p in sorted((root / LIBRARY).glob("*/*.py")) if p.name != "__init__.py"]


def packed(node: ast.AST) -> bool:
    "Three or more assignments in one, or one inside another."
    if not isinstance(node, ast.Assign):
        return False
    targets = [t for t in node.targets if isinstance(t, ast.Tuple)]
    nested = any(isinstance(e, ast.Tuple) for t in targets for e in t.elts)
    return nested or any(len(t.elts) >= 3 and isinstance(node.value, ast.Tuple) for t in targets)


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    "Parameters without self and cls. A command's are its options: typer's words, not a caller's burden."
    if any("command" in ast.unparse(d) or "callback" in ast.unparse(d) for d in node.decorator_list):
        return 0
    names = [a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
    return len([n for n in names if n not in ("self", "cls")])


def findings(path: Path) -> list[tuple[str, int]]:
    "(rule, line) of each place in a module that a rule names."
    text = path.read_text()
    tree, found = ast.parse(text), []
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > WIDTH and not line.startswith(("# %%", "__all__")):
            found.append(("line over 120", number))
    for node in ast.walk(tree):
        if packed(node):
            found.append(("packed assignment", node.lineno))
        if isinstance(node, ast.IfExp):
            parts = [x for side in (node.test, node.body, node.orelse) for x in ast.walk(side)]
            if any(isinstance(x, ast.IfExp) for x in parts):
                found.append(("conditional in a conditional", node.lineno))
        if isinstance(node, ast.comprehension) and any(
            isinstance(x, ast.NamedExpr) for c in node.ifs for x in ast.walk(c)
        ):
            found.append(("walrus in a filter", node.target.lineno))
        if isinstance(node, Function) and parameters(node) > MOST_PARAMETERS:
            found.append(("more than 8 parameters", node.lineno))
    for owner in [tree, *[n for n in tree.body if isinstance(n, ast.ClassDef)]]:
        for node in owner.body:
            is_special = isinstance(node, Function) and node.name.startswith("__") and node.name.endswith("__")
            if isinstance(node, Function) and not is_special and not ast.get_docstring(node):
                found.append(("function without a docstring", node.lineno))
    number = 1
    for cell in text.split("\n# %% "):
        if cell.startswith("../") and len(cell.strip().splitlines()) - 1 > MOST_CELL_LINES:  # its first line is nbdev's
            found.append(("cell over 60 lines", number))
        number += len(cell.splitlines()) + 1
    lines = len(text.splitlines())
    if lines > MOST_LINES:
        found.append(("module over 400 lines", lines))
    return found


def figures(root: Path = ROOT) -> dict[str, float]:
    "The figures of the whole library; lines without blanks, comments of nbdev, `__all__` and imports are not counted for nodes a line."
    nodes = lines = total = private = told = 0
    counts: Counter[str] = Counter()
    for path in modules(root):
        text = path.read_text()
        tree = ast.parse(text)
        kept = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
        total += len(kept)
        nodes += sum(1 for n in ast.walk(tree))
        lines += len(kept)
        for node in ast.walk(tree):
            if isinstance(node, Function) and node.name.startswith("_") and not node.name.startswith("__"):
                private += 1
                told += bool(ast.get_docstring(node))
        counts.update(rule for rule, _ in findings(path))
    return {
        "modules": len(modules(root)),
        "lines": total,
        "AST nodes": nodes,
        "AST nodes a line": round(nodes / lines, 2),
        "private functions": private,
        "of them with a docstring": told,
        **dict(sorted(counts.items())),
    }


if __name__ == "__main__":
    for path in modules():
        for rule, line in findings(path):
            if len(sys.argv) < 2 or sys.argv[1] in str(path):
                print(f"{path.relative_to(ROOT)}:{line}: {rule}")
    print("\n".join(f"{name}: {value:,}" for name, value in figures().items()))
