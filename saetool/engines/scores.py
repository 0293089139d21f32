"""Scores of explanations on windows they were not made from, each beside its control and its floor.

    simulate   strengths of every token are predicted; correlation with the activations
    detect     does the latent fire in this window? balanced accuracy
    fuzz       are the marked tokens those it fires on? balanced accuracy
    intruder   which of several windows is not one of the latent's? accuracy; judges the windows, not the explanation

The control is the same with another latent's explanation, and must be near what guessing gives; the floor is the same
with the table of tokens in place of a language model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from saetool.config import AutointerpConfig
from saetool.core import scoring
from saetool.core.scoring import Detection, Simulation
from saetool.engines.autointerp import STOPPED, Explained
from saetool.engines.calls import Missing, Stopped, each
from saetool.engines.judges import Certainties, Explanation, Judge, Strengths, TableJudge
from saetool.engines.windows import ROLES, Windows

SIMULATE, DETECT, FUZZ, INTRUDER = SCORERS = "simulate", "detect", "fuzz", "intruder"
MISSING_SHARE = "missing_share"
"""Why a score is undefined: too many of its windows were not answered."""
N_INTRUDERS = 5
"""Questions of the intruder test per latent."""


@dataclass(frozen=True)
class Chosen:
    """Questions with one right answer."""

    correct: int
    n: int
    chance: float


@dataclass(frozen=True)
class Score:
    """One score of one latent."""

    value: float | None
    """The number that summaries are over: correlation, balanced accuracy or accuracy. None: undefined."""
    null_reason: str | None
    details: Simulation | Detection | Chosen
    n_missing: int = 0
    """Windows (or questions) without an answer, left out of the score."""
    control: float | None = None
    control_null_reason: str | None = None
    floor: float | None = None
    by_role: Mapping[str, float | None] = field(default_factory=dict)
    """The correlation over silent windows and those of one role alone."""


@dataclass(frozen=True)
class Scored:
    """An explained latent's predictions and scores."""

    explained: Explained
    predictions: Float[np.ndarray, "s w"]
    """For the scoring windows; 0 in those that were not answered."""
    answered: Bool[np.ndarray, " s"]
    scores: Mapping[str, Score]
    control_latent: int | None
    """Whose explanation the control used; None without a control."""
    failure: str | None = None
    """``STOPPED`` if not all of its calls were made, ``MISSING_SHARE`` if too many failed."""

    @property
    def simulation(self) -> Simulation:
        details = self.scores[SIMULATE].details
        assert isinstance(details, Simulation)
        return details


def donors(explained: Sequence[Explained], seed: int) -> Iterator[tuple[Explained, Explained | None]]:
    """Every explained latent with another one, drawn from (seed, latent), whose explanation is its control."""
    done = [e for e in explained if e.explanation is not None]
    for i, one in enumerate(done):
        others = np.random.default_rng([seed, one.latent, 1]).integers(max(len(done) - 1, 1))
        yield one, done[(i + 1 + int(others)) % len(done)] if len(done) > 1 else None


async def score_all(
    explained: Sequence[Explained],
    judge: Judge,
    scorers: Sequence[str],
    config: AutointerpConfig,
    *,
    floor: TableJudge | None,
    width: int,
    advance: Callable[[], object],
) -> list[Scored]:
    """The scores of every latent that has an explanation, ``width`` latents at a time."""
    scorer = Scorer(judge, scorers, config, floor=floor)

    async def one(pair: tuple[Explained, Explained | None]) -> Scored:
        done = await scorer.score(*pair)
        advance()
        return done

    return await each(donors(explained, config.seed), one, width)


