"""What a viewer waits for and costs: from navigation to drawn candles, in Chromium, and the memory and CPU of their process.

    python bench/dashboard.py [--visits 5] [--save]

A real API and page server on loopback. `first` is the first visit after the server started, with an empty browser; `new` visits have an
empty browser each; `again` visits keep the browser's files. Every visit starts a Python process of its own. Times depend on what else
runs: the load is printed too.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

from make_us_rich.core.kernels import KERNEL_NAME

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "kits"))
DRAWN = ".mur-chart[data-drawn] .boxlayer path"


def visit(context, running) -> dict[str, float]:
    "One page from navigation to candles; afterwards the viewer's process."
    page = context.new_page()
    sizes: list[float] = []
    page.on("response", lambda r: sizes.append(float(r.headers.get("content-length") or 0)))
    before = cpu(running)
    start = time.perf_counter()
    page.goto(running.address, wait_until="commit")
    answered = time.perf_counter()
    page.wait_for_selector("#rendered_cells, .mur-loading", state="attached")
    painted = time.perf_counter()
    page.wait_for_selector(DRAWN, state="attached", timeout=60_000)
    end = time.perf_counter()
    page.wait_for_timeout(1500)
    children = psutil.Process(running.process.pid).children(recursive=True)
    kernels = [p for p in children if p.name() == KERNEL_NAME]
    memory = kernels[-1].memory_full_info()
    facts = {
        "chart s": end - start,
        "spinner s": painted - start,
        "answer s": answered - start,
        "server+kernel CPU s": cpu(running) - before,
        "kernel MB": memory.rss / 2**20,
        "kernel PSS MB": memory.pss / 2**20,
        "transfer MB": sum(sizes) / 2**20,
    }
    page.goto("about:blank")
    page.close()
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in kernels):
        time.sleep(0.1)
    return facts


def cpu(running) -> float:
    "CPU seconds of the page server and its children that live."
    total = 0.0
    for p in [psutil.Process(running.process.pid), *psutil.Process(running.process.pid).children(recursive=True)]:
        times = p.cpu_times()
        total += times.user + times.system
    return total


def measure(visits: int) -> list[tuple[str, list[dict[str, float]]]]:
    "First, new and repeated visits."
    from dash_kit import make_stage, page_server
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with tempfile.TemporaryDirectory() as folder:
        stage = make_stage(Path(folder) / "store")
        stage.up()
        with page_server(stage, local=True) as running, sync_playwright() as p:
            browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            first = [visit(browser.new_context(), running)]
            new = [visit(browser.new_context(), running) for _ in range(visits)]
            kept = browser.new_context()
            visit(kept, running)
            again = [visit(kept, running) for _ in range(visits)]
            server = psutil.Process(running.process.pid).memory_info().rss / 2**20
            print(f"page server {server:.0f} MB", file=sys.stderr)
            browser.close()
        stage.down()
    return [("first", first), ("new", new), ("again", again)]


HEAD = """# Dashboard

Made by `python bench/dashboard.py --save`. Wanted: first chart within 6 s cold and 2.5 s with a warm kernel, a kernel of at most 130 MB.
Every visit starts a kernel of its own, so each is a cold one: Voila's warm pool does not go with the limit on viewers (its prelaunch hook)
nor with the token that a front door hands over. `spinner` is the page, `chart - spinner` is the kernel's start,
its first answer and plotly.
On a time line of one visit: kernel ready and page complete after 1.3 s (kernel 0.4, Voila 0.4, widgets 0.2, the API's first
answer 0.2), the rest is the browser's: Voila's JavaScript begins when the page is complete, asks for all widgets at once,
and plotly draws.

"""


def main() -> None:
    "Measure and print a table."
    parser = argparse.ArgumentParser()
    parser.add_argument("--visits", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    loads = [os.getloadavg()[0]]
    told = measure(options.visits)
    loads.append(os.getloadavg()[0])
    names = list(told[0][1][0])
    lines = [f"| visit | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for kind, facts in told:
        cells = [
            f"{statistics.median(f[name] for f in facts):.2f} ({min(f[name] for f in facts):.2f})" for name in names
        ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    load = f"Load of the machine ({os.cpu_count()} cores) before and after: {loads[0]:.1f}, {loads[1]:.1f}."
    text = "\n".join(lines) + f"\n\nMedian (smallest) of {options.visits} visits, one for `first`. {load}\n"
    print(text)
    if options.save:
        (ROOT / "bench" / "results" / "dashboard.md").write_text(HEAD + text)


if __name__ == "__main__":
    main()
