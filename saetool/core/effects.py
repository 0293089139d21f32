"""What single latents, groups and components of a large SAE do to a small one's error, from the sums of one pass.

All with the small SAE's own b_dec, relative to the intact small SAE. With e = x − x̂ of the small SAE, adding
δ = Σ z_l d_l of some latents changes Σ‖e‖² by Σ‖δ‖² − 2 Σ δ·e; removing small latents is adding −z d. Everything that
comes in here was summed in ``core/interpolation.py``. Figures are those of Leask et al., arXiv 2502.04878.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from saetool.core.interpolation import DataSums, LatentSums, PairSums
from saetool.core.stitch import Partition

N_POINTS = 101
"""Points of a cumulative curve that are kept."""


@dataclass(frozen=True)
class Sums:
    """All sums that belong to one pair of SAEs."""

    data: DataSums
    small: LatentSums
    large: LatentSums
    pairs: PairSums

    def residual_inner(self) -> Float[Tensor, " n_large"]:
        """Σ z_l d_l·e of each large latent."""
        return self.large.inner_about(self.small.b_dec) - self.pairs.with_small

    def own_residual_inner(self) -> Float[Tensor, " n_small"]:
        """Σ z_l d_l·e of each small latent."""
        return self.small.inner_about(self.small.b_dec) - self.pairs.among_small


def added(sums: Sums) -> Float[Tensor, " n_large"]:
    """Change of the small SAE's MSE when one large latent is added: E[z²‖d‖² − 2 z d·e] of each (Fig. 4)."""
    return (_own_squares(sums.large) - 2 * sums.residual_inner()) / sums.data.n


def removed(sums: Sums) -> Float[Tensor, " n_small"]:
    """Change of the small SAE's MSE when one of its latents is left out: E[z²‖d‖² + 2 z d·e] of each."""
    return (_own_squares(sums.small) + 2 * sums.own_residual_inner()) / sums.data.n


def _own_squares(latents: LatentSums) -> Float[Tensor, " d_sae"]:
    """Σ ‖z_l d_l‖²."""
    return latents.squares * latents.W_dec.square().sum(1)


@dataclass(frozen=True)
class Swaps:
    """One component swapped in the intact small SAE, each on its own (Fig. 14)."""

    mse: Float[Tensor, " n_components"]
    """Change of MSE."""
    l0: Float[Tensor, " n_components"]
    """Change of L0."""


def swaps(sums: Sums, parts: Partition) -> Swaps:
    """What each component's large members do in the place of its small ones."""
    inner = torch.zeros(parts.n_components, dtype=torch.float64)
    fired = torch.zeros(parts.n_components, dtype=torch.float64)
    for sign, of, inners, latents in (
        (1, parts.component_of_large, sums.residual_inner(), sums.large),
        (-1, parts.component_of_small, sums.own_residual_inner(), sums.small),
    ):
        mine = (of >= 0).nonzero().squeeze(1)
        inner.index_add_(0, of[mine], sign * inners[mine])
        fired.index_add_(0, of[mine], sign * latents.fired[mine].double())
    return Swaps((sums.pairs.swapped - 2 * inner) / sums.data.n, fired / sums.data.n)


@dataclass(frozen=True)
class Group:
    """All novel, or all reconstruction latents at one theta, added to the small SAE with its own b_dec."""

    theta: float
    n_novel: int
    n_reconstruction: int
    novel_delta: float
    """Change of the small SAE's MSE by all novel latents, relative to that MSE (0.1: 10% worse)."""
    reconstruction_delta: float


def groups(max_cosine: Float[Tensor, " n_large"], thetas: list[float], sums: Sums) -> list[Group]:
    """The effect of adding whole groups. The first order of ``sums.pairs`` is that of ascending max cosine.

    Each novel group is then a head of the latents by rank and each reconstruction group a tail. Latents with a zero
    row (max cosine NaN) come last; they belong to neither group and add nothing.
    """
    head, tail = _heads_and_tails(sums, 0)
    result = []
    for theta in thetas:
        n = int((max_cosine < theta).sum())
        rest = int((max_cosine >= theta).sum())
        result.append(Group(theta, n, rest, float(head[n]), float(tail[n])))
    return result


def _heads_and_tails(sums: Sums, order: int) -> tuple[Tensor, Tensor]:
    """Relative change of MSE by the first 0, 1, … n latents of an order, and by those from place 0, 1, … n on."""
    pairs, mse = sums.pairs, sums.small.squared_error
    mine = torch.zeros_like(pairs.up_to[order]).index_add_(0, pairs.ranks[order], sums.residual_inner())
    none = torch.zeros(1, dtype=torch.float64)
    head = torch.cat([none, (pairs.up_to[order] - 2 * mine).cumsum(0)])
    tail = torch.cat([(pairs.down_to[order] - 2 * mine).flip(0).cumsum(0).flip(0), none])
    scale = mse if mse > 0 else float("nan")
    return head / scale, tail / scale


def ascending_rank(max_cosine: Float[Tensor, " n_large"]) -> Int[Tensor, " n_large"]:
    """Place of each latent by ascending max cosine; NaN last, equals in order."""
    return _places(torch.sort(max_cosine.nan_to_num(nan=torch.inf), stable=True).indices)


