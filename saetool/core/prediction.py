"""How well the max cosine of a large latent predicts what adding it does to the small SAE's error.

Leask et al., arXiv 2502.04878, Fig. 4 (the effects) and Fig. 13 (ROC). "Positive" is a latent that raises the MSE, and
the classifier says "raises" where the max cosine is at least the cut-off.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Prediction(NamedTuple):
    """How well max cosine predicts whether a latent helps; NaN where one of the two kinds is missing."""

    auc: float
    """Chance that a latent which raises the MSE has a larger max cosine than one which lowers it (ties count half)."""
    best_theta: float
    """The cut-off with the best balanced accuracy of "below it ⇒ lowers the MSE"; the lowest of equals."""
    best_balanced_accuracy: float


def predict(
    max_cosine: Float[Tensor, " n_large"], delta: Float[Tensor, " n_large"], usable: Bool[Tensor, " n_large"]
) -> Prediction:
    """ROC area of max cosine as predictor of the sign of the effect, over the ``usable`` latents (those that fire)."""
    mine = usable & ~max_cosine.isnan()
    lowers = max_cosine[mine & (delta < 0)].sort().values
    raises = max_cosine[mine & (delta >= 0)].sort().values
    if not len(lowers) or not len(raises):
        return Prediction(float("nan"), float("nan"), float("nan"))
    below = torch.searchsorted(lowers, raises) + torch.searchsorted(lowers, raises, right=True)
    auc = float(below.double().mean()) / 2 / len(lowers)
    values = torch.cat([lowers, raises]).unique()
    cuts = (values[1:] + values[:-1]) / 2 if len(values) > 1 else values
    novel_and_lowers = torch.searchsorted(lowers, cuts) / len(lowers)
    kept_and_raises = 1 - torch.searchsorted(raises, cuts) / len(raises)
    accuracy = (novel_and_lowers.double() + kept_and_raises.double()) / 2
    best = int(accuracy.argmax())
    return Prediction(auc, float(cuts[best]), float(accuracy[best]))


@dataclass(frozen=True)
class Roc:
    """Points of the ROC curve, cut-offs rising: from (1, 1) to (0, 0). Empty where one of the two kinds is missing."""

    theta: Float[Tensor, " n"]
    """Cut-offs; +inf at the last point."""
    false_positive: Float[Tensor, " n"]
    """Share of the latents that lower the MSE with max cosine ≥ theta."""
    true_positive: Float[Tensor, " n"]
    """Share of those that raise it with max cosine ≥ theta."""


def roc(
    max_cosine: Float[Tensor, " n_large"],
    delta: Float[Tensor, " n_large"],
    usable: Bool[Tensor, " n_large"],
    n_points: int = 200,
) -> Roc:
    """The curve whose area ``predict`` gives, at no more than ``n_points`` cut-offs, evenly spaced among all."""
    mine = usable & ~max_cosine.isnan()
    lowers = max_cosine[mine & (delta < 0)].sort().values
    raises = max_cosine[mine & (delta >= 0)].sort().values
    if not len(lowers) or not len(raises):
        nothing = torch.zeros(0, dtype=torch.float64)
        return Roc(nothing, nothing, nothing)
    values = torch.cat([lowers, raises]).unique()
    if len(values) > n_points - 1:
        values = values[torch.linspace(0, len(values) - 1, n_points - 1).round().long()]
    theta = torch.cat([values, torch.tensor([torch.inf], dtype=values.dtype)])
    false = 1 - torch.searchsorted(lowers, theta).double() / len(lowers)
    return Roc(theta, false, 1 - torch.searchsorted(raises, theta).double() / len(raises))
