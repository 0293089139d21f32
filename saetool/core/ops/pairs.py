"""The active (token, latent) pairs of a batch."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Found(NamedTuple):
    """Pairs row after row, latents ascending within."""

    rows: Int[Tensor, " pairs"]
    latents: Int[Tensor, " pairs"]
    values: Float[Tensor, " pairs"]


@dataclass(frozen=True)
class Pairs:
    """Active pairs, sorted by latent and then by row: the order in which gradients of latents are summed."""

    rows: Int[Tensor, " pairs"]
    latents: Int[Tensor, " pairs"]
    values: Float[Tensor, " pairs"]
    n_rows: int
    n_latents: int

    @cached_property
    def latent_starts(self) -> Int[Tensor, " d_sae"]:
        """Where each latent's pairs begin."""
        return _starts(self.latents, self.n_latents)

    @cached_property
    def by_row(self) -> Int[Tensor, " pairs"]:
        """The permutation that sorts the pairs by row, latents ascending within."""
        return sorted_by(self.rows, self.n_rows)

    @cached_property
    def row_starts(self) -> Int[Tensor, " n"]:
        """Where each row's pairs begin, in the order ``by_row``."""
        return _starts(self.rows, self.n_rows)

    @cached_property
    def latents_by_row(self) -> Int[Tensor, " pairs"]:
        return self.latents[self.by_row]

    def firings(self) -> Int[Tensor, " d_sae"]:
        """Pairs of each latent."""
        return _counts(self.latents, self.n_latents)

    def subset(self, keep: Bool[Tensor, " pairs"] | slice, values: Float[Tensor, " kept"] | None = None) -> "Pairs":
        """Some of the pairs, in the same order."""
        return Pairs(self.rows[keep], self.latents[keep], self.values[keep], self.n_rows, self.n_latents)

    def dense(self) -> Float[Tensor, "n d_sae"]:
        """The activations as a matrix."""
        z = torch.zeros(self.n_rows, self.n_latents, dtype=self.values.dtype, device=self.values.device)
        z[self.rows, self.latents] = self.values
        return z


def sorted_by(keys: Int[Tensor, " pairs"], n: int) -> Int[Tensor, " pairs"]:
    """The stable permutation that sorts ``keys`` below ``n``."""
    # A radix sort passes once for each byte of its keys: two take a third of the time of eight.
    return torch.argsort(keys.short() if n <= 2**15 else keys.int(), stable=True)


def from_dense(z: Float[Tensor, "n d_sae"]) -> Pairs:
    """The pairs of the positive entries of ``z``."""
    latents, rows = (z.T > 0).nonzero(as_tuple=True)
    return Pairs(rows, latents, z[rows, latents], *z.shape)


def _starts(keys: Tensor, n: int) -> Tensor:
    counts = _counts(keys, n)
    return counts.cumsum(0) - counts


def _counts(keys: Tensor, n: int) -> Tensor:
    # torch.bincount looks for the largest key first, for which a CUDA device must be waited for.
    return keys.new_zeros(n).scatter_add_(0, keys, torch.ones_like(keys))
