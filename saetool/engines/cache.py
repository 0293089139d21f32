"""Caching: contexts → truncated forward pass → shards, with tokenising before it and writing beside it.

A shard is a fixed run of whole forward batches of one split. So each shard is computed from the same batches whether
or not the run was interrupted before it, and whichever process computes it, and its bytes are the same. Several hooks
are read in one pass, and each has its own cache, the same as if it had been read alone.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from saetool.artifacts.cache import STORAGE
from saetool.artifacts.cache_writer import CacheWriter, as_stored
from saetool.core.statistics import Sums
from saetool.engines.background import stand_back
from saetool.engines.cache_request import Prepared, Request
from saetool.engines.model import LanguageModel
from saetool.engines.packing import Contexts, Corpus
from saetool.engines.processes import Processes
from saetool.engines.sites import Site
from saetool.engines.source import capture_all

N_WRITERS = 4
"""Threads that hash and write shards: while some wait for the disk, others hash."""


@dataclass
class Job:
    """One of the caches of a pass."""

    hook: str
    site: Site
    """In the loaded model."""
    writer: CacheWriter
    per_shard: int
    """Contexts per shard, whole batches."""
    limit: float | None = None
    """Rows of a larger norm are dropped."""
    offset: int = 0
    """Number of the first shard of the split."""
    parts: list[dict[str, Tensor]] = field(default_factory=list)
    """Of the shard that is being computed, as stored."""
    sums: Sums | None = None
    """Over the rows of ``parts``."""

    def wants(self, start: int, processes: Processes) -> bool:
        """Whether this process is to compute the shard of context ``start``."""
        index = self.offset + start // self.per_shard
        return index % processes.size == processes.rank and not self.writer.has(index)

    def put(self, rows: dict[str, Tensor]) -> None:
        """Add a forward batch to the shard. Summed and made eight-bit here, where the activations are: in a thread of
        the writer, torch would start as many threads again, which hold up the forward pass."""
        stored, sums = as_stored(rows["acts"], self.writer.storage)
        self.parts.append({**rows, **{name: tensor.cpu() for name, tensor in stored.items()}})
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self) -> tuple[dict[str, Tensor], Sums]:
        """The shard, put together, and its sums."""
        assert self.sums is not None
        whole = {name: torch.cat([part[name] for part in self.parts]) for name in self.parts[0]}, self.sums
        self.parts, self.sums = [], None
        return whole


def contexts_per_shard(prepared: Prepared, hook: str, per_batch: int, shard_bytes: int) -> int:
    """Whole batches of about ``shard_bytes``; as if bfloat16 for int8, which is read as float32."""
    row = prepared.widths[hook] * max(STORAGE[prepared.request.storage], 2)
    return max(shard_bytes // (prepared.request.ctx_len * row * per_batch), 1) * per_batch


def batches(corpus: Corpus, contexts: Contexts, size: int) -> Iterator[tuple[int, int, bool]]:
    """Ranges of contexts, ``size`` at a time, as soon as they are tokenised, and whether it is the last one; the
    shorter last context comes alone."""
    start = 0
    while True:
        corpus.grow(contexts, start + size + 1)  # one more, to know whether more follows
        stop = min(start + size, contexts.n_full)
        if stop == start < len(contexts):
            stop += 1
        if stop > start:
            yield start, stop, corpus.complete and stop == len(contexts)
            start = stop
        if corpus.complete and start == len(contexts):
            return


def norm_limits(lm: LanguageModel, prepared: Prepared, jobs: Sequence[Job], per_batch: int) -> list[float | None]:
    """For each job, the largest norm a row may have: ``max_norm`` times the median norm of the first forward batch."""
    if prepared.request.max_norm is None:
        return [None] * len(jobs)
    corpus = prepared.corpus
    start, stop, _ = next(batches(corpus, corpus.train, per_batch))
    found = read_batch(lm, [(job.site, None) for job in jobs], prepared, corpus.train, np.arange(start, stop))
    return [prepared.request.max_norm * float(rows["acts"].float().norm(dim=1).median()) for rows in found]


def remaining(prepared: Prepared, jobs: Sequence[Job], per_batch: int, processes: Processes) -> int:
    """Tokens that this process is still to read; all the text must have been read."""
    total = 0
    offsets = [job.offset for job in jobs]
    for contexts in prepared.splits.values():
        for start, stop, _ in batches(prepared.corpus, contexts, per_batch):
            if any(job.wants(start, processes) for job in jobs):
                total += contexts.take(start, stop)[0].size
        for job in jobs:
            job.offset += -(-len(contexts) // job.per_shard)
    for job, offset in zip(jobs, offsets, strict=True):
        job.offset = offset
    return total


def probe(lm: LanguageModel, prepared: Prepared, sites: Sequence[Site], per_batch: int, seconds: float = 3.0) -> float:
    """Tokens per second of the forward pass, timed on the first batches for about so long, after one to warm up."""
    corpus, n, started = prepared.corpus, 0, 0.0
    ranges = [r for _, r in zip(range(16), batches(corpus, corpus.train, per_batch), strict=False)]
    while True:
        for start, stop, _ in ranges:
            found = read_batch(lm, [(site, None) for site in sites], prepared, corpus.train, np.arange(start, stop))
            if not started:
                started = time.perf_counter()
                continue
            n += int((found[0]["input_ids"] >= 0).sum())
            if time.perf_counter() - started > seconds:
                return n / (time.perf_counter() - started)


def write(
    lm: LanguageModel, prepared: Prepared, jobs: Sequence[Job], per_batch: int, processes: Processes = Processes()
) -> Iterator[int]:
    """Compute and write the shards that are missing; yields the tokens read, after each forward batch.

    Threads write, and at most as many shards wait for them. What they raise is raised here.
    """
    pending: deque[Future[None]] = deque()
    corpus = prepared.corpus
    with ThreadPoolExecutor(N_WRITERS, "writer", initializer=stand_back) as pool:
        for split, contexts in prepared.splits.items():
            with closing(batches(corpus, contexts, per_batch)) as ranges:
                for start, stop, last in ranges:
                    active = [job for job in jobs if job.wants(start, processes)]
                    if not active:
                        continue
                    sites = [(job.site, job.limit) for job in active]
                    found = read_batch(lm, sites, prepared, contexts, np.arange(start, stop))
                    for job, rows in zip(active, found, strict=True):
                        job.put(rows)
                        if last or stop % job.per_shard == 0:
                            index = job.offset + start // job.per_shard
                            pending.append(pool.submit(job.writer.write, index, split, *job.take()))
                    while len(pending) > N_WRITERS or (pending and pending[0].done()):
                        pending.popleft().result()
                    yield int((found[0]["input_ids"] >= 0).sum())
            for job in jobs:
                job.offset += -(-len(contexts) // job.per_shard)
        for future in pending:
            future.result()


def read_batch(
    lm: LanguageModel,
    sites: Sequence[tuple[Site, float | None]],
    prepared: Prepared,
    contexts: Contexts,
    chosen: np.ndarray,
) -> list[dict[str, Tensor]]:
    """The tensors of a shard for contexts ``chosen``, for each of ``sites`` with its norm limit; ``acts`` are on the
    model's device."""
    ids, documents = contexts.pick(chosen)
    n, length = ids.shape
    keep = torch.from_numpy(prepared.rows.keep(ids)).view(-1)
    numbers = (contexts.first + chosen).astype(np.int32)
    grids = {
        "tokens": ids,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (n, length)),
        "contexts": np.broadcast_to(numbers[:, None], (n, length)),
        "documents": documents,
    }
    flat = {name: torch.from_numpy(np.array(grid, dtype=np.int32, order="C")).view(-1) for name, grid in grids.items()}
    padded = np.full((n, contexts.ctx_len), -1, dtype=np.int32)
    padded[:, :length] = ids
    found = capture_all(lm, [site for site, _ in sites], torch.from_numpy(ids).long())
    return [
        {
            "acts": acts,
            **{name: tensor[kept] for name, tensor in flat.items()},
            "input_ids": torch.from_numpy(padded),
        }
        for kept, acts in (_kept(a, keep, limit, prepared.request) for a, (_, limit) in zip(found, sites, strict=True))
    ]


def _kept(acts: Tensor, keep: Tensor, limit: float | None, request: Request) -> tuple[Tensor, Tensor]:
    """Numbers of the rows to keep [rows], on the CPU, and those rows as they will be stored [rows, d]."""
    index = keep.nonzero().squeeze(1)
    rows = acts.flatten(0, -2)[index.to(acts.device)]
    if request.center:
        exact = rows.float()
        rows = (exact - exact.mean(dim=1, keepdim=True)).to(rows.dtype)
    if limit is not None:
        inside = ~(rows.float().norm(dim=1) > limit)  # a NaN stays, to be reported
        rows, index = rows[inside], index[inside.cpu()]
    return index, rows if request.storage == "int8" else rows.to(getattr(torch, request.storage))
