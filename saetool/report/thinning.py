"""Fewer of many: what a figure or table shows when it cannot show all, and the words that say so."""

from typing import Any


def thinned(items: list[Any], most: int) -> list[Any]:
    """At most about ``most`` of ``items``, evenly spaced, the first and the last always among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def thinned_note(n: int, most: int, per: str) -> str:
    """What a table must say when it shows fewer rows than there are points."""
    return f"{most} of {n:,} points{f' {per}' if per else ''}, evenly spaced." if n > most else ""
