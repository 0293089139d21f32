"""The report: every number equals its artifact, hostile text stays text, and nothing is lost without a word."""

import base64
import csv
import hashlib
import itertools
import json
import math
import random
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import SyntheticRun, component_shapes
from typer.testing import CliRunner, Result

from saetool.artifacts import container, writing
from saetool.artifacts import header as h
from saetool.cli import app
from saetool.config import ReportConfig
from saetool.errors import ArtifactError
from saetool.report import (
    blocks,
    choice,
    collect,
    contexts,
    pair_figures,
    pairs,
    render,
    scales,
    sections,
    svg,
)
from saetool.report.explained import wilson
from saetool.report.path import path_error, path_sparsity
from saetool.report.provenance import inputs_of
from saetool.report.relatives import Relatives
from saetool.report.run import Look, Run, score
from saetool.report.splits import members_of_examples
from saetool.report.thinning import thinned_note

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<!--<script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\"' onmouseover='document.title=1' x='",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; &amp;",
    "javascript:document.title=1",
    "</style><style>*{display:none}</style>",
    "]]><svg onload=document.title=1>",
    "line\u2028separator\u2029 \u202eright to left\u202c \x00 \x1b[31m",
    "</title></textarea></details></table>",
    "ünï¢ødé 漢字 🦊",
    "x" * 5000,
)


class Parsed(HTMLParser):
    """A page read back: elements, tables by caption, JSON blocks, and the text a reader sees."""

    def __init__(self, html: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[Any]]] = {}
        self.columns: dict[str, list[str]] = {}
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.shown: list[str] = []
        self._inside: list[str] = []
        self._caption: str | None = None
        self._cell: list[Any] | None = None
        self.html = html.decode("utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw[tag].append("")
        if tag == "caption":
            self._caption = ""
        elif tag == "tbody":
            assert self._caption is not None
            self.tables[self._caption] = []
        elif tag == "tr" and self._inside[-1] == "table":  # the small tables of cards have no body of their own
            self.tables.setdefault(self._caption or "", []).append([])
        elif tag == "tr" and self._caption is not None and self._caption in self.tables:
            self.tables[self._caption].append([])
        elif tag in ("td", "th"):
            self._cell = [""]
        elif tag == "data" and self._cell is not None:
            self._cell.append(float(dict(attrs)["value"] or "nan"))
        if tag not in ("meta", "input", "br", "img"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._inside:
            while self._inside.pop() != tag:
                pass
        if tag == "td" and self._cell is not None and self._caption is not None:
            self.tables[self._caption][-1].append(self._cell[1] if len(self._cell) > 1 else self._cell[0])
            self._cell = None
        elif tag == "th" and self._cell is not None and self._caption is not None:
            self.columns.setdefault(self._caption, []).append(self._cell[0])
            self._cell = None
        elif tag == "table":
            self._caption = None

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] in ("script", "style"):
            self.raw[self._inside[-1]][-1] += data
            return
        self.shown.append(data)
        if "caption" in self._inside and self._caption is not None:
            self._caption += data
        elif self._cell is not None:
            self._cell[0] += data

    def column(self, caption: str, name: str) -> list[Any]:
        at = self.columns[caption].index(name)
        return [row[at] for row in self.tables[caption]]

    def text(self) -> str:
        return "".join(self.shown)

    def scripts(self) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.elements if tag == "script"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    SyntheticRun(folder).write()
    return folder


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Parsed:
    return Parsed(build([run_dir]))


def build(
    paths: list[Path],
    title: str = ReportConfig.title,
    look: Look = Look(features=60),
    form: render.Form | None = None,
    *,
    autoescape: bool = True,
) -> bytes:
    """The page's bytes, as the command makes them."""
    found = collect.collect(paths)
    plan = h.Plan("report", h.REPORT, {"title": title}, inputs_of(found), [a.header for a in found.artifacts])
    return render.render(sections.page(found, title, look), plan.header(), form, autoescape=autoescape)


def call(*args: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, args)])


def payload(run_dir: Path, name: str) -> dict[str, Any]:
    return container.read_json(run_dir / name)[1]


# --- numbers -----------------------------------------------------------------------------------------------------


def test_the_table_of_saes_holds_exactly_the_artifacts_numbers(page: Parsed, run_dir: Path) -> None:
    saes = payload(run_dir, "eval.json")["saes"]
    caption = next(c for c in page.tables if c.startswith("All evaluated SAEs"))
    assert page.column(caption, "SAE") == [s["name"] for s in saes]
    for name, field in (("L0", "l0"), ("MSE", "mse"), ("EV", "explained_variance"), ("FVU", "fvu"), ("dead", "dead")):
        assert page.column(caption, name) == [s["metrics"][field] for s in saes]
    assert page.column(caption, "EV, legacy") == [s["metrics"]["explained_variance_legacy"] for s in saes]
    assert page.column(caption, "CE recovered (zero)") == [s["ce"]["ce_loss_score_zero"] for s in saes]
    thetas = [container.read_header(run_dir / s["name"]).config["threshold"]["value"] for s in saes]
    assert page.column(caption, "θ") == thetas
    explained = container.read_header(run_dir / "explanations.jsonl").config["summary"]["simulate"]["mean"]
    assert page.column(caption, "autointerp r")[-1] == explained
    assert "CE recovered (mean)" not in page.columns[caption]  # null for every SAE


def test_other_scores_stand_beside_chance_control_and_floor(page: Parsed) -> None:
    assert page.column("Other scores", "score") == ["detection", "intruder"]
    assert page.column("Other scores", "mean") == [0.695, 0.48]
    assert page.column("Other scores", "chance") == [0.5, 0.2]
    assert page.column("Other scores", "control") == [0.5, blocks.ABSENT]
    assert page.column("Other scores", "floor") == [0.61, blocks.ABSENT]
    assert page.column("Other scores", "judged by") == ["table of tokens, offline"] * 2
    assert "detection (balanced accuracy)" in page.text() and "detection, control" in page.text()


def test_the_stitching_tables_hold_exactly_the_artifacts_numbers(page: Parsed, run_dir: Path) -> None:
    record = payload(run_dir, "stitch.json")
    caption = "All pairs side by side"
    names = page.column(caption, "pair")
    for pair in record["pairs"]:
        row = names.index(f"{pair['small']} → {pair['large']}")
        group = next(g for g in pair["data"]["groups"] if g["theta"] == record["theta"])
        expected = {
            "novel": pair["novel"],
            "novel share": pair["novel_share"],
            "reconstruction share": pair["reconstruction_share"],
            "unmatched": pair["unmatched_small"],
            "components": pair["components"],
            "AUC": pair["data"]["auc"],
            "+ novel": group["novel_delta"],
            "+ reconstruction": group["reconstruction_delta"],
            "mean max cos": pair["max_cosine"]["mean"],
        }
        assert {name: page.column(caption, name)[row] for name in expected} == expected
    assert page.column(caption, "kind") == ["widths", "widths", "seed control"]


