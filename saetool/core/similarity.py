"""Cosines between the decoder rows of two SAEs, in blocks of rows (Leask et al., arXiv 2502.04878, section 4.2).

    cos(i, j) = d1_i · d0_j / (‖d1_i‖ ‖d0_j‖)      d1: rows of the large SAE, d0: rows of the small one; signed

A bipartite graph joins large latent i and small latent j wherever cos(i, j) ≥ theta. The paper leaves equality open;
with ≥ here and "novel iff max_j cos(i, j) < theta" a large latent is novel exactly when it has no edge.
Rows of norm zero have no direction: they have no edge, are neither novel nor reconstruction, and are counted apart.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from saetool.core.sae import unit_rows
from saetool.errors import ConfigError

MAX_EDGES = 10_000_000
"""Listing more edges than this would take gigabytes, and a graph with so many says nothing about latents."""
_BLOCK = 16_777_216  # entries of one block of cosines: 128 MB in float64


@dataclass(frozen=True)
class Edges:
    """All pairs with cosine ≥ theta, ordered by large latent, then small latent."""

    small: Int[Tensor, " n_edges"]
    large: Int[Tensor, " n_edges"]
    cosine: Float[Tensor, " n_edges"]


@dataclass(frozen=True)
class Similarity:
    """How the decoder rows of two SAEs resemble each other. Everything is on the CPU, cosines in float64."""

    max_cosine: Float[Tensor, " n_large"]
    """Each large latent's largest cosine to a small one; NaN for a row of norm zero."""
    nearest: Int[Tensor, " n_large"]
    """The small latent that has it (the first of equals); -1 for a row of norm zero."""
    max_cosine_of_small: Float[Tensor, " n_small"]
    """Each small latent's largest cosine to a large one; NaN for a row of norm zero."""
    edges: Edges
    """At the theta asked for."""
    labels: dict[float, Int[Tensor, " n_small_plus_n_large"]]
    """At each cut-off: the connected component of every latent, small ones first."""

    @property
    def n_small(self) -> int:
        return len(self.max_cosine_of_small)

    @property
    def zero_small(self) -> Bool[Tensor, " n_small"]:
        return self.max_cosine_of_small.isnan()

    @property
    def zero_large(self) -> Bool[Tensor, " n_large"]:
        return self.max_cosine.isnan()


