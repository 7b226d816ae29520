"""`docs/security.md` says nothing that no test shows."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_named_test_exists():
    named = NAMED.findall(PAGE)
    assert len(named) > 40
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not (ROOT / path).is_file() or not re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.M)
    ]
    assert missing == []


def test_every_sentence_about_what_we_do_names_a_test():
    "Between what there is to take and what the operator must do, each point ends with its tests."
    middle = PAGE[PAGE.index("## People and tokens") : PAGE.index("## What the operator must do")]
    points = re.findall(r"^- .*$", middle, re.M)
    assert len(points) > 30
    assert [point for point in points if not NAMED.search(point)] == []


def test_every_attack_is_named():
    "A test in this folder is on the page, or it is about the page."
    named = set(NAMED.findall(PAGE))
    files = sorted((ROOT / "tests" / "attacks").glob("test_*.py"))
    unnamed = [path.name for path in files if not any(f"tests/attacks/{path.name}" == file for file, _ in named)]
    assert unnamed == [Path(__file__).name]
