"""Scores of explanations, from true values and predictions alone; no model, no files.

Simulation (Bills et al. 2023; score definition 1). y: true activations, p: predictions, both over the tokens of all
score windows, concatenated; y₁₀ = 10·y/scale is on the scale of p.

    correlation         Pearson(y, p)
    spearman            Pearson of the ranks (ties share the mean rank)
    r2_zero             1 − Σ (y₁₀ − p)² / Σ y₁₀²          against predicting 0 everywhere
    abs_dev_explained   1 − Σ |y₁₀ − p| / Σ |y₁₀|
    correlation_example Pearson over windows of max y and max p

A correlation of something constant is undefined: None with a reason, never 0 and never NaN.

Detection and fuzzing: a yes or no a window; yes where a judge's certainty, 0 … 10, is at least ``CERTAIN``.

    balanced_accuracy   (TP/(TP + FN) + TN/(TN + FP)) / 2          0.5 for one answer to everything
    mcc                 (TP·TN − FP·FN) / √((TP+FP)(TP+FN)(TN+FP)(TN+FN))
    auc                 share of (yes, no) pairs of windows whose certainties are in that order; ties count half
    trivial_accuracy    accuracy of the more frequent answer, always

Multiple choice (Leask et al., arXiv 2502.04878, section 5.1): the share of questions whose right option has the
largest similarity; options that tie share the point.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

SCORE_DEFINITION = 1
CONSTANT_PREDICTION, CONSTANT_TRUTH, TOO_FEW = "constant_prediction", "constant_truth", "too_few"
CERTAIN = 5.0
TIE = 1e-6
"""Similarities closer than this are a tie: they are made of float32 activations, which differ by as much between
machines."""


@dataclass(frozen=True)
class Simulation:
    """How well predictions follow one latent's activations. None: undefined."""

    correlation: float | None
    null_reason: str | None
    """Why ``correlation`` is None: constant_prediction, constant_truth or too_few."""
    spearman: float | None
    r2_zero: float | None
    abs_dev_explained: float | None
    correlation_example: float | None
    n_tokens: int
    n_windows: int


def undefined(y: Float[np.ndarray, " n"], p: Float[np.ndarray, " n"]) -> str | None:
    """Why y and p have no correlation, or None if they have one."""
    if len(y) < 3:
        return TOO_FEW
    if np.ptp(y) == 0:
        return CONSTANT_TRUTH
    return CONSTANT_PREDICTION if np.ptp(p) == 0 else None


def pearson(y: Float[np.ndarray, " n"], p: Float[np.ndarray, " n"]) -> float | None:
    """Pearson's correlation in float64, in [−1, 1]; None where it is undefined."""
    if undefined(y, p):
        return None
    y, p = y.astype(np.float64), p.astype(np.float64)
    # Divided by the largest deviation first, so that squares of tiny or huge values neither vanish nor overflow.
    y, p = y - y.mean(), p - p.mean()
    largest_y, largest_p = np.abs(y).max(), np.abs(p).max()
    if largest_y == 0 or largest_p == 0:
        return None
    y, p = y / largest_y, p / largest_p
    return float(np.clip((y @ p) / math.sqrt((y @ y) * (p @ p)), -1.0, 1.0))


def ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Ranks from 1; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def simulation(
    acts: Float[np.ndarray, "n w"], predictions: Float[np.ndarray, "n w"], lengths: Int[np.ndarray, " n"], scale: float
) -> Simulation:
    """Score ``predictions`` (0 … 10) of the windows' ``acts``; ``scale`` is the activation of strength 10."""
    valid = np.arange(acts.shape[1]) < lengths[:, None]
    y, p = acts[valid].astype(np.float64), predictions[valid].astype(np.float64)
    reason = undefined(y, p)
    levels = y * (10 / scale)
    squares, size = float((levels**2).sum()), float(np.abs(levels).sum())
    return Simulation(
        correlation=pearson(y, p),
        null_reason=reason,
        spearman=None if reason else pearson(ranks(y), ranks(p)),
        r2_zero=1 - float(((levels - p) ** 2).sum()) / squares if squares else None,
        abs_dev_explained=1 - float(np.abs(levels - p).sum()) / size if size else None,
        correlation_example=pearson(np.where(valid, acts, 0).max(1), np.where(valid, predictions, 0).max(1))
        if len(acts)
        else None,
        n_tokens=len(y),
        n_windows=len(acts),
    )