def test_rounded_text_says_the_value(page: Parsed) -> None:
    """Every number's text, parsed back, is its exact value to the digits shown."""
    shown = re.findall(r'<data value="([^"]+)">([^<]+)</data>', page.html)
    assert len(shown) > 1000
    for value, text in shown:
        exact, plain = float(value), text.replace("−", "-").replace(",", "").replace("\u2009", "")
        said = float(plain.removesuffix(" %")) / 100 if plain.endswith("%") else float(plain)
        assert math.isclose(said, exact, rel_tol=0.05, abs_tol=5e-4 if plain.endswith("%") else 1e-12), (value, text)


def test_histograms_count_every_value_once_and_split_at_theta(run_dir: Path) -> None:
    pair = payload(run_dir, "stitch.json")["pairs"][1]
    figure = pair_figures.closeness(pair, 0.7, "x")
    assert figure.table is not None
    rows = [[c.value for c in row] for row in figure.table.rows]
    assert sum(r[2] for r in rows) == pair["n_large"]
    assert sum(r[2] for r in rows if r[1] <= 0.7) == pair["novel"]
    assert all(r[1] <= 0.7 or r[0] >= 0.7 for r in rows)


def test_quadrants_of_the_effects_equal_a_plain_count(page: Parsed, run_dir: Path) -> None:
    pair = payload(run_dir, "stitch.json")["pairs"][-1]
    effects, cosines = pair["data"]["effects"]["delta_mse"], pair["max_cosine"]["values"]
    novel = [e for e, c in zip(effects, cosines, strict=True) if c < 0.7]
    assert page.tables["Effects by group and sign"][0][1:] == [
        sum(e < 0 for e in novel), sum(e == 0 for e in novel), sum(e > 0 for e in novel)
    ]  # fmt: skip


def test_the_page_says_its_findings_in_numbers(page: Parsed, run_dir: Path) -> None:
    text = page.text()
    record = payload(run_dir, "stitch.json")
    control = record["pairs"][-1]
    assert "MSE falls with width at similar L0 (batchtopk): 72 at 64 latents" in text
    share = blocks.percent(control["reconstruction_share"])
    assert f"Two seeds of width 128 share {share}" in text
    assert "path's ends equal" in text or "Path ends equal the SAEs' own numbers" in text
    assert "explains 51.2 % of the variance of sae-256.st's decoder rows, against 8.3 % for random directions" in text
    assert "42.5 % of 40 questions right (95 % interval 28.5 % to 57.8 %), chance 20.0 %" in text
    assert "changes its MSE by +0.62 % at θ = 0.7" in text
    assert "adding the reconstruction latents instead by +140 %" in text


def test_the_first_finding_is_who_splits_into_whom(page: Parsed, run_dir: Path) -> None:
    record = payload(run_dir, "stitch.json")
    pair = record["pairs"][0]
    shapes = component_shapes(pair["edges"])
    one = sum(n for a, b, n in shapes if a == b == 1)
    split = [sum(n * c for a, b, n in shapes if a == 1 < b for c in [(1, b)[i]]) for i in (0, 1)]
    first = page.text().partition("What this page says")[2].strip().partition(".Adding")[0]
    first = re.split(r"(?<=new\.)", first)[0]
    assert first.startswith(f"{pair['small']} → {pair['large']}: at θ = 0.7, of {pair['n_small']} latents ")
    assert f" {one} live on as one," in first and f" {split[0]} split into {split[1]}," in first and split[0] > 0
    assert f"{pair['unmatched_small']} have no partner" in first or not pair["unmatched_small"]
    assert first.endswith(f"{blocks.percent(pair['novel_share'])} of the {pair['n_large']} are new.")


def test_a_path_that_misses_its_end_is_said(tmp_path: Path, run_dir: Path) -> None:
    header, record = container.read_json(run_dir / "stitch.json")
    record["pairs"][0]["data"]["path"]["mse"][-1] *= 1.5
    writing.write_json(tmp_path / "stitch.json", header, record)
    assert "Path ends DIFFER from the SAEs' own numbers" in Parsed(build([tmp_path])).text()


@pytest.mark.parametrize(
    ("value", "text"),
    [(12288, "12,288"), (0.57214, "0.5721"), (-3.4e-5, "−3.40e−5"), (None, "–"), (float("nan"), "–"),
     (0.60999, "0.6100"), (72.0, "72"), (0, "0"), (123456.7, "123,457"), (2199.16, "2,199")],
)  # fmt: skip
def test_numbers_read_as_in_print(value: float | None, text: str) -> None:
    assert blocks.number(value) == text


def test_wilson_interval_matches_the_closed_form_of_scipy() -> None:
    from scipy.stats import binomtest

    expected = binomtest(17, 40).proportion_ci(method="wilson")
    assert wilson(17 / 40, 40) == pytest.approx((expected.low, expected.high), abs=1e-6)


# --- one file, no network, nothing that runs but our script ------------------------------------------------------


def test_the_page_needs_no_network_and_allows_only_its_own_script_and_style(page: Parsed) -> None:
    html = page.html
    assert "http:" not in html and "https:" not in html and "@import" not in html and "url(" not in html
    for tag, attrs in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
        assert not {"src", "srcset", "style"} & set(attrs)
        assert not any(name.startswith("on") for name in attrs)
        if "href" in attrs:
            assert (attrs["href"] or "").startswith("#")
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a) or ""
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    code = next(t for a, t in zip(page.scripts(), page.raw["script"], strict=True) if "type" not in a)
    for text in (code, page.raw["style"][0]):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert len(code.encode()) <= 25_000
    assert len(html.encode()) <= 3_000_000


def test_every_section_and_the_machine_readable_record_are_there(page: Parsed) -> None:
    ids = {a["id"] for t, a in page.elements if t == "section" and a.get("class") == "part"}
    assert ids == {
        *("provenance", "saes", "training", "stitching", "meta", "autointerp", "latents", "activations", "glossary")
    }
    blocks_ = [t for a, t in zip(page.scripts(), page.raw["script"], strict=True) if a.get("id") == "report"]
    record = json.loads(blocks_[0])
    assert record["sections"] == {
        "shown": [
            *("stitching", "meta", "latents", "autointerp", "saes", "training", "activations", "provenance", "glossary")
        ],
        "skipped": [],
    }
    assert record["warnings"] == [] and len(record["artifacts"]) == 13


