"""The inference threshold of an SAE from batches of activations, and what it gives.

Batches are as in training: same size, shuffled rows of the train split, no row twice.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from saetool.core import sparse
from saetool.core.sae import SAE
from saetool.core.threshold import Pool, smallest_kept

HINT = 0.8
"""A batch's cut is looked for above this share of the last one's first."""


@dataclass(frozen=True)
class Batch:
    """One batch's minimum positive kept activation; None where nothing was kept."""

    minimum: float | None


@dataclass(frozen=True)
class Check:
    """What a threshold gives on one set of tokens, beside BatchTopK's selection over the same batches."""

    n_tokens: int
    l0: float
    l0_standard_error: float
    """sd of the batches' L0 / √batches."""
    explained_variance: float
    explained_variance_batch: float
    """The same with the selection over batches in place of the threshold."""


class Batches(Protocol):
    """Where batches come from: a cache's reader, or the rows of a matrix."""

    n_rows: int

    def batch(self, step: int, size: int) -> Tensor: ...


@torch.no_grad()
def batch_minima(sae: SAE, reader: Batches, batch_size: int, n_batches: int, k: float | int) -> Iterator[Batch]:
    """The minimum positive kept activation of each of ``n_batches`` batches, n·k being kept."""
    cut = 0.0
    for step in range(n_batches):
        cut = smallest_kept(sae.pre_activations(reader.batch(step, batch_size)), k, HINT * cut)
        yield Batch(cut if cut > 0 else None)


@torch.no_grad()
def pool(sae: SAE, reader: Batches, batch_size: int, minima: list[float | None]) -> Iterator[Batch | Pool]:
    """The pairs that matter to a threshold over the batches whose ``minima`` are known; the last event is the pool.

    Values below the smallest minimum are left out: a batch has n·k values at or above its minimum, so all batches
    together have at least as many as are wanted at or above the smallest one.
    """
    smallest = min((m for m in minima if m is not None), default=0.0)
    floor = max(float(torch.nextafter(torch.tensor(smallest), torch.tensor(-math.inf))), 0.0)
    values, latents = [], []
    selected = torch.zeros(sae.d_sae, dtype=torch.int64)
    for step, minimum in enumerate(minima):
        p = sae.pre_activations(reader.batch(step, batch_size))
        codes = sparse.above(p, torch.tensor(floor, dtype=p.dtype, device=p.device))
        values.append(codes.values.cpu())
        latents.append(codes.latents.cpu())
        if minimum is not None:
            kept = codes.latents[codes.values >= minimum]
            selected += torch.bincount(kept, minlength=sae.d_sae).cpu()
        yield Batch(minimum)
    yield Pool(torch.cat(values), torch.cat(latents), selected, floor)


@torch.no_grad()
def check(sae: SAE, reader: Batches, batch_size: int, k: float | int, limit: int | None = None) -> Check:
    """L0 and explained variance of ``sae`` (with threshold) over the rows of ``reader``, shuffled into batches."""
    assert sae.threshold is not None
    size = min(batch_size, reader.n_rows)
    n_batches = max(min(reader.n_rows, limit or reader.n_rows) // size, 1)
    floor = sae.threshold.clamp_min(0)
    counts, cut = [], 0.0
    error = error_batch = squares = 0.0
    shift = total = None
    for step in range(n_batches):
        x = reader.batch(step, size)
        p = sae.pre_activations(x)
        codes = sparse.above(p, floor)
        cut = smallest_kept(p, k, HINT * cut)
        counts.append(len(codes.values) / size)
        error += _squared(x, sparse.decode(sae, codes, x))
        error_batch += _squared(x, sparse.decode(sae, sparse.encode_batch(p, cut), x))
        exact = x.cpu().double()
        shift = exact.mean(0) if shift is None else shift  # any constant near the mean keeps the difference exact
        total = (exact - shift).sum(0) + (0 if total is None else total)
        squares += float((exact - shift).square().sum())
    assert total is not None
    variance = squares - float(total.square().sum()) / (n_batches * size)
    l0 = torch.tensor(counts, dtype=torch.float64)
    return Check(
        n_tokens=n_batches * size,
        l0=float(l0.mean()),
        l0_standard_error=float(l0.std() / n_batches**0.5) if n_batches > 1 else math.nan,
        explained_variance=1 - error / variance if variance else math.nan,
        explained_variance_batch=1 - error_batch / variance if variance else math.nan,
    )


def _squared(x: Tensor, x_hat: Tensor) -> float:
    return float((x - x_hat).cpu().double().square().sum())
