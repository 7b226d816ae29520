"""Make README.md (and its pictures in docs/images/) from nbs/index.ipynb, or check that it is in step: tools/readme.py [--check]."""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
IMAGES = Path("docs/images")
HIDDEN = re.compile(r"^#\|\s*(hide|default_exp|export)\b", re.M)


def render() -> dict[Path, bytes]:
    "The notebook as Markdown and its pictures: hidden cells dropped, directives stripped, outputs kept."
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    nb.metadata["language_info"] = {"name": "python"}  # nbdev_clean strips it, and the fences would lose their language
    nb.cells = [c for c in nb.cells if not (c.cell_type == "code" and HIDDEN.search(c.source))]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    body, resources = MarkdownExporter().from_notebook_node(nb)
    body = body.replace("](../", "](")  # README.md stands one folder higher
    made = {}
    for number, (name, picture) in enumerate(sorted(resources["outputs"].items()), 1):
        made[IMAGES / f"readme-{number}.png"] = picture
        body = body.replace(name, str(IMAGES / f"readme-{number}.png"))
    text = (
        "<!-- Made from nbs/index.ipynb by tools/readme.py; edit that. -->\n\n"
        + re.sub(r"\n{3,}", "\n\n", body.strip())
        + "\n"
    )
    return {Path("README.md"): text.encode(), **made}


if __name__ == "__main__":
    wanted = render()
    if "--check" in sys.argv:
        stale = [str(p) for p, data in wanted.items() if not (ROOT / p).exists() or (ROOT / p).read_bytes() != data]
        sys.exit(f"{', '.join(stale)} is not what nbs/index.ipynb makes; run make export" if stale else 0)
    for path, data in wanted.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_bytes(data)
