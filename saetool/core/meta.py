"""Meta-SAEs: sparse autoencoders on the decoder rows of another SAE (Leask et al., arXiv 2502.04878, section 5).

rows                  w_i = W_dec,i / ‖W_dec,i‖ of the parent, zero rows left out
variance explained    1 − Σ_i ‖w_i − ŵ_i‖² / Σ_i ‖w_i − w̄‖²           (w̄ the mean row; as SAEBench's meta_structure)
decomposition         of parent latent i: its active meta-latents j with weights z_ij
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saetool.core import sparse
from saetool.core.sae import SAE, unit_rows
from saetool.core.sparse import Codes
from saetool.core.threshold import smallest_kept


@dataclass(frozen=True)
class Rows:
    """A parent's decoder directions as data."""

    rows: Float[Tensor, "n d_in"]
    """Unit norm."""
    latents: Int[Tensor, " n"]
    """Which parent latent each row belongs to (zero rows are left out)."""

    def of(self, keep: Bool[Tensor, " n"]) -> "Rows":
        """Some of the rows."""
        return Rows(self.rows[keep], self.latents[keep])


@dataclass(frozen=True)
class Explained:
    """How well a meta-SAE explains a set of rows."""

    variance_explained: float
    mse_mean: float
    """Σ‖w − ŵ‖² / (n d)."""
    mean_active: float
    """Active meta-latents per row."""
    dead: int
    """Meta-latents active on no row."""
    unexplained_rows: int
    """Rows with no active meta-latent."""


def decoder_rows(parent: SAE) -> Rows:
    """The parent's decoder rows at unit norm."""
    latents = (parent.W_dec.norm(dim=1) > 0).nonzero().squeeze(1)
    return Rows(unit_rows(parent.W_dec[latents]), latents)


def random_rows(like: Float[Tensor, "n d"], generator: torch.Generator) -> Float[Tensor, "n d"]:
    """Null: as many random unit directions."""
    return unit_rows(torch.randn(like.shape, generator=generator))


def shuffled_rows(like: Float[Tensor, "n d"], generator: torch.Generator) -> Float[Tensor, "n d"]:
    """Null: every coordinate shuffled among the rows (so each keeps its distribution), then unit norm again."""
    order = torch.rand(like.shape, generator=generator).argsort(dim=0)
    return unit_rows(like.gather(0, order))


def codes(meta: SAE, rows: Float[Tensor, "n d"], *, batch: bool = False) -> Codes:
    """Active meta-latents of each row; ``batch=True`` selects k a row on average among all rows together."""
    if not batch:
        return sparse.encode(meta, rows)
    assert meta.k is not None
    p = meta.pre_activations(rows)
    return sparse.encode_batch(p, smallest_kept(p, meta.k))


def quality(
    rows: Float[Tensor, "n d"], reconstruction: Float[Tensor, "n d"], weights: Float[Tensor, " n"] | None = None
) -> tuple[float, float]:
    """(variance explained, mean squared error of an entry) of ``rows``; ``weights`` weigh the rows and their mean."""
    exact = rows.double()
    share = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights.double()
    share = share / share.sum()
    mean = share @ exact
    error = float(share @ (exact - reconstruction.double()).square().sum(1))
    variance = float(share @ (exact - mean).square().sum(1))
    return 1 - error / variance if variance > 0 else float("nan"), error / rows.shape[1]


def explain(
    meta: SAE,
    rows: Float[Tensor, "n d"],
    *,
    batch: bool = False,
    weights: Float[Tensor, " n"] | None = None,
) -> Explained:
    """Variance explained and sparsity of ``meta`` on ``rows``; ``batch=True`` selects among all rows together."""
    return explained_by(meta, rows, codes(meta, rows, batch=batch), weights)


def explained_by(
    meta: SAE, rows: Float[Tensor, "n d"], found: Codes, weights: Float[Tensor, " n"] | None = None
) -> Explained:
    """The same from the rows' ``codes``."""
    variance_explained, mse = quality(rows, sparse.decode(meta, found), weights)
    return Explained(
        variance_explained=variance_explained,
        mse_mean=mse,
        mean_active=len(found.values) / found.n,
        dead=int((found.fired == 0).sum()),
        unexplained_rows=int((found.counts == 0).sum()),
    )


def with_decoder(meta: SAE, directions: Float[Tensor, "m d"]) -> SAE:
    """``meta`` with its decoder rows replaced by unit ``directions``; encoder, biases and threshold stay."""
    return replace(meta, W_dec=unit_rows(directions))


def decompose(meta: SAE, rows: Rows) -> list[tuple[int, list[int], list[float]]]:
    """For each row: parent latent, its active meta-latents by falling weight, and the weights."""
    found = codes(meta, rows.rows)
    order = found.values.argsort(descending=True, stable=True)
    order = order[found.tokens[order].argsort(stable=True)]
    sizes = found.counts.tolist()
    indices, values = found.latents[order].split(sizes), found.values[order].split(sizes)
    return [
        (latent, index.tolist(), value.tolist())
        for latent, index, value in zip(rows.latents.tolist(), indices, values, strict=True)
    ]


def cosine_histogram(maxima: Float[Tensor, " n"], bins: int = 100) -> tuple[list[float], list[int], float]:
    """Edges (−1 … 1), counts and mean of max cosines (the paper's Fig. 6 as numbers)."""
    counts = torch.histc(maxima.double(), bins=bins, min=-1.0, max=1.0)
    edges = [round(-1 + 2 * i / bins, 6) for i in range(bins + 1)]
    return edges, [int(c) for c in counts], float(maxima.double().mean())
