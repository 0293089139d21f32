"""Meta-SAEs: how much of a dictionary a smaller set of directions explains, and what single latents are made of."""

from typing import Any

from saetool.artifacts import header as h
from saetool.report.baselines import bars, members, panels, parents, shared
from saetool.report.blocks import (
    Column,
    Disclosure,
    Figure,
    Figures,
    Group,
    Section,
    Table,
    Text,
    barred,
    linked,
    num,
    number,
    percent,
    words,
)
from saetool.report.collect import Artifact
from saetool.report.pairs import NEUTRAL, RECONSTRUCTION
from saetool.report.run import Run
from saetool.report.scales import Scale, defined
from saetool.report.svg import Plot

MAX_DECOMPOSITIONS = 60
"""Latents in the decomposition table; described ones first."""
CONTROL_NAMES = {
    "random_directions": "control: random directions",
    "shuffled_coordinates": "control: shuffled coordinates",
}


def meta(run: Run) -> Section | None:
    """Every meta-SAE record on its own."""
    records = run.found.of(h.META)
    if not records:
        return None
    intro = "A meta-SAE is an SAE whose data are another SAE's decoder directions: is a latent made of smaller parts?"
    groups = [_record(run, artifact, i) for i, artifact in enumerate(records)]
    return Section("meta", "Meta-SAE", intro, groups)


def _record(run: Run, artifact: Artifact, index: int) -> Group:
    payload = artifact.payload
    fid = f"meta-{index}"
    parent = payload["parent"]
    text = (
        f"{number(payload['d_sae'])} meta-latents on {number(payload['n_rows'])} decoder rows of {parent['name']}, "
        f"k = {number(payload['k'])}"
    )
    facts = [
        f"{label} {number(payload[name])}"
        for name, label in (
            ("mean_active", "mean active"),
            ("dead", "dead"),
            ("unexplained_rows", "rows without an active meta-latent"),
            ("threshold", "θ"),
        )
        if payload.get(name) is not None
    ]
    if (weighted := payload["variance_explained"].get("threshold_mode_weighted")) is not None:
        facts.append(f"variance explained with rows counted as often as they fire {number(weighted)}")
    figures = [_explained(payload, fid), bars(payload, fid), *panels(payload, fid), members(payload, fid)]
    blocks: list[Any] = [Text(f"{text}; {', '.join(facts)}." if facts else f"{text}.")]
    if said := shared(payload):
        blocks.append(Text(said))
    blocks.append(Figures([f for f in figures if f]))
    if not payload.get("bars") or not (payload.get("compare") or {}).get("comparable"):
        blocks.append(
            Text("Compared with no smaller SAE: saetool meta --compare small.st adds its directions to the figures.")
        )
    if (table := parents(payload)) and len(payload["parents"]) > 1:
        blocks.append(table)
    if table := _decompositions(run, artifact):
        blocks.append(Disclosure("Browse decompositions: latent → meta-latents", [table]))
    return Group(fid, f"Meta-SAE of {parent['name']} ({artifact.label})", blocks)


def _explained(payload: dict[str, Any], fid: str) -> Figure:
    """Variance explained of the meta-SAE beside the same training on rows without structure."""
    explained = payload["variance_explained"]
    bars = [
        ("meta-SAE, threshold", explained["threshold_mode"], RECONSTRUCTION),
        ("meta-SAE, batch selection", explained["train_mode"], RECONSTRUCTION),
        *(
            (CONTROL_NAMES.get(c["name"], f"control: {c['name']}"), c["variance_explained"], NEUTRAL)
            for c in payload.get("controls") or []
        ),
    ]
    known = defined([value for _, value, _ in bars]) or [0.0]
    low, high = min(0.0, *known), max(0.0, *known)
    room = max(high - low, 0.1)
    plot = Plot(
        Scale("linear", low - 0.04 * room if low < 0 else 0.0, high + 0.22 * room),
        Scale("linear", len(bars) - 0.4, -0.6),
        "variance of the decoder rows explained",
        "",
        y_names=[(i, name) for i, (name, _, _) in enumerate(bars)],
        height=90 + 40 * len(bars),
        left=190,
    )
    plot.horizontal_bars(
        [(i, v, series, percent(v)) for i, (_, v, series) in enumerate(bars) if v is not None], thick=20
    )
    plot.vertical(0.0, rule="zero")
    title = "Variance explained, against rows without structure"
    caption = "1 − Σ‖w − ŵ‖² / Σ‖w − w̄‖² over the parent's unit-norm decoder rows; controls are trained the same way."
    if any(v is None for _, v, _ in bars):
        caption += " Undefined values have no bar."
    if not payload.get("controls"):
        caption = caption.replace("; controls are trained the same way", "; no controls were trained")
    rows = [[words(name), num(value)] for name, value, _ in bars]
    columns = [Column("trained on", numeric=False), Column("variance explained")]
    return Figure(f"{fid}-explained", title, caption, plot.draw(title, caption), Table(title, columns, rows))


def _decompositions(run: Run, artifact: Artifact) -> Table | None:
    """Latent → its meta-latents by weight; latents that have a description come first."""
    payload = artifact.payload
    parts = payload.get("decompositions")
    if not parts or not parts["latents"]:
        return None
    parent, meta_sha = payload["parent"]["sha256"], run.meta_sha256(artifact)
    items = list(zip(parts["latents"], parts["indices"], parts["weights"], strict=True))
    items.sort(key=lambda i: (not run.link(parent, i[0]), run.description(parent, i[0]) is None, not i[1], i[0]))
    top = max((w for _, _, weights in items for w in weights), default=1.0)
    rows = []
    shown = items[:MAX_DECOMPOSITIONS]
    for latent, indices, weights in shown:
        described = words(run.description(parent, latent) or "–", 60)
        pairs = sorted(zip(indices, weights, strict=True), key=lambda p: (-p[1], p[0]))
        for n, (index, weight) in enumerate(pairs):
            said = words(run.description(meta_sha, index) or "–", 60)
            first = [linked(latent, run.link(parent, latent)), described] if n == 0 else [words(""), words("")]
            rows.append([*first, linked(index, run.link(meta_sha, index)), barred(weight, top), said])
        if not pairs:
            rows.append(
                [linked(latent, run.link(parent, latent)), described, words("none active"), words(""), words("")]
            )
    columns = [
        Column(f"latent of {payload['parent']['name']}"),
        Column("description", numeric=False),
        Column("meta-latent"),
        Column("weight"),
        Column("description", numeric=False),
    ]
    n, total = number(len(shown)), number(len(items))
    note = f"{n} of {total} latents" + (
        ", those with a card, then those described, first." if len(shown) < len(items) else "."
    )
    return Table("What latents are made of", columns, rows, note=note)
