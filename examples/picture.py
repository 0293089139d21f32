"""Take the README's picture: who splits into whom, as the page shows it.

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
    page.locator("#splits").screenshot(path=picture)
    chromium.close()
