"""Components of a stitched pair to look at: small latents left, large right, an edge for each cosine above theta."""

from dataclasses import replace
from typing import Any

from saetool.report.blocks import Column, Disclosure, Figure, Figures, Line, Table, Text, linked, num, number, words
from saetool.report.lettering import fitted, text_width, written
from saetool.report.pairs import Edge, Pair, components, shape
from saetool.report.run import Run
from saetool.report.svg import wrap

N_LARGEST, N_ALIKE, N_SHAPES = 4, 2, 4
"""Components shown: the largest (at most two of one shape), then one of each of the most frequent other shapes."""
MAX_NODES = 16
"""Latents drawn on one side of a component; its table says how many there are."""
_ROW, _SIDE, _GAP, _NARROW_GAP = 28, 205, 210, 130  # pixels: a latent, the room for names, the edges between
_SMALL = 11
"""Pixels of the letters on edges."""


def drawn_components(run: Run, pair: Pair) -> tuple[list[list[Edge]], list[list[Edge]], int]:
    """All components of a pair, those that are drawn, and how many of these for their size."""
    found = components(pair.get("edges") or [])
    # Of equal size, those with most descriptions first: they say most.
    found.sort(key=lambda c: (-sum(shape(c)), -_described(run, pair, c), c[0]))
    by_shape: dict[tuple[int, int], list[list[Edge]]] = {}
    for component in found:
        by_shape.setdefault(shape(component), []).append(component)
    largest = [c for c in found if c in by_shape[shape(c)][:N_ALIKE]][:N_LARGEST]
    chosen = list(largest)
    seen = {shape(c) for c in chosen}
    others = sorted((s for s in by_shape if s not in seen), key=lambda s: (-len(by_shape[s]), s))
    # Of each other shape, the example with most descriptions, then the strongest edge: the one that says most.
    for other in others[:N_SHAPES]:
        chosen.append(min(by_shape[other], key=lambda c: (-_described(run, pair, c), -max(e[2] for e in c), c[0])))
    return found, chosen, len(largest)


def component_id(pair: int, place: int) -> str:
    """Where the drawing of a component stands on the page."""
    return f"pair-{pair}-component-{place}"


def component_browser(run: Run, pair: dict[str, Any], theta: float, fid: str) -> list[Any]:
    """Some components to open: the largest, and an example of each frequent shape."""
    found, chosen, n_largest = drawn_components(run, pair)
    if not found:
        return [Text(f"No cosine between {pair['small']} and {pair['large']} reaches θ = {theta:g}: no components.")]
    items = [_component(run, pair, c, f"{fid}-component-{i}") for i, c in enumerate(chosen)]
    rest = len(chosen) - n_largest
    text = f"{len(chosen)} of {number(len(found))} components: the largest, at most {N_ALIKE} of one shape"
    text += f", and one example of each of the {rest} most frequent other shapes." if rest else "."
    return [Disclosure("Browse components", [Text(text), *items])]


def _described(run: Run, pair: dict[str, Any], component: list[Edge]) -> int:
    small = {a for a, _, _ in component if run.description(pair["small_sha256"], a)}
    large = {b for _, b, _ in component if run.description(pair["large_sha256"], b)}
    return len(small) + len(large)


def _component(run: Run, pair: dict[str, Any], component: list[Edge], fid: str) -> Disclosure:
    figure = component_figure(run, pair, component, fid)
    small = sorted({a for a, _, _ in component})
    large = sorted({b for _, b, _ in component})
    said = [run.description(pair["small_sha256"], a) for a in small]
    said += [run.description(pair["large_sha256"], b) for b in large]
    hint = next((d for d in said if d), None)
    summary = f"{_title(small, large)}: small {_listed(small)} – large {_listed(large)}" + (
        f" · {hint[:70]}" if hint else ""
    )
    return Disclosure(summary, [Figures([figure])])


def _title(small: list[int], large: list[int]) -> str:
    return f"{len(small)} → {len(large)} latents"


