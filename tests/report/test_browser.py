"""The page in a real browser: it opens offline, runs nothing but its own script, and is whole without it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_run import SyntheticRun
from test_report import HOSTILE, build
from typer.testing import CliRunner

from saetool.artifacts import container, writing
from saetool.cli import app
from saetool.report import render
from saetool.report.run import Look

pytestmark = pytest.mark.browser
READY = "document.documentElement.dataset.ready === 'yes'"


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    with playwright.sync_playwright() as started:
        yield started


@pytest.fixture(scope="module")
def browser(driver: Any) -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    started = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
    yield started
    started.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    SyntheticRun(folder / "run").write()
    (folder / "report.html").write_bytes(build([folder / "run"]))
    return folder / "report.html"


class Tab:
    """An open page with everything it complained about or asked for."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.context = browser.new_context(offline=True, reduced_motion="reduce", **options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def close(self) -> None:
        self.context.close()


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two runs, whose SAEs have the same names and so go by longer ones."""
    folder = tmp_path_factory.mktemp("two")
    for seed, name in enumerate(("trained-with-batchtopk", "l1")):
        run = SyntheticRun(folder / "runs" / name)
        run.rng = np.random.default_rng(seed + 5)
        run.write()
    assert CliRunner().invoke(app, ["report", str(folder / "runs"), "-o", str(folder / "two.html")]).exit_code == 0
    return folder / "two.html"


@pytest.fixture
def tab(browser: Any, file: Path) -> Iterator[Tab]:
    opened = Tab(browser, file)
    yield opened
    opened.close()


def test_it_opens_offline_without_a_complaint_or_a_request(tab: Tab, file: Path) -> None:
    assert tab.page.evaluate(READY)
    assert tab.complaints == []
    assert tab.requests == [file.as_uri()]


def test_hostile_text_does_not_run_and_is_shown_exactly(browser: Any, tmp_path: Path) -> None:
    SyntheticRun(tmp_path / "run", words=HOSTILE, said=HOSTILE).write()
    file = tmp_path / "hostile.html"
    file.write_bytes(build([tmp_path / "run"], title=HOSTILE[0]))
    opened = Tab(browser, file)
    assert opened.page.evaluate(READY) and opened.complaints == [] and opened.requests == [file.as_uri()]
    assert opened.page.title() == HOSTILE[0]
    text = opened.page.evaluate("document.body.textContent")
    assert [s[:30] for s in HOSTILE if render.visible(s) not in text] == []
    opened.close()
    file.write_bytes(build([tmp_path / "run"], title=HOSTILE[0], autoescape=False))
    broken = Tab(browser, file)
    assert broken.complaints or not broken.page.evaluate(READY), "without escaping the check must fail"
    broken.close()


def test_pointing_at_a_plot_shows_the_values(tab: Tab) -> None:
    tab.page.locator("#pair-0-effects").scroll_into_view_if_needed()
    box = tab.page.locator("#pair-0-effects svg").bounding_box()
    said = set()
    for x in range(20, 90, 5):
        for y in range(20, 80, 15):
            tab.page.mouse.move(box["x"] + box["width"] * x / 100, box["y"] + box["height"] * y / 100)
            said.add(tab.page.locator("#pair-0-effects .readout").text_content())
    shown = [text for text in said if text]
    assert len(shown) > 10 and all("largest cosine with a latent of sae-64.st" in text for text in shown)
    assert any(text.startswith("novel latent ") for text in shown)


def test_a_click_on_a_column_sorts_it_both_ways(tab: Tab) -> None:
    table = tab.page.locator("#saes table.sortable").first
    values = "rows => rows.map(r => Number(r.cells[6].querySelector('data').value))"
    head = table.locator("th").nth(6).locator("button")
    head.click()
    rising = table.locator("tbody tr").evaluate_all(values)
    head.click()
    falling = table.locator("tbody tr").evaluate_all(values)
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True) and len(rising) == 4


def test_search_keeps_the_cards_that_hold_the_text(tab: Tab) -> None:
    cards = tab.page.locator(".cards > .card")
    tab.page.locator("#find input").fill("Rugby AND the leagues")
    visible = [i for i in range(cards.count()) if cards.nth(i).is_visible()]
    assert 0 < len(visible) < cards.count()
    assert all("rugby and the leagues" in cards.nth(i).text_content().lower() for i in visible)
    tab.page.locator("#find input").fill("sae-256.st 12")
    assert [tab.page.locator(".card:visible").nth(0).get_attribute("id")] == ["latent-0-12"]
    assert tab.page.locator(".card:visible").count() == 1  # neither 120 nor 212


def test_the_keyboard_goes_from_the_search_to_a_card_to_a_relative_and_back(tab: Tab) -> None:
    tab.page.locator("#find input").focus()
    tab.page.keyboard.type("sae-256.st 12")
    tab.page.keyboard.press("Enter")
    tab.page.locator("#latent-0-12 > summary:focus").wait_for()
    assert tab.page.locator("#latent-0-12").get_attribute("open") is not None
    link = tab.page.locator("#latent-0-12 a[href^='#latent']").first
    wanted = (link.get_attribute("href") or "")[1:]
    link.focus()
    tab.page.keyboard.press("Enter")
    tab.page.locator(f"#{wanted} > summary:focus").wait_for()
    assert tab.page.locator(f"#{wanted}").get_attribute("open") is not None
    assert tab.page.locator(f"#{wanted}").is_visible()  # though the search had hidden it
    tab.page.go_back()
    tab.page.locator("#latent-0-12 > summary:focus").wait_for()


def test_the_switch_turns_the_page_dark_and_light_again(tab: Tab) -> None:
    def ground() -> str:
        return tab.page.evaluate("getComputedStyle(document.body).backgroundColor")

    before = ground()
    tab.page.locator("#theme").click()
    assert ground() == "rgb(18, 20, 23)" != before
    tab.page.locator("#theme").click()
    assert ground() == before


def test_a_link_to_a_card_opens_it(browser: Any, file: Path) -> None:
    opened = Tab(browser, file)
    opened.page.goto(file.as_uri() + "#latent-0-6")
    opened.page.wait_for_function("document.getElementById('latent-0-6').open")
    opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_does_not_scroll_sideways(browser: Any, file: Path, scheme: str) -> None:
    opened = Tab(browser, file, viewport={"width": 400, "height": 800}, color_scheme=scheme)
    opened.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 400
    opened.close()


def test_long_names_do_not_widen_a_narrow_window(browser: Any, tmp_path: Path) -> None:
    long = "gemma-2-2b-layer-12-width-16k-batchtopk-k-64-seed-0.st"
    SyntheticRun(tmp_path / "run").write()
    for path in (tmp_path / "run").glob("*.json*"):
        path.write_text(path.read_text().replace("sae-256.st", long))
    (tmp_path / "run" / "sae-256.st").rename(tmp_path / "run" / long)
    (tmp_path / "r.html").write_bytes(build([tmp_path / "run"]))
    opened = Tab(browser, tmp_path / "r.html", viewport={"width": 400, "height": 800})
    assert long in opened.page.locator(".card .name").first.text_content()
    opened.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 400
    opened.close()


@pytest.mark.parametrize("which", ["file", "two_runs"])
def test_the_writing_of_every_drawing_is_inside_it_and_apart(
    browser: Any, which: str, request: pytest.FixtureRequest
) -> None:
    opened = Tab(browser, request.getfixturevalue(which))
    opened.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert opened.page.evaluate(DRAWINGS) == []
    opened.page.evaluate(
        "() => { const [a, b] = document.querySelectorAll('#pair-0-effects svg text');"
        " a.setAttribute('x', -90); b.textContent = 'a word'; b.parentNode.append(b.cloneNode(true)); }"
    )
    found = " ".join(opened.page.evaluate(DRAWINGS))
    assert "leaves the drawing" in found and "lies on" in found  # the check must be able to fail
    opened.close()


def test_without_scripts_every_figure_table_and_card_is_there(browser: Any, file: Path, tab: Tab) -> None:
    opened = Tab(browser, file, java_script_enabled=False)
    for what in ("figure svg", "table", "details.card", "figcaption"):
        assert opened.page.locator(what).count() == tab.page.locator(what).count() > 20
    assert opened.page.locator("#pair-0-effects svg").is_visible()
    opened.page.locator("#latent-0-6 summary").click()
    assert opened.page.locator("#latent-0-6 mark").first.is_visible()
    opened.close()


def test_an_example_of_a_split_leads_to_its_latents_by_keyboard_and_without_scripts(
    browser: Any, file: Path, tab: Tab
) -> None:
    link = tab.page.locator("#split-0 .note a").last
    wanted = (link.get_attribute("href") or "")[1:]
    link.focus()
    tab.page.keyboard.press("Enter")
    tab.page.locator(f"#{wanted} > summary:focus").wait_for()
    tab.page.keyboard.press("Tab")  # the next stop is inside the card: its family or a relative
    assert tab.page.evaluate(f"document.getElementById('{wanted}').contains(document.activeElement)")
    plain = Tab(browser, file, java_script_enabled=False)
    plain.page.locator(f"#split-0 .note a[href='#{wanted}']").click()
    assert plain.page.locator(f"#{wanted} h4").first.is_visible()
    plain.close()


def test_printing_keeps_every_figure_and_leaves_their_data_tables_out(browser: Any, file: Path) -> None:
    opened = Tab(browser, file)
    opened.page.emulate_media(media="print")
    drawings = opened.page.locator("figure > .drawing svg")
    assert drawings.count() > 40 and all(drawings.nth(i).is_visible() for i in range(drawings.count()))
    assert not opened.page.locator("details.data table").first.is_visible()
    opened.close()


@pytest.mark.parametrize("which", ["file", "two_runs"])
def test_no_column_is_cut_off_on_paper(browser: Any, which: str, request: pytest.FixtureRequest) -> None:
    """A4 less its margins is 703 pixels wide."""
    opened = Tab(browser, request.getfixturevalue(which), viewport={"width": 703, "height": 1000})
    opened.page.emulate_media(media="print")
    beyond = (
        "() => [...document.querySelectorAll('table, svg')].filter(e => e.checkVisibility() &&"
        " e.getBoundingClientRect().right > 704).map(e => e.textContent.slice(0, 60))"
    )
    assert opened.page.evaluate(beyond) == []
    opened.page.emulate_media(media="screen")
    assert opened.page.evaluate(beyond)  # there, wide tables scroll
    opened.close()


def test_printing_shows_what_is_folded_away(browser: Any, file: Path) -> None:
    opened = Tab(browser, file)
    opened.page.emulate_media(media="print")
    assert opened.page.locator("#latent-0-6 mark").first.is_visible()
    assert not opened.page.locator("nav").is_visible()
    opened.close()


# What axe-core would look for and can be told without it: names, structure, references, contrast, focus.
STRUCTURE = (Path(__file__).parent / "structure.js").read_text()
DRAWINGS = (Path(__file__).parent / "drawings.js").read_text()
CONTRAST = (Path(__file__).parent / "contrast.js").read_text()


def test_the_structure_can_be_read_aloud_and_walked_by_keyboard(tab: Tab) -> None:
    assert tab.page.evaluate(STRUCTURE) == []
    tab.page.keyboard.press("Tab")
    assert tab.page.evaluate("document.activeElement.className") == "skip"
    order = []
    for _ in range(6):
        tab.page.keyboard.press("Tab")
        order.append(tab.page.evaluate("document.activeElement.textContent"))
    assert order == [
        "Find a latent",
        "Stitching",
        "Meta-SAE",
        "Latents",
        "Descriptions and their scores",
        "SAEs compared",
    ]


def test_the_check_of_the_structure_finds_what_is_wrong(tab: Tab) -> None:
    tab.page.evaluate(
        "() => { for (const html of ['<h6>deep</h6>', '<button></button>', '<p id=main></p>', '<svg></svg>'.replace("
        "'></svg', '><title></title><desc></desc></svg'), '<table><tr><th>x</th></tr></table>'])"
        " document.querySelector('main').insertAdjacentHTML('beforeend', html); }"
    )
    found = " ".join(tab.page.evaluate(STRUCTURE))
    assert all(w in found for w in ("skips a level", "no name", "id used twice", "without words", "without caption"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_enough_contrast(browser: Any, file: Path, scheme: str) -> None:
    opened = Tab(browser, file, color_scheme=scheme)
    opened.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    found = opened.page.evaluate(CONTRAST)
    assert len(found) > 12 and [f for f in found if f[0] < 4.5] == []
    opened.page.evaluate("document.body.style.setProperty('--faint', '#777')")
    assert [f for f in opened.page.evaluate(CONTRAST) if f[0] < 4.5], "the check must be able to fail"
    opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Any, file: Path, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    opened = Tab(browser, file, color_scheme=scheme, bypass_csp=True)
    opened.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    results = axe.Axe().run(opened.page).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"][:120]) for v in results] == []
    opened.close()


def test_it_opens_in_firefox_too(driver: Any, file: Path) -> None:
    if not Path(driver.firefox.executable_path).exists():
        pytest.skip("no Firefox that playwright can drive (playwright install firefox)")
    firefox = driver.firefox.launch()
    opened = Tab(firefox, file)
    assert opened.page.evaluate(READY) and opened.complaints == [] and opened.requests == [file.as_uri()]
    firefox.close()


def test_a_large_run_stays_within_size_memory_and_time(browser: Any, tmp_path: Path) -> None:
    """49,152 latents, 200 cards."""
    run = SyntheticRun(tmp_path / "run")
    run.write()
    header, record = container.read_json(tmp_path / "run" / "stitch.json")
    pair = next(p for p in record["pairs"] if p["n_large"] == 256)
    times = 192
    pair |= {"n_large": 256 * times, "nearest": pair["nearest"] * times}
    pair["max_cosine"]["values"] *= times
    pair["data"]["effects"]["delta_mse"] *= times
    pair["edges"] = [[a, b + 256 * i, c] for i in range(times) for a, b, c in pair["edges"]]
    writing.write_json(tmp_path / "run" / "stitch.json", header, record)
    file = tmp_path / "r.html"
    file.write_bytes(build([tmp_path / "run"], look=Look(features=200)))
    assert file.stat().st_size <= 6_000_000
    opened = Tab(browser, file)
    page = opened.page
    assert page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") < 5000
    assert page.evaluate("performance.memory.usedJSHeapSize") <= 150e6
    took = page.evaluate(
        "() => { const i = document.querySelector('#find input'); i.value = 'rugby'; let t = [];"
        " for (let n = 0; n < 3; n++) { const s = performance.now(); i.dispatchEvent(new Event('input'));"
        " t.push(performance.now() - s); } return Math.min(...t); }"
    )
    assert took < 100
    opened.close()
