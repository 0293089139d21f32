"""What a page is made of: sections of tables, figures and text. Plain data; the template turns it into HTML.

Every number in a table is a ``Cell`` that carries its exact value beside the rounded text, so that a page can be
read back and compared with the artifacts.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from markupsafe import Markup

MINUS = "\N{MINUS SIGN}"
ABSENT = "\N{EN DASH}"


def number(value: float | None, digits: int = 4) -> str:
    """``value`` with ``digits`` significant digits, as read in print: 12,288 · 0.5721 · −3.4e−5 · – (undefined)."""
    if value is None or not math.isfinite(value):
        return ABSENT
    size = abs(value)
    if isinstance(value, int) or (value == int(value) and size < 1e15):
        text = f"{int(value):,}"
    elif size >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    elif size >= 1e-3:
        short = f"{value:.{digits}g}"
        text = short if float(short) == value else f"{value:#.{digits}g}"  # a rounded number keeps its last zeros
    else:
        mantissa, _, exponent = f"{value:.{max(digits - 2, 1)}e}".partition("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", MINUS)


NOTHING = 1e-12
"""A share below this is the rounding of sums."""


def percent(share: float | None, *, signed: bool = False) -> str:
    """A share as a percentage with two or three significant digits; ``signed`` writes the plus too."""
    if share is None or not math.isfinite(share):
        return ABSENT
    if abs(share) < NOTHING:
        return "0 %"
    value = 100 * share
    size = abs(value)
    decimals = 0 if size >= 100 else 1 if size >= 1 else min(1 - math.floor(math.log10(size)), 8)
    text = f"{value:+,.{decimals}f}" if signed else f"{value:,.{decimals}f}"
    return f"{text.replace('-', MINUS)} %"


@dataclass(frozen=True)
class Cell:
    """One table cell: the text shown and, for a number, its exact value."""

    text: str
    value: float | int | None = None
    title: str = ""
    """Said on hovering: what was cut from the text."""
    mark: str = ""
    """A class of the style sheet: ``mono``, ``strong``, ``keep`` (no line break), ``long`` (a wide column)."""
    bar: int | None = None
    """A bar behind the number, in twentieths (0 … 20)."""
    href: str = ""
    """Where the cell leads to on the page: ``#…``."""


def num(value: float | None, digits: int = 4) -> Cell:
    """A number as a cell."""
    return Cell(number(value, digits), value)


def pct(share: float | None, *, signed: bool = False) -> Cell:
    """A share as a cell in percent; its exact value stays the share."""
    return Cell(percent(share, signed=signed), share)


def words(text: object, limit: int = 0) -> Cell:
    """Text as a cell, cut to ``limit`` characters with the whole on hovering."""
    whole = str(text)
    if limit and len(whole) > limit:
        return Cell(whole[: limit - 1] + "…", title=whole, mark="long" if limit > 36 else "keep")
    return Cell(whole, mark="keep" if len(whole) <= 36 else "long")


def quoted(token: str) -> str:
    """A token's text in quotation marks, so that its spaces can be seen."""
    return json.dumps(token, ensure_ascii=False)


def linked(latent: int, href: str) -> Cell:
    """A latent's number, leading to its card if it has one."""
    return Cell(number(latent), latent, href=href)


def barred(value: float, top: float, digits: int = 3) -> Cell:
    """A number with a bar whose full length is ``top``."""
    share = min(max(value / top, 0.0), 1.0) if top > 0 else 0.0
    return Cell(number(value, digits), value, bar=round(20 * share))


@dataclass(frozen=True)
class Column:
    """A column: its name, what it means (said on hovering and to screen readers), and whether it holds numbers."""

    name: str
    meaning: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A table. ``sortable`` lets the script sort it by a click on a column's name."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    sortable: bool = False
    bad_rows: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Line:
    """A sentence with links: (text, ``#…`` or nothing)."""

    parts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Figure:
    """A drawing with what is seen in it, the numbers behind it as a table, and what hovering shows."""

    kind: ClassVar[str] = "figure"
    id: str
    title: str
    caption: str
    svg: Markup
    table: Table | None = None
    hover: dict[str, Any] | None = None
    data: Table | None = None
    """All points, exactly, where ``table`` shows a part of them."""
    wide: bool = False
    dense: bool = False
    """Whether a narrow window must scroll it rather than shrink it: small writing."""
    links: Line | None = None
    """Where on the page what is drawn leads to."""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str
    mark: str = ""


@dataclass(frozen=True)
class Listing:
    """A list of sentences."""

    kind: ClassVar[str] = "listing"
    items: Sequence[str]
    mark: str = ""


@dataclass(frozen=True)
class Figures:
    """Figures side by side where there is room."""

    kind: ClassVar[str] = "figures"
    figures: Sequence[Figure]


@dataclass(frozen=True)
class Group:
    """Blocks under a heading of their own."""

    kind: ClassVar[str] = "group"
    id: str
    title: str
    blocks: Sequence[Any]


@dataclass(frozen=True)
class Disclosure:
    """Blocks that open on request."""

    kind: ClassVar[str] = "disclosure"
    summary: str
    blocks: Sequence[Any]
    open: bool = False


@dataclass(frozen=True)
class Token:
    """A piece of a context: text, and for a single token its highlight level 0 … 10 and what hovering says.

    Neighbouring tokens without activation and without anything to say are one piece.
    """

    text: str
    level: int = 0
    title: str = ""


@dataclass(frozen=True)
class Context:
    """One window of text: what it was used for, its largest activation, and its tokens."""

    role: str
    peak: str
    tokens: Sequence[Token]


@dataclass(frozen=True)
class Card:
    """All that is known of one latent."""

    id: str
    title: str
    description: str
    """Empty if it was not described."""
    score: str
    """The correlation, for the closed card; empty if it is undefined."""
    facts: Sequence[tuple[str, Cell]]
    contexts: Sequence[Context]
    n_contexts: int
    histogram: Markup | None
    """The activations in its windows."""
    silent: Sequence[Context]
    """Windows it does not fire in, those with the largest predictions."""
    families: Sequence[Line]
    links: Sequence[Table]


@dataclass(frozen=True)
class Cards:
    """The cards of one SAE's latents."""

    kind: ClassVar[str] = "cards"
    id: str
    title: str
    note: str
    cards: Sequence[Card]


@dataclass(frozen=True)
class Search:
    """A box that finds cards, whose SAE, number, description and texts it looks through. Hidden without scripts."""

    kind: ClassVar[str] = "search"


@dataclass(frozen=True)
class Term:
    """An entry of the glossary: a name, its formula and what it says."""

    name: str
    formula: str
    meaning: str


@dataclass(frozen=True)
class Glossary:
    """Every formula used, with its name."""

    kind: ClassVar[str] = "glossary"
    terms: Sequence[Term]


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading of its own."""

    id: str
    title: str
    intro: str
    blocks: Sequence[Any] = field(default_factory=tuple)


@dataclass(frozen=True)
class Missing:
    """A section without data, and the command that would make the data."""

    id: str
    title: str
    command: str
