"""Take the README's picture: the stitching figures of one pair, as the page shows them.

python examples/picture.py quickstart/report.html examples/report.png     (needs Chromium and playwright)
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

page_file, picture = Path(sys.argv[1]).resolve(), sys.argv[2]
with sync_playwright() as playwright:
    chromium = playwright.chromium.launch(
        executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
    )
    page = chromium.new_page(viewport={"width": 1060, "height": 900}, color_scheme="light")
    page.goto(page_file.as_uri())
    boxes = [figure.bounding_box() for figure in page.locator("#stitching figure").all()]
    four = [box for box in boxes if box and box["width"] > 300][:4]
    left, top = min(b["x"] for b in four) - 12, min(b["y"] for b in four) - 12
    right, bottom = max(b["x"] + b["width"] for b in four) + 12, max(b["y"] + b["height"] for b in four) + 12
    clip = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    page.screenshot(path=picture, clip=clip, full_page=True)
    chromium.close()
