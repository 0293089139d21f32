"""Windows of text with the activation of one latent: the strongest, some of the others, and some it is silent in."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from saetool.report.blocks import Context, Token, number
from saetool.report.collect import Artifact, Windows
from saetool.report.run import stated
from saetool.report.thinning import thinned

N_SILENT = 2
"""Windows without an activation on a card: where the description expects one."""
_STRONGEST = 0.6
"""Share of a card's contexts that are the strongest; the others are spread over the rest by strength."""
_LEVELS = 10
_ROLES = ("explain_top", "explain_quantile", "explain_random", "score_top", "score_quantile", "score_random")
"""Names of the numbers in ``windows@1``, where its header does not give them."""
_STRENGTH = 10
"""Predictions are strengths from 0 to this."""
_CLOSE = 0.05
"""Predictions within this share of the latent's largest activation of the true value are not said."""


@dataclass(frozen=True)
class Shown:
    """The windows of one latent that a card shows."""

    active: list[Context]
    n_active: int
    silent: list[Context]
    activations: tuple[float, ...] = ()
    """Every activation above 0 in the latent's windows."""


def contexts(
    windows: Artifact | None, latent: int, strings: dict[int, str] | None, most: int, scale: float | None
) -> Shown:
    """At most ``most`` windows in which the latent fires, strongest first, and some in which it does not.

    ``scale`` is the activation that a predicted strength of 10 stands for; without it no prediction is shown.
    """
    if windows is None or most < 1:
        return Shown([], 0, [])
    data: Windows = windows.payload
    rows = np.flatnonzero(data.latent == latent).tolist()
    peaks = {row: _finite(data.acts[row].max(initial=0.0)) for row in rows}
    active = sorted((r for r in rows if peaks[r] > 0), key=lambda r: (-peaks[r], r))
    first = math.ceil(_STRONGEST * most)
    rest = active[first:]
    chosen = active[:first] + (thinned(rest, max(most - first, 2))[: most - first] if rest else [])
    names = stated(windows, "roles")
    roles = names if isinstance(names, list) and all(isinstance(n, str) for n in names) else list(_ROLES)
    page = _Page(data, strings, roles, max([*peaks.values(), 1e-30]), scale)
    expected = {r: _finite(data.pred[r].max(initial=0.0)) for r in rows if not peaks[r] and page.predicted(r)}
    wrong = sorted((r for r in expected if expected[r] > 0), key=lambda r: (-expected[r], r))[:N_SILENT]
    above = [v for r in active for v in data.acts[r][: int(data.length[r])].tolist() if math.isfinite(v) and v > 0]
    silent = [page.context(r, 0.0) for r in wrong]
    return Shown([page.context(r, peaks[r]) for r in chosen], len(active), silent, tuple(above))


def _finite(value: Any) -> float:
    return float(value) if math.isfinite(value) else 0.0


@dataclass(frozen=True)
class _Page:
    data: Windows
    strings: dict[int, str] | None
    roles: list[str]
    top: float
    scale: float | None

    def predicted(self, row: int) -> bool:
        return bool(self.scale) and self.data.pred is not None and bool(self.data.pred_valid[row])

    def context(self, row: int, peak: float) -> Context:
        length = max(0, min(int(self.data.length[row]), self.data.tokens.shape[1]))
        ids, acts = self.data.tokens[row][:length].tolist(), self.data.acts[row][:length].tolist()
        said: list[float | None] = [None] * length
        if self.predicted(row) and self.scale:
            said = [p * self.scale / _STRENGTH for p in self.data.pred[row][:length].tolist()]
        pieces: list[Token] = []
        for token, act, pred in zip(ids, acts, said, strict=True):
            one = Token(self._text(token), *self._shade(act, pred))
            if pieces and not (one.level or one.title or pieces[-1].level or pieces[-1].title):
                pieces[-1] = Token(pieces[-1].text + one.text)
            else:
                pieces.append(one)
        role = int(self.data.role[row])
        name = self.roles[role].replace("_", " ") if 0 <= role < len(self.roles) else str(role)
        text = number(peak, 3)
        if known := [p for p in said if p is not None and math.isfinite(p)]:
            text += f", predicted {number(max(known), 3)}"
        return Context(name, text, pieces)

    def _text(self, token: int) -> str:
        return self.strings[token] if self.strings and token in self.strings else f"⟨{token}⟩"

    def _shade(self, act: float, pred: float | None) -> tuple[int, str]:
        """Highlight level 0 … 10, and what hovering says."""
        active = math.isfinite(act) and act > 0
        level = max(1, min(_LEVELS, math.ceil(_LEVELS * act / self.top))) if active else 0
        said = number(act, 3) if active else ""
        if pred is not None and math.isfinite(pred) and abs(pred - (act if active else 0.0)) > _CLOSE * self.top:
            said = f"{number(act, 3) if active else 0}, predicted {number(pred, 3)}"
        return level, said