@dataclass(frozen=True)
class Detection:
    """How well windows are told apart. None: undefined (a class without windows, or answers all alike)."""

    tp: int
    fp: int
    tn: int
    fn: int
    balanced_accuracy: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    mcc: float | None
    auc: float | None
    accuracy: float | None
    trivial_accuracy: float | None


def detection(truth: Bool[np.ndarray, " n"], certainty: Float[np.ndarray, " n"]) -> Detection:
    """Score answers: ``truth`` is whether the latent fires in a window (or the marks are right)."""
    said = certainty >= CERTAIN
    tp, fp = int((said & truth).sum()), int((said & ~truth).sum())
    fn, tn = int((~said & truth).sum()), int((~said & ~truth).sum())
    n = len(truth)
    recall, rejected = _share(tp, tp + fn), _share(tn, tn + fp)
    both = recall is not None and rejected is not None
    balance = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return Detection(
        tp,
        fp,
        tn,
        fn,
        balanced_accuracy=(recall + rejected) / 2 if recall is not None and rejected is not None else None,
        precision=_share(tp, tp + fp),
        recall=recall,
        f1=_share(2 * tp, 2 * tp + fp + fn),
        mcc=(tp * tn - fp * fn) / math.sqrt(balance) if balance else None,
        auc=auc(certainty[truth], certainty[~truth]) if both else None,
        accuracy=_share(tp + tn, n),
        trivial_accuracy=_share(max(tp + fn, tn + fp), n),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def auc(positive: Float[np.ndarray, " p"], negative: Float[np.ndarray, " q"]) -> float:
    """Probability that a positive's value is above a negative's; equal values count half (Mann and Whitney's U)."""
    order = ranks(np.concatenate([positive, negative]))
    n = len(positive)
    return float((order[:n].sum() - n * (n + 1) / 2) / (n * len(negative)))


@dataclass(frozen=True)
class Summary:
    """One score over many latents; undefined ones are counted, and counted as 0 in ``mean_null0``."""

    n: int
    """Latents with a score."""
    n_null: int
    """Latents whose score is undefined."""
    mean: float | None
    mean_null0: float | None
    """The mean with undefined scores as 0: dropping failures cannot raise it."""
    median: float | None
    sd: float | None
    q10: float | None
    q90: float | None
    ci95: tuple[float, float] | None
    """Of the mean: percentile bootstrap over latents."""


def summarise(scores: Sequence[float | None], seed: int, n_resamples: int = 1000) -> Summary:
    """Mean, spread and bootstrap interval of ``scores``; the interval is drawn from ``seed``."""
    values = np.array([s for s in scores if s is not None], dtype=np.float64)
    n, n_null = len(values), len(scores) - len(values)
    if not n:
        return Summary(0, n_null, None, 0.0 if n_null else None, None, None, None, None, None)
    generator = np.random.default_rng(seed)
    means = [float(values[generator.integers(0, n, n)].mean()) for _ in range(n_resamples)]
    q10, median, q90 = (float(q) for q in np.quantile(values, [0.1, 0.5, 0.9]))
    low, high = (float(q) for q in np.quantile(means, [0.025, 0.975]))
    sd = float(values.std(ddof=1)) if n > 1 else None
    return Summary(
        n, n_null, float(values.mean()), float(values.sum()) / (n + n_null), median, sd, q10, q90, (low, high)
    )


@dataclass(frozen=True)
class Answers:
    """One row a question."""

    points: Float[np.ndarray, " q"]
    """1 for the right option alone at the top, 1/t where t options tie and it is one of them, else 0."""
    chosen: Int[np.ndarray, " q"]
    """The option at the top; −1 where several tie."""


def choose(similarities: Float[np.ndarray, "q o"], right: Int[np.ndarray, " q"]) -> Answers:
    """Take the option with the largest similarity in each question; column ``right`` is the right one."""
    top = similarities >= similarities.max(axis=1, keepdims=True) - TIE
    tied = top.sum(axis=1)
    points = np.take_along_axis(top, right[:, None], 1)[:, 0] / tied
    return Answers(points, np.where(tied == 1, top.argmax(axis=1), -1))


def wilson(points: float, n: int, z: float = 1.959963984540054) -> tuple[float, float] | None:
    """Wilson's score interval of the proportion ``points``/n (95% by default); None without questions."""
    if not n:
        return None
    p = points / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)
