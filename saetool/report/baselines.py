"""What a meta-SAE is measured against: other decoders, other dictionaries and chance (the paper's figures 6 and 20)."""

from typing import Any

from saetool.report.blocks import ABSENT, Column, Figure, Table, num, number, pct, percent, words
from saetool.report.pairs import NEUTRAL, NOVEL, RECONSTRUCTION
from saetool.report.scales import Scale, defined, linear
from saetool.report.svg import Key, Plot

_BARS = {
    "meta_sae": ("the meta-SAE", RECONSTRUCTION),
    "nearest_sae_latents": ("decoder: nearest SAE latents", NOVEL),
    "nearest_sae_latents_tuned": ("the same, encoder retrained", NOVEL),
    "random_directions": ("decoder: random directions", NEUTRAL),
    "random_directions_tuned": ("the same, encoder retrained", NEUTRAL),
    "zero": ("nothing (zero)", NEUTRAL),
    "mean": ("the mean row", NEUTRAL),
    "pca": ("the first k principal components", NEUTRAL),
    "omp_meta_sae": ("matching pursuit, meta-latents", RECONSTRUCTION),
    "omp_random_directions": ("matching pursuit, random directions", NEUTRAL),
    "omp_comparable": ("matching pursuit, comparable SAE", NOVEL),
}
"""Name in the record → (name on the page, series)."""


def bars(payload: dict[str, Any], fid: str) -> Figure | None:
    """Variance of the parent's rows explained with k active directions, by whose they are (Fig. 20)."""
    found = [b for b in payload.get("bars") or [] if b.get("variance_explained") is not None]
    if not found:
        return None
    named = [(*_BARS.get(b["name"], (b["name"], NEUTRAL)), b) for b in found]
    values = [b["variance_explained"] for b in found]
    low, high = min(0.0, *values), max(0.0, *values)
    room = max(high - low, 0.1)
    plot = Plot(
        Scale("linear", low - 0.16 * room if low < 0 else 0.0, high + 0.2 * room),
        Scale("linear", len(named) - 0.4, -0.6),
        "variance of the decoder rows explained",
        "",
        y_names=[(i, name) for i, (name, _, _) in enumerate(named)],
        height=76 + 25 * len(named),
        left=236,
        width=560,
    )
    plot.horizontal_bars(
        [
            (i, b["variance_explained"], series, percent(b["variance_explained"]))
            for i, (_, series, b) in enumerate(named)
        ],
        thick=16,
    )
    plot.vertical(0.0, rule="zero")
    comparable = (payload.get("compare") or {}).get("comparable")
    title = "Do the meta-latents explain more than other directions?"
    caption = (
        f"{len(named)} ways to write each of the {number(payload['n_rows'])} decoder rows of "
        f"{payload['parent']['name']} as k = {number(payload['k'])} directions on average (principal components and "
        "matching pursuit: exactly). Blue: meta-latents; orange: latents of other SAEs; grey: chance and plain "
        "baselines. Below 0 is worse than the mean row."
    )
    if comparable:
        sizes = {c["name"]: c.get("directions") for c in payload["compare"].get("pool") or []}
        caption += f" The comparable SAE: {comparable}, {number(sizes.get(comparable))} latents"
        caption += f" against {number(payload['d_sae'])} meta-latents."
    columns = [Column("directions", numeric=False), Column("variance explained"), Column("at its own θ")]
    columns += [Column("mean squared error", "per element of the rows"), Column("mean active")]
    rows = [
        [
            words(name, 60),
            num(b["variance_explained"]),
            num(b.get("threshold_mode")),
            num(b.get("mse_mean")),
            num(b.get("mean_active")),
        ]
        for name, _, b in named
    ]
    return Figure(f"{fid}-bars", title, caption, plot.draw(title, caption), Table(title, columns, rows))


def panels(payload: dict[str, Any], fid: str) -> list[Figure]:
    """Max cosines within dictionaries and between them, as densities over each other (Fig. 6)."""
    parent = payload["parent"]["name"].removesuffix(".st")
    other = ((payload.get("compare") or {}).get("comparable") or "the comparable SAE").removesuffix(".st")
    found = payload.get("max_cosine") or {}
    shown = (
        (
            "within",
            "How close each direction comes to another of its own dictionary",
            "largest cosine within the dictionary",
            "Meta-latents further apart than latents: fewer things said twice.",
            (
                ("within", "meta-latents", RECONSTRUCTION),
                ("within_comparable", other, NOVEL),
                ("within_parent", parent, 2),
            ),
        ),
        (
            "to",
            "How close each meta-latent comes to a latent",
            "largest cosine with a latent",
            "Near 1: the meta-latent is a latent of that SAE. Random: as many random directions.",
            (
                ("to_parent", f"to {parent}", RECONSTRUCTION),
                ("to_comparable", f"to {other}", NOVEL),
                ("random_to_parent", f"random to {parent}", NEUTRAL),
                ("random_to_comparable", f"random to {other}", 4),
            ),
        ),
        (
            "from",
            f"How close each latent of {parent} comes to a smaller dictionary",
            "largest cosine with a direction of it",
            "Further right: the dictionary covers the latents better.",
            (
                ("parent_to_meta", "the meta-latents", RECONSTRUCTION),
                ("parent_to_comparable", other, NOVEL),
                ("parent_to_random", "random directions", NEUTRAL),
            ),
        ),
    )
    out = []
    for name, title, label, reading, series in shown:
        known = [(found[n], said, s) for n, said, s in series if _whole(found.get(n))]
        if known:
            out.append(_panel(f"{fid}-cosine-{name}", title, label, reading, known))
    return out


