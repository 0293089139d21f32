"""An explanation that is text a person can read and, at the same time, a function that predicts.

A table of tokens, and of pairs (previous token, token), each with a strength from 0 to 10:

    " Einstein" 10; "instein" 9; after "Al": "bert" 4

    strength of t      round(10 · Σ activation on t / (count of t + κ) / scale)          κ = 1/2
    strength of (s,t)  the same over the places where t follows s
    prediction         the pair's strength, else the token's, else 0

Built from the explaining windows alone; what it predicts elsewhere depends on nothing but the table. It is the
floor for every other explainer: one that does not beat it has described a token latent.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

KAPPA = 0.5
"""Added to every count: a token seen once, at full strength, gets 7 and not 10."""
LEVELS = 10
PAIR_CHANGE = 2
"""A pair is kept only if it changes the prediction by at least this much."""
_NOTHING = "no token and no pair of tokens stands out"
_PART = re.compile(r'(?:after ("(?:[^"\\]|\\.)*"): )?("(?:[^"\\]|\\.)*") (\d+)(?:; |$)')


class Entry(NamedTuple):
    """One line of a table."""

    previous: int | None
    """Token id that must stand directly before ``token``; None: any."""
    token: int
    strength: int
    """0 … 10, where 10 is the largest activation in the explaining windows."""


Table = tuple[Entry, ...]


def build(
    tokens: Int[np.ndarray, "n w"],
    acts: Float[np.ndarray, "n w"],
    lengths: Int[np.ndarray, " n"],
    size: int,
    scale: float,
) -> Table:
    """The table of the windows ``tokens`` with activations ``acts``: at most ``size`` tokens and ``size`` pairs.

    Tokens are ranked by summed activation, pairs by how much squared error they remove from the prediction of the
    tokens alone. ``scale`` > 0 is the activation of strength 10. Places beyond a window's length are ignored.
    """
    valid = np.arange(tokens.shape[1]) < lengths[:, None]
    y = acts.astype(np.float64)
    ids, strengths = _tokens(tokens[valid], y[valid], size, scale)
    alone = np.zeros(tokens.shape)
    for token, strength in zip(ids, strengths, strict=True):
        alone[tokens == token] = strength
    follows = valid[:, 1:]
    pairs = _pairs(
        tokens[:, :-1][follows], tokens[:, 1:][follows], y[:, 1:][follows], alone[:, 1:][follows], size, scale
    )
    return (*(Entry(None, int(t), int(s)) for t, s in zip(ids, strengths, strict=True)), *pairs)


def _strength(sums: Float[np.ndarray, " u"], counts: Int[np.ndarray, " u"], scale: float) -> Float[np.ndarray, " u"]:
    return np.clip(np.rint(LEVELS * sums / (counts + KAPPA) / scale), 0, LEVELS)


def _tokens(
    token: Int[np.ndarray, " m"], y: Float[np.ndarray, " m"], size: int, scale: float
) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """The tokens kept and their strengths, strongest first."""
    ids, inverse = np.unique(token, return_inverse=True)
    sums = np.bincount(inverse, y, minlength=len(ids))
    strength = _strength(sums, np.bincount(inverse, minlength=len(ids)), scale)
    seen = np.flatnonzero(strength > 0)
    kept = seen[np.lexsort((ids[seen], -sums[seen]))][:size]
    kept = kept[np.lexsort((ids[kept], -sums[kept], -strength[kept]))]
    return ids[kept], strength[kept]


def _pairs(
    previous: Int[np.ndarray, " m"],
    token: Int[np.ndarray, " m"],
    y: Float[np.ndarray, " m"],
    alone: Float[np.ndarray, " m"],
    size: int,
    scale: float,
) -> tuple[Entry, ...]:
    """The pairs kept, strongest first. ``alone`` is what the tokens' strengths predict at each place."""
    width = int(token.max(initial=0)) + 1
    key, first, inverse = np.unique(previous.astype(np.int64) * width + token, return_index=True, return_inverse=True)
    counts = np.bincount(inverse, minlength=len(key))
    sums = np.bincount(inverse, y, minlength=len(key))
    strength, before = _strength(sums, counts, scale), alone[first]
    # Σ (y − before)² − (y − strength)² over the pair's places, in levels
    gain = 2 * (strength - before) * sums * (LEVELS / scale) - counts * (strength**2 - before**2)
    useful = np.flatnonzero((np.abs(strength - before) >= PAIR_CHANGE) & (gain > 0))
    kept = useful[np.lexsort((key[useful], -gain[useful]))][:size]
    kept = kept[np.lexsort((key[kept], -strength[kept]))]
    return tuple(Entry(int(key[i] // width), int(key[i] % width), int(strength[i])) for i in kept)


def predict(table: Table, tokens: Int[np.ndarray, "n w"], lengths: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n w"]:
    """The strength, 0 … 10, that ``table`` predicts at each place; 0 beyond a window's length.

    A window's first token has no previous one: only its own strength counts there.
    """
    out = np.zeros(tokens.shape, dtype=np.float32)
    for entry in table:
        if entry.previous is None:
            out[tokens == entry.token] = entry.strength
    for entry in table:
        if entry.previous is not None:
            hits = (tokens[:, :-1] == entry.previous) & (tokens[:, 1:] == entry.token)
            out[:, 1:][hits] = entry.strength
    out[np.arange(tokens.shape[1]) >= lengths[:, None]] = 0
    return out


def describe(table: Table, text: Callable[[int], str]) -> str:
    """The table as a person reads it; ``text`` gives a token's string. It says all that the table says."""
    parts = []
    for entry in table:
        after = "" if entry.previous is None else f"after {_quote(text(entry.previous))}: "
        parts.append(f"{after}{_quote(text(entry.token))} {entry.strength}")
    return "; ".join(parts) or _NOTHING


def parse(description: str, ids: Callable[[str], Sequence[int]]) -> Table | None:
    """The table that ``describe`` made ``description`` of, or None if it is no such description.

    ``ids`` gives the tokens that have a string (several may look alike: all of them are meant).
    """
    if description == _NOTHING:
        return ()
    entries, at = [], 0
    while at < len(description):
        match = _PART.match(description, at)
        if match is None or int(match[3]) > LEVELS:
            return None
        try:
            previous = [None] if match[1] is None else list(ids(json.loads(match[1])))
            token = list(ids(json.loads(match[2])))
        except ValueError:
            return None
        entries += [Entry(p, t, int(match[3])) for p in previous for t in token]
        at = match.end()
    return tuple(entries) if entries else None


def _quote(text: str) -> str:
    """A JSON string whose unprintable characters (controls, direction marks, odd spaces) are escaped."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in quoted)
