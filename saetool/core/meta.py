"""Meta-SAEs: sparse autoencoders on the decoder rows of another SAE (Leask et al., arXiv 2502.04878, section 5).

rows                  w_i = W_dec,i / ‖W_dec,i‖ of the parent, zero rows left out
variance explained    1 − Σ_i ‖w_i − ŵ_i‖² / Σ_i ‖w_i − w̄‖²           (w̄ the mean row; as SAEBench's meta_structure)
decomposition         of parent latent i: its active meta-latents j with weights z_ij
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetool.core.sae import SAE, unit_rows


@dataclass(frozen=True)
class Rows:
    """A parent's decoder directions as data."""

    rows: Float[Tensor, "n d_in"]
    """Unit norm."""
    latents: Int[Tensor, " n"]
    """Which parent latent each row belongs to (zero rows are left out)."""


@dataclass(frozen=True)
class Explained:
    """How well a meta-SAE explains a set of rows."""

    variance_explained: float
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


def explain(meta: SAE, rows: Float[Tensor, "n d"], *, batch: bool = False) -> Explained:
    """Variance explained and sparsity of ``meta`` on ``rows``; ``batch=True`` selects among all rows together."""
    z = meta.encode(rows, batch=batch)
    exact = rows.double()
    error = (exact - meta.decode(z).double()).square().sum()
    variance = (exact - exact.mean(0)).square().sum()
    active = z > 0
    return Explained(
        variance_explained=float(1 - error / variance) if variance > 0 else float("nan"),
        mean_active=float(active.sum()) / len(rows),
        dead=int((~active.any(0)).sum()),
        unexplained_rows=int((~active.any(1)).sum()),
    )


def decompose(meta: SAE, rows: Rows) -> list[tuple[int, list[int], list[float]]]:
    """For each row: parent latent, its active meta-latents by falling weight, and the weights."""
    result = []
    for latent, z in zip(rows.latents.tolist(), meta.encode(rows.rows), strict=True):
        weights, order = z.sort(descending=True, stable=True)
        n = int((weights > 0).sum())
        result.append((latent, order[:n].tolist(), weights[:n].tolist()))
    return result


def cosine_histogram(maxima: Float[Tensor, " n"], bins: int = 100) -> tuple[list[float], list[int], float]:
    """Edges (−1 … 1), counts and mean of max cosines (the paper's Fig. 6 as numbers)."""
    counts = torch.histc(maxima.double(), bins=bins, min=-1.0, max=1.0)
    edges = [round(-1 + 2 * i / bins, 6) for i in range(bins + 1)]
    return edges, [int(c) for c in counts], float(maxima.double().mean())
