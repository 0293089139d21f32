"""An explanation that is text a person can read and, at the same time, a function that predicts.

A table of tokens, and of pairs (previous token, token), each with a strength from 0 to 10:

    Einstein 10; "-" 3; after "Al", " Al": "bert" 4

    strength of t      round(10 · Σ activation on t / (count of t + κ) / scale)          κ = 1/2
    strength of (s,t)  the same over the places where t follows s
    prediction         the pair's strength, else the token's, else that of its word, else 0

A word is the tokens that differ in case and outer spaces alone (" during", "During"); its strength is the largest of
its tokens in the table. Those of its tokens that occur in the explaining windows are all in the table, so that the
word speaks only for spellings that were never seen. In the text a word stands without quotation marks, and a token,
where it differs from its word or is none, within them.

Built from the explaining windows alone; what it predicts elsewhere depends on nothing but the table. It is the
floor for every other explainer: one that does not beat it has described a token latent.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

KAPPA = 0.5
"""Added to every count: a token seen once, at full strength, gets 7 and not 10."""
LEVELS = 10
PAIR_CHANGE = 2
"""A pair is kept only if it changes the prediction by at least this much."""
WORD = 2
"""Letters that make a token a word: a single one in another case is another thing."""
_NOTHING = "no token and no pair of tokens stands out"
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_LIST = rf"{_QUOTED}(?:, {_QUOTED})*"
_PART = re.compile(rf"(?:after ({_LIST}): )?({_QUOTED}|[^\W\d_]+) (\d+)(?: \(in {_LIST}\))?(?:; |$)")


class Entry(NamedTuple):
    """One line of a table."""

    previous: int | None
    """Token id that must stand directly before ``token``; None: any."""
    token: int
    strength: int
    """0 … 10, where 10 is the largest activation in the explaining windows."""


Table = tuple[Entry, ...]


def word_of(text: str) -> str | None:
    """The word that a token's string is, in lower case; None if it is none."""
    word = text.strip().casefold()
    return word if len(word) >= WORD and word.isalpha() else None


def alike(strings: Sequence[str]) -> Int[np.ndarray, " V"]:
    """For each token id the first one that is the same word; itself for what is no word."""
    first: dict[str, int] = {}
    words = (word_of(text) for text in strings)
    return np.array([i if word is None else first.setdefault(word, i) for i, word in enumerate(words)], dtype=np.int64)


def build(
    tokens: Int[np.ndarray, "n w"],
    acts: Float[np.ndarray, "n w"],
    lengths: Int[np.ndarray, " n"],
    size: int,
    scale: float,
    words: Int[np.ndarray, " V"] | None = None,
) -> Table:
    """The table of the windows ``tokens`` with activations ``acts``: at most ``size`` tokens and ``size`` pairs.

    Tokens are ranked by summed activation, pairs by how much squared error they remove from the prediction of the
    tokens alone. ``scale`` > 0 is the activation of strength 10. Places beyond a window's length are ignored.
    ``words`` (``alike`` of the vocabulary; None: no two tokens are one word): other tokens of these words follow, with
    their own strengths.
    """
    valid = np.arange(tokens.shape[1]) < lengths[:, None]
    y = acts.astype(np.float64)
    ids, strengths = _tokens(tokens[valid], y[valid], size, scale, words)
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
    token: Int[np.ndarray, " m"],
    y: Float[np.ndarray, " m"],
    size: int,
    scale: float,
    words: Int[np.ndarray, " V"] | None,
) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """The tokens kept and their strengths, strongest first; then other tokens of the same words."""
    ids, inverse = np.unique(token, return_inverse=True)
    sums = np.bincount(inverse, y, minlength=len(ids))
    strength = _strength(sums, np.bincount(inverse, minlength=len(ids)), scale)
    seen = np.flatnonzero(strength > 0)
    kept = seen[np.lexsort((ids[seen], -sums[seen]))][:size]
    kept = kept[np.lexsort((ids[kept], -sums[kept], -strength[kept]))]
    if words is not None:
        same = np.isin(words[ids], words[ids[kept]]) & ~np.isin(ids, ids[kept])
        kept = np.append(kept, np.flatnonzero(same))
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