def component_figure(
    run: Run, pair: dict[str, Any], component: list[Edge], fid: str, more: str = "", *, beside: bool = False
) -> Figure:
    """One component as a drawing, its edges as a table that links to cards, and links to its latents."""
    small = sorted({a for a, _, _ in component})
    large = sorted({b for _, b, _ in component})
    names = {
        **{(0, a): run.description(pair["small_sha256"], a) for a in small},
        **{(1, b): run.description(pair["large_sha256"], b) for b in large},
    }
    title = _title(small, large)
    columns = [
        Column(f"latent of {pair['small']}"),
        Column("description", numeric=False),
        Column(f"latent of {pair['large']}"),
        Column("description", numeric=False),
        Column("cosine"),
    ]
    shown = sorted(component, key=lambda e: (-e[2], e[0], e[1]))[:MAX_NODES]
    rows = [
        [
            linked(a, run.link(pair["small_sha256"], a)),
            words(names[0, a] or "–", 80),
            linked(b, run.link(pair["large_sha256"], b)),
            words(names[1, b] or "–", 80),
            num(c),
        ]
        for a, b, c in shown
    ]
    note = f"The {len(shown)} largest of {number(len(component))} cosines." if len(shown) < len(component) else ""
    table = Table(f"Edges of the component {title}", columns, rows, note=note)
    gap = _NARROW_GAP if beside else _GAP
    drawn = _figure(run, pair, component, small, large, names, title, fid, table, more, gap)
    return replace(drawn, wide=False, dense=True) if beside else drawn


def _listed(ids: list[int]) -> str:
    return ", ".join(str(i) for i in ids[:4]) + ("…" if len(ids) > 4 else "")


def _figure(
    run: Run,
    pair: dict[str, Any],
    component: list[Edge],
    small: list[int],
    large: list[int],
    names: dict[tuple[int, int], str | None],
    title: str,
    fid: str,
    table: Table,
    more: str,
    gap: int,
) -> Figure:
    """The component as a drawing; sides longer than ``MAX_NODES`` show the latents with the strongest edges."""
    strongest = sorted(component, key=lambda e: (-e[2], e[0], e[1]))
    left = sorted(_first(strongest, 0))
    right = _by_neighbour(sorted(_first(strongest, 1)), left, component)
    edges = [e for e in component if e[0] in set(left) and e[1] in set(right)]
    rows = max(len(left), len(right))
    height = 34 + _ROW * rows + 6
    y_left = {a: 34 + _ROW * (i + (rows - len(left)) / 2 + 0.5) for i, a in enumerate(left)}
    y_right = {b: 34 + _ROW * (i + (rows - len(right)) / 2 + 0.5) for i, b in enumerate(right)}
    # The names on the left get the room they need: latents without a description need little.
    wanted = [text_width(_label(a, names[0, a])) for a in left] + [1.12 * text_width(pair["small"])]
    x0 = round(min(_SIDE, max(wanted) + 16))
    x1, width = x0 + gap, x0 + gap + _SIDE
    out = [
        f'<text class="label" x="{x0}" y="14" text-anchor="end">{_head(pair["small"], x0)}</text>',
        f'<text class="label" x="{x1}" y="14">{_head(pair["large"], _SIDE)}</text>',
    ]
    for a, b, cosine in sorted(edges, key=lambda e: e[2]):
        weight = 1 + round(3 * max(0.0, min(cosine, 1.0)))
        said = f"small {a} – large {b}: cosine {cosine:.3f}"
        out.append(
            f'<path class="edge w{weight}" d="M{x0 + 6} {y_left[a]:.1f}L{x1 - 6} {y_right[b]:.1f}">'
            f"<title>{written(said)}</title></path>"
        )
    if len(edges) <= 12:
        ends = [((x0, y_left[a]), (x1, y_right[b]), cosine) for a, b, cosine in edges]
        # Where edges fan out from one side, they lie furthest apart near the other.
        out += _cosines(ends, 0.74 if len(left) < len(right) else 0.26 if len(right) < len(left) else 0.5)
    for side, places, x in ((0, y_left, x0), (1, y_right, x1)):
        for latent, y in places.items():
            out.append(_node(side, latent, names[side, latent], x, y))
    counts = [
        f"{number(n)} {what}{'s' * (n != 1)}" for n, what in ((len(component), "edge"), (len(large), "large latent"))
    ]
    caption = f"{counts[0]} (cosine at least θ) between {number(len(small))} small and {counts[1]}."
    if len(left) < len(small) or len(right) < len(large):
        caption += f" Drawn: the {len(left)} and {len(right)} with the largest cosines."
    drawing = wrap(width, height, f"Component {title}", caption, "".join(out))
    what = f"{pair['small']} → {pair['large']}: {title}" + (f", {more}" if more else "")
    return Figure(fid, what, caption, drawing, table, wide=True, links=_links(run, pair, left, right))


