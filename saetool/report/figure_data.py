"""The numbers behind the page's figures as CSV, exactly as the artifacts hold them."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from saetool.report.blocks import ABSENT, Cell, Disclosure, Figure, Figures, Group
from saetool.report.sections import Page


def figures_of(page: Page) -> Iterator[Figure]:
    """Every figure of the page that has data, in the page's order."""
    for section in page.sections:
        yield from _inside(section.blocks)


def _inside(blocks: Any) -> Iterator[Figure]:
    for block in blocks:
        if isinstance(block, Figure) and (block.data or block.table):
            yield block
        elif isinstance(block, Figures):
            yield from _inside(block.figures)
        elif isinstance(block, Group | Disclosure):
            yield from _inside(block.blocks)


def csv_of(figure: Figure) -> bytes:
    """All points of a figure, one a line, under their axes' names; a column without any value is left out."""
    table = figure.data or figure.table
    assert table is not None
    used = [i for i in range(len(table.columns)) if any(_plain(row[i]) != "" for row in table.rows)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([table.columns[i].name for i in used])
    writer.writerows([_plain(row[i]) for i in used] for row in table.rows)
    return out.getvalue().encode("utf-8", "replace")


def _plain(cell: Cell) -> str | float:
    if cell.value is not None:
        return cell.value
    return "" if cell.text == ABSENT else cell.title or cell.text
