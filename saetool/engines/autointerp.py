"""Explaining latents by tables of tokens, and scoring the explanations on text they were not made from.

For each latent: windows of both halves (engines/windows.py), a table from the explaining ones (core/ngram.py), its
predictions for the scoring ones, and the score. The control beside every score is another latent's table on the
same windows: it must be near 0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from saetool.artifacts.cache import Cache
from saetool.config import AutointerpConfig
from saetool.core import ngram, scoring
from saetool.core.sae import SAE
from saetool.engines import firings, windows
from saetool.engines.firings import Advance, Firing
from saetool.engines.windows import Text, Windows

REASONS = ("dead", "too_rare", "too_dense", "one_half")
"""Why a latent is skipped: it never fires; in fewer stretches than asked; on too many rows; without repeated text, in
one half of the documents only."""


@dataclass(frozen=True)
class Explained:
    """One latent with its explanation, or the reason why there is none."""

    latent: int
    reason: str | None
    """One of ``REASONS``, or None if it was explained."""
    firing_rows: int
    firing_windows: int
    """Stretches of text in which it fires: the windows it could have."""
    max_act: float
    """Largest activation on the text read; 0 for a dead latent."""
    scale: float = 0.0
    """Largest activation in the explaining windows: strength 10."""
    table: ngram.Table = ()
    windows: Windows | None = None


@dataclass(frozen=True)
class Scored:
    """An explained latent's predictions and scores."""

    explained: Explained
    predictions: Float[np.ndarray, "n w"]
    """For the scoring windows; 0 in the others."""
    simulation: scoring.Simulation
    control_latent: int | None
    """Whose table the control used; None if no other latent was explained."""
    control: scoring.Simulation | None


def choose(counts: Int[np.ndarray, " d_sae"], wanted: int, seed: int) -> list[int]:
    """``wanted`` random latents among those that fire, or all of them if they are fewer; in latent order."""
    alive = np.flatnonzero(counts)
    return sorted(np.random.default_rng(seed).permutation(alive)[:wanted].tolist())


def explain(
    sae: SAE,
    cache: Cache,
    splits: Sequence[str],
    latents: Sequence[int],
    counts: Int[np.ndarray, " L"],
    config: AutointerpConfig,
    device: str,
    advance: Advance,
) -> Iterator[Explained]:
    """Explain each of ``latents``, which fire on ``counts`` rows of ``splits``; all that are asked come out.

    ``advance`` is told of every row encoded: once per group of latents whose activations fit in memory.
    """
    text = windows.read_text(cache, splits)
    half = windows.explain_half(text.document, config.seed, config.split)
    limit = config.max_density * text.n_rows
    readable = [i for i, n in enumerate(counts.tolist()) if 0 < n <= limit]
    found: dict[int, Explained] = {}
    for group in firings.groups([latents[i] for i in readable], counts[readable]):
        for firing in firings.collect(sae, cache, splits, group, device, advance):
            found[firing.latent] = explain_latent(firing, text, half, config)
    for latent, n in zip(latents, counts.tolist(), strict=True):
        yield found.get(latent) or Explained(latent, "dead" if n == 0 else "too_dense", n, 0, 0.0)


def n_passes(counts: Int[np.ndarray, " L"], n_rows: int, max_density: float) -> int:
    """How often ``explain`` will read the text."""
    kept = counts[(counts > 0) & (counts <= max_density * n_rows)]
    return len(firings.groups(list(range(len(kept))), kept))


def explain_latent(firing: Firing, text: Text, half: Bool[np.ndarray, " s"], config: AutointerpConfig) -> Explained:
    """Windows and table of one latent."""
    if not len(firing.rows):
        return Explained(firing.latent, "dead", 0, 0, 0.0)
    peaks = windows.peaks(firing, text)
    facts = (len(firing.rows), len(peaks.row), float(firing.values.max()))
    if len(peaks.row) < config.min_firing:
        return Explained(firing.latent, "too_rare", *facts)
    drawn = windows.draw(firing, peaks, text, half, config)
    active = drawn.acts.max(axis=1, initial=0) > 0
    if not (active & drawn.explaining).any() or not (active & ~drawn.explaining).any():
        return Explained(firing.latent, "one_half", *facts)
    shown = drawn.pick(drawn.explaining)
    scale = float(shown.acts.max())
    table = ngram.build(shown.tokens, shown.acts, shown.lengths, config.table_size, scale)
    return Explained(firing.latent, None, *facts, scale=scale, table=table, windows=drawn)


def score(explained: Sequence[Explained], seed: int) -> Iterator[Scored]:
    """Score every explained latent, with another one's table, drawn from (seed, latent), as the control."""
    done = [e for e in explained if e.reason is None]
    for i, one in enumerate(done):
        assert one.windows is not None
        others = np.random.default_rng([seed, one.latent, 1]).integers(max(len(done) - 1, 1))
        other = done[(i + 1 + int(others)) % len(done)] if len(done) > 1 else None
        test = one.windows.pick(~one.windows.explaining)
        predictions = np.zeros_like(one.windows.acts)
        predictions[~one.windows.explaining] = ngram.predict(one.table, test.tokens, test.lengths)
        control = None
        if other is not None:
            theirs = ngram.predict(other.table, test.tokens, test.lengths)
            control = scoring.simulation(test.acts, theirs, test.lengths, one.scale)
        yield Scored(
            one,
            predictions,
            scoring.simulation(test.acts, predictions[~one.windows.explaining], test.lengths, one.scale),
            None if other is None else other.latent,
            control,
        )
