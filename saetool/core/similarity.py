"""Cosines between the decoder rows of two SAEs, in blocks of rows (Leask et al., arXiv 2502.04878, section 4.2).

    cos(i, j) = d1_i · d0_j / (‖d1_i‖ ‖d0_j‖)      d1: rows of the large SAE, d0: rows of the small one; signed

A bipartite graph joins large latent i and small latent j wherever cos(i, j) ≥ theta. The paper leaves equality open;
with ≥ here and "novel iff max_j cos(i, j) < theta" a large latent is novel exactly when it has no edge.
Rows of norm zero have no direction: they have no edge, are neither novel nor reconstruction, and are counted apart.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
_BLOCK = 8_388_608  # entries of one block of cosines: 32 MB
_PAIRS = 8192  # rows that are made float64 at once
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

    Products are float32, ``block`` large rows at a time (memory is block × n_small), and only screen: every cosine that
    is within their rounding error of a cut-off or of its row's largest is computed again in float64, so that edges,
    components, ``nearest`` and ``max_cosine`` are those of float64 and do not depend on ``block``. Of a small latent's
    near-equals (1e-5) any may give ``max_cosine_of_small``.

    A cut-off other than theta that joins more than ``MAX_EDGES`` pairs gets no components. Raises ``ConfigError`` if
    all rows of one SAE are zero or theta joins that many pairs.
    """
    exact = _Cosines(small, large)
    for usable, which in ((exact.usable_small, "smaller"), (exact.usable_large, "larger")):
        if not usable.any():
            raise ConfigError(f"all decoder rows of the {which} SAE are zero: nothing can be compared with it")
    components = {cutoff: _Components(len(small) + len(large)) for cutoff in (theta, *cutoffs)}
    best_of_small = torch.full((len(small),), -torch.inf, device=small.device)
    at_small = torch.zeros(len(small), dtype=torch.int64, device=small.device)
    maxima, nearest, edges = [], [], []
    for start, cosines in _blocks(exact, block):
        of_rows = _row_maxima(exact, start, cosines)
        maxima.append(of_rows.values.cpu())
        nearest.append(of_rows.indices.cpu())
        of_columns = cosines.amax(dim=0)
        better = (of_columns > best_of_small).nonzero().squeeze(1)
        best_of_small[better] = of_columns[better]
        at_small[better] = cosines[:, better].argmax(dim=0) + start
        rows, columns = _at_least(cosines, min(components) - exact.slack)
        values = cosines[rows, columns].double()
        rows += start
        for cutoff in list(components):
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
    zero_large, zero_small = ~exact.usable_large.cpu(), ~exact.usable_small.cpu()
    everyone = torch.arange(len(small), device=small.device)
    return Similarity(
        max_cosine=torch.cat(maxima).masked_fill(zero_large, torch.nan),
        nearest=torch.cat(nearest).masked_fill(zero_large, -1),
        max_cosine_of_small=exact(at_small, everyone).cpu().masked_fill(zero_small, torch.nan),
        edges=Edges(
            torch.cat([e.small for e in edges]),
            torch.cat([e.large for e in edges]),
            torch.cat([e.cosine for e in edges]),
        ),
        labels={cutoff: joined.finished() for cutoff, joined in components.items()},
    )