def test_every_figure_has_a_title_a_description_and_a_caption(page: Parsed) -> None:
    tags = [t for t, _ in page.elements]
    drawings = [a for t, a in page.elements if t == "svg"]
    assert len(drawings) >= 25 and all(a["role"] == "img" for a in drawings)
    assert tags.count("figcaption") == tags.count("figure") >= 25
    assert tags.count("desc") == len(drawings) == tags.count("figure") + page.html.count('<div class="small-drawing">')
    assert tags.count("h1") == 1
    ids = [a["id"] for _, a in page.elements if a.get("id")]
    assert len(ids) == len(set(ids))


def test_every_figure_has_its_numbers_as_a_table(page: Parsed) -> None:
    """The chain of artifacts and the multiple choice have tables of their own right after them."""
    without = [
        f for f, inside in re.findall(r'<figure id="([^"]+)"(.*?)</figure>', page.html, re.S) if "<td" not in inside
    ]
    assert set(without) == {"chain", "choice"}
    assert {"Multiple choice", "Artifacts on this page"} <= set(page.tables)


def test_equal_inputs_in_any_order_give_equal_bytes(run_dir: Path) -> None:
    whole = build([run_dir])
    files = sorted(p for p in run_dir.iterdir() if p.name != "report.html")
    for seed in range(3):
        random.Random(seed).shuffle(files)
        assert build(files) == whole
    assert str(run_dir).encode() not in whole and run_dir.parent.name.encode() not in whole


def test_a_copied_run_gives_the_same_page(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "elsewhere")
    assert build([tmp_path / "elsewhere"]) == build([run_dir])


# --- hostile text ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose tokens, descriptions, model name and one file name are hostile."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    run = SyntheticRun(folder, words=HOSTILE, said=HOSTILE)
    run.write()
    header, record = container.read_json(folder / "eval.json")
    record["saes"][0]["name"] = HOSTILE[2]
    writing.write_json(folder / "<b onclick=x>&.json", header, record)
    return folder


def problems(html: bytes, plain: Parsed) -> list[str]:
    """How ``html`` differs in structure from what an honest page may hold, and what of the hostile text is lost."""
    parsed = Parsed(html)
    allowed = {tag for tag, _ in plain.elements} | {"code", "ul", "li"}
    found = [f"element {tag}" for tag, _ in parsed.elements if tag not in allowed]
    found += [f"attribute {n}" for _, a in parsed.elements for n in a if n.startswith("on") or n == "src"]
    scripts = [a for a in parsed.scripts() if a.get("type") != "application/json"]
    found += ["a second script"] * (len(scripts) - 1) + ["a second style"] * (len(parsed.raw["style"]) - 1)
    text = parsed.text()
    return found + [f"lost: {s[:20]}" for s in HOSTILE if render.visible(s) not in text]


def test_hostile_text_is_shown_exactly_and_never_becomes_markup(hostile_dir: Path, page: Parsed) -> None:
    html = build([hostile_dir], title=HOSTILE[0])
    assert problems(html, page) == []
    parsed = Parsed(html)
    assert f"{HOSTILE[0]}" in parsed.text() and "<b onclick=x>&.json" in parsed.text()
    for attrs, text in zip(parsed.scripts(), parsed.raw["script"], strict=True):
        if attrs.get("type") == "application/json":
            json.loads(text)
            assert "<" not in text and ">" not in text


def test_the_hostility_check_fails_without_escaping(hostile_dir: Path, page: Parsed) -> None:
    assert problems(build([hostile_dir], title=HOSTILE[0], autoescape=False), page)


STRUCTURAL = {"schema", "sha256", "key", "role", "status", "small_sha256", "large_sha256", "windows_sha256"}
"""Fields whose strings decide what an artifact is and belongs to; every other string may be anything."""


def poisoned(value: Any, poison: Iterator[str], name: str = "") -> Any:
    """``value`` with every free string in it replaced by a hostile one."""
    if isinstance(value, dict):
        return {k: poisoned(v, poison, k) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v, poison, name) for v in value]
    free = isinstance(value, str) and name not in STRUCTURAL and not re.fullmatch("[0-9a-f]{64}", value)
    return next(poison) if free else value


def test_every_string_of_every_artifact_may_be_hostile(run_dir: Path, page: Parsed, tmp_path: Path) -> None:
    """Headers, histories, options, names, records: all of them, of every kind, at once."""
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    poison = itertools.cycle(HOSTILE[:-1])
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.suffix == ".st":
            data = path.read_bytes()
            end = 8 + int.from_bytes(data[:8], "little")
            head = json.loads(data[8:end])
            if own := head.get("__metadata__", {}).get(container.METADATA_KEY):
                head["__metadata__"][container.METADATA_KEY] = json.dumps(poisoned(json.loads(own), poison))
                text = json.dumps(head).encode()
                path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
        elif path.suffix == ".jsonl":
            lines = path.read_text().splitlines()
            path.write_text("".join(json.dumps(poisoned(json.loads(x), poison)) + "\n" for x in lines))
        else:
            path.write_text(json.dumps(poisoned(json.loads(path.read_text()), poison)))
    html = build([folder])
    found = [p for p in problems(html, page) if p != f"lost: {HOSTILE[-1][:20]}"]
    assert found == [] and "\u202e" not in Parsed(html).text()
    assert not [w for w in Parsed(html).text().splitlines() if "left out" in w and "damaged" in w]
    assert len(Parsed(html).elements) > 0.7 * len(page.elements)  # still the whole page


def test_invisible_characters_are_shown_as_signs() -> None:
    assert render.visible("a\nb\tc\x00\u202e") == "a⏎b⇥c␀⟨U+202E⟩"
    plot = svg.Plot(scales.linear([0, 4]), scales.linear([0, 4]), "x\u202e", "y\x00", [svg.Key("k\n", 0)])
    drawing = plot.draw("t\x1b", "d\u2066")
    assert not set("\u202e\x00\n\x1b\u2066") & set(drawing) and "x⟨U+202E⟩" in drawing and "k⏎" in drawing


# --- parts of a run ----------------------------------------------------------------------------------------------

