"""What inserting and swapping latents does to the reconstruction, for every latent and every step, from one pass.

With u_S = x − b0 − Σ_{l ∈ S} z_l d_l for a set S of included latents, and c = b1 − b0, eq. 5 of Leask et al.
(arXiv 2502.04878) leaves the error u_S − (1 − α) c. Summed over the tokens,

    Σ‖u_S‖²           = Σ‖x − b0‖² − 2 Σ_{l ∈ S} L_l + Σ_{l,m ∈ S} C_lm
    L_l               = Σ z_l d_l·(x − b0)
    C_lm              = (Σ z_l z_m) (d_l·d_m)
    Σ‖u_S − (1−α)c‖²  = Σ‖u_S‖² − 2 (1−α) c·Σu_S + n (1−α)² ‖c‖²

so each sum over tokens belongs to a latent or to a pair of latents that fire together, and along a path it counts in
the states where the latent, or both latents, are included: running sums give every state exactly, in float64.
The pairs are products of sparse matrices: about 5 ns for each pair of latents that fire on the same token. Walking the
tokens with a running residual instead (tried first) takes 1 to 2 µs for each firing at d = 576, on the same core, and
a walk for each order; so it wins only above several hundred active latents a token. C is never held whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from saetool.core.sae import SAE
from saetool.core.stitch import Path

_ROWS, _BLOCK = 256, 8_388_608
"""Rows of C computed at once, and the most entries such a block may have (64 MB)."""


def firings(z: Float[Tensor, "n d_sae"]) -> csr_array:
    """The activations that are not zero, a sparse row per token, float64."""
    n, d_sae = z.shape
    flat = z.reshape(-1)
    where = flat.nonzero().squeeze(1)
    rows = torch.div(where, d_sae, rounding_mode="floor")
    starts = torch.zeros(n + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(rows, minlength=n).cumsum(0).cpu()
    latents = (where - rows * d_sae).int().cpu()
    return csr_array((flat[where].cpu().double().numpy(), latents.numpy(), starts.numpy()), shape=(n, d_sae))


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

    def add(self, z: csr_array, centred: Float[Tensor, "n d"]) -> None:
        """Count some tokens: their activations and x − reference."""
        rows, y = self.W_dec.numpy(), centred.numpy()
        error = centred + (self.reference - self.b_dec) - torch.from_numpy(z @ rows)
        self.squared_error += float(error.square().sum())
        fired = np.bincount(z.indices, minlength=len(rows))
        used = fired.nonzero()[0]  # in a wide SAE few of all latents fire in one batch
        local = (np.cumsum(fired > 0) - 1)[z.indices]
        narrow = csr_array((z.data, local, z.indptr), shape=(z.shape[0], len(used)))
        self.inner[used] += torch.from_numpy(np.einsum("ij,ij->i", narrow.T @ y, rows[used]))
        self.fired += torch.from_numpy(fired)
        self.total += torch.from_numpy(np.bincount(z.indices, z.data, minlength=len(rows)))
        self.squares += torch.from_numpy(np.bincount(z.indices, z.data**2, minlength=len(rows)))

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
    """Sums over tokens that belong to pairs of latents, each counted at the step of a path where it comes or goes."""

    def __init__(self, small: LatentSums, large: LatentSums, path: Path, rank: Int[Tensor, " n_large"]) -> None:
        self._small, self._large, self._path, self._rank = small.W_dec, large.W_dec, path, rank
        n_large = len(large.W_dec)
        self.along_path = torch.zeros(path.n_steps + 1, dtype=torch.float64)
        """Change of Σ_{l,m ∈ S} C_lm at each step; at 0, its value for the small SAE."""
        self.with_small = torch.zeros(n_large, dtype=torch.float64)
        """Σ_{m small} C_lm of each large latent l."""
        self.up_to = torch.zeros(n_large, dtype=torch.float64)
        """By rank: the pairs of large latents of which the later one has this rank, C_lm and C_ml."""
        self.down_to = torch.zeros(n_large, dtype=torch.float64)
        """By rank: the pairs of which the earlier one has this rank."""

    def add(self, small: csr_array, large: csr_array) -> None:
        """Count some tokens: the activations of both SAEs."""
        path = self._path
        for rows, C in _own_pairs(large, self._large):
            at = _by_order(C, path.added_at[rows], path.added_at[: rows.stop], path.n_steps + 1)
            self.along_path += at.last
            ranked = _by_order(C, self._rank[rows], self._rank[: rows.stop], len(self._rank))
            self.up_to += ranked.last
            self.down_to += ranked.first
        for rows, C in _own_pairs(small, self._small):
            at = _by_order(C, path.removed_at[rows], path.removed_at[: rows.stop], path.n_steps + 1)
            self.along_path[0] += C.sum()
            self.along_path -= at.first
        for rows, C in _cross_pairs(large, self._large, small, self._small):
            self.with_small[rows] += C.sum(1)
            enters, leaves = path.added_at[rows], path.removed_at
            C.mul_(2).mul_(enters[:, None] < leaves)  # a pair swapped in one step is never included together
            self.along_path.index_add_(0, enters, C.sum(1))
            self.along_path.index_add_(0, leaves, -C.sum(0))


class _Placed(NamedTuple):
    last: Tensor
    first: Tensor


def _by_order(C: Tensor, rows: Tensor, columns: Tensor, n: int) -> _Placed:
    """Sums of C at the later (``last``) and at the earlier (``first``) place of each pair; places are below ``n``."""
    row_is_last = C * (rows[:, None] >= columns)
    column_is_last = C - row_is_last
    last, first = torch.zeros(n, dtype=C.dtype), torch.zeros(n, dtype=C.dtype)
    last.index_add_(0, rows, row_is_last.sum(1)).index_add_(0, columns, column_is_last.sum(0))
    first.index_add_(0, columns, row_is_last.sum(0)).index_add_(0, rows, column_is_last.sum(1))
    return _Placed(last, first)


def _own_pairs(z: csr_array, W_dec: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, C[rows, : rows.stop]) with C_lm + C_ml below the diagonal, C_ll on it and 0 above: each pair once."""
    transposed = z.T.tocsr()
    for rows in _row_blocks(len(W_dec), len(W_dec)):
        products = (transposed[rows] @ z[:, : rows.stop]).toarray()
        C = torch.from_numpy(products) * (W_dec[rows] @ W_dec[: rows.stop].T)
        yield rows, C.tril_(rows.start).add_(C.tril(rows.start - 1))


