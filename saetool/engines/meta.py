"""Training a meta-SAE: ``engines.train`` on decoder rows in place of activations."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from saetool.config import MetaConfig, TrainConfig
from saetool.core.sae import SAE
from saetool.engines import recipe
from saetool.engines import threshold as thresholds
from saetool.engines import train as trainer
from saetool.engines.reader import Order
from saetool.engines.trainee import Trainee
from saetool.errors import ConfigError


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
    estimate: thresholds.Estimate


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
    plain = RowBatches(rows, seed=config.seed)
    n_batches = 1 if config.batch_size >= plain.n_rows else 2 * -(-plain.n_rows // config.batch_size)
    minima = thresholds.batch_minima(replace(sae, threshold=None), plain, config.batch_size, n_batches)
    estimate = thresholds.mean_min([b.minimum for b in minima])
    yield Trained(thresholds.with_threshold(sae, below(estimate)), estimate)


def below(estimate: thresholds.Estimate) -> float:
    """θ for strict ``>``: with one batch the minimum itself must stay in, so θ is the next smaller float32."""
    if estimate.n_batches > 1:
        return estimate.value
    value = torch.tensor(estimate.value, dtype=torch.float32)
    return float(torch.nextafter(value, torch.zeros(())))
