"""Make README.md from nbs/index.ipynb, or check that it is in step: tools/readme.py [--check]."""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
HIDDEN = re.compile(r"^#\|\s*(hide|default_exp|export)\b", re.M)


def render() -> str:
    "The notebook as Markdown: hidden cells dropped, directives stripped, outputs kept."
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    nb.metadata["language_info"] = {"name": "python"}  # nbdev_clean strips it, and the fences would lose their language
    nb.cells = [c for c in nb.cells if not (c.cell_type == "code" and HIDDEN.search(c.source))]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    body = MarkdownExporter().from_notebook_node(nb)[0].strip()
    return "<!-- Made from nbs/index.ipynb by tools/readme.py; edit that. -->\n\n" + re.sub(r"\n{3,}", "\n\n", body) + "\n"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    if "--check" in sys.argv:
        sys.exit(0 if readme.exists() and readme.read_text() == render() else "README.md is not what nbs/index.ipynb makes; run make export")
    readme.write_text(render())
