"""Where every artifact came from: one row each, the chain as a drawing, and inputs that have changed since."""

import json
from typing import Any

from saetool.artifacts import header as h
from saetool.artifacts.header import KINDS
from saetool.report.blocks import Cell, Column, Disclosure, Figure, Listing, Section, Table, number, words
from saetool.report.collect import Artifact, Found
from saetool.report.lettering import fitted, written
from saetool.report.run import last_entry
from saetool.report.svg import wrap

MAX_NODES = 60
"""Artifacts in the drawing of the chain; the table has all."""
_BOX, _GAP, _ROW = 172, 46, 42  # pixels


def stale_sentences(found: Found) -> list[str]:
    """One sentence per input that has another hash than the file found under its name."""
    return [
        f"{artifact.label} was made from {item['name']} with hash {item['sha256'][:12]}…, "
        f"but the {other.label} given has {other.sha256[:12]}…"
        for artifact, item, other in found.stale
    ]


def provenance(found: Found) -> Section:
    """The table of artifacts and the chain."""
    stale = {id(artifact) for artifact, _, _ in found.stale}
    rows, bad = [], []
    for i, artifact in enumerate(found.artifacts):
        rows.append(_row(found, artifact))
        if id(artifact) in stale:
            bad.append(i)
    columns = [
        Column("artifact", "path below the folder given", numeric=False),
        Column("kind", numeric=False),
        Column("made by", "the last verb and its options", numeric=False),
        Column("made from", "✓ given here, ✗ another file of that name is here, · not given", numeric=False),
        Column("seed"),
        Column("SHA-256", "first 12 digits; all of it on hovering", numeric=False),
        Column("schema", numeric=False),
        Column("model", numeric=False),
    ]
    note = "✓ the input is given here; ✗ a file of that name is here, with another hash; · the input is not given."
    table = Table("Artifacts on this page", columns, rows, note=note, sortable=True, bad_rows=frozenset(bad))
    blocks: list[Any] = [Listing(stale_sentences(found), "warning")] if found.stale else []
    if len(found.artifacts) <= MAX_NODES:
        blocks.append(_chain(found))
    summary = f"All {len(found.artifacts)} artifacts: what made them, from what, and their hashes"
    blocks.append(Disclosure(summary, [table], open=bool(found.stale)))
    return Section("provenance", "Provenance", "What was read, what made it, and from what.", blocks)


def _row(found: Found, artifact: Artifact) -> list[Cell]:
    header = artifact.header
    entry = last_entry(artifact)
    options = " ".join(f"{k}={_short(v)}" for k, v in sorted((entry.get("options") or {}).items()))
    made = f"{entry.get('verb', '?')} {options}".strip()
    model = header.model.get("id")
    hook = header.model.get("hook_name")
    site = " · ".join(str(part) for part in (model, hook) if part)
    inputs = "; ".join(_input(found, artifact, item) for item in header.inputs)
    return [
        words(artifact.label, 60),
        words(KINDS[header.schema].removeprefix("an ").removeprefix("a ")),
        words(made, 140),
        words(inputs or "–", 400),
        Cell("–" if header.seed is None else str(header.seed), header.seed),
        Cell(artifact.sha256[:12], title=artifact.sha256, mark="mono"),
        words(header.schema),
        words(site or "–", 60),
    ]


def _input(found: Found, artifact: Artifact, item: dict[str, Any]) -> str:
    if item["sha256"] in found.by_sha:
        sign = "✓"
    else:
        sign = "✗" if any(a is artifact and i is item for a, i, _ in found.stale) else "·"
    return f"{sign}\N{NO-BREAK SPACE}{item['role']}: {item['name']}\N{NO-BREAK SPACE}{item['sha256'][:8]}"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if len(text) <= 40 else text[:39] + "…"


def _chain(found: Found) -> Figure:
    """Artifacts as boxes, inputs as arrows from left to right; dashed boxes are inputs that were not given."""
    names: dict[str, tuple[str, str, bool]] = {a.sha256: (a.name, a.kind, True) for a in found.artifacts}
    links: list[tuple[str, str]] = []
    for artifact in found.artifacts:
        for item in artifact.header.inputs:
            kind = item["schema"].partition("/")[2].partition("@")[0]
            names.setdefault(item["sha256"], (item["name"], kind, False))
            links.append((item["sha256"], artifact.sha256))
    depth = _depths(list(names), links)
    columns: dict[int, list[str]] = {}
    for sha in sorted(names, key=lambda s: (depth[s], names[s][1], names[s][0], s)):
        columns.setdefault(depth[sha], []).append(sha)
    tallest = max(len(c) for c in columns.values())
    place = {}
    for column, shas in columns.items():
        for i, sha in enumerate(shas):
            top = _ROW * (i + (tallest - len(shas)) / 2)
            place[sha] = (column * (_BOX + _GAP) + 2, top + 4)
    width = max(columns) * (_BOX + _GAP) + _BOX + 4
    out = []
    for start, end in dict.fromkeys(links):
        (x0, y0), (x1, y1) = place[start], place[end]
        x0, y0, y1 = x0 + _BOX, y0 + 16, y1 + 16
        middle = (x0 + x1) / 2
        out.append(f'<path class="link" d="M{x0} {y0:.1f}C{middle} {y0:.1f} {middle} {y1:.1f} {x1 - 2} {y1:.1f}"/>')
        out.append(f'<path class="tip" d="M{x1} {y1:.1f}l-6 -3.5v7z"/>')
    for sha, (x, y) in place.items():
        name, kind, given = names[sha]
        shown = fitted(name, _BOX - 12, middle=True)
        out.append(
            f"<g><title>{written(f'{name} ({kind}) {sha}')}</title>"
            f'<rect class="{"box" if given else "box absent"}" x="{x}" y="{y:.1f}" width="{_BOX}" height="33" rx="4"/>'
            f'<text x="{x + 8}" y="{y + 14:.1f}">{written(shown)}</text>'
            f'<text class="faint" x="{x + 8}" y="{y + 27:.1f}">{written(kind)}</text></g>'
        )
    given = len(found.artifacts)
    absent = len(names) - given
    title = "What was made from what"
    caption = f"{number(given)} artifacts" + (
        f"; dashed: {number(absent)} input{'s' if absent != 1 else ''} not given." if absent else "."
    )
    drawing = wrap(width, tallest * _ROW + 4, title, caption, "".join(out))
    return Figure("chain", title, caption, drawing, None, wide=True)


def _depths(nodes: list[str], links: list[tuple[str, str]]) -> dict[str, int]:
    """The length of the longest chain of inputs that ends in each node."""
    inputs: dict[str, list[str]] = {node: [] for node in nodes}
    for start, end in links:
        if start != end:
            inputs[end].append(start)
    depth = dict.fromkeys(nodes, 0)
    for _ in nodes:  # at most as many rounds as the longest chain has links; headers cannot form circles of hashes
        changed = False
        for node in nodes:
            wanted = max((depth[i] + 1 for i in inputs[node]), default=0)
            if wanted != depth[node] and wanted <= len(nodes):
                depth[node], changed = wanted, True
        if not changed:
            break
    return depth


def inputs_of(found: Found) -> list[h.Input]:
    """The report's own inputs: every artifact, in the page's order."""
    return [a.as_input() for a in found.artifacts]