class Scorer:
    """Scores latents with ``judge``; ``floor``: scores the table of tokens beside it."""

    def __init__(
        self, judge: Judge, scorers: Sequence[str], config: AutointerpConfig, *, floor: TableJudge | None
    ) -> None:
        self._judge = judge
        self._scorers = scorers
        self._config = config
        self._table = floor

    async def score(self, one: Explained, donor: Explained | None) -> Scored:
        windows = one.windows
        assert windows is not None and one.explanation is not None
        test = windows.pick(windows.scoring)
        predictions, answered = np.zeros_like(test.acts), np.zeros(len(test.role), dtype=bool)
        control = None if donor is None or self._config.control == "none" else donor.explanation
        control_latent = None if control is None or donor is None else donor.latent
        scores: dict[str, Score] = {}
        try:
            if SIMULATE in self._scorers:
                scores[SIMULATE], found = await self._simulate(one, test, control)
                predictions, answered = np.where(found.valid[:, None], found.values, 0), found.valid
            if DETECT in self._scorers:
                truth = test.acts.max(axis=1, initial=0) > 0
                scores[DETECT] = await self._tell(one, _Asked(test, None, truth), control)
            if FUZZ in self._scorers:
                scores[FUZZ] = await self._tell(one, _fuzzed(test, one.latent, self._config.seed), control)
            if INTRUDER in self._scorers:
                scores[INTRUDER] = await self._intruders(one, test)
        except Stopped:
            return Scored(one, np.zeros_like(predictions), np.zeros_like(answered), {}, control_latent, STOPPED)
        failed = MISSING_SHARE if any(s.null_reason == MISSING_SHARE for s in scores.values()) else None
        return Scored(one, predictions, answered, scores, control_latent, failed)

    async def _strengths(self, explanation: Explanation, test: Windows, latent: int) -> Strengths:
        """In a random order, so that a window's place does not tell what it holds."""
        order = np.random.default_rng([self._config.seed, latent, 2]).permutation(len(test.role))
        found = await self._judge.strengths(explanation, Windows(*(v[order] for v in vars(test).values())))
        back = np.argsort(order)
        return Strengths(found.values[back], found.valid[back])

    async def _simulate(self, one: Explained, test: Windows, control: Explanation | None) -> tuple[Score, Strengths]:
        assert one.explanation is not None
        found = await self._strengths(one.explanation, test, one.latent)
        details = _simulation(test, found, one.scale)
        value, reason = self._headline(details, found.valid)
        other, floor = None, None
        if control is not None:
            theirs = await self._strengths(control, test, one.latent)
            other = self._headline(_simulation(test, theirs, one.scale), theirs.valid)
        if self._table is not None:
            table = await self._table.strengths(Explanation("", one.table), test)
            # On the same windows: those that the model did not answer are no part of the comparison.
            floor = self._headline(_simulation(test, Strengths(table.values, found.valid), one.scale), found.valid)[0]
        score = Score(
            value,
            reason,
            details,
            int((~found.valid).sum()),
            *(other or (None, None)),
            floor=floor,
            by_role=_by_role(test, found, one.scale) if self._config.score_quantile and reason != MISSING_SHARE else {},
        )
        return score, found

    def _headline(self, details: Simulation, valid: Bool[np.ndarray, " n"]) -> tuple[float | None, str | None]:
        if self._too_many(valid):
            return None, MISSING_SHARE
        if self._config.granularity == "token":
            return details.correlation, details.null_reason
        value = details.correlation_example
        return value, None if value is not None else details.null_reason or scoring.CONSTANT_PREDICTION

    def _too_many(self, valid: Bool[np.ndarray, " n"]) -> bool:
        return bool((~valid).mean() > self._config.max_missing) if len(valid) else False

    async def _tell(self, one: Explained, asked: "_Asked", control: Explanation | None) -> Score:
        assert one.explanation is not None
        order = np.random.default_rng([self._config.seed, one.latent, 3]).permutation(len(asked.truth))
        asked = asked.pick(order)
        found = await self._judge.certainties(one.explanation, asked.windows, asked.marked)
        details, (value, reason) = self._told(asked, found)
        other: tuple[float | None, str | None] = (None, None)
        if control is not None:
            theirs = await self._judge.certainties(control, asked.windows, asked.marked)
            other = self._told(asked, theirs)[1]
        floor = None
        if self._table is not None:
            table = await self._table.certainties(Explanation("", one.table), asked.windows, asked.marked)
            floor = self._told(asked, Certainties(table.values, found.valid))[1][0]
        return Score(value, reason, details, int((~found.valid).sum()), *other, floor=floor)

    def _told(self, asked: "_Asked", found: Certainties) -> tuple[Detection, tuple[float | None, str | None]]:
        details = scoring.detection(asked.truth[found.valid], found.values[found.valid])
        if self._too_many(found.valid):
            return details, (None, MISSING_SHARE)
        value = details.balanced_accuracy
        return details, (value, None if value is not None else scoring.CONSTANT_TRUTH)

    async def _intruders(self, one: Explained, test: Windows) -> Score:
        generator = np.random.default_rng([self._config.seed, one.latent, 5])
        active = test.acts.max(axis=1, initial=0) > 0
        firing, silent = np.flatnonzero(active), np.flatnonzero(~active)
        n = self._config.n_options
        chance = 1 / n
        if len(firing) < n - 1 or not len(silent):
            return Score(None, scoring.TOO_FEW, Chosen(0, 0, chance))
        right, missing = 0, 0
        odd = generator.permutation(silent)[:N_INTRUDERS]
        for intruder in odd:
            rows = generator.choice(firing, n - 1, replace=False)
            at = int(generator.integers(n))
            try:
                right += await self._judge.odd_one(test.pick(np.insert(rows, at, intruder))) == at
            except Missing:
                missing += 1
        asked = len(odd) - missing
        too_many = self._too_many(np.arange(len(odd)) >= missing)
        value = right / asked if asked and not too_many else None
        return Score(value, None if value is not None else MISSING_SHARE, Chosen(right, asked, chance), missing)


