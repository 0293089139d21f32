"""Explaining latents, and scoring the explanations on text they were not made from.

For each latent: windows of both halves (engines/windows.py) and a table of tokens from the explaining ones
(core/ngram.py); with a language model also a description, made from the same windows. Explanations are scored on the
scoring windows (engines/scores.py).
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int

from saetool.config import AutointerpConfig
from saetool.core import ngram, scoring
from saetool.engines import firings, prompts, stretches, windows
from saetool.engines.activations import Activations
from saetool.engines.calls import Caller, Missing, Stopped, each
from saetool.engines.firings import Advance, Firing
from saetool.engines.judges import Explanation, Judge
from saetool.engines.stretches import Parts, Text
from saetool.engines.strings import Strings
from saetool.engines.windows import Drawn, Windows

REASONS = ("dead", "too_rare", "too_dense", "one_half")
"""Why a latent is skipped: it never fires; in fewer stretches than asked; on too many rows; without repeated text, in
one half of the documents only."""
STOPPED = "stopped"
"""Reason of a latent that was not reached before the run was stopped."""
N_WORDS = 2
"""Words named beside a token that is a part of them."""
N_NEIGHBOURS = 3
"""Latents whose windows are near misses of a latent, with ``--negatives neighbours``."""


@dataclass(frozen=True)
class Explained:
    """One latent with its explanation, or the reason why there is none."""

    latent: int
    reason: str | None
    """One of ``REASONS``, or None if it has windows."""
    firing_rows: int
    firing_windows: int
    """Stretches of text in which it fires: the windows it could have."""
    max_act: float
    """Largest activation on the text read; 0 for a dead latent."""
    scale: float = 0.0
    """Largest activation in the explaining windows: strength 10."""
    table: ngram.Table = ()
    """Tokens and their strengths, from the explaining windows: the explanation, or the floor beside it."""
    drawn: Drawn | None = None
    explanation: Explanation | None = None
    failure: str | None = None
    """Why there is no explanation although there are windows: backend, unparsable or stopped."""

    @property
    def windows(self) -> Windows | None:
        """Made anew each time."""
        return None if self.drawn is None else self.drawn.windows()


def choose(counts: Int[np.ndarray, " d_sae"], wanted: int, seed: int) -> list[int]:
    """``wanted`` random latents among those that fire, or all of them if they are fewer; in latent order."""
    alive = np.flatnonzero(counts)
    return sorted(np.random.default_rng(seed).permutation(alive)[:wanted].tolist())


def neighbours(decoder: Float[torch.Tensor, "d_sae d_in"], latents: Sequence[int], n: int) -> dict[int, list[int]]:
    """The ``n`` other latents with the largest decoder cosine to each of ``latents``, nearest first."""
    unit = torch.nn.functional.normalize(decoder.float(), dim=1)
    out = {}
    for some in torch.tensor(list(latents), dtype=torch.int64).split(256):
        cosine = unit[some] @ unit.T
        cosine[torch.arange(len(some)), some] = -2
        for latent, near in zip(some.tolist(), cosine.topk(min(n, len(unit) - 1)).indices.tolist(), strict=True):
            out[latent] = near
    return out


def explain(
    source: Activations,
    latents: Sequence[int],
    counts: Int[np.ndarray, " L"],
    config: AutointerpConfig,
    advance: Advance,
    near: Mapping[int, Sequence[int]] | None = None,
    strings: Strings | None = None,
) -> Iterator[Explained]:
    """Windows and table of each of ``latents``, which fire on ``counts`` rows; all that are asked come out.

    ``near``: the neighbours of each latent, for ``negatives="neighbours"``. ``strings``: of all tokens; without them,
    no two are the same word. ``advance`` is told of every row read: once per group of latents whose activations fit
    in memory.

    In memory are the text, where the windows of all latents are in it (with their scores about 8 kB a latent at the
    default numbers: 200 MB for 24,576), and the activations of a group of latents (at most ``firings.GROUP_FIRINGS``);
    never those of all.
    """
    text = source.text(config.skip_positions)
    parts = stretches.divide(stretches.kinds(text), config)
    words = None
    if strings is not None:
        strings(int(text.tokens.max(initial=0)))  # every token has one, or this raises
        words = strings.words
    found: dict[int, Explained] = {}
    for group in _groups(latents, counts, text.n_rows, config, near):
        also = [] if near is None else sorted({n for latent in group for n in near[latent]} - set(group))
        together = [*group, *also]
        inside = {f.latent: text.inside(f) for f in source.collect(together, advance)} if also else None
        stream = (inside[i] for i in group) if inside else map(text.inside, source.collect(group, advance))
        for firing in stream:
            others = [] if inside is None or near is None else [inside[i] for i in near[firing.latent]]
            found[firing.latent] = explain_latent(firing, text, parts, config, others, words)
    for latent, n in zip(latents, counts.tolist(), strict=True):
        yield found.get(latent) or Explained(latent, "dead" if n == 0 else "too_dense", n, 0, 0.0)


def _groups(
    latents: Sequence[int],
    counts: Int[np.ndarray, " L"],
    n_rows: int,
    config: AutointerpConfig,
    near: Mapping[int, Sequence[int]] | None = None,
) -> list[list[int]]:
    kept = [i for i, n in enumerate(counts.tolist()) if 0 < n <= config.max_density * n_rows]
    budget = firings.GROUP_FIRINGS if near is None else firings.GROUP_FIRINGS // (1 + N_NEIGHBOURS)
    return firings.groups([latents[i] for i in kept], counts[kept], budget)


def n_passes(
    latents: Sequence[int], counts: Int[np.ndarray, " L"], n_rows: int, config: AutointerpConfig, near: bool
) -> int:
    """How often ``explain`` will read the text."""
    return len(_groups(latents, counts, n_rows, config, {} if near else None))


def explain_latent(
    firing: Firing,
    text: Text,
    parts: Parts,
    config: AutointerpConfig,
    near: Sequence[Firing] = (),
    words: Int[np.ndarray, " V"] | None = None,
) -> Explained:
    """Windows and table of one latent; ``words``: which tokens are the same word."""
    if not len(firing.rows):
        return Explained(firing.latent, "dead", 0, 0, 0.0)
    peaks = windows.peaks(firing, text)
    facts = (len(firing.rows), len(peaks.row), float(firing.values.max()))
    if len(peaks.row) < config.min_firing:
        return Explained(firing.latent, "too_rare", *facts)
    drawn = windows.draw(firing, peaks, text, parts, config, near)
    found = drawn.windows()
    active = found.acts.max(axis=1, initial=0) > 0
    needed = [found.explaining, found.scoring] + ([found.selecting] if config.candidates > 1 else [])
    if not all((active & mine).any() for mine in needed):
        return Explained(firing.latent, "one_half", *facts)
    shown = found.pick(found.explaining)
    scale = float(shown.acts.max())
    table = ngram.build(shown.tokens, shown.acts, shown.lengths, config.table_size, scale, words)
    return Explained(firing.latent, None, *facts, scale=scale, table=table, drawn=drawn)


async def describe_all(
    found: Sequence[Explained],
    caller: Caller,
    judge: Judge,
    string: Callable[[int], str],
    config: AutointerpConfig,
    width: int,
    advance: Callable[[], object],
) -> list[Explained]:
    """Every latent that has windows with a description by a language model, ``width`` at a time."""

    async def one(latent: Explained) -> Explained:
        done = await describe(latent, caller, judge, string, config)
        advance()
        return done

    described = {e.latent: e for e in await each((e for e in found if e.reason is None), one, width)}
    return [described.get(e.latent, e) for e in found]


async def describe(
    one: Explained, caller: Caller, judge: Judge, string: Callable[[int], str], config: AutointerpConfig
) -> Explained:
    """``one`` with a description by a language model, the best of ``config.candidates`` on the selecting windows."""
    shown = prompts.excerpts(_of(one, "explaining"), one.scale, string)
    found: list[Explanation] = []
    failure = None
    try:
        for sample in range(config.candidates):
            request = prompts.explain(shown, config.max_output_tokens, config.temperature, sample)
            try:
                found.append(Explanation(await caller.ask(request, prompts.read_description)))
            except Missing as missing:
                failure = failure or str(missing)
        if not found:
            return replace(one, failure=failure)
        best = found[0] if len(found) == 1 else found[await _best(one, found, judge)]
    except Stopped:
        return replace(one, failure=STOPPED)
    return replace(one, explanation=best)


async def _best(one: Explained, found: Sequence[Explanation], judge: Judge) -> int:
    """The candidate with the largest correlation on the selecting windows; the first of equals."""
    test = _of(one, "selecting")
    reached = []
    for candidate in found:
        strengths = await judge.strengths(candidate, test)
        answered = test.pick(strengths.valid)
        score = scoring.simulation(answered.acts, strengths.values[strengths.valid], answered.lengths, one.scale)
        reached.append(-2.0 if score.correlation is None else score.correlation)
    return int(np.argmax(reached))


def with_tables(found: Sequence[Explained], string: Callable[[int], str]) -> list[Explained]:
    """Every latent that has windows explained by its table."""
    return [one if one.reason else replace(one, explanation=_by_table(one, string)) for one in found]


def _by_table(one: Explained, string: Callable[[int], str]) -> Explanation:
    shown = _of(one, "explaining")
    return Explanation(ngram.describe(one.table, string, lambda token: longer_words(token, shown, string)), one.table)


def _of(one: Explained, role: str) -> Windows:
    windows = one.windows
    assert windows is not None
    return windows.pick(getattr(windows, role))


def longer_words(token: int, shown: Windows, string: Callable[[int], str]) -> list[str]:
    """The words that ``token`` is a part of where it fires, those with the largest activations first; at most two.

    None if it is mostly a whole word, or if the words' ends are not shown.
    """
    core = string(token).strip()
    if not core.isalnum():
        return []
    found: collections.defaultdict[str, float] = collections.defaultdict(float)
    for i, at in np.argwhere((shown.tokens == token) & (shown.acts > 0)).tolist():
        strings = [string(int(t)) for t in shown.tokens[i, : int(shown.lengths[i])]]
        text = "".join(strings)
        begin = len("".join(strings[:at])) + len(strings[at]) - len(strings[at].lstrip())
        end = begin + len(core)
        while begin > 0 and text[begin - 1].isalnum():
            begin -= 1
        while end < len(text) and text[end].isalnum():
            end += 1
        if begin > 0 and end < len(text):
            found[text[begin:end]] += float(shown.acts[i, at])
    best = sorted(found, key=lambda word: (-found[word], word))[:N_WORDS]
    return best if best and best[0].casefold() != core.casefold() else []
