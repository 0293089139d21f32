"""Training a meta-SAE: what ``saetool train`` does, with decoder rows in place of activations."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from saetool.config import MetaConfig, TrainConfig
from saetool.core import sparse
from saetool.core.sae import SAE
from saetool.core.threshold import Estimate, mean_min, resampling_error, with_threshold
from saetool.engines import recipe
from saetool.engines import threshold as thresholds
from saetool.engines.reader import Order, Statistics
from saetool.errors import ConfigError

RESAMPLING_FLOOR = 0.5
"""The cut of a resample of the rows is looked for above this share of the rows' own cut."""
DRAWN_BATCHES = 20
"""Batches for the threshold where rows are drawn, which have no epochs: at least so many."""


class RowBatches:
    """Batches of the rows of a matrix: all of them where they are fewer than a batch, shuffled ones otherwise.

    With ``weights``, rows are drawn with replacement, in proportion to them.
    """

    def __init__(self, rows: Float[Tensor, "n d"], *, seed: int, weights: Float[Tensor, " n"] | None = None) -> None:
        self._rows, self._weights, self._seed = rows, None if weights is None else weights.double(), seed
        self.n_rows, self.d_in = rows.shape
        self.scale = 1.0
        self._scaled = (1.0, rows)
        self._order = Order(self.n_rows, seed)

    @property
    def statistics(self) -> Statistics:
        """Of the rows as they are drawn. No meta-SAE starts at their geometric median: it is left undefined."""
        exact = self._rows.double().cpu()
        weights = torch.ones(self.n_rows, dtype=torch.float64) if self._weights is None else self._weights
        share = weights / weights.sum()
        undefined = torch.full((self.d_in,), math.nan, dtype=torch.float64)
        return Statistics(share @ exact, undefined, float(share @ exact.square().sum(1)))

    def whole(self, size: int) -> bool:
        """Whether a batch of ``size`` is all the rows."""
        return self._weights is None and size >= self.n_rows

    def batch(self, step: int, size: int) -> Float[Tensor, "size d"]:
        if self._scaled[0] != self.scale:
            self._scaled = (self.scale, self._rows * self.scale)
        rows = self._scaled[1]
        if self.whole(size):
            return rows
        if self._weights is None:
            chosen = self._order.rows(step, size)
        else:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
            chosen = torch.multinomial(self._weights, size, replacement=True, generator=generator)
        return rows[chosen.to(rows.device)]


@dataclass(frozen=True)
class Trained:
    """A trained meta-SAE with its threshold."""

    sae: SAE
    estimate: Estimate


def training_config(config: MetaConfig, n_rows: int, d_in: int) -> TrainConfig:
    """The trainer's configuration for a meta-SAE on ``n_rows`` rows of width ``d_in``."""
    drawn = config.replacement or config.weighted
    batch_size = config.batch_size if drawn else min(config.batch_size, n_rows)
    latents = config.latents if config.latents is not None else max(math.ceil(n_rows * config.ratio), config.k)
    if latents >= n_rows:
        raise ConfigError(f"--latents {latents}: not fewer than the parent's {n_rows} rows: nothing to compress")
    steps = config.steps if config.epochs is None else config.epochs * max(n_rows // batch_size, 1)
    return recipe.resolve(
        TrainConfig(
            arch="batchtopk",
            k=config.k,
            latents=latents,
            tokens=steps * batch_size,
            batch_size=batch_size,
            lr=config.lr,
            beta2=config.beta2,
            warmup=0.0,
            decay=config.decay,
            clip=config.clip,
            aux_alpha=config.aux_alpha,
            aux_scale=config.aux_scale,
            k_aux=config.k_aux,
            dead_after=config.dead_after_steps * batch_size,
            b_dec_init=config.b_dec_init,
            normalize=config.normalize,
            seed=config.seed,
        ),
        d_in,
    )


@torch.no_grad()
def finish(sae: SAE, rows: RowBatches, config: TrainConfig) -> Trained:
    """``sae`` as it comes from training, with θ (eq. 8) from two epochs of batches of ``rows`` (not scaled).

    Where one batch is all the rows, the error of θ comes from resampling them.
    """
    sae = replace(sae, threshold=None)
    assert config.k is not None
    whole = rows.whole(config.batch_size)
    n_batches = 1 if whole else max(2 * -(-rows.n_rows // config.batch_size), DRAWN_BATCHES)
    found = thresholds.batch_minima(sae, rows, config.batch_size, n_batches, config.k)
    estimate = mean_min([batch.minimum for batch in found])
    if whole:
        assert estimate.value is not None
        p = sae.pre_activations(rows.batch(0, config.batch_size))
        pool = sparse.above(p, torch.tensor(RESAMPLING_FLOOR * estimate.value, dtype=p.dtype))
        error = resampling_error(pool, config.k, torch.Generator().manual_seed(config.seed))
        estimate = replace(estimate, standard_error=error, relative_error=error / estimate.value)
    return Trained(with_threshold(sae, below(estimate)), estimate)


def below(estimate: Estimate) -> float:
    """θ for strict ``>``: with one batch the minimum itself must stay in, so θ is the next smaller float32."""
    assert estimate.value is not None
    if estimate.n_batches > 1:
        return estimate.value
    value = torch.tensor(estimate.value, dtype=torch.float32)
    return float(torch.nextafter(value, torch.zeros(())))
