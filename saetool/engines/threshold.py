"""The inference threshold of a BatchTopK SAE, and what it gives.

    θ = mean over batches of min { z : z kept by BatchTopK in the batch, z > 0 }       (eq. 8, arXiv 2502.04878)

Batches are as in training: same size, shuffled rows of the train split. A batch in which nothing is kept has no
minimum and is left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from saetool.core import activations
from saetool.core.metrics import QualitySums
from saetool.core.sae import SAE
from saetool.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """One batch's minimum positive kept activation; None where nothing was kept."""

    minimum: float | None


@dataclass(frozen=True)
class Estimate:
    """θ and how well it is known."""

    value: float
    n_batches: int
    """Batches with a minimum."""
    standard_error: float
    """sd of the minima / √n_batches."""
    minima: list[float]


@dataclass(frozen=True)
class Check:
    """What a threshold gives on one set of tokens."""

    l0: float
    explained_variance: float
    explained_variance_batch: float
    """The same with the training-time selection over batches in place of the threshold."""
    n_tokens: int


class Batches(Protocol):
    """Where batches come from: a cache's reader, or the rows of a matrix."""

    n_rows: int

    def batch(self, step: int, size: int) -> Tensor: ...


@torch.no_grad()
def batch_minima(sae: SAE, reader: Batches, batch_size: int, n_batches: int) -> Iterator[Batch]:
    """The minimum positive kept activation of each of ``n_batches`` batches."""
    if sae.k is None:
        raise ConfigError(f"a {sae.arch} SAE has no k: there is nothing to estimate")
    for step in range(n_batches):
        p = sae.pre_activations(reader.batch(step, batch_size))
        cut = float(activations.batch_topk_cut(p, sae.k))
        if cut <= 0:  # fewer than n·k positive values: all of them are kept
            positive = p[p > 0]
            cut = float(positive.min()) if positive.numel() else 0.0
        yield Batch(cut if cut > 0 else None)


def mean_min(minima: list[float | None]) -> Estimate:
    """Equation 8 from the batches' minima, in float64. Raises ``ConfigError`` if there is none."""
    found = torch.tensor([m for m in minima if m is not None], dtype=torch.float64)
    if not len(found):
        raise ConfigError("no batch has a positive activation: the SAE is dead on these data")
    error = float(found.std() / len(found) ** 0.5) if len(found) > 1 else float("nan")
    return Estimate(float(found.mean()), len(found), error, found.tolist())


def with_threshold(sae: SAE, value: float) -> SAE:
    """``sae`` with the same θ for every latent: a JumpReLU SAE."""
    return replace(sae, threshold=torch.full((sae.d_sae,), value, dtype=torch.float32))


@torch.no_grad()
def check(sae: SAE, reader: Batches, batch_size: int, limit: int | None = None) -> Check:
    """L0 and explained variance of ``sae`` (with threshold) over the rows of ``reader``, shuffled into batches."""
    n_batches = max(min(reader.n_rows, limit or reader.n_rows) // batch_size, 1)
    size = min(batch_size, reader.n_rows)
    mean = torch.stack([reader.batch(step, size).double().mean(0) for step in range(n_batches)]).mean(0).cpu()
    plain = QualitySums(sae.d_in, sae.d_sae, mean)
    batched = QualitySums(sae.d_in, sae.d_sae, mean)
    for step in range(n_batches):
        x = reader.batch(step, size)
        for sums, batch in ((plain, False), (batched, True)):
            z = sae.encode(x, batch=batch)
            sums.add(x, z, sae.decode(z, x))
    at, before = plain.result(), batched.result()
    return Check(at.l0, at.explained_variance, before.explained_variance, plain.n)
