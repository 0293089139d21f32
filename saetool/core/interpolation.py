"""What inserting and swapping latents does to the reconstruction, for every latent and every step, from one pass.

With u_S = x − b0 − Σ_{l ∈ S} z_l d_l for a set S of included latents, and c = b1 − b0, eq. 5 of Leask et al.
(arXiv 2502.04878) leaves the error u_S − (1 − α) c. Summed over the tokens,

    Σ‖u_S‖²           = Σ‖x − b0‖² − 2 Σ_{l ∈ S} L_l + Σ_{l,m ∈ S} C_lm
    L_l               = Σ z_l d_l·(x − b0)
    C_lm              = (Σ z_l z_m) (d_l·d_m)
    Σ‖u_S − (1−α)c‖²  = Σ‖u_S‖² − 2 (1−α) c·Σu_S + n (1−α)² ‖c‖²

so each sum over tokens belongs to a latent or to a pair of latents that fire together, and along a path it counts in
the states where the latent, or both latents, are included: running sums give every state exactly, in float64.
The pairs are products of sparse matrices: 5 to 15 ns for each pair of latents that fire on the same token. Walking the
tokens with a running residual instead (tried first) takes 1 to 2 µs for each firing at d = 576, on the same core, and
a walk for each order; so it wins only above several hundred active latents a token. C is never held whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from saetool.core import ops
from saetool.core.sae import SAE
from saetool.core.sparse import Codes
from saetool.core.stitch import Partition, Path

_ROWS, _BLOCK = 256, 8_388_608
"""Rows of C computed at once, and the most entries such a block may have (64 MB)."""
_CACHED = 16
"""Rows of C compared at once: what stays in a core's cache is read again in half the time."""
_SLICES = 8
"""How often the first columns of the activations are taken, which reads them all; what is too much is cut off."""


def firings(codes: Codes) -> csr_array:
    """The active pairs as a sparse row per token, float64, on the CPU."""
    starts = torch.zeros(codes.n + 1, dtype=torch.int32)
    starts[1:] = codes.counts.cumsum(0).cpu()
    values, latents = codes.values.cpu().double().numpy(), codes.latents.cpu().int().numpy()
    return csr_array((values, latents, starts.numpy()), shape=(codes.n, codes.d_sae))


def _pairs(z: csr_array) -> ops.Pairs:
    """The same pairs, latent after latent."""
    columns = z.tocsc()
    latents = np.repeat(np.arange(z.shape[1]), np.diff(columns.indptr))
    rows, latents, values = (torch.from_numpy(part) for part in (columns.indices, latents, columns.data))
    return ops.Pairs(rows.long(), latents, values, *z.shape)


