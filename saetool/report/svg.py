"""Draws plots as SVG text: axes, lines, points, bars, labels. No library, no script, no colour but by class.

Colours, dashes and fonts come from the page's style sheet, so a figure follows the reader's light or dark theme and
prints. Everything written into a drawing is escaped here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from markupsafe import Markup

from saetool.report.blocks import ABSENT, Cell, Column, Table, num
from saetool.report.lettering import fitted, text_width, written
from saetool.report.scales import Scale, Values
from saetool.report.thinning import thinned

N_SERIES = 7
"""Distinct series (colour + dash + marker); the eighth repeats the first."""
_SAMPLE = 16
"""Rows of the table under a drawing that holds some of its points."""
_BOLD = 1.12  # how much wider the letters of an axis' name are


@dataclass(frozen=True)
class Key:
    """A legend entry: its text and the classes of its line and marker."""

    text: str
    series: int
    style: Literal["line", "mark", "bar", "rule"] = "line"


@dataclass
class Plot:
    """One drawing with two axes. Call the drawing methods, then ``figure_text`` once."""

    x: Scale
    y: Scale
    x_label: str
    y_label: str
    keys: Sequence[Key] = ()
    y_names: Sequence[tuple[float, str]] | None = None
    """Names at places of the y axis, instead of numbers."""
    width: int = 480
    height: int = 300
    left: int = 64
    _parts: list[str] = field(default_factory=list)
    _over: list[str] = field(default_factory=list)
    _hover: list[dict[str, Any]] = field(default_factory=list)
    _exact: list[tuple[str, int | None, float | None, float | None]] = field(default_factory=list)
    _labels: list[tuple[float, float, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.y_names is not None:  # names get the room they need, up to half of the drawing
            needed = max((text_width(text) for _, text in self.y_names), default=0) + 12
            self.left = round(max(self.left, min(needed, self.width / 2)))
        self._rows = _legend_rows(self.keys, self.width - self.left - 8)
        self.height += 18 * max(0, len(self._rows) - 3)  # a long legend takes no room from the plot
        self.top = 12 + 18 * len(self._rows)
        self.bottom = self.height - 44
        self.right = self.width - 18
        if self.y_label and self.y_names is None:  # long numbers must not run into the axis' name
            self.left = max(self.left, round(28 + max((text_width(text) for _, text in self.y.ticks()), default=0)))
        self.x = self.x.placed(self.left, self.right)
        self.y = self.y.placed(self.bottom, self.top)

    def line(self, xs: Sequence[float], ys: Values, series: int, *, dashed: bool = False, markers: bool = True) -> None:
        """A line through the points; a null is a gap. Up to ten markers tell series apart without colour."""
        log_y = self.y.kind == "log"
        pieces, open_piece = [], False
        shown = []
        for x, y in zip(xs, ys, strict=True):
            if y is None or not math.isfinite(y) or (log_y and y <= 0):
                open_piece = False
                continue
            px, py = self.x(x), self.y(y)
            pieces.append(f"{'L' if open_piece else 'M'}{px:.1f} {py:.1f}")
            shown.append((px, py))
            open_piece = True
        n = series % N_SERIES + 1
        dash = f" d{n}" if dashed or n > 1 else ""
        self._parts.append(f'<path class="line s{n}{dash}" d="{"".join(pieces)}"/>')
        if markers and shown:
            every = max(1, len(shown) // 8)
            for px, py in shown[every // 2 :: every]:
                self._parts.append(marker(n, px, py))

    def faint(self, xs: Sequence[float], ys: Values, series: int) -> None:
        """A thin line without markers, for one of several that another line is the mean of."""
        self.line(xs, ys, series, markers=False)
        self._parts[-1] = self._parts[-1].replace('class="line ', 'class="line thin ', 1)

    def points(self, xs: Sequence[float], ys: Sequence[float], series: int, *, square: bool = False) -> None:
        """Points as one path of strokes of no length: small, and drawn at once."""
        d = "".join(f"M{self.x(x):.1f} {self.y(y):.1f}h0" for x, y in zip(xs, ys, strict=True))
        n = series % N_SERIES + 1
        self._parts.append(f'<path class="{"square" if square else "dot"} s{n}" d="{d}"/>')

    def mark(self, x: float, y: float, series: int, label: str = "") -> None:
        """One larger marker with a label beside it, where no other mark's label is."""
        px, py = self.x(x), self.y(y)
        self._over.append(marker(series % N_SERIES + 1, px, py, 4.6))
        if not label:
            return
        label = fitted(label, self.right - self.left, middle=True)
        width = text_width(label)
        places = [(px + dx, py + dy) for dy in (-8, 17, -22, 31) for dx in (-4, 4 - width, -width / 2)]
        fits = [
            p for p in places if self.left < p[0] and p[0] + width < self.right and self.top + 8 < p[1] < self.bottom
        ]
        free = [p for p in fits if not any(_overlap((p[0], p[1], width, 14), other) for other in self._labels)]
        left, base = (free or fits or places)[0]
        self._labels.append((left, base, width, 14))
        self._over.append(f'<text class="halo" x="{left:.1f}" y="{base:.1f}">{written(label)}</text>')

    def bars(self, edges: Sequence[float], heights: Sequence[float], series: int, say: Callable[[int], str]) -> None:
        """Histogram bars between ``edges``; ``say(i)`` is shown on hovering bar i."""
        n = series % N_SERIES + 1
        zero = self.y(max(0.0, self.y.low))
        for i, value in enumerate(heights):
            if not value:
                continue
            x0, x1, y = self.x(edges[i]), self.x(edges[i + 1]), self.y(value)
            gap = 0.6 if x1 - x0 > 3 else 0
            self._parts.append(
                f'<rect class="bar s{n}" x="{x0:.1f}" y="{min(y, zero):.1f}" width="{max(x1 - x0 - gap, 0.5):.1f}" '
                f'height="{abs(zero - y):.1f}"><title>{written(say(i))}</title></rect>'
            )

    def steps(self, edges: Sequence[float], heights: Sequence[float], series: int) -> None:
        """A histogram as an outline, for laying several over each other."""
        n = series % N_SERIES + 1
        d = f"M{self.x(edges[0]):.1f} {self.y(0):.1f}"
        for i, value in enumerate(heights):
            d += f"V{self.y(value):.1f}H{self.x(edges[i + 1]):.1f}"
        self._parts.append(f'<path class="line s{n} d{n}" d="{d}V{self.y(0):.1f}"/>')

    def horizontal_bars(self, values: Sequence[tuple[float, float, int, str]], thick: float) -> None:
        """Bars from zero: (position on y, value on x, series, text at the end)."""
        zero = self.x(0.0)
        for position, value, series, text in values:
            y, end = self.y(position), self.x(value)
            n = series % N_SERIES + 1
            self._parts.append(
                f'<rect class="bar s{n}" x="{min(zero, end):.1f}" y="{y - thick / 2:.1f}" '
                f'width="{max(abs(end - zero), 1):.1f}" height="{thick:.1f}"/>'
            )
            if text:
                self.label(max(value, 0.0), position, text)

    def stacked(self, position: float, parts: Sequence[tuple[float, int, str]], thick: float) -> None:
        """One bar of parts along x, from zero: (length, series, text shown where it fits)."""
        start, y = 0.0, self.y(position)
        for value, series, text in parts:
            a, b = self.x(start), self.x(start + value)
            start += value
            if b - a < 0.05:
                continue
            n = series % N_SERIES + 1
            self._parts.append(
                f'<rect class="bar part s{n}" x="{a:.1f}" y="{y - thick / 2:.1f}" width="{max(b - a - 1, 0.5):.1f}" '
                f'height="{thick:.1f}"><title>{written(text)}</title></rect>'
            )
            if text and b - a > text_width(text) + 3:
                middle = f'x="{(a + b) / 2:.1f}" y="{y + 4.4:.1f}"'
                self._over.append(f'<text class="halo" {middle} text-anchor="middle">{written(text)}</text>')

    def label(self, x: float, y: float, text: str) -> None:
        """Text just right of a point, cut at the edge of the drawing."""
        px, py = self.x(x) + 6, self.y(y) + 4
        text = fitted(text, self.width - px - 2, middle=True)
        self._over.append(f'<text class="halo" x="{px:.1f}" y="{py:.1f}">{written(text)}</text>')

    def interval(self, y: float, low: float, high: float) -> None:
        """A whisker along x."""
        a, b, at = self.x(low), self.x(high), self.y(y)
        ends = "".join(f"M{end:.1f} {at - 5:.1f}v10" for end in (a, b))
        self._over.append(f'<path class="whisker" d="M{a:.1f} {at:.1f}H{b:.1f}{ends}"/>')

    def vertical(self, x: float, text: str = "", *, rule: str = "rule", row: int = 0, before: bool = False) -> None:
        """A line across the plot at ``x``, labelled at the top (``row`` lines further down, left with ``before``)."""
        px = self.x(x)
        self._over.append(f'<path class="{rule}" d="M{px:.1f} {self.top}V{self.bottom}"/>')
        if text:
            length = text_width(text) + 6
            flip = (before and px - length > self.left) or px + length > self.right
            anchor, dx = (' text-anchor="end"', -5) if flip else ("", 5)
            self._over.append(
                f'<text class="halo" x="{px + dx:.1f}" y="{self.top + 13 + 15 * row}"{anchor}>{written(text)}</text>'
            )

    def horizontal(self, y: float, text: str = "", *, rule: str = "rule", below: bool = False) -> None:
        """A line across the plot at ``y``, labelled at the right end."""
        py = self.y(y)
        self._over.append(f'<path class="{rule}" d="M{self.left} {py:.1f}H{self.right}"/>')
        if text:
            text = fitted(text, self.right - self.left - 8, middle=True)
            at = py + (14 if below else -5)
            self._over.append(
                f'<text class="halo" x="{self.right - 4}" y="{at:.1f}" text-anchor="end">{written(text)}</text>'
            )

    def note(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        """Text at a place given as shares (0 … 1) of the plot's width and height, from the lower left corner."""
        px = self.left + x * (self.right - self.left)
        py = self.bottom - y * (self.bottom - self.top)
        self._over.append(f'<text class="halo" x="{px:.1f}" y="{py:.1f}" text-anchor="{anchor}">{written(text)}</text>')

    def remember(
        self,
        name: str,
        xs: Sequence[float],
        ys: Values,
        label: str = "",
        ids: Sequence[int] = (),
        prefix: str = "",
        most: int | None = None,
        drawn: Sequence[int] | None = None,
    ) -> None:
        """Values that hovering shows: four significant digits; ``label`` names what ``ids`` count;
        ``prefix`` and an id name the card that a click opens. Hovering knows those that are ``drawn`` (places in
        ``xs``; all without it), at most ``most`` of them, evenly spaced; the figure's data hold all."""
        self._exact += [(name, ids[i] if ids else None, x, y) for i, (x, y) in enumerate(zip(xs, ys, strict=True))]
        at = list(range(len(xs)) if drawn is None else drawn)
        at = at if most is None else thinned(at, most)
        if not at:
            return
        xs, ys, ids = [xs[i] for i in at], [ys[i] for i in at], [ids[i] for i in at] if ids else ()
        series = {"n": name, "x": [_short(v) for v in xs], "y": [_short(v) for v in ys]}
        more = {"l": label, "i": list(ids), **({"h": prefix} if prefix else {})} if ids else {}
        self._hover.append(series | more)

    def draw(self, title: str, description: str) -> Markup:
        """The whole drawing as SVG."""
        ground = [_axes(self), *self._parts, *self._over, _legend(self)]
        return wrap(self.width, self.height, title, description, "".join(ground))

    def data(self) -> Table | None:
        """All remembered points, exactly; None if there are none."""
        if not self._exact:
            return None
        columns = [Column("series", numeric=False), Column("id"), Column(self.x_label), Column(self.y_label)]
        rows = [[Cell(name), num(i), num(x), num(y)] for name, i, x, y in self._exact]
        return Table("", columns, rows)

    def sample(self, caption: str) -> Table | None:
        """Some of the remembered points for the page, evenly spaced over each series; None if there are none."""
        data = self.data()
        if data is None:
            return None
        series: dict[str, list[Sequence[Cell]]] = {}
        for row in data.rows:
            series.setdefault(row[0].text, []).append(row)
        most = max(_SAMPLE // len(series), 4)
        rows = [row for mine in series.values() for row in thinned(mine, most)]
        used = [i for i in range(4) if any(row[i].text != ABSENT for row in rows)]
        note = f"{len(rows)} of {len(data.rows):,} points, evenly spaced." if len(rows) < len(data.rows) else ""
        return Table(caption, [data.columns[i] for i in used], [[row[i] for i in used] for row in rows], note=note)

    def hover(self) -> dict[str, Any] | None:
        """What the page's script needs to show values under the pointer, if anything was remembered."""
        if not self._hover:
            return None
        axes = {
            name: {"k": s.kind, "d": [s.low, s.high], "r": [s.start, s.end], "u": s.linear, "n": label}
            for name, s, label in (("x", self.x, self.x_label), ("y", self.y, self.y_label))
        }
        return {**axes, "s": self._hover}


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    """Whether two labels (left, base line, width, height) touch."""
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and abs(a[1] - b[1]) < max(a[3], b[3])


def _short(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.4g}")


def marker(n: int, x: float, y: float, r: float = 3.2) -> str:
    """The marker of series ``n`` (1 …): circle, square, triangle, diamond, cross, ring, bar."""
    shapes = {
        1: f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        2: f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        3: f"M{x:.1f} {y - 1.3 * r:.1f}l{1.2 * r:.1f} {2.2 * r:.1f}h{-2.4 * r:.1f}z",
        4: f"M{x:.1f} {y - 1.4 * r:.1f}l{1.4 * r:.1f} {1.4 * r:.1f}l{-1.4 * r:.1f} {1.4 * r:.1f}"
        f"l{-1.4 * r:.1f} {-1.4 * r:.1f}z",
    }
    if n in shapes:
        return f'<path class="mark s{n}" d="{shapes[n]}"/>'
    strokes = {
        5: f"M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}",
        6: shapes[1],
        7: f"M{x:.1f} {y - 1.3 * r:.1f}v{2.6 * r:.1f}",
    }
    return f'<path class="ring s{n}" d="{strokes[n]}"/>'


def wrap(width: int, height: float, title: str, description: str, inside: str) -> Markup:
    """An ``<svg role="img">`` with title and description around ``inside`` (already escaped)."""
    return Markup(
        f'<svg role="img" viewBox="0 0 {width} {height:g}" width="{width}" height="{height:g}">'
        f"<title>{written(title)}</title><desc>{written(description)}</desc>{inside}</svg>"
    )


def _axes(plot: Plot) -> str:
    out = []
    used: list[tuple[float, float]] = []
    # Zero first: on a symlog axis the labels next to it may have no room.
    for value, text in sorted(plot.x.ticks(), key=lambda t: t[0] != 0):
        px, half = plot.x(value), 0.5 * text_width(text) + 3
        out.append(f'<path class="grid" d="M{px:.1f} {plot.top}V{plot.bottom}"/>')
        if any(px - half < end and start < px + half for start, end in used):
            continue
        used.append((px - half, px + half))
        out.append(f'<text x="{px:.1f}" y="{plot.bottom + 17}" text-anchor="middle">{written(text)}</text>')
    named = plot.y_names
    taken: list[float] = []
    for value, text in sorted(plot.y.ticks(), key=lambda t: t[0] != 0) if named is None else named:
        py = plot.y(value)
        if any(abs(py - other) < 13 for other in taken):
            continue
        taken.append(py)
        if named is None:
            out.append(f'<path class="grid" d="M{plot.left} {py:.1f}H{plot.right}"/>')
        if named is not None:
            whole, text = text, fitted(text, plot.left - 9, middle=True)
            text_ = f"<title>{written(whole)}</title>{written(text)}" if text != whole else f"{written(text)}"
        else:
            text_ = f"{written(text)}"
        out.append(f'<text x="{plot.left - 7}" y="{py + 4:.1f}" text-anchor="end">{text_}</text>')
    out.append(f'<path class="axis" d="M{plot.left} {plot.top}V{plot.bottom}H{plot.right}"/>')
    middle = (plot.left + plot.right) / 2
    name = fitted(plot.x_label, 2 * min(middle, plot.width - middle) / _BOLD, middle=True)
    out.append(
        f'<text class="label" x="{middle:.0f}" y="{plot.height - 8}" text-anchor="middle">{written(name)}</text>'
    )
    if plot.y_label:
        middle = (plot.top + plot.bottom) / 2
        out.append(
            f'<text class="label" transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle">'
            f"{written(fitted(plot.y_label, 2 * min(middle, plot.height - middle) / _BOLD, middle=True))}</text>"
        )
    return "".join(out)


def _key_text(key: Key, room: float) -> str:
    return fitted(key.text, room - 46, middle=True)


def _legend_rows(keys: Sequence[Key], room: float) -> list[list[tuple[float, Key]]]:
    rows: list[list[tuple[float, Key]]] = []
    at = room
    for key in keys:
        width = 34 + text_width(_key_text(key, room)) + 12
        if not rows or at + width > room:
            rows.append([])
            at = 0.0
        rows[-1].append((at, key))
        at += width
    return rows


def _legend(plot: Plot) -> str:
    out = []
    for i, row in enumerate(plot._rows):
        for at, key in row:
            x, y, n = plot.left + at, 12 + 18 * i, key.series % N_SERIES + 1
            if key.style == "line":
                out.append(f'<path class="line s{n} d{n}" d="M{x:.0f} {y}h26"/>{marker(n, x + 13, y)}')
            elif key.style == "rule":
                out.append(f'<path class="rule2" d="M{x:.0f} {y}h26"/>')
            elif key.style == "bar":
                out.append(f'<rect class="bar s{n}" x="{x + 6:.0f}" y="{y - 6}" width="16" height="11"/>')
            else:
                out.append(marker(n, x + 15, y, 4))
            out.append(
                f'<text x="{x + 31:.0f}" y="{y + 4}">{written(_key_text(key, plot.width - plot.left - 8))}</text>'
            )
    return "".join(out)
