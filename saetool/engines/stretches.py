"""The text of a cache as stretches, and which of them are for explaining and which for scoring.

A stretch is a run of consecutive positions of one document in one context. Documents are divided into two halves by a
hash of document number and seed: one for explaining, one for scoring (for choosing among several explanations, a third
part). Near-duplicate documents are in the same part.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from saetool.artifacts.cache import Cache
from saetool.config import AutointerpConfig
from saetool.engines.firings import Firing
from saetool.engines.near_duplicates import NearDuplicates


@dataclass(frozen=True)
class Text:
    """The tokens of some splits of a cache, cut into stretches."""

    tokens: Int[np.ndarray, " rows"]
    first: Int[np.ndarray, " s"]
    """First row of each stretch."""
    size: Int[np.ndarray, " s"]
    """Rows of each stretch."""
    context: Int[np.ndarray, " s"]
    position: Int[np.ndarray, " s"]
    """Position of the stretch's first row in its context."""
    document: Int[np.ndarray, " s"]

    @property
    def n_rows(self) -> int:
        """Rows in stretches."""
        return int(self.size.sum())

    def inside(self, firing: Firing) -> Firing:
        """``firing`` without the rows that are in no stretch."""
        stretch = np.searchsorted(self.first, firing.rows, side="right") - 1
        kept = (stretch >= 0) & (firing.rows < (self.first + self.size)[stretch])
        return firing if kept.all() else Firing(firing.latent, firing.rows[kept], firing.values[kept])


def read_text(cache: Cache, splits: Sequence[str], skip_positions: int = 0) -> Text:
    """Tokens and stretches of ``splits`` of ``cache``, one after the other."""
    columns = (
        np.concatenate([cache.row_tensor(split, name).numpy() for split in splits])
        for name in ("tokens", "contexts", "documents", "positions")
    )
    return cut(*columns, skip_positions)


def cut(
    tokens: Int[np.ndarray, " rows"],
    contexts: Int[np.ndarray, " rows"],
    documents: Int[np.ndarray, " rows"],
    positions: Int[np.ndarray, " rows"],
    skip_positions: int = 0,
) -> Text:
    """The stretches of rows; those at the first ``skip_positions`` positions of a context are in none.

    Position 0 takes what attention has to put somewhere, and many latents fire there most, whatever the token.
    """
    rows = np.flatnonzero(positions >= skip_positions)
    breaks = np.diff(rows) != 1
    for column, step in ((contexts, 0), (documents, 0), (positions, 1)):
        breaks |= np.diff(column[rows].astype(np.int64)) != step
    begin = np.concatenate([[0], np.flatnonzero(breaks) + 1]).astype(np.int64) if len(rows) else rows
    first, size = rows[begin].astype(np.int64), np.diff(np.append(begin, len(rows)))
    return Text(tokens, first, size, contexts[first], positions[first], documents[first])


@dataclass(frozen=True)
class Parts:
    """What each stretch is for, by its document."""

    explain: Bool[np.ndarray, " s"]
    score: Bool[np.ndarray, " s"]
    select: Bool[np.ndarray, " s"]


def kinds(text: Text) -> Int[np.ndarray, " s"]:
    """The document of each stretch, near-duplicates under the number of the first of their kind."""
    order = np.argsort(text.document, kind="stable")
    documents, begin = np.unique(text.document[order], return_index=True)
    near, kind = NearDuplicates(), documents.copy()
    for i, (a, b) in enumerate(itertools.pairwise([*begin.tolist(), len(order)])):
        parts = [text.tokens[text.first[s] : text.first[s] + text.size[s]] for s in order[a:b]]
        like = near.add_tokens(np.concatenate(parts))
        if like is not None:
            kind[i] = kind[like]
    return kind[np.searchsorted(documents, text.document)]


def divide(documents: Int[np.ndarray, " s"], config: AutointerpConfig) -> Parts:
    """``config.split`` of the documents for explaining; half of the others for choosing, if there is a choice."""
    place = _place(documents, config.seed)
    explain = place < config.split
    select = (place >= (1 + config.split) / 2) & (config.candidates > 1)
    return Parts(explain, ~explain & ~select, select)


def explain_half(documents: Int[np.ndarray, " s"], seed: int, share: float) -> Bool[np.ndarray, " s"]:
    """Whether each document is for explaining: its place is below ``share``."""
    return _place(documents, seed) < share


def _place(documents: Int[np.ndarray, " s"], seed: int) -> Float[np.ndarray, " s"]:
    """A place in [0, 1) for each document: a hash (splitmix64) of its number and ``seed``."""
    mask = np.uint64(0xFFFFFFFFFFFFFFFF)
    with np.errstate(over="ignore"):
        x = documents.astype(np.uint64) + np.uint64(seed % 2**32) * np.uint64(0xD1342543DE82EF95)
        x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) & mask
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) / 2**53