class LatentSums:
    """Sums over tokens that belong to single latents of one SAE, and its own squared error. Float64, CPU."""

    def __init__(self, sae: SAE, reference: Float[Tensor, " d"]) -> None:
        self.W_dec: Float[Tensor, "d_sae d"] = sae.W_dec.double().cpu()
        self.b_dec: Float[Tensor, " d"] = sae.b_dec.double().cpu()
        self.reference = reference
        self.fired = torch.zeros(sae.d_sae, dtype=torch.int64)
        """Tokens with z > 0."""
        self.total = torch.zeros(sae.d_sae, dtype=torch.float64)
        """Σ z."""
        self.squares = torch.zeros(sae.d_sae, dtype=torch.float64)
        """Σ z²."""
        self.inner = torch.zeros(sae.d_sae, dtype=torch.float64)
        """Σ z d·(x − reference)."""
        self.squared_error = 0.0
        """Σ ‖x − x̂‖² with x̂ decoded from all latents: what the ends of a path must come to."""
        self.error = torch.zeros_like(self.b_dec)
        """Σ (x − x̂)."""

    def add(self, z: csr_array, centred: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Count some tokens: their activations and x − reference. Returns ‖x − x̂‖² of each."""
        rows = self.W_dec.numpy()
        error = centred + (self.reference - self.b_dec) - torch.from_numpy(z @ rows)
        squares = error.square().sum(1)
        self.squared_error += float(squares.sum())
        self.error += error.sum(0)
        pairs = _pairs(z)
        weighted = pairs.values * ops.pair_dots(pairs, centred, self.W_dec)
        self.inner += torch.bincount(pairs.latents, weighted, minlength=len(rows))
        self.fired += pairs.firings()
        self.total += torch.bincount(pairs.latents, pairs.values, minlength=len(rows))
        self.squares += torch.bincount(pairs.latents, pairs.values.square(), minlength=len(rows))
        return squares

    def inner_about(self, centre: Float[Tensor, " d"]) -> Float[Tensor, " d_sae"]:
        """Σ z d·(x − centre)."""
        return self.inner - self.total * (self.W_dec @ (centre - self.reference))


class DataSums:
    """Sums over the tokens themselves: n, Σ(x − reference) and Σ‖x − reference‖²."""

    def __init__(self, reference: Float[Tensor, " d"]) -> None:
        self.reference = reference
        self.n = 0
        self.total = torch.zeros_like(reference)
        self.squares = 0.0

    def add(self, centred: Float[Tensor, "n d"]) -> None:
        self.n += len(centred)
        self.total += centred.sum(0)
        self.squares += float(centred.square().sum())

    def total_about(self, centre: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Σ(x − centre)."""
        return self.total - self.n * (centre - self.reference)

    def squares_about(self, centre: Float[Tensor, " d"]) -> float:
        """Σ‖x − centre‖²."""
        shift = centre - self.reference
        return self.squares - 2 * float(shift @ self.total) + self.n * float(shift @ shift)


class PairSums:
    """Sums over tokens that belong to pairs of latents, each counted where it matters.

    That is: at the step of a path, and at the place in other orders of the large latents, where a pair comes or goes;
    at its latent; at its component.
    """

    def __init__(
        self,
        small: LatentSums,
        large: LatentSums,
        path: Path,
        parts: Partition,
        nearest: Int[Tensor, " n_large"],
        ranks: Int[Tensor, "n_orders n_large"],
    ) -> None:
        """``nearest``: the small latent nearest to each large one; ``ranks``: places of the latents in some orders."""
        self._small, self._large, self._path, self._parts = small.W_dec, large.W_dec, path, parts
        self.nearest, self.ranks = nearest, ranks
        n_small, n_large = len(small.W_dec), len(large.W_dec)
        self.along_path = torch.zeros(path.n_steps + 1, dtype=torch.float64)
        """Change of Σ_{l,m ∈ S} C_lm at each step; at 0, its value for the small SAE."""
        self.with_small = torch.zeros(n_large, dtype=torch.float64)
        """Σ_{m small} C_lm of each large latent l."""
        self.among_small = torch.zeros(n_small, dtype=torch.float64)
        """Σ_{m small} C_lm of each small latent l, itself included."""
        self.up_to = torch.zeros(ranks.shape, dtype=torch.float64)
        """By place in each order: the pairs of large latents of which the later one is there, C_lm and C_ml."""
        self.down_to = torch.zeros(ranks.shape, dtype=torch.float64)
        """By place: the pairs of which the earlier one is there."""
        self.swapped = torch.zeros(parts.n_components, dtype=torch.float64)
        """Σ ‖δ‖² of each component, δ = what its large members write − what its small members write."""
        self.with_nearest = torch.zeros(n_large, dtype=torch.float64)
        """Σ z_l z_m of each large latent l, m the small one nearest to it."""

    def add(self, small: csr_array, large: csr_array) -> None:
        """Count some tokens: the activations of both SAEs."""
        path, of_small, of_large = self._path, self._parts.component_of_small, self._parts.component_of_large
        for rows, C in _own_pairs(large, self._large):
            sums = C.sum(1), C.sum(0)
            at = _by_order(C, sums, path.added_at[rows], path.added_at[: rows.stop], path.n_steps + 1)
            self.along_path += at.last
            for rank, up_to, down_to in zip(self.ranks, self.up_to, self.down_to, strict=True):
                at = _by_order(C, sums, rank[rows], rank[: rows.stop], len(rank))
                up_to += at.last
                down_to += at.first
            self._within(C, of_large[rows], of_large[: rows.stop])
        for rows, C in _own_pairs(small, self._small):
            sums = C.sum(1), C.sum(0)
            at = _by_order(C, sums, path.removed_at[rows], path.removed_at[: rows.stop], path.n_steps + 1)
            self.along_path[0] += C.sum()
            self.along_path -= at.first
            self.among_small[rows] += sums[0] / 2  # C holds each pair twice, and a latent with itself once
            self.among_small[: rows.stop] += sums[1] / 2
            self._within(C, of_small[rows], of_small[: rows.stop])
        for rows, C, products in _cross_pairs(large, self._large, small, self._small):
            self.with_small[rows] += C.sum(1)
            self.with_nearest[rows] += products.gather(1, self.nearest[rows, None].clamp_min(0)).squeeze(1)
            C.mul_(2)
            self._within(-C, of_large[rows], of_small)
            enters, leaves = path.added_at[rows], path.removed_at
            C.mul_(enters[:, None] < leaves)  # a pair swapped in one step is never included together
            self.along_path.index_add_(0, enters, C.sum(1))
            self.along_path.index_add_(0, leaves, -C.sum(0))

    def _within(self, C: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Add the entries of C whose two latents belong to the same component to that component's sum."""
        mine = (rows >= 0).nonzero().squeeze(1)
        if len(mine):
            same = torch.where(rows[mine, None] == columns, C[mine], 0.0)
            self.swapped.index_add_(0, rows[mine], same.sum(1))


class _Placed(NamedTuple):
    last: Tensor
    first: Tensor


def _by_order(C: Tensor, sums: tuple[Tensor, Tensor], rows: Tensor, columns: Tensor, n: int) -> _Placed:
    """Sums of C at the later (``last``) and at the earlier (``first``) place of each pair; places are below ``n``.

    ``sums``: those of C's rows and of its columns.
    """
    of_rows, of_columns = [], torch.zeros_like(sums[1])
    for part, their in zip(C.split(_CACHED), rows.split(_CACHED), strict=True):
        row_is_last = (their[:, None] >= columns) * part
        of_rows.append(row_is_last.sum(1))
        of_columns += row_is_last.sum(0)
    of_rows = torch.cat(of_rows)
    last, first = torch.zeros(n, dtype=C.dtype), torch.zeros(n, dtype=C.dtype)
    last.index_add_(0, rows, of_rows).index_add_(0, columns, sums[1] - of_columns)
    first.index_add_(0, columns, of_columns).index_add_(0, rows, sums[0] - of_rows)
    return _Placed(last, first)


def _own_pairs(z: csr_array, W_dec: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, C[rows, : rows.stop]) with C_lm + C_ml below the diagonal, C_ll on it and 0 above: each pair once."""
    transposed = z.T.tocsr()
    blocks = _row_blocks(len(W_dec), len(W_dec))
    each = -(-len(blocks) // _SLICES)
    for number, rows in enumerate(blocks):
        if number % each == 0:
            first = z[:, : blocks[min(number + each, len(blocks)) - 1].stop]
        products = (transposed[rows] @ first).toarray()[:, : rows.stop]
        C = torch.from_numpy(products) * (W_dec[rows] @ W_dec[: rows.stop].T)
        yield rows, C.tril_(rows.start).add_(C.tril(rows.start - 1))


def _cross_pairs(
    z: csr_array, W_dec: Tensor, other: csr_array, W_other: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, C[rows, :], Σ z_l z_m of the same pairs) between the latents of two SAEs."""
    transposed = z.T.tocsr()
    for rows in _row_blocks(len(W_dec), len(W_other)):
        products = torch.from_numpy((transposed[rows] @ other).toarray())
        yield rows, products * (W_dec[rows] @ W_other.T), products


def _row_blocks(n: int, width: int) -> list[slice]:
    size = max(min(_ROWS, _BLOCK // width), 1)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


@dataclass(frozen=True)
class Curve:
    """The stitched SAE in every state of a path, from the small SAE (first) to the large one (last)."""

    mse: Float[Tensor, " n_states"]
    """Squared error summed over d, mean over tokens."""
    l0: Float[Tensor, " n_states"]
    """Active latents per token; additive over latents."""
    n_latents: Int[Tensor, " n_states"]


def curve(data: DataSums, small: LatentSums, large: LatentSums, pairs: PairSums, path: Path, bias: str) -> Curve:
    """MSE and L0 of eq. 5 in every state of ``path``. ``bias``: eq. 5's α, or the small or the large SAE's b_dec."""

    def included(of_small: Tensor, of_large: Tensor) -> Tensor:
        """Σ over the included latents, in every state."""
        changes = torch.zeros(path.n_steps + 1, dtype=torch.float64)
        changes[0] = of_small.double().sum()
        changes.index_add_(0, path.added_at, of_large.double()).index_add_(0, path.removed_at, -of_small.double())
        return changes.cumsum(0)

    b, c = small.b_dec, large.b_dec - small.b_dec
    inner = included(small.inner_about(b), large.inner_about(b))
    squares = data.squares_about(b) - 2 * inner + pairs.along_path.cumsum(0)
    along_c = c @ data.total_about(b) - included(small.total * (small.W_dec @ c), large.total * (large.W_dec @ c))
    share = {"eq5": 1 - path.alpha(), "small": torch.zeros(()), "large": torch.ones(())}[bias].double()
    error = squares - 2 * share * along_c + data.n * share.square() * (c @ c)
    n_small, n_large = path.included()
    return Curve(error / data.n, included(small.fired, large.fired) / data.n, n_small + n_large)