def predict(
    table: Table,
    tokens: Int[np.ndarray, "n w"],
    lengths: Int[np.ndarray, " n"],
    words: Int[np.ndarray, " V"] | None = None,
) -> Float[np.ndarray, "n w"]:
    """The strength, 0 … 10, that ``table`` predicts at each place; 0 beyond a window's length.

    A window's first token has no previous one: only its own strength counts there. ``words`` as in ``build``.
    """
    out = np.zeros(tokens.shape, dtype=np.float32)
    if words is not None:
        word = words[np.maximum(tokens, 0)]
        # Rising strengths: the largest of a word's tokens is written last.
        for entry in sorted((e for e in table if e.previous is None), key=lambda e: e.strength):
            out[word == words[entry.token]] = entry.strength
    for entry in table:
        if entry.previous is None:
            out[tokens == entry.token] = entry.strength
    for entry in table:
        if entry.previous is not None:
            hits = (tokens[:, :-1] == entry.previous) & (tokens[:, 1:] == entry.token)
            out[:, 1:][hits] = entry.strength
    out[np.arange(tokens.shape[1]) >= lengths[:, None]] = 0
    return out


def describe(
    table: Table, text: Callable[[int], str], parts_of: Callable[[int], Sequence[str]] = lambda token: ()
) -> str:
    """The table as a person reads it; ``text`` gives a token's string. It says all that the table says.

    ``parts_of`` gives the longer words that a token is mostly a part of: said for the reader, not part of the table.
    """
    out = [*_single(table, text, parts_of), *_after(table, text)]
    return "; ".join(out) or _NOTHING


def _single(table: Table, text: Callable[[int], str], parts_of: Callable[[int], Sequence[str]]) -> Iterator[str]:
    strongest: dict[str, int] = {}
    alone = [(entry, word_of(text(entry.token))) for entry in table if entry.previous is None]
    for entry, word in alone:
        if word is not None:
            strongest[word] = max(strongest.get(word, 0), entry.strength)
    said: set[str] = set()
    for entry, word in alone:
        gloss = ", ".join(_quote(w) for w in parts_of(entry.token)) if entry.strength else ""
        gloss = f" (in {gloss})" if gloss else ""
        if word is not None and entry.strength == strongest[word]:
            if word not in said:
                yield f"{text(entry.token).strip()} {entry.strength}{gloss}"
            said.add(word)
        else:
            yield f"{_quote(text(entry.token))} {entry.strength}{gloss}"


def _after(table: Table, text: Callable[[int], str]) -> Iterator[str]:
    """Pairs of the same token and strength together."""
    together: dict[tuple[int, int], list[str]] = {}
    for entry in table:
        if entry.previous is not None:
            together.setdefault((entry.token, entry.strength), []).append(_quote(text(entry.previous)))
    for (token, strength), before in together.items():
        yield f"after {', '.join(before)}: {_quote(text(token))} {strength}"


def parse(description: str, ids: Callable[[str], Sequence[int]], word: Callable[[str], Sequence[int]]) -> Table | None:
    """A table that predicts as the one that ``describe`` made ``description`` of; None if it is no such description.

    ``ids`` gives the tokens that have a string (several may look alike: all of them are meant), ``word`` those that
    are a word.
    """
    if description == _NOTHING:
        return ()
    exact, spelled, pairs, at = [], [], [], 0
    while at < len(description):
        match = _PART.match(description, at)
        if match is None or int(match[3]) > LEVELS:
            return None
        before, token, strength = match[1], match[2], int(match[3])
        try:
            previous = [i for quoted in re.findall(_QUOTED, before or "") for i in ids(json.loads(quoted))]
            tokens = ids(json.loads(token)) if token.startswith('"') else word(token)
        except ValueError:
            return None
        if before is not None:
            pairs += [Entry(p, t, strength) for p in previous for t in tokens]
        else:
            (exact if token.startswith('"') else spelled).extend(Entry(None, t, strength) for t in tokens)
        at = match.end()
    named = {entry.token for entry in exact}
    return (*(e for e in spelled if e.token not in named), *exact, *pairs) or None


def _quote(text: str) -> str:
    """A JSON string whose unprintable characters (controls, direction marks, odd spaces) are escaped."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in quoted)
