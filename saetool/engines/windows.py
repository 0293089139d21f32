"""Windows of text that show when one latent fires, drawn apart for explaining and for scoring.

A stretch is a run of consecutive positions of one document in one context; no window crosses its edges. A latent
has at most one window in a stretch, so its windows never overlap:

    active   around the stretch's largest activation, moved (not cut) to stay inside the stretch
    random   anywhere in a stretch, all places verified to be zero

Documents are divided into two halves by a hash of document number and seed; windows for explaining come from one,
for scoring from the other. A window that shares a run of ``SHINGLE`` tokens with one already taken is passed over, in
either half: news and licences repeat themselves, and a score on what was shown is no score.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from saetool.artifacts.cache import Cache
from saetool.config import AutointerpConfig
from saetool.engines.firings import Firing

ROLES = ("explain_top", "explain_quantile", "explain_random", "score_top", "score_quantile", "score_random")
N_EXPLAIN = 3
"""The first so many roles are for explaining, the others for scoring."""
SHINGLE = 8
"""Tokens in a row that make two windows repeats of each other (or whole windows, if they are shorter)."""


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
        return len(self.tokens)


@dataclass(frozen=True)
class Windows:
    """Windows of one latent, in the order of their roles; within top, largest activation first."""

    tokens: Int[np.ndarray, "n w"]
    """−1 beyond a window's length."""
    acts: Float[np.ndarray, "n w"]
    lengths: Int[np.ndarray, " n"]
    role: Int[np.ndarray, " n"]
    """Index into ``ROLES``."""
    source: Int[np.ndarray, "n 2"]
    """Context number, and position of the window's first token in it."""
    document: Int[np.ndarray, " n"]

    def pick(self, mine: Bool[np.ndarray, " n"]) -> "Windows":
        return Windows(*(getattr(self, name)[mine] for name in self.__dataclass_fields__))

    @property
    def explaining(self) -> Bool[np.ndarray, " n"]:
        return self.role < N_EXPLAIN


@dataclass(frozen=True)
class Peaks:
    """The largest activation of one latent in each stretch where it fires, largest first."""

    stretch: Int[np.ndarray, " p"]
    row: Int[np.ndarray, " p"]


def read_text(cache: Cache, splits: Sequence[str]) -> Text:
    """Tokens and stretches of ``splits`` of ``cache``, one after the other."""
    tokens, contexts, documents, positions = (
        np.concatenate([cache.row_tensor(split, name).numpy() for split in splits])
        for name in ("tokens", "contexts", "documents", "positions")
    )
    breaks = (np.diff(contexts) != 0) | (np.diff(documents) != 0) | (np.diff(positions) != 1)
    first = np.concatenate([[0], np.flatnonzero(breaks) + 1]).astype(np.int64)
    size = np.diff(np.append(first, len(tokens)))
    return Text(tokens, first, size, contexts[first], positions[first], documents[first])


def explain_half(documents: Int[np.ndarray, " s"], seed: int, share: float) -> Bool[np.ndarray, " s"]:
    """Whether each document is for explaining: a hash of its number and ``seed`` (splitmix64) is below ``share``."""
    mask = np.uint64(0xFFFFFFFFFFFFFFFF)
    with np.errstate(over="ignore"):
        x = documents.astype(np.uint64) + np.uint64(seed % 2**32) * np.uint64(0xD1342543DE82EF95)
        x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) & mask
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) / 2**53 < share


def peaks(firing: Firing, text: Text) -> Peaks:
    """One peak a stretch; of equal values the first in the stretch. Ordered by value, context, position."""
    stretch = np.searchsorted(text.first, firing.rows, side="right") - 1
    order = np.lexsort((firing.rows, -firing.values, stretch))
    best = order[np.unique(stretch[order], return_index=True)[1]]
    stretch, row, value = stretch[best], firing.rows[best], firing.values[best]
    order = np.lexsort((text.position[stretch], text.context[stretch], -value))
    return Peaks(stretch[order], row[order])