def similarity(
    small: Float[Tensor, "n_small d"],
    large: Float[Tensor, "n_large d"],
    theta: float,
    cutoffs: Sequence[float] = (),
    *,
    block: int | None = None,
) -> Similarity:
    """Cosines of ``large``'s rows to ``small``'s: their maxima, edges at ``theta``, components at each cut-off.

    Computed on the rows' device in float64, ``block`` large rows at a time: memory is block × n_small, and the result
    does not depend on it. Raises ``ConfigError`` if all small rows are zero or theta joins absurdly many pairs.
    """
    usable = small.double().norm(dim=1) > 0
    if not usable.any():
        raise ConfigError("all decoder rows of the smaller SAE are zero: nothing can be compared with it")
    n_small, n_large = len(small), len(large)
    block = block or max(_BLOCK // n_small, 1)
    components = {cutoff: _Components(n_small + n_large) for cutoff in (theta, *cutoffs)}
    lowest = min(components)
    small_max = torch.full((n_small,), -torch.inf, dtype=torch.float64)
    maxima, nearest, edges, n_edges = [], [], [], 0
    for start, cosines in _blocks(small, large, usable, block):
        best = cosines.max(dim=1)
        maxima.append(best.values.cpu())
        nearest.append(best.indices.cpu())
        small_max = torch.maximum(small_max, cosines.amax(dim=0).cpu())
        where = (cosines >= lowest).nonzero()
        values = cosines[where[:, 0], where[:, 1]].cpu()
        rows, columns = where[:, 0].cpu() + start, where[:, 1].cpu()
        for cutoff, joined in components.items():
            mine = values >= cutoff
            joined.join(columns[mine], rows[mine] + n_small)
        mine = values >= theta
        edges.append(Edges(columns[mine], rows[mine], values[mine]))
        n_edges += len(edges[-1].cosine)
        if n_edges > MAX_EDGES:
            raise ConfigError(f"theta {theta} joins more than {MAX_EDGES:,} pairs of latents", "choose a higher theta")
    max_cosine = torch.cat(maxima)
    zero = max_cosine == -torch.inf
    return Similarity(
        max_cosine=max_cosine.masked_fill(zero, torch.nan),
        nearest=torch.cat(nearest).masked_fill(zero, -1),
        max_cosine_of_small=small_max.masked_fill(small_max == -torch.inf, torch.nan),
        edges=Edges(
            torch.cat([e.small for e in edges]),
            torch.cat([e.large for e in edges]),
            torch.cat([e.cosine for e in edges]),
        ),
        labels={cutoff: joined.labels for cutoff, joined in components.items()},
    )


def _blocks(
    small: Float[Tensor, "n_small d"], large: Float[Tensor, "n_large d"], usable: Bool[Tensor, " n_small"], block: int
) -> Iterator[tuple[int, Float[Tensor, "m n_small"]]]:
    """(first row, cosines) of each block of large rows; −inf wherever a row of norm zero takes part."""
    columns = unit_rows(small.double()).T
    for start in range(0, len(large), block):
        rows = large[start : start + block].double()
        cosines = (unit_rows(rows) @ columns).clamp_(-1.0, 1.0)
        cosines[:, ~usable] = -torch.inf
        cosines[rows.norm(dim=1) == 0] = -torch.inf
        yield start, cosines


class _Components:
    """Connected components of a graph whose edges arrive in portions; only the labels are kept between them."""

    def __init__(self, n: int) -> None:
        self.labels: Int[Tensor, " n"] = torch.arange(n)

    def join(self, a: Int[Tensor, " m"], b: Int[Tensor, " m"]) -> None:
        """Add edges a_e — b_e. Contracting what is joined already keeps the graph as small as its labels."""
        if not len(a):
            return
        n = int(self.labels.max()) + 1
        ends = (self.labels[a].numpy(), self.labels[b].numpy())
        graph = coo_array((np.ones(len(a)), ends), shape=(n, n))
        _, merged = connected_components(graph, directed=False)
        self.labels = torch.from_numpy(merged).long()[self.labels]


def random_max_cosines(
    n_small: int, large: Float[Tensor, "n_large d"], generator: torch.Generator, *, block: int | None = None
) -> Float[Tensor, " n_usable"]:
    """The null: max cosine of each large row (of norm > 0) to ``n_small`` random unit directions; float64, CPU."""
    directions = torch.randn(n_small, large.shape[1], generator=generator, dtype=torch.float64).to(large.device)
    usable = torch.ones(n_small, dtype=torch.bool, device=large.device)
    blocks = _blocks(directions, large, usable, block or max(_BLOCK // n_small, 1))
    maxima = torch.cat([cosines.amax(dim=1).cpu() for _, cosines in blocks])
    return maxima[maxima > -torch.inf]


def max_cosine_to_others(rows: Float[Tensor, "n d"], *, block: int | None = None) -> Float[Tensor, " n_usable"]:
    """Each row's largest cosine to another row of the same matrix (rows of norm 0 left out); float64, CPU."""
    usable = rows[rows.norm(dim=1) > 0]
    everyone = torch.ones(len(usable), dtype=torch.bool, device=rows.device)
    maxima = []
    for start, cosines in _blocks(usable, usable, everyone, block or max(_BLOCK // max(len(usable), 1), 1)):
        own = torch.arange(len(cosines), device=rows.device)
        cosines[own, own + start] = -torch.inf
        maxima.append(cosines.amax(dim=1).cpu())
    return torch.cat(maxima)
