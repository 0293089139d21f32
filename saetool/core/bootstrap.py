"""Intervals by resampling groups of tokens (documents).

Tokens of one document are alike, so an interval from tokens as if they were independent is too narrow. Documents are
drawn with replacement, as many as there are, and the statistic is computed anew from their sums; the 2.5% and 97.5%
quantiles over the draws are the ends of the interval (Efron's percentile interval).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

REPLICATES = 1000
_DRAWS_AT_ONCE = 10_000_000


class Interval(NamedTuple):
    """The ends of a 95% interval."""

    low: float
    high: float


def replicates(
    sums: Float[Tensor, "documents columns"], generator: torch.Generator, n: int = REPLICATES
) -> Float[Tensor, "n columns"]:
    """Column sums of ``n`` resamples of the documents."""
    documents = len(sums)
    parts = []
    for chunk in torch.arange(n).split(max(_DRAWS_AT_ONCE // documents, 1)):
        drawn = torch.randint(documents, (len(chunk), documents), generator=generator)
        times = torch.zeros(len(chunk), documents, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(times))
        parts.append(times @ sums.double().cpu())
    return torch.cat(parts)


def intervals(
    sums: Float[Tensor, "documents columns"],
    statistic: Callable[[Tensor], dict[str, Tensor]],
    generator: torch.Generator,
    n: int = REPLICATES,
) -> dict[str, Interval]:
    """The 95% interval of each value of ``statistic``, a function of column sums [n, columns] → name: values [n].

    Draws in which a value is undefined are left out of it; nothing is returned for fewer than two documents.
    """
    if len(sums) < 2:
        return {}
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    found = {}
    for name, values in statistic(replicates(sums, generator, n)).items():
        values = values[values.isfinite()]
        if len(values):
            found[name] = Interval(*torch.quantile(values.double(), ends).tolist())
    return found
