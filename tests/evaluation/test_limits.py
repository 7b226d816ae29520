"""The gate's limits stand in one table, and what a backtest keeps is forgotten when the code that made it changes."""

import ast
import shutil
from importlib.resources import files
from pathlib import Path

import pytest

from make_us_rich.evaluation.gate import LIMITS
from make_us_rich.evaluation.walk import code_version

LIBRARY = Path(str(files("make_us_rich")))
HOME = {"t": "evaluation/scores.py", "hours": "models/baselines.py"}
JUDGES = (
    "evaluation/gate.py",
    "evaluation/leaktest.py",
    "evaluation/walk.py",
    "registry/rejudge.py",
    "runs/pretrain.py",
    "serving/track_record.py",
    "serving/breaker.py",
)


def numbers(path: Path) -> list[float]:
    "Every number that a module types, but those of the table itself."
    tree = ast.parse(path.read_text())
    table = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Limits"]
    own = {id(x) for node in table for x in ast.walk(node)}
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in own]
    return [n.value for n in found if type(n.value) in (int, float)]


@pytest.mark.parametrize("name", JUDGES)
def test_who_judges_types_no_limit(name):
    limits = {LIMITS.hours, LIMITS.t, *LIMITS.cover80, *LIMITS.cover95, LIMITS.width[1], LIMITS.worse, LIMITS.stable}
    limits -= {0.75} if name == "runs/pretrain.py" else set()  # there it is a share of the pairs
    assert limits & set(numbers(LIBRARY / name)) == set()


def test_the_least_t_is_typed_once_in_the_library():
    typed = [str(p.relative_to(LIBRARY)) for p in sorted(LIBRARY.rglob("*.py")) if LIMITS.t in numbers(p)]
    assert typed == [HOME["t"]]
    assert LIMITS.hours in numbers(LIBRARY / HOME["hours"])


def test_kept_forecasts_belong_to_the_code_that_made_them(tmp_path):
    copy = tmp_path / "make_us_rich"
    shutil.copytree(LIBRARY, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert code_version.__wrapped__(copy) == code_version()
    (copy / "api" / "app.py").write_text("# another page\n")
    assert code_version.__wrapped__(copy) == code_version()
    seen = {code_version()}
    for module in ("models/har.py", "evaluation/peers.py", "market/candles.py", "market/series.py"):
        with (copy / module).open("a") as f:
            f.write("# another line\n")
        seen.add(code_version.__wrapped__(copy))
    assert len(seen) == 5
    (copy / "market" / "candles.py").unlink()
    with pytest.raises(FileNotFoundError):
        code_version.__wrapped__(copy)