def _whole(part: dict[str, Any] | None) -> bool:
    return bool(part) and len(part["edges"]) == len(part["counts"]) + 1 and sum(part["counts"]) > 0  # type: ignore[index]


def _panel(fid: str, title: str, label: str, reading: str, known: list[tuple[dict[str, Any], str, int]]) -> Figure:
    shares = [[c / sum(part["counts"]) for c in part["counts"]] for part, _, _ in known]
    used = [
        part["edges"][i + d]
        for (part, _, _), share in zip(known, shares, strict=True)
        for i, v in enumerate(share)
        if v
        for d in (0, 1)
    ]
    plot = Plot(
        Scale("linear", min(used), max(used)),
        Scale("linear", 0, 1.12 * max(max(s) for s in shares)),
        label,
        "share of the directions",
        [Key(said, series) for _, said, series in known],
    )
    rows = []
    for (part, said, series), share in zip(known, shares, strict=True):
        inside = [i for i, v in enumerate(share) if v]
        first, last = inside[0], inside[-1] + 1
        plot.steps(part["edges"][first : last + 1], share[first:last], series)
        rows += [
            [words(said), num(part["edges"][i]), num(part["edges"][i + 1]), num(part["counts"][i]), pct(share[i])]
            for i in inside
        ]
    means = "; ".join(
        f"{said}: mean {number(part.get('mean'), 3)} (n = {number(sum(part['counts']))})" for part, said, _ in known
    )
    caption = f"{means}. {reading}"
    columns = [Column("of", numeric=False), Column("cosine from"), Column("to"), Column("directions"), Column("share")]
    return Figure(fid, title, caption, plot.draw(title, caption), Table(title, columns, rows))


def members(payload: dict[str, Any], fid: str) -> Figure | None:
    """On how many of the rows each meta-latent is active, from the most to the least used."""
    sizes = sorted(defined((payload.get("meta_latents") or {}).get("n_members") or []), reverse=True)
    if not sizes:
        return None
    plot = Plot(
        linear([1, len(sizes)], pad=0.02),
        Scale("linear", 0, 1.1 * (sizes[0] or 1)),
        "meta-latents, the most used first",
        "latents it is active on",
    )
    places = list(range(1, len(sizes) + 1))
    plot.line(places, sizes, RECONSTRUCTION)
    plot.remember("meta-latent of rank", places, sizes, most=400)
    plot.horizontal(sum(sizes) / len(sizes), f"mean {number(sum(sizes) / len(sizes), 3)}")
    title = "How many latents share a meta-latent"
    caption = (
        f"{number(len(sizes))} meta-latents over {number(payload['n_rows'])} decoder rows; {number(sizes.count(0))} "
        "are active on none. A few that many latents share, and a long tail, is what parts in common look like."
    )
    return Figure(
        f"{fid}-members", title, caption, plot.draw(title, caption), plot.sample(title), plot.hover(), plot.data()
    )


def parents(payload: dict[str, Any]) -> Table | None:
    """Each parent of the meta-SAE on its own: what of it was explained, and with how many meta-latents a row."""
    found = payload.get("parents") or []
    if not found:
        return None
    most = max((len(p.get("rows_by_active") or []) for p in found), default=0)
    columns = [
        Column("parent", numeric=False),
        Column("latents"),
        Column("rows used"),
        Column("rows of norm 0", "left out"),
        Column("rarely firing", "left out"),
        Column("variance explained"),
        Column("mean active"),
        Column("rows without one", "no active meta-latent"),
        Column("meta-latents used"),
        *(Column(f"{i} active", "rows with so many active meta-latents") for i in range(min(most, 11))),
    ]
    rows = []
    for p in found:
        left, by = p.get("left_out") or {}, p.get("rows_by_active") or []
        rows.append(
            [words(p["name"], 40), num(p["d_sae"]), num(p.get("n_rows")), num(left.get("zero")), num(left.get("rare"))]
            + [num(p.get("variance_explained")), num(p.get("mean_active")), num(p.get("unexplained_rows"))]
            + [num(p.get("meta_latents_used"))]
            + [num(by[i] if i < len(by) else 0) for i in range(min(most, 11))]
        )
    used = [i for i in range(len(columns)) if any(row[i].text != ABSENT for row in rows)]
    note = f"Rows with more than 10 active meta-latents are not listed ({most - 1} at most)." if most > 11 else ""
    return Table("Parents", [columns[i] for i in used], [[row[i] for i in used] for row in rows], note=note)


def shared(payload: dict[str, Any]) -> str:
    """Whether latents that share a meta-latent are those that resemble one latent of a smaller SAE; '' if unknown."""
    compare = payload.get("compare") or {}
    edges = compare.get("shared_edges")
    if not edges or edges.get("overlap") is None:
        return ""
    return (
        f"Of the {number(edges.get('edges'))} pairs of latents that share a meta-latent, {percent(edges['overlap'])} "
        f"also both have a cosine of at least τ = {number(edges.get('tau'), 3)} with one latent of "
        f"{compare.get('comparable')} (τ makes the two sets of pairs equally large); by chance "
        f"{percent(edges.get('chance'))} would."
    )
