"""Batches of activations from a cache, shuffled or in stored order.

Shards are memory-mapped. Shuffled batches come from a mixing buffer (see ``order``) of whole blocks of rows in their
stored type; rows are made float32 when they leave it. The buffer after it is filled in step, as many rows with each
batch as the batch takes, by the same threads: a thread of its own would fight with them for the processor. It only
looks ahead: it touches what will be copied, so that it is in memory by then.
"""

from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from saetool.artifacts.cache import Cache
from saetool.core.quantize import dequantize_rows
from saetool.engines.background import stand_back
from saetool.engines.order import Order
from saetool.errors import ArtifactError

BLOCK = 1024
"""Consecutive rows that are read in one piece: some ten contexts."""
BUFFER_NUMBERS = 2**27
"""Numbers in a mixing buffer: 256 MiB of bfloat16, 233 thousand rows of width 576. There are two buffers."""
GATHERED = 512
"""Rows that are gathered and made float32 at once."""
PAGE = 4096
"""Bytes that the system reads at least."""

__all__ = ["BLOCK", "BUFFER_NUMBERS", "Order", "Reader", "Statistics", "select_rows"]


@dataclass(frozen=True)
class Statistics:
    """What training wants to know of its rows, as they are stored (not scaled)."""

    mean: Float64[Tensor, " d"]
    geometric_median: Float64[Tensor, " d"]
    mean_sq_norm: float
    """E‖x‖²."""


def select_rows(
    cache: Cache, split: str, *, special: bool = True, max_norm: float | None = None
) -> Bool[Tensor, " rows"]:
    """Which rows of ``split`` to read: without position 0 and the special tokens unless ``special``, and without those
    of a norm above ``max_norm`` times the median. For a cache that was made with rows that training shall not see."""
    keep = torch.ones(cache.rows(split), dtype=torch.bool)
    if not special:
        ends = (cache.header.config.get("bos_id"), cache.header.config.get("separator_id"))
        dropped = torch.tensor([i for i in (*cache.header.config.get("dropped_ids", ()), *ends) if i is not None])
        keep &= cache.row_tensor(split, "positions") != 0
        keep &= ~torch.isin(cache.row_tensor(split, "tokens"), dropped.int())
    if max_norm is not None:
        norms = torch.cat([part["acts"].float().norm(dim=1) for part in cache.iter_split(split)])
        keep &= norms <= max_norm * norms.median()
    return keep


@dataclass
class _Buffer:
    """A mixing buffer, and how far it is filled."""

    rows: dict[str, Tensor]
    n: int
    """Rows that it is to hold; ``rows`` may have room for more."""
    blocks: list[tuple[int, int]]
    """Ranges of rows of the split, still to be copied into it."""
    filled: int = 0


