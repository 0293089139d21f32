"""Training a meta-SAE: ``engines.train`` on decoder rows in place of activations."""

from collections.abc import Iterator
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
from saetool.engines import train as trainer
from saetool.engines.reader import Order
from saetool.engines.trainee import Trainee
from saetool.errors import ConfigError

RESAMPLING_FLOOR = 0.5
"""The cut of a resample of the rows is looked for above this share of the rows' own cut."""


class RowBatches:
    """Batches of the rows of a matrix: all of them where they are fewer than a batch, shuffled ones otherwise."""

    def __init__(self, rows: Float[Tensor, "n d"], *, seed: int, scale: float = 1.0) -> None:
        self._rows = rows * scale
        self.n_rows, self.d_in = rows.shape
        self._order = Order(self.n_rows, seed)

    def batch(self, step: int, size: int) -> Float[Tensor, "size d"]:
        if size >= self.n_rows:
            return self._rows
        return self._rows[self._order.rows(step, size).to(self._rows.device)]


@dataclass(frozen=True)
class Trained:
    """A trained meta-SAE with its threshold."""

    sae: SAE
    estimate: Estimate


def training_config(config: MetaConfig, n_rows: int, d_in: int) -> TrainConfig:
    """The trainer's configuration for a meta-SAE on ``n_rows`` rows of width ``d_in``."""
    batch_size = min(config.batch_size, n_rows)
    latents = config.latents if config.latents is not None else max(n_rows * 3 // 64, config.k)
    if latents >= n_rows:
        raise ConfigError(f"--latents {latents}: not fewer than the parent's {n_rows} rows: nothing to compress")
    return recipe.resolve(
        TrainConfig(
            arch="batchtopk",
            k=config.k,
            latents=latents,
            tokens=config.steps * batch_size,
            batch_size=batch_size,
            lr=config.lr,
            beta2=config.beta2,
            warmup=0.0,
            clip=0.0,
            aux_alpha=config.aux_alpha,
            dead_after=config.dead_after_steps * batch_size,
            seed=config.seed,
        ),
        d_in,
    )


def train(rows: Float[Tensor, "n d"], config: TrainConfig, *, device: str) -> Iterator[trainer.Tick | Trained]:
    """Train on unit-norm ``rows`` (scaled to E‖x‖² = d meanwhile); the last event is the result."""
    scale = rows.shape[1] ** 0.5
    batches = RowBatches(rows.to(device), seed=config.seed, scale=scale)
    trainee = Trainee(config, rows.shape[1], rows.mean(0), scale, device)
    for event in trainer.train([trainee], batches, log_every=max(recipe.n_steps(config) // 20, 1)):
        if isinstance(event, trainer.Tick):
            yield event
    sae = trainee.sae()
    estimate = _estimate(replace(sae, threshold=None), RowBatches(rows, seed=config.seed), config)
    yield Trained(with_threshold(sae, below(estimate)), estimate)


def _estimate(sae: SAE, rows: RowBatches, config: TrainConfig) -> Estimate:
    """θ from two epochs of batches; where one batch is all the rows, its error comes from resampling them."""
    assert config.k is not None
    whole = config.batch_size >= rows.n_rows
    n_batches = 1 if whole else 2 * -(-rows.n_rows // config.batch_size)
    found = thresholds.batch_minima(sae, rows, config.batch_size, n_batches, config.k)
    estimate = mean_min([batch.minimum for batch in found])
    if not whole:
        return estimate
    assert estimate.value is not None
    p = sae.pre_activations(rows.batch(0, config.batch_size))
    pool = sparse.above(p, torch.tensor(RESAMPLING_FLOOR * estimate.value, dtype=p.dtype))
    error = resampling_error(pool, config.k, torch.Generator().manual_seed(config.seed))
    return replace(estimate, standard_error=error, relative_error=error / estimate.value)


def below(estimate: Estimate) -> float:
    """θ for strict ``>``: with one batch the minimum itself must stay in, so θ is the next smaller float32."""
    assert estimate.value is not None
    if estimate.n_batches > 1:
        return estimate.value
    value = torch.tensor(estimate.value, dtype=torch.float32)
    return float(torch.nextafter(value, torch.zeros(())))