def _cross_pairs(z: csr_array, W_dec: Tensor, other: csr_array, W_other: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, C[rows, :]) between the latents of two SAEs."""
    transposed = z.T.tocsr()
    for rows in _row_blocks(len(W_dec), len(W_other)):
        yield rows, torch.from_numpy((transposed[rows] @ other).toarray()) * (W_dec[rows] @ W_other.T)


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


def residual_inner(small: LatentSums, large: LatentSums, pairs: PairSums) -> Float[Tensor, " n_large"]:
    """Σ z_l d_l·e of each large latent, e = x − x̂ of the small SAE."""
    return large.inner_about(small.b_dec) - pairs.with_small


def effects(data: DataSums, small: LatentSums, large: LatentSums, pairs: PairSums) -> Float[Tensor, " n_large"]:
    """Change of the small SAE's MSE when one large latent is added, b_dec unchanged: E[z²‖d‖² − 2 z d·e] of each."""
    own = large.squares * large.W_dec.square().sum(1)
    return (own - 2 * residual_inner(small, large, pairs)) / data.n


@dataclass(frozen=True)
class Group:
    """All novel, or all reconstruction latents at one theta, added to the small SAE with its own b_dec."""

    theta: float
    n_novel: int
    n_reconstruction: int
    novel_delta: float
    """Change of the small SAE's MSE by all novel latents, relative to that MSE (0.1: 10% worse)."""
    reconstruction_delta: float


def groups(
    max_cosine: Float[Tensor, " n_large"],
    thetas: list[float],
    small: LatentSums,
    large: LatentSums,
    pairs: PairSums,
    rank: Int[Tensor, " n_large"],
) -> list[Group]:
    """The effect of adding whole groups; ``rank`` is the one ``pairs`` were counted by: ascending max cosine.

    Each novel group is then a head of the latents by rank and each reconstruction group a tail. Latents with a zero
    row (max cosine NaN) come last; they belong to neither group and add nothing.
    """
    ranked = torch.zeros_like(pairs.up_to).index_add_(0, rank, residual_inner(small, large, pairs))
    none = torch.zeros(1, dtype=torch.float64)
    head = torch.cat([none, (pairs.up_to - 2 * ranked).cumsum(0)])
    tail = torch.cat([(pairs.down_to - 2 * ranked).flip(0).cumsum(0).flip(0), none])
    mse = small.squared_error if small.squared_error > 0 else float("nan")
    result = []
    for theta in thetas:
        n = int((max_cosine < theta).sum())
        rest = int((max_cosine >= theta).sum())
        result.append(Group(theta, n, rest, float(head[n]) / mse, float(tail[n]) / mse))
    return result


def ascending_rank(max_cosine: Float[Tensor, " n_large"]) -> Int[Tensor, " n_large"]:
    """Place of each latent by ascending max cosine; NaN last, equals in order."""
    order = torch.sort(max_cosine.nan_to_num(nan=torch.inf), stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    return rank


class Prediction(NamedTuple):
    """How well max cosine predicts whether a latent helps; NaN where one of the two kinds is missing."""

    auc: float
    """Chance that a latent which raises the MSE has a larger max cosine than one which lowers it (ties count half)."""
    best_theta: float
    """The cut-off with the best balanced accuracy of "below it ⇒ lowers the MSE"; the lowest of equals."""
    best_balanced_accuracy: float


def predict(
    max_cosine: Float[Tensor, " n_large"], delta: Float[Tensor, " n_large"], usable: Bool[Tensor, " n_large"]
) -> Prediction:
    """ROC area of max cosine as predictor of the sign of the effect, over the ``usable`` latents (those that fire)."""
    mine = usable & ~max_cosine.isnan()
    lowers = max_cosine[mine & (delta < 0)].sort().values
    raises = max_cosine[mine & (delta >= 0)].sort().values
    if not len(lowers) or not len(raises):
        return Prediction(float("nan"), float("nan"), float("nan"))
    below = torch.searchsorted(lowers, raises) + torch.searchsorted(lowers, raises, right=True)
    auc = float(below.double().mean()) / 2 / len(lowers)
    values = torch.cat([lowers, raises]).unique()
    cuts = (values[1:] + values[:-1]) / 2 if len(values) > 1 else values
    novel_and_lowers = torch.searchsorted(lowers, cuts) / len(lowers)
    kept_and_raises = 1 - torch.searchsorted(raises, cuts) / len(raises)
    accuracy = (novel_and_lowers.double() + kept_and_raises.double()) / 2
    best = int(accuracy.argmax())
    return Prediction(auc, float(cuts[best]), float(accuracy[best]))