@dataclass(frozen=True)
class _Asked:
    """Windows to be told apart."""

    windows: Windows
    marked: Bool[np.ndarray, "n w"] | None
    truth: Bool[np.ndarray, " n"]

    def pick(self, rows: np.ndarray) -> "_Asked":
        return _Asked(self.windows.pick(rows), None if self.marked is None else self.marked[rows], self.truth[rows])


def _fuzzed(test: Windows, latent: int, seed: int) -> _Asked:
    """Firing windows with the right tokens marked, and all windows with as many silent ones marked."""
    generator = np.random.default_rng([seed, latent, 4])
    valid = np.arange(test.acts.shape[1]) < test.lengths[:, None]
    on = (test.acts > 0) & valid
    counts = on.sum(axis=1)
    firing = np.flatnonzero(counts)
    rows, marked, truth = list(firing), [on[i] for i in firing], [True] * len(firing)
    for i in range(len(counts)):
        silent = np.flatnonzero(valid[i] & ~on[i])
        wanted = int(counts[i] or generator.choice(counts[firing])) if len(firing) else 0
        picked = generator.permutation(silent)[:wanted]
        if len(picked):
            marks = np.zeros(on.shape[1], dtype=bool)
            marks[picked] = True
            rows.append(i)
            marked.append(marks)
            truth.append(False)
    index = np.array(rows, dtype=np.int64)
    return _Asked(test.pick(index), np.array(marked).reshape(len(rows), -1), np.array(truth, dtype=bool))


def _simulation(test: Windows, found: Strengths, scale: float) -> Simulation:
    answered = test.pick(found.valid)
    return scoring.simulation(answered.acts, found.values[found.valid], answered.lengths, scale)


def _by_role(test: Windows, found: Strengths, scale: float) -> dict[str, float | None]:
    out = {}
    for name in ("top", "quantile"):
        mine = np.isin(test.role, [ROLES.index(f"score_{name}"), ROLES.index("score_random")])
        some = Strengths(found.values[mine], found.valid[mine])
        out[name] = _simulation(test.pick(mine), some, scale).correlation
    return out
