"""The threshold that turns selection over a batch into an activation of single tokens: z = p · 1[p > θ].

    mean-min    θ = mean over batches of min { z : z kept by BatchTopK in the batch, z > 0 }   (eq. 8, arXiv 2502.04878)
    target-l0   θ such that p > θ holds for exactly n·k pairs of the n tokens: the (n·k + 1)-th largest p
    per-latent  θ_i such that latent i is active on as many tokens as BatchTopK selects it on, batch by batch

All are estimated from the same batches. ``k`` is the mean L0 asked for and may be a fraction.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetool.core import sparse
from saetool.core.sae import SAE, fold_decoder_norms
from saetool.errors import ConfigError

METHODS = ("mean-min", "target-l0", "per-latent")
UNIT = 1e-5
"""Decoder rows whose norm is this close to 1 count as unit rows."""


@dataclass(frozen=True)
class Estimate:
    """θ and how well it is known."""

    method: str
    value: float | None
    """θ where it is one for all latents."""
    values: Float[Tensor, " d_sae"] | None
    """θ of each latent where it is not."""
    n_batches: int
    """Batches with a minimum."""
    standard_error: float
    """Of θ: that of the mean of the batches' cuts. NaN where it cannot be known."""
    relative_error: float
    """The standard error as a share of θ."""
    minima: list[float]


@dataclass(frozen=True)
class Pool:
    """The pairs (token, latent) of all batches with p > ``floor``: at least those that BatchTopK selects."""

    values: Float[Tensor, " pairs"]
    latents: Int[Tensor, " pairs"]
    selected: Int[Tensor, " d_sae"]
    """How often BatchTopK selects each latent."""
    floor: float


def wanted_pairs(k: float | int, n: int) -> int:
    """n·k to the nearest whole pair."""
    return round(k * n)


def smallest_kept(p: Float[Tensor, "n d_sae"], k: float | int, hint: float = 0.0) -> float:
    """The smallest value BatchTopK keeps of ``p``: the (n·k)-th largest positive one, or the smallest if there are
    fewer; 0 if there is none. ``hint`` (a little below the last batch's) saves time and changes nothing."""
    wanted = wanted_pairs(k, len(p))
    for floor in (max(hint, 0.0), 0.0):
        values = sparse.above(p, torch.tensor(floor, dtype=p.dtype, device=p.device)).values
        if len(values) >= wanted > 0:
            return float(values.kthvalue(len(values) - wanted + 1).values)
    return float(values.min()) if len(values) and wanted else 0.0


def mean_min(minima: list[float | None]) -> Estimate:
    """Equation 8 from the batches' minima, in float64; a batch in which nothing is kept has none and is left out.

    Raises ``ConfigError`` if no batch has one.
    """
    found = torch.tensor([m for m in minima if m is not None], dtype=torch.float64)
    if not len(found):
        raise ConfigError("no batch has a positive activation: the SAE is dead on these data")
    value = float(found.mean())
    error = _error_of_mean(found)
    return Estimate("mean-min", value, None, len(found), error, error / value, found.tolist())


def target_l0(minima: list[float | None], pool: Pool, k: float | int, n_tokens: int) -> Estimate:
    """θ with a mean L0 of exactly ``k`` on the pooled tokens (less ties). Its error is that of the batches' cuts."""
    known = mean_min(minima)
    wanted, n = wanted_pairs(k, n_tokens), len(pool.values)
    if n < wanted:  # even every positive pair is too few
        value = 0.0
    else:
        value = float(pool.values.kthvalue(n - wanted).values) if n > wanted else pool.floor
    error = known.standard_error
    return replace(known, method="target-l0", value=value, relative_error=error / value if value else math.inf)


def per_latent(minima: list[float | None], pool: Pool) -> Estimate:
    """θ_i: the largest value of latent i that is not kept, if as many are kept as BatchTopK selects.

    A latent that is never selected gets eq. 8's θ, or its largest value if that is more: it stays silent on the pooled
    tokens. Each θ_i averages the cuts of the batches that latent i is near them in, so the error stated is the cuts'.
    """
    known = mean_min(minima)
    assert known.value is not None
    order = pool.values.argsort(descending=True, stable=True)
    order = order[pool.latents[order].argsort(stable=True)]
    values, d_sae = pool.values[order].double(), len(pool.selected)
    sizes = torch.bincount(pool.latents, minlength=d_sae)
    starts, chosen = sizes.cumsum(0) - sizes, pool.selected

    def at_rank(rank: Tensor) -> Tensor:
        """The value at ``rank`` (from 0) of each latent, the floor past its last."""
        inside = rank < sizes
        padded = torch.cat([values, values.new_zeros(1)])
        return torch.where(inside, padded[torch.where(inside, starts + rank, len(values))], pool.floor)

    theta = at_rank(chosen)
    theta = torch.where(chosen > 0, theta, theta.clamp_min(known.value))
    return replace(known, method="per-latent", value=None, values=theta.float())


def _error_of_mean(values: Float[Tensor, " n"]) -> float:
    """sd / √n; NaN for one value."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan


def resampling_error(pool: sparse.Codes, k: float | int, generator: torch.Generator, replicates: int = 200) -> float:
    """The standard error of the smallest kept value of one batch, by resampling its rows with replacement.

    For a batch that is all the data there are (the rows of a decoder): there are no further batches to compare.
    ``pool`` must reach well below the cut, so that the cut of every resample is in it.
    """
    order = pool.values.argsort(descending=True)
    values, rows = pool.values[order].double().cpu(), pool.tokens[order].cpu()
    wanted, cuts = wanted_pairs(k, pool.n), []
    for _ in range(replicates):
        drawn = torch.randint(pool.n, (pool.n,), generator=generator)
        kept = torch.bincount(drawn, minlength=pool.n)[rows].cumsum(0)
        at = min(int(torch.searchsorted(kept, wanted)), len(values) - 1)
        cuts.append(values[at])
    return float(torch.stack(cuts).std())


def with_threshold(sae: SAE, theta: float | Float[Tensor, " d_sae"]) -> SAE:
    """``sae`` with θ for every latent, or one for each: a JumpReLU SAE."""
    values = theta.float() if isinstance(theta, Tensor) else torch.full((sae.d_sae,), theta, dtype=torch.float32)
    return replace(sae, threshold=values)


def with_unit_rows(sae: SAE) -> SAE:
    """The same function with unit decoder rows; ``sae`` itself where they are unit already (within ``UNIT``)."""
    norms = sae.W_dec.norm(dim=1)
    return sae if bool(((norms - 1).abs() <= UNIT).logical_or(norms == 0).all()) else fold_decoder_norms(sae)
