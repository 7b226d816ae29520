"""Pictures of the dashboard's views, from a real browser, API and page server: python tools/screenshots.py [FOLDER] (default docs/images)

Needs Chromium and the fonts of a normal desktop. Pictures are reduced to 256 colours, so that a README can carry them.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "kits"))

from dash_kit import make_stage, page_server  # noqa: E402
from playwright.sync_api import Page, sync_playwright  # noqa: E402

DRAWN = ".mur-chart[data-drawn] .boxlayer path"
SIZES = {"wide": (1360, 800, "dark"), "light": (1360, 900, "light"), "phone": (420, 900, "dark")}
VIEWS = {"forecast": "Forecast", "record": "Track record", "account": "Account", "admin": "Admin"}


def shoot(page: Page, path: Path) -> None:
    "A picture of the whole page."
    page.wait_for_timeout(900)
    page.screenshot(path=path, full_page=True)
    try:
        from PIL import Image
    except ImportError:
        return
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    "All views in all sizes, and the states that nobody wants to see."
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        sys.exit("pictures need Chromium and there is none; install it with: apt-get install chromium")
    with tempfile.TemporaryDirectory() as home, sync_playwright() as p:
        stage = make_stage(Path(home) / "store")
        stage.up()
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with page_server(stage, local=True) as running:
            for size, (width, height, scheme) in SIZES.items():
                page = browser.new_page(
                    viewport={"width": width, "height": height}, color_scheme=scheme, timezone_id="Europe/Berlin"
                )
                page.goto(running.address)
                page.wait_for_selector(DRAWN, state="attached", timeout=60_000)
                for name, tab in VIEWS.items():
                    page.get_by_role("button", name=tab, exact=True).click()
                    shoot(page, folder / f"dashboard-{name}-{size}.png")
                page.get_by_role("button", name="Forecast", exact=True).click()
                if size == "wide":
                    before = stage.forecast()
                    why = "BTC_USDT: the newest closed candle is 3 h 17 min old, so there is no forecast; the exchange does not answer"
                    gone = {
                        "status": "abstain",
                        "reason": "stale_data",
                        "quantiles": None,
                        "median": None,
                        "p_up": None,
                        "sentence": why,
                    }
                    stage.change(**gone, as_of="2023-12-31T20:00:00Z")
                    page.wait_for_selector(".mur-abstain", timeout=30_000)
                    shoot(page, folder / "dashboard-abstain-wide.png")
                    stage.show(before)
                    page.wait_for_selector(".mur-hero", timeout=30_000)
                    stage.down()
                    page.wait_for_selector(".mur-error", timeout=60_000)
                    shoot(page, folder / "dashboard-down-wide.png")
                    stage.up()
                page.close()
        with page_server(stage) as running:
            page = browser.new_page(viewport={"width": 1000, "height": 640}, color_scheme="dark")
            page.goto(running.address)
            page.get_by_label("Token").wait_for(timeout=60_000)
            shoot(page, folder / "dashboard-login.png")
        browser.close()
        stage.down()
    print("\n".join(str(path) for path in sorted(folder.glob("dashboard-*.png"))))


if __name__ == "__main__":
    main()