class _Draw:
    """The windows taken for one latent so far: where they start, their roles, and what text they hold."""

    def __init__(self, text: Text, width: int) -> None:
        self.text = text
        self.width = width
        self.start: list[int] = []
        self.stretch: list[int] = []
        self.role: list[int] = []
        self._seen: set[bytes] = set()
        self._used: set[int] = set()

    def length(self, stretch: int) -> int:
        return min(self.width, int(self.text.size[stretch]))

    def take(self, role: str, candidates: Iterable[tuple[int, int]], wanted: int) -> None:
        """Take the first ``wanted`` (stretch, start row) that repeat neither text nor stretch."""
        for stretch, start in candidates:
            if wanted <= 0:
                return
            if stretch in self._used or not self._seen.isdisjoint(runs := self._runs(stretch, start)):
                continue
            self._seen |= runs
            self._used.add(stretch)
            self.start.append(start)
            self.stretch.append(stretch)
            self.role.append(ROLES.index(role))
            wanted -= 1

    def _runs(self, stretch: int, start: int) -> set[bytes]:
        """The runs of ``SHINGLE`` tokens in a window."""
        tokens = self.text.tokens[start : start + self.length(stretch)]
        return {tokens[i : i + SHINGLE].tobytes() for i in range(max(len(tokens) - SHINGLE + 1, 1))}

    def around(self, stretch: int, row: int) -> tuple[int, int]:
        """The window around ``row``: (stretch, start row)."""
        length, first = self.length(stretch), int(self.text.first[stretch])
        last = first + int(self.text.size[stretch]) - length
        return stretch, min(max(row - self.width // 2, first), last)


def draw(
    firing: Firing,
    found: Peaks,
    text: Text,
    explaining: Bool[np.ndarray, " s"],
    config: AutointerpConfig,
) -> Windows:
    """The windows of one latent, as many of each role as there are, up to what ``config`` asks for.

    ``explaining``: the half of each stretch. The random choices depend on (seed, latent) alone.
    """
    generator = np.random.default_rng([config.seed, firing.latent])
    taken = _Draw(text, config.window)
    halves = {"explain": explaining, "score": ~explaining}
    wanted = {
        "explain": (config.n_top, config.n_quantile, config.n_random),
        "score": (config.score_top, config.score_quantile, config.score_random),
    }
    for name, half in halves.items():
        mine = np.flatnonzero(half[found.stretch])
        active = list(zip(found.stretch[mine].tolist(), found.row[mine].tolist(), strict=True))
        top, quantiles, _ = wanted[name]
        taken.take(f"{name}_top", (taken.around(*peak) for peak in active), top)
        bins = np.array_split(np.arange(min(top, len(active)), len(active)), quantiles) if quantiles else []
        for part in bins:
            shuffled = (taken.around(*active[i]) for i in generator.permutation(part).tolist())
            taken.take(f"{name}_quantile", shuffled, 1)
    silent = _silent_starts(firing, text, config.window)
    for name, half in halves.items():
        eligible = np.flatnonzero(half & (silent.total > 0))
        # Without replacement, each place equally likely: the smallest of exponential times with rate 'total'.
        eligible = eligible[np.argsort(generator.exponential(size=len(eligible)) / silent.total[eligible])]
        random = ((s, silent.start(s, generator)) for s in eligible.tolist())
        taken.take(f"{name}_random", random, wanted[name][2])
    return _cut(taken, firing, text, config.window)


@dataclass(frozen=True)
class _Silent:
    """Every place where a window without any activation can start, as gaps between activations."""

    total: Int[np.ndarray, " s"]
    """Number of such places in each stretch."""
    begin: Int[np.ndarray, " g"]
    """Gap g offers the rows begin[g] … begin[g] + offers[g] − 1."""
    offers: Int[np.ndarray, " g"]
    first_gap: Int[np.ndarray, " s+1"]
    """Gaps of stretch s: first_gap[s] … first_gap[s+1] − 1."""

    def start(self, stretch: int, generator: np.random.Generator) -> int:
        """One of the stretch's places, each equally likely."""
        mine = slice(int(self.first_gap[stretch]), int(self.first_gap[stretch + 1]))
        number = int(generator.integers(self.total[stretch]))
        ends = np.cumsum(self.offers[mine])
        gap = int(np.searchsorted(ends, number, side="right"))
        return int(self.begin[mine][gap]) + number - (int(ends[gap - 1]) if gap else 0)


def _silent_starts(firing: Firing, text: Text, width: int) -> _Silent:
    # A gap begins at a stretch's first row or one after an activation, and ends at the next activation or edge.
    n = len(text.first)
    stretch = np.searchsorted(text.first, firing.rows, side="right") - 1
    owner = np.concatenate([np.arange(n), stretch])
    begin = np.concatenate([text.first, firing.rows + 1])
    # An activation in a stretch's first row gives two gaps there, the first of them empty: 'begin' orders them.
    order = np.lexsort((begin, owner))
    owner, begin = owner[order], begin[order]
    last_of_stretch = np.append(owner[1:] != owner[:-1], True)
    end = np.where(last_of_stretch, (text.first + text.size)[owner], np.append(begin[1:] - 1, 0))
    offers = np.maximum(end - begin - np.minimum(width, text.size[owner]) + 1, 0)
    total = np.bincount(owner, offers, minlength=n).astype(np.int64)
    return _Silent(total, begin, offers, np.searchsorted(owner, np.arange(n + 1)))


def _cut(taken: _Draw, firing: Firing, text: Text, width: int) -> Windows:
    """The windows' tokens and activations."""
    role, start, stretch = (np.array(x, dtype=np.int64) for x in (taken.role, taken.start, taken.stretch))
    order = np.argsort(role, kind="stable")
    role, start, stretch = role[order], start[order], stretch[order]
    lengths = np.minimum(width, text.size[stretch])
    places = start[:, None] + np.arange(width)
    valid = np.arange(width) < lengths[:, None]
    tokens = np.where(valid, text.tokens[np.minimum(places, text.n_rows - 1)], -1).astype(np.int32)
    at = np.minimum(np.searchsorted(firing.rows, places), len(firing.rows) - 1)
    acts = np.where(valid & (firing.rows[at] == places), firing.values[at], 0).astype(np.float32)
    position = text.position[stretch] + (start - text.first[stretch])
    source = np.stack([text.context[stretch], position], axis=1).astype(np.int32)
    return Windows(tokens, acts, lengths.astype(np.int64), role, source, text.document[stretch])
