"""Cards of single latents: where it fires, its scores, its relatives in other SAEs, its families and meta-latents."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from saetool.report.blocks import (
    Card,
    Cards,
    Cell,
    Column,
    Line,
    Search,
    Section,
    Table,
    linked,
    num,
    number,
    words,
)
from saetool.report.browser import component_id, drawn_components
from saetool.report.choice import Chosen, Record, Shelf
from saetool.report.collect import strings_of
from saetool.report.contexts import Shown, contexts
from saetool.report.lettering import written
from saetool.report.pairs import histogram, pairs_of
from saetool.report.relatives import Family, Key, Relation
from saetool.report.run import Run, score
from saetool.report.svg import wrap

KIN_CONTEXTS = 2
"""Contexts on the card of a latent that is there because another card speaks of it."""
MAX_FAMILY = 12
"""Families with more latents than this on one side are only counted."""
_PICKED = {
    "mixed": "a third of them the best explained, a third the worst, the others evenly by number",
    "top": "the best explained",
    "worst": "the worst explained",
    "random": "drawn at random",
}
_FACTS = (
    ("correlation", "simulate", "correlation"),
    ("rank correlation", "simulate", "spearman"),
    ("its control: another's description", "simulate", "shuffled"),
    ("its floor: the table of tokens", "simulate", "ngram"),
    ("detection (balanced accuracy)", "detect", "value"),
    ("detection (balanced accuracy)", "detect", "balanced_accuracy"),
    ("detection, control", "detect", "shuffled"),
    ("fuzzing (balanced accuracy)", "fuzz", "value"),
    ("fuzzing (balanced accuracy)", "fuzz", "balanced_accuracy"),
    ("fuzzing, control", "fuzz", "shuffled"),
    ("intruder (accuracy)", "intruder", "value"),
)


def latents(run: Run, chosen: Chosen) -> Section | None:
    """The cards of every shelf, with one search box over all."""
    if not chosen.shelves:
        return None
    drawn = _drawn(run)
    blocks: list[Any] = [Search()]
    for i, shelf in enumerate(chosen.shelves):
        windows = shelf.explained.windows if shelf.explained else None
        strings = strings_of(run.found, windows) if windows else None
        cards = []
        for latent, record, asked in shelf.latents:
            n = run.look.contexts if asked else min(KIN_CONTEXTS, run.look.contexts)
            shown = contexts(windows, latent, strings, n, (record or {}).get("scale"))
            cards.append(_card(run, chosen, shelf, latent, record, shown, drawn, f"latent-{i}-{latent}"))
        blocks.append(Cards(f"cards-{i}", f"Latents of {shelf.name}", _note(run, shelf, strings), cards))
    intro = (
        "Open a latent to see the text it fires on, how well its description predicts that, and, as links, the "
        "latents of other SAEs it is close to, the family it is exchanged with, and the meta-latents it is made of. "
        "Highlights grow with the activation, in tenths of the latent's largest in its windows; hovering gives values. "
        "Windows come strongest first, with what each was used for and its largest activation; the histogram counts "
        "the tokens of all the latent's windows, which are its strongest and some others, not a sample of all text. A "
        "family is the latents that are exchanged together when one SAE is turned into the other."
    )
    return Section("latents", "Latents", intro, blocks)


def _note(run: Run, shelf: Shelf, strings: dict[int, str] | None) -> str:
    kin = len(shelf.latents) - shelf.n_asked
    if shelf.explained is None:
        return f"{number(kin)} latents without explanations that the cards of other SAEs speak of: no text, only links."
    note = f"Showing {number(shelf.n_asked)} of {number(shelf.n_records)} explained latents"
    if shelf.n_asked < shelf.n_records:
        note += f", {_PICKED.get(run.look.pick, f'chosen by {run.look.pick}')}"
        if kin:
            note += f"; and, with fewer contexts, {number(kin)} that other cards speak of"
    note += "."
    if run.look.asked is not None:
        note += f" {number(run.look.asked)} cards were asked for; fewer are here because of the page's largest size."
    if shelf.explained.windows is None and not any(r and r.get("members") for _, r, _ in shelf.latents):
        note += " Contexts need the windows file written beside the explanations."
    elif shelf.explained.windows is not None and strings is None:
        note += " Tokens are shown by number: their text needs the activation cache given as well."
    return f"{note} Which next tokens a latent raises or lowers (its logits) no artifact holds."


def activation_histogram(values: Sequence[float]) -> Markup | None:
    """How strong the activations in a latent's windows are, small enough for a card; None without any."""
    if not values:
        return None
    top, n = max(values), 24
    counts = histogram(values, [top * i / n for i in range(n + 1)])
    high = max(counts)
    bars = "".join(
        f"M{4 + 9 * i} 44v-{max(38 * c / high, 1):.0f}h8V44z" for i, c in enumerate(counts) if c
    )  # fmt: skip
    said = f"{len(values):,} tokens with an activation, from 0 to {number(top, 3)}; at most {high:,} in one bar"
    drawing = f'<path class="bar s1" d="{bars}"/><path class="axis" d="M4 44.5H220"/>'
    drawing += f'<text x="4" y="57">0</text><text x="220" y="57" text-anchor="end">{written(number(top, 3))}</text>'
    return wrap(224, 60, "Activations in its windows", said, drawing)


