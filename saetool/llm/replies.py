"""Reading what a language model wrote: the JSON in it, wherever it stands.

Reasoning in ``<think>`` marks and code fences are set aside, and the first balanced object is taken. What cannot be
read raises ``Unreadable`` with the reason: a failure is never turned into an answer.
"""

import json
import re
import unicodedata
from typing import Any

from saetool.llm.client import Reply

_REASONING = re.compile(r"<(think|thinking|reasoning)>.*?(</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_BEGUN = re.compile(r'\{"description": "([^"\\]*)')


class Unreadable(Exception):
    """A reply without a usable answer; the text says why, in words that the model could act on."""


def whole(reply: Reply) -> str:
    """The reply's text. Raises ``Unreadable`` if there is none."""
    text = _REASONING.sub("", reply.text).strip()
    if text:
        return text
    if reply.finish == "length":
        raise Unreadable("the limit on output tokens was reached before the answer began")
    raise Unreadable("the reply was empty")


def first_object(text: str) -> dict[str, Any]:
    """The first balanced JSON object in ``text``."""
    decoder = json.JSONDecoder(object_pairs_hook=_without_doubles)
    for match in re.finditer(r"\{", text):
        try:
            value, _ = decoder.raw_decode(text, match.start())
        except ValueError:
            continue
        except RecursionError:
            raise Unreadable("the JSON object is nested without end") from None
        return value
    raise Unreadable("no JSON object in the reply")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Unreadable("a JSON object names a key twice")
    return found


def description(reply: Reply, most: int) -> str:
    """The text under ``description``, on one line of at most ``most`` characters, without control characters."""
    text = whole(reply)
    if reply.finish == "length" and (begun := _BEGUN.fullmatch(text)) and len(begun[1]) >= most:
        return clean(begun[1], most)  # cut off behind what is kept of it
    found = first_object(text).get("description")
    if not isinstance(found, str):
        raise Unreadable('the JSON object has no text under "description"')
    text = clean(found, most)
    if not text:
        raise Unreadable("the description was empty")
    return text


def clean(text: str, most: int) -> str:
    """One line, without control characters and direction marks, cut to ``most`` characters."""
    spaced = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)
    kept = "".join(c for c in spaced if unicodedata.category(c) not in ("Cf", "Cs", "Co", "Cn"))
    kept = " ".join(kept.split())
    return kept if len(kept) <= most else kept[: most - 1].rstrip() + "…"


def number(value: Any, low: float, high: float, what: str) -> float:
    """``value`` if it is a number between ``low`` and ``high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise Unreadable(f"{what} must be a number from {low:g} to {high:g}, not {json.dumps(value)[:40]}")
    return float(value)
