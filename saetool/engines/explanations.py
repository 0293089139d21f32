"""What ``explanations@1`` and ``windows@1`` hold, made from explained and scored latents."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saetool.core import ngram, scoring
from saetool.engines.autointerp import REASONS, Explained, Scored
from saetool.engines.windows import ROLES
from saetool.errors import ArtifactError


class Strings:
    """The strings of token ids. ``where`` names their file in errors."""

    def __init__(self, vocabulary: Sequence[str], where: str) -> None:
        self._vocabulary = vocabulary
        self._where = where

    def __call__(self, token: int) -> str:
        if token >= len(self._vocabulary):
            raise ArtifactError(
                f"{self._where}: has {len(self._vocabulary)} strings, and token {token} occurs", "make the cache again"
            )
        return self._vocabulary[token]

    def of(self, tokens: Iterable[int]) -> dict[str, str]:
        """The strings of some ids (those below 0, padding, left out), for a header."""
        return {str(t): self(t) for t in sorted({int(t) for t in tokens}) if t >= 0}


def table_json(table: ngram.Table) -> list[list[int | None]]:
    """[[previous id or null, token id, strength], …]."""
    return [list(entry) for entry in table]


def latent_records(
    found: Sequence[Explained], scored: Sequence[Scored], strings: Strings, n_rows: int
) -> list[dict[str, Any]]:
    """One record per latent asked for, in latent order; ``windows`` are rows of ``window_tensors``."""
    done = {s.explained.latent: s for s in scored}
    first = 0
    out = []
    for one in sorted(found, key=lambda e: e.latent):
        record: dict[str, Any] = {
            "latent": one.latent,
            "status": "skipped" if one.reason else "scored",
            "reason": one.reason,
            "description": None,
            "explainer": "ngram",
            "table": None,
            "firing_windows": one.firing_windows,
            "density": one.firing_rows / n_rows,
            "max_act": one.max_act,
            "scale": None,
            "n": None,
            "windows": None,
            "scores": {},
        }
        if one.windows is not None:
            roles = np.bincount(one.windows.role, minlength=len(ROLES)).tolist()
            record |= {
                "description": ngram.describe(one.table, strings),
                "table": table_json(one.table),
                "scale": one.scale,
                "n": dict(zip(ROLES, roles, strict=True)),
                "windows": [first, first + len(one.windows.role)],
                "scores": {"simulate": _simulation(done[one.latent])},
            }
            first += len(one.windows.role)
        out.append(record)
    return out


def _simulation(scored: Scored) -> dict[str, Any]:
    return {
        **dataclasses.asdict(scored.simulation),
        "n_missing": 0,
        "shuffled": scored.control.correlation if scored.control else None,
        "shuffled_null_reason": scored.control.null_reason if scored.control else None,
        "shuffled_latent": scored.control_latent,
    }


def table_tokens(scored: Sequence[Scored]) -> set[int]:
    """Every token id that a table names."""
    entries = [entry for s in scored for entry in s.explained.table]
    return {e.token for e in entries} | {e.previous for e in entries if e.previous is not None}


def counts(found: Sequence[Explained]) -> dict[str, Any]:
    """How many latents were asked for, explained, scored, and skipped for which reason."""
    reasons = collections.Counter(e.reason for e in found)
    done = reasons[None]
    return {
        "requested": len(found),
        "explained": done,
        "scored": done,
        "skipped": {name: reasons[name] for name in REASONS},
        "missing_windows": 0,
    }


def simulation_summary(scored: Sequence[Scored], seed: int) -> dict[str, Any]:
    """The correlations over latents, with the control's mean beside."""
    simulations = [s.simulation for s in scored]
    control = scoring.summarise([s.control.correlation for s in scored if s.control], seed)
    reasons = collections.Counter(s.null_reason for s in simulations if s.null_reason)
    return {
        **dataclasses.asdict(scoring.summarise([s.correlation for s in simulations], seed)),
        "null_reasons": dict(sorted(reasons.items())),
        "control_mean": control.mean,
        "control_n": control.n,
        "control_mean_null0": control.mean_null0,
    }


def window_tensors(scored: Sequence[Scored]) -> dict[str, Tensor]:
    """All windows, one row each, latent after latent in latent order."""
    ordered = sorted(scored, key=lambda s: s.explained.latent)
    windows = [s.explained.windows for s in ordered]
    parts: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for one, w in zip(ordered, windows, strict=True):
        assert w is not None
        n = len(w.role)
        parts["tokens"].append(w.tokens)
        parts["acts"].append(w.acts)
        parts["pred"].append(one.predictions)
        parts["pred_valid"].append((~w.explaining).astype(np.uint8))
        parts["latent"].append(np.full(n, one.explained.latent, dtype=np.int32))
        parts["role"].append(w.role.astype(np.uint8))
        parts["source"].append(w.source)
        parts["length"].append(w.lengths.astype(np.int32))
        parts["document"].append(w.document.astype(np.int32))
    return {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in parts.items()}