def _links(run: Run, pair: dict[str, Any], left: list[int], right: list[int]) -> Line | None:
    """The drawn latents that have a card, as links; None if none has."""
    parts: list[tuple[str, str]] = []
    for name, sha256, ids in (
        (pair["small"], pair["small_sha256"], left),
        (pair["large"], pair["large_sha256"], right),
    ):
        links = [(i, run.link(sha256, i)) for i in ids]
        if any(href for _, href in links):
            parts.append((f"{'; ' if parts else 'Open: '}{name} ", ""))
            for n, (i, href) in enumerate(p for p in links if p[1]):
                parts += [(", ", "")] if n else []
                parts.append((str(i), href))
    return Line(parts) if parts else None


def _cosines(ends: list[tuple[tuple[float, float], tuple[float, float], float]], first: float) -> list[str]:
    """The cosines beside their edges, near the share ``first`` of the way, each where no other is: else left out."""
    out: list[str] = []
    taken: list[tuple[float, float]] = []
    width, height = text_width("0.00", _SMALL) + 4, _SMALL + 1
    for (x0, y0), (x1, y1), cosine in ends:
        for share in sorted((0.2, 0.32, 0.5, 0.68, 0.8, first), key=lambda s: abs(s - first)):
            x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0) - 3
            if all(abs(x - a) >= width or abs(y - b) >= height for a, b in taken):
                taken.append((x, y))
                out.append(f'<text class="halo small" x="{x:.0f}" y="{y:.1f}" text-anchor="middle">{cosine:.2f}</text>')
                break
    return out


def _head(name: str, room: float) -> str:
    """An SAE's name over its latents."""
    return str(written(fitted(name, room / 1.12 - 2, middle=True)))


def _by_neighbour(right: list[int], left: list[int], component: list[Edge]) -> list[int]:
    """Right-hand latents ordered by the mean place of their neighbours, so that few edges cross."""
    place = {a: i for i, a in enumerate(left)}
    means = {}
    for b in right:
        near = [place[a] for a, other, _ in component if other == b and a in place]
        means[b] = sum(near) / len(near) if near else len(left)
    return sorted(right, key=lambda b: (means[b], b))


def _first(strongest: list[Edge], side: int) -> list[int]:
    """The first ``MAX_NODES`` latents of one side, by their strongest edges."""
    return list(dict.fromkeys(edge[side] for edge in strongest))[:MAX_NODES]


def _node(side: int, latent: int, description: str | None, x: float, y: float) -> str:
    text = fitted(_label(latent, description), _SIDE - 13)
    whole = f"latent {latent}" + (f": {description}" if description else "")
    anchor, dx = (' text-anchor="end"', -9) if side == 0 else ("", 9)
    shape_ = (
        f'<path class="mark s1" d="M{x - 4.5} {y:.1f}a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z"/>'
        if side == 0
        else f'<path class="mark s2" d="M{x - 4} {y - 4:.1f}h8v8h-8z"/>'
    )
    return f'{shape_}<text x="{x + dx}" y="{y + 4:.1f}"{anchor}><title>{written(whole)}</title>{written(text)}</text>'


def _label(latent: int, description: str | None) -> str:
    return f"{latent} · {description}" if description else str(latent)