class _Cosines:
    """Cosines between chosen rows of two matrices in float64, and what screening by float32 products needs."""

    def __init__(self, small: Float[Tensor, "n_small d"], large: Float[Tensor, "n_large d"]) -> None:
        self.small, self.large = small, large
        self._small_norms, self._large_norms = _norms(small), _norms(large)
        self.usable_small, self.usable_large = self._small_norms > 0, self._large_norms > 0
        self.slack = (small.shape[1] + 4) * 2.0**-24
        """A float32 product of two unit rows is at most this far from their cosine."""

    def __call__(self, rows: Int[Tensor, " n"], columns: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """cos(large row, small column) of each pair; 0 where a row is zero."""
        parts = [torch.zeros(0, dtype=torch.float64, device=self.small.device)]
        for mine, theirs in zip(rows.split(_PAIRS), columns.split(_PAIRS), strict=True):
            norms = self._large_norms[mine] * self._small_norms[theirs]
            inner = (self.large[mine].double() * self.small[theirs].double()).sum(1)
            parts.append((inner / norms.clamp_min(torch.finfo(torch.float64).tiny)).clamp_(-1.0, 1.0))
        return torch.cat(parts)

    def settle(self, values: Tensor, rows: Tensor, columns: Tensor, cutoff: float) -> Tensor:
        """``values`` with those too near to ``cutoff`` to tell the side computed in float64."""
        near = ((values - cutoff).abs() <= self.slack).nonzero().squeeze(1)
        values[near] = self(rows[near], columns[near])
        return values


class _Maxima(NamedTuple):
    values: Float[Tensor, " m"]
    indices: Int[Tensor, " m"]


def _row_maxima(exact: _Cosines, start: int, cosines: Float[Tensor, "m n_small"]) -> _Maxima:
    """The largest cosine of each row, in float64, and the first column that has it."""
    floor = cosines.amax(dim=1, keepdim=True) - 2 * exact.slack
    rows, columns = _at_least(cosines, floor)
    values = exact(rows + start, columns)
    best = torch.full((len(cosines),), -torch.inf, dtype=torch.float64, device=cosines.device)
    best = best.scatter_reduce(0, rows, values, "amax")
    winners = values == best[rows]
    first = torch.full((len(cosines),), cosines.shape[1], device=cosines.device)
    return _Maxima(best, first.scatter_reduce(0, rows[winners], columns[winners], "amin"))


def _at_least(cosines: Float[Tensor, "m n"], floor: Tensor | float) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries ≥ ``floor`` that are not −inf, row after row."""
    if cosines.device.type == "cpu":  # NumPy's comparison and search are several times as fast as torch's here
        values = cosines.numpy()
        low = floor.numpy() if isinstance(floor, Tensor) else np.float32(floor)
        flat = torch.from_numpy(np.flatnonzero(values >= low))
    else:
        flat = (cosines >= floor).view(-1).nonzero().squeeze(1)
    flat = flat[cosines.view(-1)[flat] > -torch.inf]
    return torch.div(flat, cosines.shape[1], rounding_mode="floor"), flat % cosines.shape[1]


def _norms(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Norms in float64, without a float64 copy of the whole."""
    return torch.cat([part.double().norm(dim=1) for part in rows.split(_PAIRS)])


def _unit_float32(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return torch.cat([unit_rows(part.double()).float() for part in rows.split(_PAIRS)])


def _blocks(exact: _Cosines, block: int | None) -> Iterator[tuple[int, Float[Tensor, "m n_small"]]]:
    """(first row, cosines in float32) of each block of large rows; −inf wherever a row of norm zero takes part."""
    columns = _unit_float32(exact.small)
    absent = (~exact.usable_small).nonzero().squeeze(1)
    for start in range(0, len(exact.large), block := block or max(_BLOCK // len(columns), 1)):
        mine = slice(start, start + block)
        cosines = _unit_float32(exact.large[mine]) @ columns.T
        if len(absent):
            cosines[:, absent] = -torch.inf
        if not exact.usable_large[mine].all():
            cosines[~exact.usable_large[mine]] = -torch.inf
        yield start, cosines


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


def max_cosines(
    small: Float[Tensor, "n_small d"], large: Float[Tensor, "n_large d"], *, block: int | None = None
) -> Float[Tensor, " n_usable"]:
    """Max cosine of each large row (of norm > 0) to ``small``'s rows; float32 products, as float64 on the CPU."""
    maxima = torch.cat([c.amax(dim=1).cpu() for _, c in _blocks(_Cosines(small, large), block)])
    return maxima[maxima > -torch.inf].double().clamp_(-1.0, 1.0)


def random_directions(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    """A null: ``n`` random unit directions."""
    return unit_rows(torch.randn(n, d, generator=generator))


def shuffled_coordinates(rows: Float[Tensor, "n d"], generator: torch.Generator) -> Float[Tensor, "n d"]:
    """A null: each coordinate permuted among the rows, so that it keeps its distribution (outlier dimensions too)."""
    shuffled = torch.empty_like(rows)
    for i in range(rows.shape[1]):
        shuffled[:, i] = rows[torch.randperm(len(rows), generator=generator), i]
    return shuffled


def max_cosine_to_others(rows: Float[Tensor, "n d"], *, block: int | None = None) -> Float[Tensor, " n_usable"]:
    """Each row's largest cosine to another row of the same matrix (rows of norm 0 left out); float64, CPU."""
    usable = rows[rows.norm(dim=1) > 0].double()
    columns = unit_rows(usable).T
    block = block or max(_BLOCK // max(len(usable), 1), 1)
    maxima = [torch.zeros(0, dtype=torch.float64)]
    for start in range(0, len(usable), block):
        cosines = (unit_rows(usable[start : start + block]) @ columns).clamp_(-1.0, 1.0)
        own = torch.arange(len(cosines), device=rows.device)
        cosines[own, own + start] = -torch.inf
        maxima.append(cosines.amax(dim=1).cpu())
    return torch.cat(maxima)
