"""Do meta-latents join the same pairs of parent latents as an SAE of comparable width does?

Graph A joins two parent latents that share a meta-latent, graph B two that both have cosine ≥ τ to one latent of the
other SAE, with τ such that B has as many edges as A. The overlap is |A ∩ B| / |A| (28.92% in the authors' post); were
B's latents renamed at random it would be |B| / (n choose 2).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array, triu
from torch import Tensor

from saetool.core.sae import unit_rows
from saetool.core.sparse import Codes

MAX_PAIRS = 100_000_000
"""Most pairs, with repetitions, that graph A may be made of: above, it takes gigabytes."""
_BLOCK = 4096


@dataclass(frozen=True)
class Overlap:
    """How much two graphs on the same latents have in common."""

    edges: int
    """Of graph A."""
    other_edges: int
    """Of graph B: as near to A's as ties allow."""
    tau: float
    shared: int
    overlap: float
    chance: float
    """What renaming B's latents at random would give on average."""


def shared_edges(found: Codes, rows: Float[Tensor, "n d"], other: Float[Tensor, "m d"]) -> Overlap | None:
    """The overlap; None where graph A is empty or too large, or no τ above 0 gives B as many edges."""
    sizes = found.fired.double()
    if not 0 < float((sizes * (sizes - 1) / 2).sum()) <= MAX_PAIRS:
        return None
    a = _pairs(found.tokens.numpy(), found.latents.numpy(), (found.n, found.d_sae))
    row, column, cosine = _strongest(rows, other, 2 * a.nnz)
    shape = (len(rows), len(other))
    low, high = _first_reaching(column, a.nnz), 0
    while low < len(row) and _pairs(row[:low], column[:low], shape).nnz < a.nnz:
        low, high = min(low + low // 4 + 1, len(row)), low
    if _pairs(row[:low], column[:low], shape).nnz < a.nnz:
        return None
    while low - high > 1:  # the fewest incidences with at least as many edges
        middle = (low + high) // 2
        enough = _pairs(row[:middle], column[:middle], shape).nnz >= a.nnz
        low, high = (middle, high) if enough else (low, middle)
    tau = cosine[low - 1]
    low = int(np.searchsorted(-cosine, -tau, side="right"))
    b = _pairs(row[:low], column[:low], shape)
    shared = int(a.multiply(b).nnz)
    n = len(rows)
    return Overlap(a.nnz, b.nnz, float(tau), shared, shared / a.nnz, b.nnz / (n * (n - 1) / 2))


def _pairs(row: np.ndarray, column: np.ndarray, shape: tuple[int, int]) -> csr_array:
    """The pairs of rows that have a column in common, each once."""
    incidence = csr_array((np.ones(len(row), dtype=np.int32), (row, column)), shape=shape)
    return csr_array(triu(incidence @ incidence.T, k=1) > 0)


def _strongest(
    rows: Float[Tensor, "n d"], other: Float[Tensor, "m d"], n_pairs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, column, cosine) by falling cosine, down to where they make ``n_pairs`` pairs with repetitions, or to 0."""
    columns = unit_rows(other.double()).T
    for floor in (0.5, 0.4, 0.3, 0.2, 0.1, 0.0):
        row, column, cosine = [], [], []
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK].double() @ columns
            at = (block > floor).nonzero()
            row.append(at[:, 0] + start)
            column.append(at[:, 1])
            cosine.append(block[at[:, 0], at[:, 1]])
        joined: Int[Tensor, " e"] = torch.cat(column)
        sizes = torch.bincount(joined, minlength=len(other)).double()
        if floor == 0.0 or float((sizes * (sizes - 1) / 2).sum()) >= 4 * n_pairs:
            break
    order = torch.cat(cosine).argsort(descending=True, stable=True)
    return torch.cat(row)[order].numpy(), joined[order].numpy(), torch.cat(cosine)[order].numpy()


def _first_reaching(column: np.ndarray, n_pairs: int) -> int:
    """How many of the incidences, in order, make ``n_pairs`` pairs with repetitions: no fewer can make as many edges.

    The r-th incidence of a column adds r − 1 pairs.
    """
    order = np.argsort(column, kind="stable")
    sorted_ = column[order]
    starts = np.flatnonzero(np.r_[True, sorted_[1:] != sorted_[:-1]]) if len(column) else np.empty(0, dtype=np.int64)
    sizes = np.diff(np.r_[starts, len(column)])
    earlier = np.empty(len(column), dtype=np.int64)
    earlier[order] = np.arange(len(column)) - np.repeat(starts, sizes)
    return min(int(np.searchsorted(earlier.cumsum(), n_pairs)) + 1, len(column))