def group_rank(parts: Partition, generator: torch.Generator) -> Int[Tensor, " n_large"]:
    """A random order of the novel latents, then those with a zero row, then a random order of the reconstruction ones.

    So one order gives both of Fig. 15's curves: the heads are the novel group's, the tails the reconstruction group's.
    """
    shuffled = torch.randperm(len(parts.novel), generator=generator)
    novel, rest = parts.novel[shuffled], parts.reconstruction[shuffled]
    return _places(torch.cat([shuffled[novel], shuffled[~novel & ~rest], shuffled[rest]]))


def _places(order: Tensor) -> Tensor:
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    return rank


@dataclass(frozen=True)
class Cumulative:
    """Relative change of the small SAE's MSE as one group is added in random orders, a curve for each order (Fig. 15).

    Every curve starts at 0 latents and ends at the whole group; at most ``N_POINTS`` points, evenly spaced.
    """

    n_novel: Int[Tensor, " n_points"]
    novel: Float[Tensor, "n_orders n_points"]
    n_reconstruction: Int[Tensor, " m_points"]
    reconstruction: Float[Tensor, "n_orders m_points"]


def cumulative(sums: Sums, parts: Partition) -> Cumulative:
    """From all orders of ``sums.pairs`` but the first, each made by ``group_rank``."""
    n, rest = int(parts.novel.sum()), int(parts.reconstruction.sum())
    at_novel, at_rest = _spaced(n), _spaced(rest)
    novel, reconstruction = [], []
    for order in range(1, len(sums.pairs.ranks)):
        head, tail = _heads_and_tails(sums, order)
        novel.append(head[at_novel])
        reconstruction.append(tail.flip(0)[at_rest])
    return Cumulative(at_novel, _stacked(novel, at_novel), at_rest, _stacked(reconstruction, at_rest))


def _stacked(curves: list[Tensor], points: Tensor) -> Tensor:
    return torch.stack(curves) if curves else torch.zeros(0, len(points), dtype=torch.float64)


def _spaced(n: int) -> Int[Tensor, " n_points"]:
    return torch.linspace(0, n, min(n + 1, N_POINTS), dtype=torch.float64).round().long()


@dataclass(frozen=True)
class Scaling:
    """How much of each large latent's contribution z d the small SAE has (latent scaling, arXiv 2504.02922).

    β = Σ z d·y / Σ ‖z d‖² is the multiple of the contribution that explains y best. Adding the latent lowers the small
    SAE's MSE exactly if β of the error is above 1/2. NaN for a latent that adds nothing.
    """

    error: Float[Tensor, " n_large"]
    """y = e: about 1 where the small SAE lacks the contribution altogether, 0 where it has it."""
    reconstruction: Float[Tensor, " n_large"]
    """y = x̂ − b_dec of the small SAE."""


def scaling(sums: Sums) -> Scaling:
    """β of the small SAE's error and of its reconstruction."""
    own = _own_squares(sums.large)
    own = torch.where(own > 0, own, torch.nan)
    return Scaling(sums.residual_inner() / own, sums.pairs.with_small / own)


def activation_cosine(sums: Sums) -> Float[Tensor, " n_large"]:
    """Σ z_l z_m / √(Σ z_l² Σ z_m²) of each large latent l, m the small one of the nearest decoder row (Fig. 8).

    Not centred. NaN where one of the two never fires.
    """
    nearest = sums.pairs.nearest
    norms = (sums.large.squares * sums.small.squares[nearest.clamp_min(0)]).sqrt()
    known = (norms > 0) & (nearest >= 0)
    return torch.where(known, sums.pairs.with_nearest / torch.where(known, norms, 1.0), torch.nan)


class FiringErrors:
    """Squared errors of both SAEs on the tokens where each large latent fires (appendix A.3)."""

    def __init__(self, n_large: int) -> None:
        self._sums = torch.zeros(2, n_large, dtype=torch.float64)

    def add(self, large: csr_array, small_errors: Float[Tensor, " n"], large_errors: Float[Tensor, " n"]) -> None:
        """Count some tokens: the large SAE's activations, and ‖x − x̂‖² of both SAEs."""
        per_token = np.diff(large.indptr)
        for sums, errors in zip(self._sums, (small_errors, large_errors), strict=True):
            weights = np.repeat(errors.numpy(), per_token)
            sums += torch.from_numpy(np.bincount(large.indices, weights, minlength=len(sums)))

    def result(self, sums: Sums) -> Float[Tensor, "4 n_large"]:
        """MSE of the small SAE where each latent fires and where it doesn't, then the large SAE's; NaN of no token."""
        fired = sums.large.fired.double()
        rows = []
        for here, whole in zip(self._sums, (sums.small.squared_error, sums.large.squared_error), strict=True):
            rows += [here / fired, (whole - here) / (sums.data.n - fired)]
        return torch.stack(rows)


def with_bias(latents: LatentSums, b_dec: Float[Tensor, " d"], n: int) -> float:
    """MSE of an SAE with another output bias; what its encoder subtracts stays its own (Fig. 17)."""
    shift = latents.b_dec - b_dec
    return (latents.squared_error + 2 * float(latents.error @ shift)) / n + float(shift @ shift)
