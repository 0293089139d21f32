"""What ``explanations@1`` and ``windows@1`` hold, made from explained and scored latents."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from saetool.artifacts.writing import Stacked
from saetool.core import ngram, scoring
from saetool.core.scoring import Simulation
from saetool.engines.autointerp import REASONS, STOPPED, Explained
from saetool.engines.scores import INTRUDER, MISSING_SHARE, SIMULATE, Score, Scored
from saetool.engines.windows import ROLES, Drawn, is_scoring

DETECTION_CHANCE = 0.5
"""Balanced accuracy of guessing."""


def table_json(table: ngram.Table) -> list[list[int | None]]:
    """[[previous id or null, token id, strength], …]."""
    return [list(entry) for entry in table]


def latent_records(
    found: Sequence[Explained], scored: Sequence[Scored], explainer: str, n_rows: int
) -> Iterator[dict[str, Any]]:
    """One record per latent asked for, in latent order; ``windows`` are rows of ``window_tensors``."""
    done = {s.explained.latent: s for s in scored}
    first = 0
    for one in sorted(found, key=lambda e: e.latent):
        mine = done.get(one.latent)
        reason = one.reason or one.failure or (mine.failure if mine else None)
        status = (
            "skipped" if one.reason else ("failed" if reason else ("scored" if mine and mine.scores else "explained"))
        )
        record: dict[str, Any] = {
            "latent": one.latent,
            "status": status,
            "reason": reason,
            "description": one.explanation.description if one.explanation else None,
            "explainer": explainer,
            "table": table_json(one.table) if one.drawn is not None else None,
            "firing_windows": one.firing_windows,
            "density": one.firing_rows / n_rows,
            "max_act": one.max_act,
            "scale": one.scale if one.drawn is not None else None,
            "n": None,
            "windows": None,
            "scores": {name: _score_json(name, s, mine) for name, s in mine.scores.items()} if mine else {},
        }
        if one.drawn is not None and mine is not None:
            roles = np.bincount(one.drawn.role, minlength=len(ROLES)).tolist()
            record["n"] = {name: n for name, n in zip(ROLES, roles, strict=True) if n or not name.startswith("select")}
            record["windows"] = [first, first + len(one.drawn)]
            first += len(one.drawn)
        yield record


def _score_json(name: str, score: Score, scored: Scored) -> dict[str, Any]:
    details = dataclasses.asdict(score.details)
    if score.null_reason == MISSING_SHARE:
        # Counts say what happened; what could be computed from the few answers there are is no score.
        details |= {key: None for key, value in details.items() if isinstance(value, float) and key != "chance"}
    out = details | {"n_missing": score.n_missing}
    if isinstance(score.details, Simulation):
        out |= {"null_reason": score.null_reason or score.details.null_reason}
        if score.by_role:
            out["by_role"] = dict(score.by_role)
    else:
        out |= {"value": score.value, "null_reason": score.null_reason}
    if name != INTRUDER:
        out |= {
            "shuffled": score.control,
            "shuffled_null_reason": score.control_null_reason,
            "shuffled_latent": scored.control_latent,
        }
        if score.floor is not None:
            out["ngram"] = score.floor
    return out


def table_tokens(found: Sequence[Explained]) -> set[int]:
    """Every token id that a table names."""
    entries = [entry for one in found for entry in one.table]
    return {e.token for e in entries} | {e.previous for e in entries if e.previous is not None}


def counts(found: Sequence[Explained], scored: Sequence[Scored]) -> dict[str, Any]:
    """How many latents were asked for, explained, scored; skipped or failed for which reason; windows unanswered."""
    reasons = collections.Counter(e.reason for e in found)
    failed = collections.Counter(e.failure for e in found if e.failure)
    failed.update(s.failure for s in scored if s.failure)
    return {
        "requested": len(found),
        "explained": sum(e.explanation is not None for e in found),
        "scored": sum(bool(s.scores) and s.failure is None for s in scored),
        "skipped": {name: reasons[name] for name in REASONS},
        "failed": dict(sorted(failed.items())),
        "missing_windows": sum(score.n_missing for s in scored for score in s.scores.values()),
    }


def complete(counts: Mapping[str, Any], max_missing: float) -> bool:
    """Whether nothing is left to do: not stopped, no score lost to missing answers, few descriptions lost."""
    failed = counts["failed"]
    if any(name in failed for name in (STOPPED, MISSING_SHARE)):
        return False
    tried = counts["explained"] + sum(failed.values())
    return not tried or sum(failed.values()) / tried <= max_missing


def summary(scored: Sequence[Scored], seed: int, granularity: str, n_options: int) -> dict[str, Any]:
    """Each score over latents, with the control's and the floor's means beside."""
    names = list(dict.fromkeys(name for s in scored for name in s.scores))
    out = {}
    for name in names:
        scores = [s.scores[name] for s in scored if name in s.scores]
        reasons = collections.Counter(s.null_reason for s in scores if s.value is None and s.null_reason)
        values = {
            **dataclasses.asdict(scoring.summarise([s.value for s in scores], seed)),
            "null_reasons": dict(sorted(reasons.items())),
        }
        if name != INTRUDER:
            shown = [
                s
                for s, one in zip(scores, (s for s in scored if name in s.scores), strict=True)
                if one.control_latent is not None
            ]
            control = scoring.summarise([s.control for s in shown], seed)
            floor = scoring.summarise([s.floor for s in scores], seed)
            values |= {
                "control_mean": control.mean,
                "control_n": control.n,
                "control_mean_null0": control.mean_null0,
                "control_ci95": control.ci95,
                "floor_mean": floor.mean,
                "floor_n": floor.n,
                "floor_mean_null0": floor.mean_null0 if floor.n else None,
            }
        if name == SIMULATE:
            values["granularity"] = granularity
            for role in ("top", "quantile"):
                found = [s.by_role[role] for s in scores if role in s.by_role]
                if found:
                    values[f"mean_{role}"] = scoring.summarise(found, seed).mean
        else:
            values["chance"] = 1 / n_options if name == INTRUDER else DETECTION_CHANCE
        out[name] = values
    return out


def window_tensors(scored: Sequence[Scored]) -> dict[str, Stacked]:
    """All windows of scored latents, one row each, latent after latent in latent order; made when they are written."""
    ordered = sorted(scored, key=lambda s: s.explained.latent)
    drawn = [_drawn(s) for s in ordered]
    n, width = sum(len(d) for d in drawn), drawn[0].width

    def stacked(dtype: str, columns: tuple[int, ...], part: Callable[[Scored, Drawn], np.ndarray]) -> Stacked:
        return Stacked(dtype, (n, *columns), lambda: (part(s, d) for s, d in zip(ordered, drawn, strict=True)))

    def spread(values: np.ndarray, d: Drawn) -> np.ndarray:
        """Rows of scoring windows among those of all; 0 elsewhere."""
        out = np.zeros((len(d), *values.shape[1:]), dtype=values.dtype)
        out[is_scoring(d.role)] = values
        return out

    return {
        "tokens": stacked("int32", (width,), lambda s, d: d.tokens()),
        "acts": stacked("float32", (width,), lambda s, d: d.acts()),
        "pred": stacked("float32", (width,), lambda s, d: spread(s.predictions, d)),
        "pred_valid": stacked("uint8", (), lambda s, d: spread(s.answered, d)),
        "latent": stacked("int32", (), lambda s, d: np.full(len(d), s.explained.latent)),
        "role": stacked("uint8", (), lambda s, d: d.role),
        "source": stacked("int32", (2,), lambda s, d: d.source),
        "length": stacked("int32", (), lambda s, d: d.lengths),
        "document": stacked("int32", (), lambda s, d: d.document),
    }


def window_tokens(scored: Sequence[Scored]) -> set[int]:
    """Every token id in the windows of scored latents."""
    out: set[int] = set()
    for one in scored:
        out.update(np.unique(_drawn(one).tokens()).tolist())
    return out


def _drawn(one: Scored) -> Drawn:
    assert one.explained.drawn is not None
    return one.explained.drawn