ALONE = {
    "acts": {"provenance", "activations", "glossary"},
    "sae-64.st": {"provenance", "training", "glossary"},
    "meta.st": {"provenance", "glossary"},
    "train.jsonl": {"provenance", "training", "glossary"},
    "eval.json": {"provenance", "saes", "glossary"},
    "stitch.json": {"provenance", "stitching", "glossary"},
    "meta.json": {"provenance", "meta", "glossary"},
    "explanations.jsonl": {"provenance", "autointerp", "latents", "glossary"},
    "explanations.windows.st": {"provenance", "glossary"},
}


@pytest.mark.parametrize("name", ALONE)
def test_each_artifact_alone_makes_a_page_that_names_what_is_absent(run_dir: Path, name: str) -> None:
    parsed = Parsed(build([run_dir / name]))
    shown = {a["id"] for t, a in parsed.elements if t == "section" and a.get("class") == "part"}
    assert shown - {"missing"} == ALONE[name]
    text = parsed.text()
    assert "Not in this report" in text
    commands = {"saes": "saetool eval", "stitching": "saetool stitch", "meta": "saetool meta", "training": "--log"}
    for section, command in commands.items():
        assert (command in text.partition("Not in this report")[2].rpartition("Not in this report")[2]) == (
            section not in shown
        )


