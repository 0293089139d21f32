"""The order in which rows are visited: a pure function of (seed, position).

That is what makes a resumed run equal to an undisturbed one, bit for bit.

Each epoch cuts the rows into blocks of consecutive ones, puts the blocks into a random order, and mixes the rows of
each ``n_mixed`` blocks in that order among each other. Blocks are read in one piece, so a set larger than memory is
read at the speed of the disk, and rows that follow each other come from anywhere in it. A set of no more than
``block · n_mixed`` rows is permuted as a whole.
"""

from bisect import bisect_right

import torch
from jaxtyping import Int
from torch import Tensor


class Order:
    """The endless shuffled stream of row numbers 0 … n-1: each epoch a fresh order drawn from (seed, epoch)."""

    def __init__(self, n_rows: int, seed: int, *, block: int = 1024, n_mixed: int | None = None) -> None:
        """``n_mixed`` None: every epoch is one permutation of all rows."""
        self.n_rows = n_rows
        self._seed = seed
        whole = n_mixed is None or block * n_mixed >= n_rows
        self._block, self._n_mixed = (n_rows, 1) if whole else (block, int(n_mixed or 1))
        self._epoch = -1
        self._starts: list[int] = []
        self._blocks = torch.empty(0, dtype=torch.int64)
        self._mixed: tuple[tuple[int, int], Tensor] | None = None

    @property
    def whole(self) -> bool:
        """Whether an epoch is one permutation of all rows."""
        return self._block == self.n_rows

    def spans(self, position: int, size: int) -> list[tuple[tuple[int, int], int, int]]:
        """The stretch ``position`` … + ``size`` of the stream as parts of buffers: (buffer, first, end)."""
        parts = []
        while size:
            epoch, offset = divmod(position, self.n_rows)
            self._enter(epoch)
            buffer = bisect_right(self._starts, offset) - 1
            first = offset - self._starts[buffer]
            end = min(first + size, self._starts[buffer + 1] - self._starts[buffer])
            parts.append(((epoch, buffer), first, end))
            position, size = position + end - first, size - (end - first)
        return parts

    def following(self, buffer: tuple[int, int]) -> tuple[int, int]:
        """The buffer after ``buffer``."""
        self._enter(buffer[0])
        epoch, number = buffer
        return (epoch, number + 1) if number + 2 < len(self._starts) else (epoch + 1, 0)

    def blocks(self, buffer: tuple[int, int]) -> list[tuple[int, int]]:
        """Ranges of rows (first, end) that ``buffer`` mixes, in the order in which they are put into it."""
        self._enter(buffer[0])
        mine = self._blocks[buffer[1] * self._n_mixed : (buffer[1] + 1) * self._n_mixed]
        return [(b * self._block, min((b + 1) * self._block, self.n_rows)) for b in mine.tolist()]

    def mixing(self, buffer: tuple[int, int]) -> Int[Tensor, " n"]:
        """The order of visit of the rows of ``buffer``: places in it. The last one asked for is remembered."""
        if self._mixed is None or self._mixed[0] != buffer:
            epoch, number = buffer
            n = sum(end - first for first, end in self.blocks(buffer))
            part = None if self.whole else number + 1
            self._mixed = buffer, torch.randperm(n, generator=seeded(self._seed, epoch, part))
        return self._mixed[1]

    def rows(self, step: int, size: int) -> Int[Tensor, " size"]:
        """Rows of the ``step``-th batch of ``size``: positions step·size … of the stream."""
        parts = []
        for buffer, first, end in self.spans(step * size, size):
            places = torch.cat([torch.arange(a, b) for a, b in self.blocks(buffer)])
            parts.append(places[self.mixing(buffer)[first:end]])
        return torch.cat(parts)

    def _enter(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        n_blocks = -(-self.n_rows // self._block)
        self._blocks = torch.randperm(n_blocks, generator=seeded(self._seed, epoch, 0))
        sizes = torch.full((n_blocks,), self._block, dtype=torch.int64)
        sizes[-1] = self.n_rows - (n_blocks - 1) * self._block
        ends = sizes[self._blocks].cumsum(0)
        last = torch.arange(self._n_mixed, n_blocks + self._n_mixed, self._n_mixed).clamp_max(n_blocks) - 1
        self._starts = [0, *ends[last].tolist()]
        self._epoch = epoch


def seeded(seed: int, epoch: int, part: int | None = None) -> torch.Generator:
    """A generator of its own for each epoch and, within it, each part."""
    number = seed * 1_000_003 + epoch
    if part is not None:  # splitmix64, so that neighbouring numbers give unlike streams
        number = (number * 0x9E3779B97F4A7C15 + part * 0xD1342543DE82EF95) % 2**64
        number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        number = (number ^ (number >> 31)) % 2**63
    return torch.Generator().manual_seed(number)
