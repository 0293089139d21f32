"""Text in drawings: how wide it is about, cut to the room there is, escaped, and with every character visible."""

import unicodedata

from markupsafe import Markup, escape

SIZE = 12.5
"""Pixels of a drawing's letters, as in the style sheet."""
_CONTROL = {i: chr(0x2400 + i) for i in range(32)} | {0x7F: "␡", 0x0A: "⏎", 0x09: "⇥"}
# Characters that turn the reading direction around are shown by name, or they would reorder the text after them.
_BIDI = {c: f"⟨U+{c:04X}⟩" for c in (0x202A, 0x202B, 0x202C, 0x202D, 0x202E, 0x2066, 0x2067, 0x2068, 0x2069)}
_SHARES = {c: share for share, group in (
    (0.33, " .,:;'|!ijl"), (0.43, "()[]{}/\\-Irtf\""), (0.58, "cskvxyzJ"), (0.84, "−+=<>~±×"), (0.97, "mwMWOQ%@→—…")
) for c in group}  # fmt: skip
"""Widths over the size of the letters in DejaVu Sans, the widest of the common sans-serif faces."""


def visible(text: str) -> str:
    """``text`` with characters that cannot be seen (line ends, controls, direction marks) as signs that can."""
    return text.translate(_CONTROL | _BIDI)


def written(text: object) -> Markup:
    """``text`` as it stands between tags: nothing in it is markup, nothing in it is unseen."""
    return escape(visible(str(text)))


def _share(character: str) -> float:
    """A character's width over the size of the letters."""
    if character in _SHARES:
        return _SHARES[character]
    if unicodedata.combining(character):
        return 0.0
    wide = unicodedata.east_asian_width(character) in "WF"
    return 1.05 if wide else 0.72 if character.isupper() else 0.64


def text_width(text: str, size: float = SIZE) -> float:
    """About how many pixels ``text`` takes."""
    return size * sum(map(_share, text))


def fitted(text: str, room: float, *, middle: bool = False, size: float = SIZE) -> str:
    """``text`` cut to about ``room`` pixels, with an ellipsis for what is cut at its end, or in its ``middle``."""
    text = visible(text)
    if text_width(text, size) <= room:
        return text
    left = room - text_width("…", size)
    head, tail = [], []
    for place in range(len(text)):
        at_end = middle and place % 2 == 1
        character = text[-1 - place // 2] if at_end else text[place // 2 if middle else place]
        left -= size * _share(character)
        if left < 0:
            break
        (tail if at_end else head).append(character)
    return "".join(head) + "…" + "".join(reversed(tail))