def _drawn(run: Run) -> dict[tuple[int, Any], str]:
    """The place on the page of every component that is drawn, by (pair, its first edge)."""
    return {
        (i, component[0]): component_id(i, place)
        for i, (_, pair) in enumerate(pairs_of(run))
        for place, component in enumerate(drawn_components(run, pair)[1])
    }


def _card(
    run: Run,
    chosen: Chosen,
    shelf: Shelf,
    latent: int,
    record: Record | None,
    shown: Shown,
    drawn: dict[tuple[int, Any], str],
    anchor: str,
) -> Card:
    key = (shelf.sae, latent)
    relations = chosen.relatives.of(key)
    tables = [_table(run, relation) for relation in relations]
    if record and record.get("members") and not any(r.title == "Latents it is part of" for r in relations):
        members = tuple((int(m), float(w)) for m, w in record["members"])
        tables.append(
            _table(run, Relation("Latents it is part of", "latent", "weight", "", members[:10], len(members)))
        )
    correlation = score(record, "simulate", "correlation") if record else None
    description = (record or {}).get("description") or run.description(shelf.sae, latent) or ""
    return Card(
        anchor,
        f"{shelf.name} · latent {latent}",
        description,
        "" if correlation is None else number(correlation, 3),
        _facts(record) if record else [],
        shown.active,
        shown.n_active,
        activation_histogram(shown.activations),
        shown.silent,
        [_family(run, family, key, drawn) for family in chosen.relatives.families(key)],
        tables,
    )


def _facts(record: Record) -> list[tuple[str, Cell]]:
    facts = {label: num(v) for label, name, field in _FACTS if (v := score(record, name, field)) is not None}
    for label, name in (("share of tokens it fires on", "density"), ("largest activation", "max_act")):
        if record.get(name) is not None:
            facts[label] = num(record[name])
    out = list(facts.items())
    if record.get("reason"):
        out.append(("no score because", words(f"{record['status']}: {record['reason']}")))
    return out


def _table(run: Run, relation: Relation) -> Table:
    said = [run.description(relation.sae, i) for i, _ in relation.found]
    rows = [[linked(i, run.link(relation.sae, i)), num(v, 3)] for i, v in relation.found]
    columns = [Column(relation.what), Column(relation.value)]
    if any(said):
        columns.append(Column("description", numeric=False))
        rows = [[*row, Cell(_cut(text or "–"))] for row, text in zip(rows, said, strict=True)]
    note = f"{len(rows)} of {number(relation.total)}, closest first." if relation.total > len(rows) else ""
    return Table(relation.title, columns, rows, note=note)


def _cut(text: str, limit: int = 60) -> str:
    """The linked card has the whole of it."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _family(run: Run, family: Family, key: Key, drawn: dict[tuple[int, Any], str]) -> Line:
    """A sentence about the component a latent belongs to, its members linked where they are few."""
    names, theta = f"{family.small_name} → {family.large_name}", f"θ = {family.theta:g}"
    if family.first is None:
        other = family.large_name if family.is_small else family.small_name
        new = "without partner" if family.is_small else "novel: no latent comes as close"
        return Line([(f"{names}, {theta}: {new} in {other}.", "")])
    parts: list[tuple[str, str]] = []

    def add(text: str, href: str = "") -> None:
        if parts and not href and not parts[-1][1]:
            parts[-1] = (parts[-1][0] + text, "")
        else:
            parts.append((text, href))

    add(f"{names}, {theta}: {number(len(family.small))} → {number(len(family.large))} latents")
    if max(len(family.small), len(family.large)) <= MAX_FAMILY:
        for before, sae, members in ((": ", family.small_sae, family.small), (" → ", family.large_sae, family.large)):
            for i, latent in enumerate(members):
                add(", " if i else before)
                add(str(latent), "" if (sae, latent) == key else run.link(sae, latent))
    if place := drawn.get((family.pair, family.first)):
        add(" · ")
        add("drawn", f"#{place}")
    return Line(parts)