class Reader:
    """Batches of one split, float32 on ``device``, multiplied by ``scale``."""

    def __init__(
        self,
        cache: Cache,
        split: str,
        *,
        seed: int = 0,
        device: str = "cpu",
        scale: float = 1.0,
        keep: Bool[Tensor, " rows"] | None = None,
        buffer_numbers: int = BUFFER_NUMBERS,
        overwrite: bool = False,
    ) -> None:
        """``keep``: which of the split's rows to read (see ``select_rows``); None: all. ``buffer_numbers`` is part of
        the order. ``overwrite``: a batch is written over the one before it (on a processor), for who needs one at a
        time: half of the time that a batch takes is the system's, to find memory for it."""
        self._cache = cache
        self._shards = [cache.stored(shard) for shard in cache.shards if shard.split == split]
        sizes = [len(shard["acts"]) for shard in self._shards]
        self._kept = None if keep is None else [part.nonzero().squeeze(1) for part in keep.split(sizes)]
        lengths = sizes if self._kept is None else [len(kept) for kept in self._kept]
        self._starts = [0, *accumulate(lengths)]
        self.n_rows = self._starts[-1]
        if not self.n_rows:
            raise ArtifactError(f"{cache.path}: its {split} split is empty", "cache more text")
        self.d_in = cache.d_in
        self.device = device
        self.scale = scale
        self._order = Order(self.n_rows, seed, block=BLOCK, n_mixed=max(buffer_numbers // (BLOCK * self.d_in), 1))
        self._buffers: dict[tuple[int, int], _Buffer] = {}
        self._spare: list[dict[str, Tensor]] = []
        self._overwrite = overwrite
        self._out = torch.empty(0, self.d_in)
        self._pool: ThreadPoolExecutor | None = None

    @property
    def statistics(self) -> Statistics:
        """Of the whole train split, as the cache has them."""
        moments = self._cache.moments()
        return Statistics(moments["mean"], moments["geometric_median"], self._cache.statistics["mean_sq_norm"])

    def batch(self, step: int, size: int) -> Float[Tensor, "size d_in"]:
        """The ``step``-th training batch of ``size`` rows: rows step·size … of the endless shuffled stream."""
        picked, at = [], 0
        out = self._room(size) if self.device == "cpu" else None
        for number, first, end in self._order.spans(step * size, size):
            held, rows = self._buffer(number, end), self._order.mixing(number)[first:end]
            if out is None:
                picked.append({name: tensor.index_select(0, rows) for name, tensor in held.items()})
            else:
                self._gather(held, rows, out[at : at + len(rows)])
            at += len(rows)
        return self._finish(_cat(picked)) if out is None else out

    def _room(self, size: int) -> Tensor:
        """Memory for a batch."""
        if len(self._out) != size or not self._overwrite:
            self._out = torch.empty(size, self.d_in)
        return self._out

    def _gather(self, held: dict[str, Tensor], rows: Tensor, out: Tensor) -> None:
        """Chosen rows of a buffer, float32 and scaled, a few at a time, in the processor's cache."""
        for chosen, piece in zip(rows.split(GATHERED), out.split(GATHERED), strict=True):
            piece.copy_(held["acts"].index_select(0, chosen))
            if "scales" in held:
                piece.mul_(held["scales"].index_select(0, chosen)[:, None])
            if self.scale != 1.0:
                piece.mul_(self.scale)

    def _buffer(self, wanted: tuple[int, int], used: int) -> dict[str, Tensor]:
        """The rows that ``wanted`` mixes, as stored. The next buffer is filled as far as this one is ``used``."""
        # Where all rows are one buffer, it is the same in every epoch.
        numbers = [(0, 0)] if self._order.whole else [wanted, self._order.following(wanted)]
        for other in set(self._buffers) - set(numbers):
            self._spare.append(self._buffers.pop(other).rows)
        for number in numbers:
            if number not in self._buffers:
                self._buffers[number] = self._begin(self._order.blocks(number))
                if number != numbers[0]:  # that one is filled now
                    self._look_ahead(self._order.blocks(number))
        current, *following = (self._buffers[number] for number in numbers)
        self._fill(current, current.n)
        for buffer in following:
            self._fill(buffer, -(-buffer.n * used // current.n))
        return current.rows

    def _begin(self, blocks: list[tuple[int, int]]) -> _Buffer:
        """An empty buffer for ``blocks``. Memory is used again: the system takes longer to give it than the rows to be
        copied."""
        n = sum(end - first for first, end in blocks)
        rows = self._spare.pop() if self._spare else {}
        if not rows or len(rows["acts"]) < n:
            rows = {name: torch.empty(n, *t.shape[1:], dtype=t.dtype) for name, t in self._shards[0].items()}
        return _Buffer(rows, n, blocks[::-1])

    def _fill(self, buffer: _Buffer, n: int) -> None:
        """Copy blocks until the buffer has ``n`` rows or more."""
        while buffer.filled < n:
            for part in self._slices(*buffer.blocks.pop()):
                end = buffer.filled + len(part["acts"])
                for name, tensor in part.items():
                    buffer.rows[name][buffer.filled : end] = tensor
                buffer.filled = end

    def _look_ahead(self, blocks: list[tuple[int, int]]) -> None:
        """Have ``blocks`` touched from now on, beside what is computed."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "look-ahead", initializer=stand_back)
        self._pool.submit(self._touch, blocks)

    def _touch(self, blocks: list[tuple[int, int]]) -> None:
        """Have the system read ``blocks`` from the disk."""
        for first, end in blocks:
            for part in self._slices(first, end):
                part["acts"].view(torch.uint8).flatten()[::PAGE].numpy().max(initial=0)

    def _slices(self, first: int, end: int) -> Iterator[dict[str, Tensor]]:
        """Rows ``first`` … ``end`` − 1, as stored, shard by shard."""
        shard = bisect_right(self._starts, first) - 1
        while first < end:
            start, stop = self._starts[shard], self._starts[shard + 1]
            mine = slice(first - start, min(end, stop) - start)
            stored = self._shards[shard]
            if self._kept is None:
                yield {name: tensor[mine] for name, tensor in stored.items()}
            else:
                rows = self._kept[shard][mine]
                yield {name: tensor[rows] for name, tensor in stored.items()}
            first, shard = max(first, min(end, stop)), shard + 1

    def sequential(self, size: int, limit: int | None = None) -> Iterator[Float[Tensor, "size d_in"]]:
        """All rows (the first ``limit``) in stored order, ``size`` at a time; the last batch may be smaller."""
        end = self.n_rows if limit is None else min(limit, self.n_rows)
        for start in range(0, end, size):
            parts = [part for part in self._slices(start, min(start + size, end)) if len(part["acts"])]
            yield self._finish(_cat(parts))

    def _finish(self, rows: dict[str, Tensor]) -> Tensor:
        on_device = {name: self._sent(tensor) for name, tensor in rows.items()}
        if "scales" in on_device:
            acts = dequantize_rows(on_device["acts"], on_device["scales"])
        else:
            acts = on_device["acts"].float()
        return acts * self.scale if self.scale != 1.0 else acts

    def _sent(self, tensor: Tensor) -> Tensor:
        """On the device, in the stored type: a graphics card gets it from pinned memory while the host goes on."""
        if self.device.startswith("cuda"):
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def _cat(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return parts[0] if len(parts) == 1 else {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
