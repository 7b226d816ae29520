"""Renew the parts of docs/house.md that are made from the folders, or check that they are in step: tools/house.py [--check]."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = Path("docs/house.md")
LIBRARY = "make_us_rich"


def pages(room: Path) -> list[tuple[str, str, str]]:
    "(file, title, subtitle) of each page of a room, in its order."
    found = []
    for path in sorted(room.glob("*.ipynb")):
        head = "".join(json.loads(path.read_text())["cells"][0]["source"])
        title, subtitle = re.search(r"^# (.+)$", head, re.M), re.search(r"^> (.+)$", head, re.M)
        found.append((path.name, title[1] if title else path.stem, subtitle[1] if subtitle else ""))
    return found


def rooms() -> str:
    "A section for each folder of nbs/: what it exports, and its pages with their own subtitles."
    parts = []
    for room in sorted(p for p in (ROOT / "nbs").iterdir() if p.is_dir() and not p.name.startswith((".", "_"))):
        number, _, name = room.name.partition("_")
        exports = f", exports `{LIBRARY}/{name}/`" if number.isdigit() else ""
        rows = [f"| [{title}](../nbs/{room.name}/{file}) | {subtitle} |" for file, title, subtitle in pages(room)]
        parts.append("\n".join([f"### `{room.name}/`{exports}", "", "| page | what it is |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def render(text: str) -> str:
    "The page with its made parts renewed; everything else stays as it was written."
    return re.sub(r"(<!-- rooms -->\n).*?(<!-- /rooms -->)", lambda m: f"{m[1]}\n{rooms()}\n\n{m[2]}", text, flags=re.S)


def lost(text: str) -> list[str]:
    "Pages that the text names and that are not there."
    named = sorted(set(re.findall(r"`(\d\d_\w+/\d\d\w+)`", text)))
    return [name for name in named if not (ROOT / "nbs" / f"{name}.ipynb").is_file()]


if __name__ == "__main__":
    text = (ROOT / PAGE).read_text()
    if gone := lost(text):
        sys.exit(f"{PAGE} names {', '.join(gone)}, and there is no such page in nbs/; name the one that does it now")
    wanted = render(text)
    if "--check" in sys.argv:
        sys.exit(f"{PAGE} is not what the folders of nbs/ say; run make export" if wanted != text else 0)
    (ROOT / PAGE).write_text(wanted)
