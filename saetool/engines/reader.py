"""Batches of activations from a cache.

The order of training batches is a pure function of (seed, step): epoch e visits all rows in the order of a random
permutation drawn from (seed, e). That is what makes a resumed run equal to an undisturbed one, bit for bit.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetool.artifacts.cache import Cache
from saetool.errors import ArtifactError


class Order:
    """The endless shuffled stream of row numbers 0 … n-1: each epoch a fresh permutation from (seed, epoch)."""

    def __init__(self, n_rows: int, seed: int) -> None:
        self._n_rows, self._seed = n_rows, seed
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def rows(self, step: int, size: int) -> Int[Tensor, " size"]:
        """Rows of the ``step``-th batch of ``size``: positions step·size … of the stream."""
        parts, position, wanted = [], step * size, size
        while wanted:
            epoch, offset = divmod(position, self._n_rows)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
                self._permutation = torch.randperm(self._n_rows, generator=generator)
                self._epoch = epoch
            rows = self._permutation[offset : offset + wanted]
            parts.append(rows)
            position += len(rows)
            wanted -= len(rows)
        return torch.cat(parts)


class Reader:
    """Shuffled or sequential batches of one split, float32 on ``device``, multiplied by ``scale``."""

    def __init__(self, cache: Cache, split: str, *, seed: int = 0, device: str = "cpu", scale: float = 1.0) -> None:
        self._acts = [tensors["acts"] for tensors in cache.iter_split(split)]
        self._starts = torch.tensor([0, *(a.shape[0] for a in self._acts)]).cumsum(0)
        self.n_rows = int(self._starts[-1])
        if not self.n_rows:
            raise ArtifactError(f"{cache.path}: its {split} split is empty", "cache more text")
        self.d_in = cache.d_in
        self.device = device
        self.scale = scale
        self._order = Order(self.n_rows, seed)

    def batch(self, step: int, size: int) -> Float[Tensor, "size d_in"]:
        """The ``step``-th training batch of ``size`` rows: rows step·size … of the endless shuffled stream."""
        return self._finish(self._gather(self._order.rows(step, size)))

    def sequential(self, size: int, limit: int | None = None) -> Iterator[Float[Tensor, "size d_in"]]:
        """All rows (the first ``limit``) in stored order, ``size`` at a time; the last batch may be smaller."""
        end = self.n_rows if limit is None else min(limit, self.n_rows)
        for start in range(0, end, size):
            yield self._finish(self._gather(torch.arange(start, min(start + size, end))))

    def _gather(self, rows: Tensor) -> Tensor:
        shard = torch.searchsorted(self._starts, rows, right=True) - 1
        out = torch.empty(len(rows), self.d_in, dtype=self._acts[0].dtype)
        for index in shard.unique().tolist():
            mine = shard == index
            out[mine] = self._acts[index][rows[mine] - self._starts[index]]
        return out

    def _finish(self, acts: Tensor) -> Tensor:
        acts = acts.to(self.device, torch.float32)
        return acts * self.scale if self.scale != 1.0 else acts
