"""How many tokens a text is, without its tokenizer: for estimates before any call.

Words, digits, marks and spaces are cut as GPT-style tokenizers cut them. Calibrated on prompts of this package
against SmolLM2's tokenizer (49k tokens): within 5%.
"""

import re

from saetool.llm.client import Request

_PIECES = re.compile(r" ?[^\W\d_]+|\d| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s")
_LONGEST_WORD = 8
"""Letters of a word that are one token; longer words are cut."""
PER_MESSAGE = 4
"""Tokens that mark a message's beginning, role and end."""


def estimate(text: str) -> int:
    """About how many tokens ``text`` is."""
    n = 0
    for piece in _PIECES.findall(text):
        letters = piece.strip()
        n += -(-len(letters) // _LONGEST_WORD) if letters.isalpha() else max(1, round(len(letters) / 2.5))
    return n


def prompt_tokens(request: Request) -> int:
    """About how many tokens a request sends."""
    return sum(estimate(m.content) + PER_MESSAGE for m in request.messages) + estimate(request.given) + PER_MESSAGE
