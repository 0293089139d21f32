"""Windows of text that show when one latent fires, drawn apart for explaining and for scoring.

A latent has at most one window in a stretch of text (``stretches``), so its windows never overlap:

    active   around the stretch's largest activation, moved (not cut) to stay inside the stretch
    random   zero: anywhere in a stretch, all places verified to be zero
             any: anywhere, whatever the activations there
             neighbours: around the largest activation of a latent with a similar decoder row, verified to be zero

Windows for explaining come from some documents, for scoring from others (``stretches.divide``); and a window that
shares a run of ``SHINGLE`` tokens with one already taken is passed over, in any part: news and licences repeat
themselves, and a score on what was shown is no score.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from saetool.config import AutointerpConfig
from saetool.engines.firings import Firing
from saetool.engines.stretches import Parts, Text

ROLES = (
    *("explain_top", "explain_quantile", "explain_random"),
    *("score_top", "score_quantile", "score_random"),
    *("select_top", "select_quantile", "select_random"),
)
N_EXPLAIN, N_SCORE = 3, 3
"""The first roles are for explaining, the next for scoring, the last for choosing among explanations."""
ZERO, ANY, NEIGHBOURS = NEGATIVES = "zero", "any", "neighbours"
SHINGLE = 8
"""Tokens in a row that make two windows repeats of each other (or whole windows, if they are shorter)."""


def is_scoring(role: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Which windows are for scoring, by their role."""
    return (role >= N_EXPLAIN) & (role < N_EXPLAIN + N_SCORE)


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

    @property
    def scoring(self) -> Bool[np.ndarray, " n"]:
        return is_scoring(self.role)

    @property
    def selecting(self) -> Bool[np.ndarray, " n"]:
        return self.role >= N_EXPLAIN + N_SCORE


@dataclass(frozen=True)
class Drawn:
    """Windows of one latent as places in the text, in the order of ``Windows``: a tenth of its memory."""

    text: Text
    width: int
    start: Int[np.ndarray, " n"]
    """Row of each window's first token."""
    stretch: Int[np.ndarray, " n"]
    role: Int[np.ndarray, " n"]
    which: Int[np.ndarray, " m"]
    """The window that each activation is in; no two windows overlap."""
    offset: Int[np.ndarray, " m"]
    """Its place there."""
    values: Float[np.ndarray, " m"]

    def __len__(self) -> int:
        return len(self.role)

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        return np.minimum(self.width, self.text.size[self.stretch]).astype(np.int64)

    @property
    def document(self) -> Int[np.ndarray, " n"]:
        return self.text.document[self.stretch]

    @property
    def source(self) -> Int[np.ndarray, "n 2"]:
        position = self.text.position[self.stretch] + (self.start - self.text.first[self.stretch])
        return np.stack([self.text.context[self.stretch], position], axis=1).astype(np.int32)

    def tokens(self) -> Int[np.ndarray, "n w"]:
        places = np.minimum(self.start[:, None] + np.arange(self.width), len(self.text.tokens) - 1)
        valid = np.arange(self.width) < self.lengths[:, None]
        return np.where(valid, self.text.tokens[places], -1).astype(np.int32)

    def acts(self) -> Float[np.ndarray, "n w"]:
        out = np.zeros((len(self), self.width), dtype=np.float32)
        out[self.which, self.offset] = self.values
        return out

    def windows(self) -> Windows:
        return Windows(self.tokens(), self.acts(), self.lengths, self.role, self.source, self.document)


@dataclass(frozen=True)
class Peaks:
    """The largest activation of one latent in each stretch where it fires, largest first."""

    stretch: Int[np.ndarray, " p"]
    row: Int[np.ndarray, " p"]


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
    parts: Parts,
    config: AutointerpConfig,
    near: Sequence[Firing] = (),
) -> Drawn:
    """The windows of one latent, as many of each role as there are, up to what ``config`` asks for.

    ``near``: the firings of its neighbours, for ``negatives="neighbours"``. The random choices depend on
    (seed, latent) alone.
    """
    generator = np.random.default_rng([config.seed, firing.latent])
    taken = _Draw(text, config.window)
    score = (config.score_top, config.score_quantile, config.score_random)
    wanted = {"explain": (config.n_top, config.n_quantile, config.n_random), "score": score, "select": score}
    stretches = {name: getattr(parts, name) for name in wanted if getattr(parts, name).any()}
    for name, mine in stretches.items():
        mine = np.flatnonzero(mine[found.stretch])
        active = list(zip(found.stretch[mine].tolist(), found.row[mine].tolist(), strict=True))
        top, quantiles, _ = wanted[name]
        taken.take(f"{name}_top", (taken.around(*peak) for peak in active), top)
        bins = np.array_split(np.arange(min(top, len(active)), len(active)), quantiles) if quantiles else []
        for part in bins:
            shuffled = (taken.around(*active[i]) for i in generator.permutation(part).tolist())
            taken.take(f"{name}_quantile", shuffled, 1)
    if config.negatives == NEIGHBOURS:
        for name, mine in stretches.items():
            taken.take(f"{name}_random", _near_misses(firing, near, text, taken, mine), wanted[name][2])
    nowhere = Firing(firing.latent, firing.rows[:0], firing.values[:0])
    silent = _silent_starts(nowhere if config.negatives == ANY else firing, text, config.window)
    for name, mine in stretches.items():
        eligible = np.flatnonzero(mine & (silent.total > 0))
        # Without replacement, each place equally likely: the smallest of exponential times with rate 'total'.
        eligible = eligible[np.argsort(generator.exponential(size=len(eligible)) / silent.total[eligible])]
        random = ((s, silent.start(s, generator)) for s in eligible.tolist())
        taken.take(f"{name}_random", random, wanted[name][2] - taken.role.count(ROLES.index(f"{name}_random")))
    return _placed(taken, firing, text, config.window)


def _near_misses(
    firing: Firing, near: Sequence[Firing], text: Text, taken: "_Draw", mine: Bool[np.ndarray, " s"]
) -> Iterator[tuple[int, int]]:
    """Windows around the peaks of neighbours, in turns, in which the latent itself is silent."""
    turns = [peaks(one, text) for one in near]
    for place in range(max((len(p.row) for p in turns), default=0)):
        for found in turns:
            if place >= len(found.row) or not mine[found.stretch[place]]:
                continue
            stretch, start = taken.around(int(found.stretch[place]), int(found.row[place]))
            first, last = np.searchsorted(firing.rows, [start, start + taken.length(stretch)])
            if first == last:
                yield stretch, start


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


def _placed(taken: _Draw, firing: Firing, text: Text, width: int) -> Drawn:
    """The windows taken, in the order of their roles."""
    role, start, stretch = (np.array(x, dtype=np.int64) for x in (taken.role, taken.start, taken.stretch))
    order = np.argsort(role, kind="stable")
    role, start, stretch = role[order], start[order], stretch[order]
    first = np.searchsorted(firing.rows, start)
    n = np.searchsorted(firing.rows, start + np.minimum(width, text.size[stretch])) - first
    which = np.repeat(np.arange(len(start)), n)
    active = np.arange(n.sum()) + np.repeat(first - np.cumsum(n) + n, n)
    offset = firing.rows[active] - start[which]
    return Drawn(
        text, width, start, stretch, role, which.astype(np.int32), offset.astype(np.int32), firing.values[active]
    )
