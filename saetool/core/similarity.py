"""Cosines between the decoder rows of two SAEs, in blocks of rows (Leask et al., arXiv 2502.04878, section 4.2).

    cos(i, j) = d1_i · d0_j / (‖d1_i‖ ‖d0_j‖)      d1: rows of the large SAE, d0: rows of the small one; signed

A bipartite graph joins large latent i and small latent j wherever cos(i, j) ≥ theta. The paper leaves equality open;
with ≥ here and "novel iff max_j cos(i, j) < theta" a large latent is novel exactly when it has no edge.
Rows of norm zero have no direction: they have no edge, are neither novel nor reconstruction, and are counted apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from saetool.core.cosines import Cosines, column_maxima, near, raise_maxima, row_maxima
from saetool.core.sae import unit_rows
from saetool.errors import ConfigError

MAX_EDGES = 10_000_000
"""Listing more edges than this would take gigabytes, and a graph with so many says nothing about latents."""
_LISTED = 2**27  # cosines of which the large ones are listed at once; some 1% of them are
_CHANCE = 3.5
"""Of thousands of random unit rows nearly each has one with a cosine above this / √d: listing from there finds it."""
_CROWDED = 0.01
"""Share of all pairs above that from which listing them costs more than multiplying out the rows without an edge."""
_PENDING = 1_000_000  # edges held before their components are found


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
    """At each cut-off that has them: the connected component of every latent, small ones first."""

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

    Pairs at or above the lowest cut-off, or above what chance gives, are listed for ``block`` large rows at a time;
    rows and columns without such a pair are multiplied out for their maximum. Everything returned is decided in
    float64 (``core/cosines.py``) and depends on neither ``block`` nor the kernels.

    A cut-off other than theta that joins more than ``MAX_EDGES`` pairs gets no components. Raises ``ConfigError`` if
    all rows of one SAE are zero or theta joins that many pairs.
    """
    exact = Cosines(small, large)
    for usable, which in ((exact.usable_small, "smaller"), (exact.usable_large, "larger")):
        if not usable.any():
            raise ConfigError(f"all decoder rows of the {which} SAE are zero: nothing can be compared with it")
    components = {cutoff: _Components(len(small) + len(large)) for cutoff in (theta, *cutoffs)}
    of_small = torch.full((len(small),), -torch.inf, dtype=torch.float64, device=small.device)
    maxima, nearest, edges = [], [], []
    chance, highest = _CHANCE / small.shape[1] ** 0.5, -1.0
    for start, stop in _ranges(len(large), block or max(_LISTED // len(small), 1)):
        floor = min(*components, chance)
        rows, columns, values = near(exact, start, stop, floor)
        if len(rows) > _CROWDED * (stop - start) * len(small):
            chance = 1.0
        highest = max(highest, floor)
        of_rows = row_maxima(exact, start, stop, floor, rows, columns, values)
        maxima.append(of_rows.values.cpu())
        nearest.append(of_rows.indices.cpu())
        raise_maxima(exact, of_small, rows, columns, values)
        values = values.double()
        for cutoff in components:
            values = exact.settle(values, rows, columns, cutoff)
        mine = values >= theta
        here = rows[mine], columns[mine]
        edges.append(Edges(here[1].cpu(), here[0].cpu(), exact(*here).cpu()))
        for cutoff in list(components):
            mine = values >= cutoff
            components[cutoff].join(columns[mine].cpu(), rows[mine].cpu() + len(small))
            if components[cutoff].n_edges > MAX_EDGES:
                if cutoff == theta:
                    raise ConfigError(
                        f"theta {theta} joins more than {MAX_EDGES:,} pairs of latents", "choose a higher theta"
                    )
                del components[cutoff]
    low = (of_small < highest) & exact.usable_small  # some of their pairs below it were not listed
    of_small[low] = column_maxima(small[low], large)
    zero_large, zero_small = ~exact.usable_large.cpu(), ~exact.usable_small.cpu()
    return Similarity(
        max_cosine=torch.cat(maxima).masked_fill(zero_large, torch.nan),
        nearest=torch.cat(nearest).masked_fill(zero_large, -1),
        max_cosine_of_small=of_small.cpu().masked_fill(zero_small, torch.nan),
        edges=Edges(
            torch.cat([e.small for e in edges]),
            torch.cat([e.large for e in edges]),
            torch.cat([e.cosine for e in edges]),
        ),
        labels={cutoff: joined.finished() for cutoff, joined in components.items()},
    )


def _ranges(n: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, n)) for start in range(0, n, size)]


class _Components:
    """Connected components of a graph whose edges arrive in portions; few edges are held at a time."""

    def __init__(self, n: int) -> None:
        self._labels: Int[Tensor, " n"] = torch.arange(n)
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._n_pending = 0
        self.n_edges = 0

    def join(self, a: Int[Tensor, " m"], b: Int[Tensor, " m"]) -> None:
        """Add edges a_e — b_e."""
        self._pending.append((a, b))
        self._n_pending += len(a)
        self.n_edges += len(a)
        if self._n_pending > _PENDING:
            self.finished()

    def finished(self) -> Int[Tensor, " n"]:
        """The component of each node. Contracting what is joined keeps the graph as small as its labels."""
        if self._n_pending:
            n = int(self._labels.max()) + 1
            a, b = (self._labels[torch.cat(ends)].numpy() for ends in zip(*self._pending, strict=True))
            graph = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(n, n))
            _, merged = connected_components(graph, directed=False)
            self._labels = torch.from_numpy(merged).long()[self._labels]
        self._pending, self._n_pending = [], 0
        return self._labels


def random_directions(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    """A null: ``n`` random unit directions."""
    return unit_rows(torch.randn(n, d, generator=generator))


def shuffled_coordinates(rows: Float[Tensor, "n d"], generator: torch.Generator) -> Float[Tensor, "n d"]:
    """A null: each coordinate permuted among the rows, so that it keeps its distribution (outlier dimensions too)."""
    shuffled = torch.empty_like(rows)
    for i in range(rows.shape[1]):
        shuffled[:, i] = rows[torch.randperm(len(rows), generator=generator), i]
    return shuffled
