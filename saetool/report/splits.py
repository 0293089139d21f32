"""Who splits into whom: what becomes of the smaller SAE's latents, and where the larger SAE's come from."""

from collections.abc import Sequence
from typing import Any

from saetool.report.blocks import Column, Figure, Figures, Group, Table, Text, num, number, pct, words
from saetool.report.browser import component_figure
from saetool.report.collect import Artifact
from saetool.report.pairs import Edge, Pair, components, is_control, pairs_of, shape
from saetool.report.run import Run
from saetool.report.scales import Scale
from saetool.report.svg import Key, Plot

N_EXAMPLES = 4
"""Families drawn as examples of a split."""
_MOST_CHILDREN = 6  # an example with more latents says less
FATES = (
    ("alone", "no partner", 1),
    ("one", "one to one", 0),
    ("split", "one splits", 2),
    ("merge", "several merge", 3),
    ("family", "several to several", 6),
)
"""(key, name, series) of what can happen to a latent, by the shape of its component."""


def fates(pair: Pair) -> dict[str, tuple[int, int]]:
    """Of both SAEs, how many latents share each fate: {key: (small, large)}, from the shapes of the components."""
    found = {key: [0, 0] for key, _, _ in FATES}
    for small, large, count in pair["component_shapes"]:
        key = "one" if small == large == 1 else "split" if small == 1 else "merge" if large == 1 else "family"
        found[key][0] += small * count
        found[key][1] += large * count
    found["alone"] = [pair["unmatched_small"], pair["novel"]]
    return {key: (a, b) for key, (a, b) in found.items()}


def splits(run: Run, pairs: Sequence[tuple[Artifact, Pair]]) -> Group:
    """The fates of all latents, a bar for each SAE of each pair, and some latents that split."""
    blocks: list[Any] = [Figures([_figure(pairs)])]
    examples = [
        component_figure(run, pair, component, f"split-{i}", f"θ = {theta:g}", beside=True)
        for i, (pair, theta, component) in enumerate(examples_of(run))
    ]
    if examples:
        said = (
            f"{len(examples)} of the latents that split, those with most descriptions among their parts first. The "
            "lines are cosines of decoder rows. More families are under each pair below, and on the cards."
        )
        blocks += [Text(said), Figures(examples)]
    return Group("splits", "Who splits into whom", blocks)


def _figure(pairs: Sequence[tuple[Artifact, Pair]]) -> Figure:
    names: list[tuple[float, str]] = []
    bars: list[tuple[float, list[tuple[float, int, str]]]] = []
    heads: list[tuple[float, str]] = []
    rows = []
    at = 0.0
    for artifact, pair in pairs:
        found, theta = fates(pair), artifact.payload["theta"]
        kind = ", seed control" if is_control(pair) else ""
        heads.append((at, f"{_short(pair['small'])} → {_short(pair['large'])}, θ = {theta:g}{kind}"))
        for i, (which, said) in enumerate((("small", "of the smaller"), ("large", "of the larger"))):
            n = pair[f"n_{which}"]
            parts = [(found[key][i] / n if n else 0.0, series, f"{found[key][i]:,}") for key, _, series in FATES]
            at += 1
            names.append((at, f"{said}: {number(n)}"))
            bars.append((at, parts))
            rows.append(
                [words(f"{pair['small']} → {pair['large']}"), num(theta), words(pair[which]), num(n)]
                + [num(found[key][i]) for key, _, _ in FATES]
                + [pct(found["split"][i] / n if n else None)]
            )
        at += 1.15
    plot = Plot(
        Scale("linear", 0.0, 1.0),
        Scale("linear", at - 0.6, -0.6),
        "share of the SAE's latents",
        "",
        [Key(name, series, "bar") for _, name, series in FATES],
        y_names=names,
        width=820,
        height=round(70 + 25 * at),
        left=160,
    )
    for position, parts in bars:
        plot.stacked(position, parts, thick=19)
    for position, text in heads:
        plot.label(0.0, position, text)
    title = "What becomes of the smaller SAE's latents, and where the larger one's come from"
    caption = (
        "Latents are joined where the cosine of their decoder rows reaches θ; a family is a connected group. No "
        "partner: the larger SAE's latent is novel, the smaller one's has no successor. One splits: one small latent, "
        "several large ones. Numbers are latents. What two seeds of one width show is chance."
    )
    columns = [Column("pair", numeric=False), Column("θ"), Column("latents of", numeric=False), Column("latents")]
    columns += [Column(name) for _, name, _ in FATES]
    columns += [Column("share in splits", "latents of families with one small latent and several large ones")]
    return Figure("fates", title, caption, plot.draw(title, caption), Table(title, columns, rows), wide=True)


def _short(name: str) -> str:
    return name.removesuffix(".st")


def examples_of(run: Run) -> list[tuple[Pair, float, list[Edge]]]:
    """(pair, θ, family) of one small latent and a few large ones: the most described, then the most unlike, first."""
    found: list[tuple[tuple[Any, ...], Pair, float, list[Edge]]] = []
    for place, (artifact, pair) in enumerate(pairs_of(run)):
        if is_control(pair):
            continue
        for component in components(pair.get("edges") or []):
            small, large = shape(component)
            if small != 1 or not 2 <= large <= _MOST_CHILDREN:
                continue
            said = [run.description(pair["large_sha256"], b) for _, b, _ in component]
            parent = run.description(pair["small_sha256"], component[0][0])
            n_said, differ = sum(bool(s) for s in [*said, parent]), len({s for s in said if s})
            weakest = min(e[2] for e in component)
            rank = (-min(n_said, 4), -min(differ, 4), -weakest, place, component[0])
            found.append((rank, pair, artifact.payload["theta"], component))
    chosen: list[tuple[Pair, float, list[Edge]]] = []
    taken: set[tuple[str, int]] = set()
    for _, pair, theta, component in sorted(found, key=lambda f: f[0]):
        mine = {(run.identity(pair["large_sha256"]), b) for _, b, _ in component}
        mine.add((run.identity(pair["small_sha256"]), component[0][0]))
        if not mine & taken:  # the same latents at another θ, or seen from another width, say nothing new
            chosen.append((pair, theta, component))
            taken |= mine
        if len(chosen) == N_EXAMPLES:
            break
    return chosen


def members_of_examples(run: Run) -> list[tuple[str, int]]:
    """(hash that stands for the SAE, latent) of every latent drawn as an example: each gets a card."""
    out = []
    for pair, _, component in examples_of(run):
        out.append((run.identity(pair["small_sha256"]), component[0][0]))
        out += [(run.identity(pair["large_sha256"]), b) for _, b, _ in component]
    return list(dict.fromkeys(out))
