"""Activations straight from the model, without a cache: the reader's interface, computed as it goes.

Each epoch puts the contexts of the train split into a random order drawn from (seed, epoch) and cuts it into blocks of
``BLOCK_CONTEXTS``; a block's activations are computed when they are first wanted, and its rows are shuffled by (seed,
epoch, block). So ``batch(step, size)`` is a pure function of its arguments, and a resumed run computes one block again.

Rows are those that a cache of the same request stores, each once an epoch. With a norm limit, which rows are dropped is
known only when they are computed; each dropped row's place is taken by another row of its block, so that blocks keep
their lengths: an epoch visits every other row at least once, and a few twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetool.core.quantize import dequantize_rows, quantize_rows
from saetool.core.statistics import geometric_median, moments, row_sums
from saetool.engines.cache import read_batch
from saetool.engines.cache_request import Prepared
from saetool.engines.model import LanguageModel
from saetool.engines.order import seeded
from saetool.engines.reader import Statistics
from saetool.engines.sites import Site
from saetool.errors import ArtifactError

BLOCK_CONTEXTS = 512
"""Contexts per block: 65 thousand rows of 128 tokens each."""
SAMPLE_ROWS = 65_536
"""Rows, from the first blocks of the first epoch, that the statistics are estimated from."""


@dataclass(frozen=True)
class _Block:
    """The rows of one block in their order of visit, as they are stored."""

    acts: Tensor
    contexts: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]


class LiveReader:
    """Shuffled batches of the train split's activations, float32 on the model's device, multiplied by ``scale``.

    ``prepared`` is of one hook; its text is read whole.
    """

    def __init__(
        self,
        lm: LanguageModel,
        site: Site,
        prepared: Prepared,
        *,
        seed: int = 0,
        scale: float = 1.0,
        batch_tokens: int = 4096,
        block_contexts: int = BLOCK_CONTEXTS,
    ) -> None:
        """``batch_tokens``: of a forward pass. ``block_contexts`` is part of the order."""
        prepared.corpus.grow(prepared.corpus.train, None)
        self._lm, self._site, self._prepared = lm, site, prepared
        self._contexts = prepared.corpus.train
        self._seed, self._block_contexts = seed, block_contexts
        self._per_batch = max(batch_tokens // prepared.request.ctx_len, 1)
        self.scale = scale
        self.device = str(lm.device)
        self.d_in = prepared.widths[site.hook_name]
        self._rows_of = self._count_rows()
        self.n_rows = int(self._rows_of.sum())
        if not self.n_rows:
            raise ArtifactError("the text has no context with a row to train on", "give more text")
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)
        self._starts = np.empty(0, dtype=np.int64)
        self._held: tuple[tuple[int, int], _Block] | None = None
        self.limit: float | None = None
        self.statistics = self._estimate()

    def _count_rows(self) -> np.ndarray:
        """int64 [contexts]: rows of each context that are kept by their tokens."""
        contexts, counts = self._contexts, []
        for start, stop in contexts.batches(0, len(contexts), 4096):
            counts.append(self._prepared.rows.keep(contexts.take(start, stop)[0]).sum(axis=1))
        return np.concatenate([np.empty(0, dtype=np.int64), *counts])

    def _estimate(self) -> Statistics:
        """Norm limit and statistics from the first blocks, as many as ``SAMPLE_ROWS`` need."""
        wanted = min(SAMPLE_ROWS, self.n_rows)
        if (factor := self._prepared.request.max_norm) is not None:
            norms = torch.cat([b.acts.float().norm(dim=1) for b in self._first_blocks(wanted)])
            self.limit = factor * float(norms.median())
            self._held = None
        rows = torch.cat([block.acts.float().cpu() for block in self._first_blocks(wanted)])
        found = moments(row_sums(rows), len(rows))
        return Statistics(found.mean, geometric_median(rows), found.mean_sq_norm)

    def _first_blocks(self, n_rows: int) -> Iterator[_Block]:
        self._enter(0)
        for number in range(len(self._starts) - 1):
            if self._starts[number] >= n_rows:
                return
            yield self._block((0, number))

    def batch(self, step: int, size: int) -> Float[Tensor, "size d_in"]:
        """The ``step``-th training batch of ``size`` rows: rows step·size … of the endless shuffled stream."""
        acts = torch.cat([block.acts[part] for block, part in self._parts(step, size)]).float()
        return acts * self.scale if self.scale != 1.0 else acts

    def places(self, step: int, size: int) -> Int[Tensor, "size 2"]:
        """Context number (as in a cache) and position of each row of ``batch(step, size)``."""
        found = [
            torch.stack([block.contexts[part], block.positions[part]], dim=1) for block, part in self._parts(step, size)
        ]
        return torch.cat(found)

    def _parts(self, step: int, size: int) -> Iterator[tuple[_Block, slice]]:
        position = step * size
        while size:
            epoch, offset = divmod(position, self.n_rows)
            self._enter(epoch)
            number = int(np.searchsorted(self._starts, offset, side="right")) - 1
            first = offset - int(self._starts[number])
            end = min(first + size, int(self._starts[number + 1] - self._starts[number]))
            yield self._block((epoch, number)), slice(first, end)
            position, size = position + end - first, size - (end - first)

    def _enter(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        order = torch.randperm(len(self._contexts), generator=seeded(self._seed, epoch)).numpy()
        ends = self._rows_of[order].cumsum()
        last = np.append(np.arange(self._block_contexts, len(order), self._block_contexts), len(order)) - 1
        self._order, self._starts, self._epoch = order, np.concatenate([[0], ends[last]]), epoch

    def _block(self, number: tuple[int, int]) -> _Block:
        """Compute the block, or remember it from the last call."""
        if self._held is None or self._held[0] != number:
            self._enter(number[0])
            start = number[1] * self._block_contexts
            chosen = np.sort(self._order[start : start + self._block_contexts])
            self._held = number, self._compute(chosen, seeded(self._seed, number[0], number[1] + 1))
        return self._held[1]

    def _compute(self, chosen: np.ndarray, generator: torch.Generator) -> _Block:
        """The rows of contexts ``chosen`` (ascending), shuffled."""
        full = chosen[chosen < self._contexts.n_full]
        groups = [full[i : i + self._per_batch] for i in range(0, len(full), self._per_batch)]
        groups += [chosen[len(full) :]] if len(chosen) > len(full) else []  # the shorter last context, alone
        parts = [
            read_batch(self._lm, [(self._site, None)], self._prepared, self._contexts, group)[0] for group in groups
        ]
        acts, contexts, positions = (torch.cat([p[n] for p in parts]) for n in ("acts", "contexts", "positions"))
        if self._prepared.request.storage == "int8":
            acts = dequantize_rows(*quantize_rows(acts))
        order = torch.randperm(len(acts), generator=generator)
        if self.limit is not None:
            inside = ~(acts.float().norm(dim=1) > self.limit).cpu()
            kept = order[inside[order]]
            if not len(kept):
                raise ArtifactError("every row of a block has a norm above the limit", "give a larger --max-norm")
            order = kept[torch.arange(len(order)) % len(kept)]
        return _Block(acts[order.to(acts.device)], contexts[order], positions[order])