@pytest.mark.parametrize("name", ALONE)
def test_each_artifact_may_be_missing(run_dir: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    target = tmp_path / "run" / name
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert b"</html>" in build([tmp_path / "run"])


def test_contexts_come_from_the_windows_with_ten_levels_and_their_texts(page: Parsed, run_dir: Path) -> None:
    levels = {a["class"] for t, a in page.elements if t == "mark" and a.get("title")}
    assert levels == {f"a{i}" for i in range(1, 11)}
    assert "Einstein" in page.text() and "⟨" not in page.text()


def test_descriptions_label_components_decompositions_and_neighbours(page: Parsed) -> None:
    captions = set(page.tables)
    assert {"Its meta-latents (meta.st)", "Latents it is part of", "What latents are made of"} <= captions
    assert any(c.startswith("Nearest in sae-128.st") for c in captions)
    described = page.column("What latents are made of", "description")
    assert "famous physicists, strongest on “Einstein”" in described


def cards_of(parsed: Parsed) -> dict[str, set[str]]:
    """The cards of a page and what each leads to."""
    out: dict[str, set[str]] = {}
    mine: set[str] = set()
    for tag, attrs in parsed.elements:
        if tag == "details" and attrs.get("class") == "card":
            mine = out.setdefault(attrs["id"] or "", set())
        elif tag == "section":
            mine = set()
        elif tag == "a":
            mine.add(attrs["href"] or "")
    return out


def test_more_latents_than_asked_for_are_chosen_and_said(run_dir: Path) -> None:
    parsed = Parsed(build([run_dir], look=Look(features=12)))
    assert "Showing 6 of 41 explained latents, a third of them the best explained, a third the worst" in parsed.text()
    assert "Showing 6 of 12 explained latents" in parsed.text()
    assert 12 < len(cards_of(parsed)) <= 24
    assert "latents" not in {a.get("id") for _, a in Parsed(build([run_dir], look=Look(features=0))).elements}


def test_a_latent_leads_to_its_relatives_and_they_lead_back(run_dir: Path, page: Parsed) -> None:
    ids = {a["id"] for _, a in page.elements if a.get("id")}
    assert {a["href"][1:] for t, a in page.elements if t == "a" and a["href"]} <= ids  # no link leads nowhere
    cards = cards_of(page)
    saes = {c.rpartition("-")[0] for c in cards}
    assert len(saes) == 4  # the explained SAE, the meta-SAE, and the smaller SAEs, which have no explanations
    parts = payload(run_dir, "meta.json")["decompositions"]
    for latent in (0, 6, 12):
        strongest = max(zip(parts["weights"][latent], parts["indices"][latent], strict=True))[1]
        assert f"#latent-1-{strongest}" in cards[f"latent-0-{latent}"]
    pair = payload(run_dir, "stitch.json")["pairs"][1]
    shown = [e for e in pair["edges"] if any(f"#{s}-{e[0]}" in cards.get(f"latent-0-{e[1]}", ()) for s in saes)]
    small, large, _ = max(shown, key=lambda e: e[2])
    name = next(s for s in saes if f"#{s}-{small}" in cards[f"latent-0-{large}"])
    assert f"#latent-0-{large}" in cards[f"{name}-{small}"]


@pytest.mark.parametrize("gone", [(), ("meta.st",), ("meta.st", "meta-explanations.jsonl")])
def test_the_meta_sae_of_a_record_is_neither_its_parent_nor_what_it_was_compared_with(
    run_dir: Path, tmp_path: Path, gone: tuple[str, ...]
) -> None:
    """The record names parent and compared SAEs as its inputs; the meta-SAE itself is known by its last step."""
    shutil.copytree(run_dir, tmp_path / "run")
    wanted = h.sha256_file(tmp_path / "run" / "meta.st")
    for name in gone:
        (tmp_path / "run" / name).unlink()
    run = Run(collect.collect([tmp_path / "run"]))
    (record,) = run.found.of(h.META)
    assert {i["role"] for i in record.header.inputs} == {"parent", "compare"}
    assert run.meta_sha256(record) == (wanted if len(gone) < 2 else "")
    latent, index = record.payload["decompositions"]["latents"][0], record.payload["decompositions"]["indices"][0][0]
    relations = Relatives(run).of((run.identity(record.payload["parent"]["sha256"]), latent))
    parts = next(r for r in relations if r.title.startswith("Its meta-latents"))
    assert parts.sae == (wanted if len(gone) < 2 else "") and index in dict(parts.found)
    assert "sae-64" not in parts.title


def test_families_on_cards_are_the_components(run_dir: Path) -> None:
    run = Run(collect.collect([run_dir]))
    pair = payload(run_dir, "stitch.json")["pairs"][1]
    large = run.identity(pair["large_sha256"])
    for latent in range(pair["n_large"]):
        reached, grown = {(1, latent)}, True
        while grown:  # brute force: walk along edges until nothing is new
            new = {n for a, b, _ in pair["edges"] for n in ((0, a), (1, b)) if {(0, a), (1, b)} & reached} - reached
            reached, grown = reached | new, bool(new)
        family = next(f for f in Relatives(run).families((large, latent)) if f.large_name == pair["large"])
        alone = len(reached) == 1
        assert (family.first is None) == alone == (pair["max_cosine"]["values"][latent] < 0.7)
        assert alone or {(0, a) for a in family.small} | {(1, b) for b in family.large} == reached
        if latent > 40:
            break


def test_relatives_with_a_card_are_the_most_linked_then_the_closest(run_dir: Path) -> None:
    """Not those of the smallest numbers of one SAE."""
    run = Run(collect.collect([run_dir]), Look(features=60))
    chosen = choice.choose_cards(run)
    asked = [(s.sae, n) for s in chosen.shelves for n, _, mine in s.latents if mine]
    kin = [(s.sae, n) for s in chosen.shelves for n, _, mine in s.latents if not mine]
    linked: dict[tuple[str, int], list[float]] = {}
    for key in asked:
        for relation in chosen.relatives.of(key):
            for n, value in relation.found:
                linked.setdefault((relation.sae, n), []).append(value)
    described = {(run.identity(e.sae_sha256), r["latent"]) for e in run.explanations for r in e.records}
    drawn = set(members_of_examples(run))
    once = {k: v[0] for k, v in linked.items() if len(v) == 1 and k not in described and k not in drawn}
    within = [once[k] for k in kin if k in once]
    without = [v for k, v in once.items() if k not in kin]
    assert within and without and min(within) >= max(without)


@pytest.mark.parametrize("pick", ["top", "worst", "random"])
def test_the_latents_picked_are_those_asked_for(run_dir: Path, pick: str) -> None:
    run = Run(collect.collect([run_dir]), Look(features=10, pick=pick))
    explained = next(e for e in run.explanations if e.sae_name == "sae-256.st")
    mine = {r["latent"] for r in choice.choose(explained, 10, run.look)}
    scores = {r["latent"]: s for r in explained.records if (s := score(r, "simulate", "correlation")) is not None}
    ranked = sorted(scores, key=lambda n: -scores[n])
    assert len(mine) == 10
    if pick == "random":
        assert mine == {r["latent"] for r in choice.choose(explained, 10, run.look)}
        assert mine != {r["latent"] for r in choice.choose(explained, 10, Look(features=10, pick="random", seed=1))}
    else:
        assert mine == set(ranked[:10] if pick == "top" else ranked[-10:])


def test_a_list_of_latents_is_shown_and_a_wrong_one_refused(run_dir: Path, tmp_path: Path) -> None:
    listed = tmp_path / "mine.txt"
    listed.write_text("sae-256.st:12\nsae-256.st:30, meta.st:3\n")
    assert call(run_dir, "-o", tmp_path / "r.html", "--pick", f"@{listed}", "--features", 3).exit_code == 0
    text = Parsed((tmp_path / "r.html").read_bytes()).text()
    assert "Showing 2 of 41 explained latents" in text and "Showing 1 of 12 explained latents" in text
    for words, said in (("7x", "'7x' is no latent"), ("", "names no latent"), ("9999", "latent 9999 is in no")):
        listed.write_text(words)
        refused(call(run_dir, "-o", tmp_path / "s.html", "--pick", f"@{listed}"), said, code=2)
    refused(call(run_dir, "-o", tmp_path / "s.html", "--pick", "@nowhere"), "cannot be read", code=2)
    refused(call(run_dir, "-o", tmp_path / "s.html", "--pick", "best"), "is none of mixed", code=2)
    refused(call(run_dir, "-o", tmp_path / "s.html", "--theme", "pink"), "is none of auto", code=2)
    refused(call(run_dir, "-o", tmp_path / "s.html", "--contexts", -1), "--contexts", code=2)
    refused(call(run_dir, "-o", tmp_path / "s.html", "--max-size", "big"), "--max-size", code=2)


def test_contexts_are_the_strongest_and_some_weaker_ones_with_predictions(run_dir: Path) -> None:
    run = Run(collect.collect([run_dir]))
    artifact = next(e for e in run.explanations if e.windows).windows
    assert artifact is not None
    data = artifact.payload
    peaks = sorted((float(a.max()) for a, n in zip(data.acts, data.latent, strict=True) if n == 6), reverse=True)
    active = [p for p in peaks if p > 0]
    shown = contexts.contexts(artifact, 6, None, 4, 5.0)
    said = [float(c.peak.partition(",")[0]) for c in shown.active]
    expected = [active[0], active[1], active[2], active[3]]
    assert shown.n_active == len(active) and said == pytest.approx(expected, rel=0.005)
    assert [c.peak for c in shown.silent] == ["0, predicted 0.5"]  # strength 1 of 10, of a scale of 5
    row = int(next(i for i, n in enumerate(data.latent) if n == 6 and data.role[i] == 3))
    strongest = int(data.acts[row].argmax())
    token = next(t for c in shown.active for t in c.tokens if t.text == f"⟨{data.tokens[row][strongest]}⟩" and t.level)
    assert "predicted" in token.title
    assert contexts.contexts(artifact, 6, None, 4, None).silent == []  # no scale, no prediction


def test_undefined_numbers_are_gaps_and_are_counted(tmp_path: Path, run_dir: Path) -> None:
    header, record = container.read_json(run_dir / "stitch.json")
    pair = record["pairs"][0]
    pair["data"]["path"]["mse"][5] = None
    pair["data"]["effects"]["delta_mse"][3] = float("nan")
    pair["max_cosine"]["values"][4] = None
    writing.write_json(tmp_path / "stitch.json", header, record)
    parsed = Parsed(build([tmp_path]))
    text = parsed.text()
    assert "1 undefined values are gaps." in text
    assert "2 latents without a defined effect are not in it." in text
    assert not re.search(r"\bnan\b", text, re.IGNORECASE) and "NaN" not in parsed.html


def test_a_pair_without_data_has_no_path_and_says_how_to_get_one(tmp_path: Path, run_dir: Path) -> None:
    header, record = container.read_json(run_dir / "stitch.json")
    for pair in record["pairs"]:
        pair |= {"data": None, "edges": [], "sweep": [], "component_shapes": [], "components": 0}
    writing.write_json(tmp_path / "stitch.json", header, record)
    text = Parsed(build([tmp_path])).text()
    assert "Effects on reconstruction were not measured" in text and "reaches θ = 0.7: no components" in text


def test_components_of_the_browser_equal_brute_force(run_dir: Path) -> None:
    for pair in payload(run_dir, "stitch.json")["pairs"]:
        found = pairs.components(pair["edges"])
        assert sum(len(c) for c in found) == len(pair["edges"])
        counted: dict[tuple[int, int], int] = {}
        for component in found:
            counted[pairs.shape(component)] = counted.get(pairs.shape(component), 0) + 1
        assert counted == {(a, b): n for a, b, n in component_shapes(pair["edges"])}


def test_a_huge_component_is_drawn_in_part_and_said(tmp_path: Path, run_dir: Path) -> None:
    header, record = container.read_json(run_dir / "stitch.json")
    pair = record["pairs"][0]
    pair["edges"] = [[i, j, 0.7 + 0.002 * i] for i in range(60) for j in (i, i + 60)] + [
        [i, i + 1, 0.9] for i in range(59)
    ]
    writing.write_json(tmp_path / "stitch.json", header, record)
    text = Parsed(build([tmp_path])).text()
    assert "between 60 small and 120 large latents. Drawn: the 16 and 16 with the largest cosines." in text


def test_descriptions_hold_across_threshold(run_dir: Path, tmp_path: Path) -> None:
    """An SAE with a threshold has another hash and the same latents: descriptions made for one serve the other."""
    run = SyntheticRun(tmp_path / "run")
    run.cache()
    run.saes()
    trained = run.inputs["sae-256.st"]
    header = container.read_header(tmp_path / "run" / "sae-256.st")
    plan = run.plan("threshold", h.SAE, {"batches": 9}, "sae-256.st")
    loaded = container.read_tensors(tmp_path / "run" / "sae-256.st", h.SAE)
    made = plan.header(config=header.config, model=header.model)
    path = tmp_path / "run" / "sae-256-threshold.st"
    sha256 = writing.write_tensors(path, loaded.tensors, made)
    run.stitch()
    run.inputs["sae-256.st"] = h.Input("sae", path.name, sha256, h.SAE)
    run.headers["sae-256.st"] = made
    run.explanations()
    for keep in (True, False):  # the history tells even where the file itself is not given
        if not keep:
            path.unlink()
        found = Run(collect.collect([tmp_path / "run"]))
        assert found.description(trained.sha256, 0) == found.description(sha256, 0) is not None


# --- provenance --------------------------------------------------------------------------------------------------


def test_a_changed_input_is_a_red_row_and_a_warning(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    run = SyntheticRun(tmp_path / "other")
    run.cache()
    run.rng = __import__("numpy").random.default_rng(99)
    run.saes()
    shutil.copy(tmp_path / "other" / "sae-64.st", tmp_path / "run" / "sae-64.st")
    result = call(tmp_path / "run", "-o", tmp_path / "out.html", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert any("eval.json was made from sae-64.st" in w for w in record["metrics"]["warnings"])
    parsed = Parsed((tmp_path / "out.html").read_bytes())
    assert sum(t == "tr" and a.get("class") == "bad" for t, a in parsed.elements) == 4  # eval.json, stitch.json, meta.*
    assert "✗" in "".join(map(str, parsed.column("Artifacts on this page", "made from")))
    strict = call(tmp_path / "run", "-o", tmp_path / "strict.html", "--strict")
    assert strict.exit_code == 1 and (tmp_path / "strict.html").exists()


def test_an_unchanged_run_has_no_warning(run_dir: Path, tmp_path: Path) -> None:
    assert call(run_dir, "-o", tmp_path / "r.html", "--strict").exit_code == 0


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command_prints_the_path_or_one_record(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    result = call(run_dir, "-o", out, "--quiet")
    assert result.exit_code == 0 and result.stdout == f"{out}\n" and result.stderr == ""
    again = call(run_dir, "-o", out, "--json")
    record = json.loads(again.stdout)
    assert record["kind"] == "report" and record["sha256"] == h.sha256_file(out)
    assert record["key"] == render.read_header(out.read_bytes(), "r").key
    assert "up to date" in again.stderr
    other = call(run_dir, "-o", out, "--title", "Another")
    assert other.exit_code == 1 and "title" in other.stderr and "--overwrite" in other.stderr
    assert call(run_dir, "-o", out, "--title", "Another", "--overwrite").exit_code == 0
    assert "<title>Another</title>" in out.read_text()


def test_standard_output_gets_the_page(run_dir: Path) -> None:
    result = call(run_dir, "-o", "-", "-q")
    assert result.exit_code == 0 and result.stdout_bytes == call(run_dir, "-o", "-", "-q").stdout_bytes
    assert result.stdout.rstrip().endswith("</html>")


def test_the_page_beside_its_inputs_is_up_to_date_when_made_again(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    first = call()
    before = (tmp_path / "run" / "report.html").read_bytes()
    second = call("--json")
    assert first.exit_code == second.exit_code == 0 and "up to date" in second.stderr
    assert (tmp_path / "run" / "report.html").read_bytes() == before
    assert call("--overwrite").exit_code == 0  # the page does not count itself among the other files
    assert (tmp_path / "run" / "report.html").read_bytes() == before


def test_dry_run_lists_the_artifacts_and_writes_nothing(run_dir: Path, tmp_path: Path) -> None:
    result = call(run_dir, "-o", tmp_path / "r.html", "--dry-run")
    assert result.exit_code == 0 and "stitch.json: saetool/stitch@1" in result.stdout
    assert not (tmp_path / "r.html").exists()


def refused(result: Result, *words: str, code: int = 1) -> None:
    """One line of error with these words, a hint at most beside it."""
    assert result.exit_code == code, result.output
    lines = [x for x in result.stderr.splitlines() if not x.startswith(("hint: ", "found ", "warning: ", "not in "))]
    assert len(lines) == 1, result.stderr
    assert all(word in lines[0] for word in words), lines[0]


def test_paths_that_cannot_work_are_refused(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "page.html").write_text("<!doctype html><title>mine</title>")
    refused(call(tmp_path / "none", "-o", tmp_path / "r.html"), "no such file")
    refused(call(tmp_path, "-o", tmp_path / "r.html"), "no artifact of saetool found", "3 other files")
    refused(call(run_dir, "-o", tmp_path / "no" / "r.html"), "does not exist")
    refused(call(run_dir, "-o", tmp_path), "is a folder")
    refused(call(run_dir, "-o", tmp_path / "page.html"), "page.html", "did not write")
    refused(call(run_dir / "eval.json", "-o", run_dir / "eval.json", "--overwrite"), "one of the inputs")
    refused(call(run_dir, "-o", run_dir / "eval.json", "--overwrite"), "one of the inputs")
    refused(call(run_dir, "-o", tmp_path / "r.html", "--features", -1), "--features", code=2)
    refused(call(run_dir, "-o", tmp_path / "r.html", "--title", " "), "--title", code=2)
    assert (tmp_path / "page.html").read_text().endswith("mine</title>")
    assert not (tmp_path / "r.html").exists()


def test_paths_may_come_from_standard_input(run_dir: Path, tmp_path: Path) -> None:
    files = sorted(str(p) for p in run_dir.iterdir())
    whole = build([run_dir])
    for text in ("\n".join(files) + "\n", "\0".join(files)):
        result = CliRunner().invoke(app, ["report", "-", "-o", "-", "-q", "--features", "60"], input=text)
        assert result.exit_code == 0 and len(result.stdout_bytes) == pytest.approx(len(whole), abs=500)
    refused(CliRunner().invoke(app, ["report", "-", "-o", "-"], input="\n"), "no path came", code=2)


def test_a_page_above_its_size_has_fewer_cards_and_says_so(run_dir: Path, tmp_path: Path) -> None:
    assert call(run_dir, "-o", tmp_path / "full.html").exit_code == 0
    full = (tmp_path / "full.html").stat().st_size
    assert call(run_dir, "-o", tmp_path / "r.html", "--max-size", f"{full * 3 // 4}").exit_code == 0
    page = (tmp_path / "r.html").read_bytes()
    parsed = Parsed(page)
    assert full // 2 < len(page) <= full * 3 // 4 and cards_of(parsed)
    assert "200 cards were asked for; fewer are here because of the page's largest size." in parsed.text()
    refused(call(run_dir, "-o", tmp_path / "s.html", "--max-size", "50kb"), "without any card", "--max-size 50kb")


def test_the_data_of_every_figure_is_written_exactly(run_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    made = call(run_dir, "-o", tmp_path / "r.html", "--data", folder)
    assert made.exit_code == 0, made.output
    record = json.loads((folder / "report.json").read_text())
    figures = {a["id"] for t, a in Parsed((tmp_path / "r.html").read_bytes()).elements if t == "figure"}
    # The chain of artifacts and the multiple choice have tables of their own on the page.
    assert set(record["figures"]) == {f"{f}.csv" for f in figures - {"chain", "choice"}}
    pair = payload(run_dir, "stitch.json")["pairs"][0]
    rows = list(csv.DictReader((folder / "pair-0-effects.csv").open()))
    effects = {int(r["id"]): float(r["change of MSE (symlog axis)"]) for r in rows}
    assert effects == dict(enumerate(pair["data"]["effects"]["delta_mse"]))
    again = call(run_dir, "-o", tmp_path / "r.html", "--data", folder)
    assert again.exit_code == 0 and "up to date" in again.stderr
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    refused(call(run_dir, "-o", tmp_path / "s.html", "--data", tmp_path / "other"), "holds other data")
    refused(call(run_dir, "-o", tmp_path / "s.html", "--data", tmp_path / "r.html"), "is a file")
    assert not (tmp_path / "s.html").exists()


def test_data_hold_every_point_where_the_drawing_shows_some(run_dir: Path) -> None:
    """Effects, and the steps of a path, of which only a part is drawn and told on hovering."""
    pair = payload(run_dir, "stitch.json")["pairs"][1]
    times = 3000 // pair["n_large"] + 1
    pair["max_cosine"]["values"] *= times
    pair["data"]["effects"]["delta_mse"] *= times
    figure = pair_figures.effects(Run(collect.collect([run_dir])), pair, pair["data"], 0.7, "x")
    assert figure is not None and figure.data is not None and figure.hover is not None
    points = {row[1].value: row[3].value for row in figure.data.rows}
    assert points == dict(enumerate(pair["data"]["effects"]["delta_mse"])) and len(points) > 3000
    assert sum(len(s["i"]) for s in figure.hover["s"]) == pair_figures.MAX_POINTS
    steps = pair["data"]["path"]
    for name in ("mse", "l0", "n_latents"):
        steps[name] = [v for v in steps[name] for _ in range(20)]
    steps["n_add_steps"] *= 20
    steps["n_swap_steps"] = len(steps["mse"]) - steps["n_add_steps"] - 1
    for drawn in (path_error(pair, pair["data"], "x"), path_sparsity(pair, pair["data"], "x")):
        assert drawn.data is not None and drawn.hover is not None
        assert {row[1].value for row in drawn.data.rows} == set(range(len(steps["mse"])))
        assert all(len(s["i"]) <= 100 for s in drawn.hover["s"])


def test_a_page_without_script_has_none_and_allows_none(run_dir: Path, tmp_path: Path) -> None:
    assert call(run_dir, "-o", tmp_path / "r.html", "--no-js", "--theme", "dark").exit_code == 0
    parsed = Parsed((tmp_path / "r.html").read_bytes())
    assert all(a.get("type") == "application/json" for a in parsed.scripts())
    assert "script-src 'none'" in parsed.html and ("html", {"lang": "en", "data-theme": "dark"}) in parsed.elements
    assert "hover" not in {a.get("class") for a in parsed.scripts()}


def spoiled(run_dir: Path) -> dict[str, bytes]:
    """Damaged versions of artifacts, by the word that their warning must hold."""
    header, record = container.read_json(run_dir / "eval.json")
    del record["saes"][0]["metrics"]
    newer = header.to_json() | {"schema": "saetool/eval@9"}
    text = (run_dir / "stitch.json").read_bytes()
    return {
        "metrics is missing": writing.json_bytes(header, record),
        "schema saetool/eval@9": json.dumps({"saetool": newer}).encode(),
        "not JSON": text[: len(text) // 2],
        "cut off": (run_dir / "sae-64.st").read_bytes()[:-10],
    }


@pytest.mark.parametrize("word", ["metrics is missing", "schema saetool/eval@9", "not JSON", "cut off"])
def test_a_damaged_artifact_is_named_and_the_rest_still_shown(run_dir: Path, tmp_path: Path, word: str) -> None:
    suffix = ".st" if word == "cut off" else ".json"
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(run_dir / "meta.json", folder)
    (folder / f"damaged{suffix}").write_bytes(spoiled(run_dir)[word])
    result = call(folder, "-o", tmp_path / "r.html")
    assert result.exit_code == 0, result.output
    text = Parsed((tmp_path / "r.html").read_bytes()).text()
    assert f"damaged{suffix}" in text and word in text and "1 warning" in text and "Meta-SAE of sae-256.st" in text
    assert str(tmp_path) not in text
    strict = call(folder, "-o", tmp_path / "s.html", "--strict")
    assert strict.exit_code == 1 and "--strict" in strict.stderr


GONE = object()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("pairs", 0, "novel_share"), GONE),
        (("pairs", 0, "reconstruction_share"), GONE),
        (("pairs", 0, "max_cosine", "mean"), GONE),
        (("pairs", 0, "max_cosine", "median"), GONE),
        (("pairs", 0, "data", "roc", "true_positive"), [None, 1.0]),
        (("pairs", 0, "max_cosine", "values"), [0.5]),
        (("pairs", 0, "component_shapes"), [[1, 2]]),
        (("pairs", 0, "data", "path", "l0"), [1.0]),
        (("pairs", 0, "data", "effects", "delta_mse"), [1.0]),
        (("pairs", 0, "edges"), [[1, 2]]),
        (("pairs", 0, "novel"), "many"),
        (("pairs", 0, "data", "auc"), "high"),
        (("pairs",), {}),
        (("theta",), None),
    ],
)
def test_a_record_that_contradicts_its_schema_is_damaged(
    run_dir: Path, tmp_path: Path, path: tuple[Any, ...], value: Any
) -> None:
    header, record = container.read_json(run_dir / "stitch.json")
    place: Any = record
    for step in path[:-1]:
        place = place[step]
    if value is GONE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    writing.write_json(tmp_path / "stitch.json", header, record)
    with pytest.raises(ArtifactError, match="is damaged"):
        collect.collect([tmp_path])


def test_the_scan_stops_at_linked_and_hidden_folders_and_opens_no_shard(run_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / ".hidden").mkdir()
    shutil.copy(run_dir / "eval.json", folder / ".hidden" / "copy.json")
    (folder / "acts" / "shard-00000.st").write_bytes(b"not even safetensors")
    found = collect.collect([folder])
    assert [a.label for a in found.artifacts] == [a.label for a in collect.collect([run_dir]).artifacts]
    assert found.warnings == ()


def test_the_scan_is_bounded(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "MAX_ENTRIES", 6)
    assert any("was not looked at" in w for w in collect.collect([run_dir]).warnings)


def test_two_folders_keep_their_files_apart(run_dir: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    shutil.copy(run_dir / "eval.json", tmp_path / "a")
    shutil.copy(run_dir / "stitch.json", tmp_path / "b")
    found = collect.collect([tmp_path / "b", tmp_path / "a"])
    assert [a.label for a in found.artifacts] == ["a/eval.json", "b/stitch.json"]


# --- drawing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "log", "symlog"])
@pytest.mark.parametrize(("low", "high"), [(0.001, 7.3), (12.1, 12.4), (1e-7, 2e-6), (3.0, 5e6)])
def test_ticks_lie_in_range_in_order_and_read_as_their_value(kind: Any, low: float, high: float) -> None:
    scale = scales.Scale(kind, -high if kind == "symlog" else low, high, 0, 100, linear=low)
    ticks = scale.ticks()
    places = [scale(v) for v, _ in ticks]
    assert len(ticks) >= 2 and places == sorted(places) and all(-0.01 <= p <= 100.01 for p in places)
    for value, text in ticks:
        plain = text.replace("−", "-").replace(",", "").replace("k", "e3").replace("M", "e6")
        assert math.isclose(float(plain), value, rel_tol=1e-6, abs_tol=low * 1e-6)


def test_a_signed_logarithmic_axis_spends_no_room_on_a_side_without_values() -> None:
    scale = scales.symlog([62.0, 136.0, 209.0, 0.4, 4.8, 127.0, 1.0], linear_for=[0.4, 4.8, 14.7, 45.1, 127.0])
    assert scale.linear == 10.0 and [t for t, _ in scale.ticks()] == [0.0, 10.0, 30.0, 100.0]
    placed = scale.placed(0, 100)
    assert 0 < placed(0.0) < 10 and placed(209.0) > 90
    assert scales.symlog([-3.0, 4.0]).low == pytest.approx(-3.9)


def test_a_long_legend_takes_no_room_from_the_plot() -> None:
    keys = [svg.Key(f"sae-{i}-of-a-long-name", i) for i in range(30)]
    plots = [svg.Plot(scales.linear([0, 4]), scales.linear([0, 4]), "x", "y", keys[:n]) for n in (6, 30)]
    assert plots[1].bottom - plots[1].top == plots[0].bottom - plots[0].top > 100


def test_what_was_left_out_is_said_in_a_sentence() -> None:
    assert thinned_note(667, 16, "") == "16 of 667 points, evenly spaced."
    assert thinned_note(667, 16, "an SAE") == "16 of 667 points an SAE, evenly spaced."
    assert thinned_note(16, 16, "") == ""


def test_a_null_breaks_the_line() -> None:
    plot = svg.Plot(scales.linear([0, 4]), scales.linear([0, 4]), "x", "y")
    plot.line([0, 1, 2, 3, 4], [0.0, 1.0, None, 3.0, 4.0], 0, markers=False)
    assert plot._parts[0].count("M") == 2 and plot._parts[0].count("L") == 2


def test_series_differ_in_dash_and_marker_not_in_colour_alone() -> None:
    markers = {re.sub(r"s\d", "", svg.marker(n, 0, 0)) for n in range(1, svg.N_SERIES + 1)}
    assert len(markers) == svg.N_SERIES
    style = (Path(svg.__file__).parent / "static" / "report.css").read_text()
    dashes = re.findall(r"\.d\d\{stroke-dasharray:([^}]+)\}", style)
    assert len(dashes) == len(set(dashes)) == svg.N_SERIES - 1  # the first is solid


def luminance(rgb: tuple[float, ...]) -> float:
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_text_on_every_highlight_has_enough_contrast_in_both_themes() -> None:
    style = (Path(svg.__file__).parent / "static" / "report.css").read_text()
    for place in (0, 1):
        colours = {}
        for name, *pair in re.findall(r"--(\w+):light-dark\(#([0-9a-f]+),#([0-9a-f]+)\)", style):
            digits = pair[place] if len(pair[place]) == 6 else "".join(c + c for c in pair[place])
            colours[name] = tuple(int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
        for share in re.findall(r"var\(--mark\) (\d+)%", style):
            mixed = tuple(b + int(share) / 100 * (m - b) for b, m in zip(colours["bg"], colours["mark"], strict=True))
            pair = sorted((luminance(mixed), luminance(colours["fg"])))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5
        pair = sorted((luminance(colours["bg"]), luminance(colours["faint"])))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5
    assert len(re.findall(r"var\(--mark\) (\d+)%", style)) == 10
