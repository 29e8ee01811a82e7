"""The pictures of the README and the docs, from a run of the reference model: `python docs/pictures.py RUN`.

Needs Chromium.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

import bigram_circuits as bc

FOLDER = Path(__file__).parent / "_static"


def main() -> None:
    """Write them."""
    run = bc.load_run(sys.argv[1])
    report = bc.write_report(run)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 900, "height": 1000})
        page.goto(report.resolve().as_uri())
        page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true })")
        page.wait_for_timeout(6000)
        page.locator("#layers figure").first.screenshot(path=FOLDER / "by-layer.png")
        page.locator("#read").evaluate("section => section.scrollIntoView()")
        token = page.locator("#read .tokens").nth(0).locator(".colored-tokens > span").nth(31)
        token.hover()  # may scroll, which hides what is told
        page.wait_for_timeout(300)
        page.mouse.move(1, 1)
        token.hover()
        page.wait_for_timeout(300)
        figure = page.locator("#read figure").first.bounding_box()
        assert figure is not None
        clip = {"x": 0, "y": max(0, figure["y"] - 8), "width": 900, "height": figure["height"] + 30}
        page.screenshot(path=FOLDER / "passage.png", clip=clip)
        with tempfile.TemporaryDirectory() as folder:
            explained = Path(folder) / "explained.html"
            bc.explain(bc.load_model("reference"), run.mask, " of").to_html(explained)
            page = browser.new_page(viewport={"width": 1100, "height": 900}, device_scale_factor=2)
            page.goto(explained.as_uri())
            page.wait_for_timeout(1000)
            page.locator(".circuit .parts").screenshot(path=FOLDER / "circuit.png")
        browser.close()


if __name__ == "__main__":
    main()
