"""Caching: contexts → truncated forward pass → shards, with writing beside the forward pass.

A shard is a fixed run of whole forward batches of one split. So each shard is computed from the same batches whether
or not the run was interrupted before it, and its bytes are the same.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saetool.artifacts import header as h
from saetool.artifacts.cache import HELDOUT, ROW_TENSORS, TRAIN, CacheWriter
from saetool.engines.model import (
    LanguageModel,
    ModelSource,
    load_config,
    load_tokenizer,
    skeleton,
    special_ids,
)
from saetool.engines.packing import HELDOUT_RULE, Contexts, Corpus, tokenise
from saetool.engines.sites import Site, find_site, hidden_size, parse_hook
from saetool.engines.source import capture
from saetool.engines.text import Texts
from saetool.errors import ConfigError

ITEM_SIZE = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Rows:
    """Which rows are kept."""

    special: np.ndarray
    """Token ids whose rows are dropped, int32, sorted; empty: none."""
    first: bool
    """Whether the row of position 0 is kept."""

    def keep(self, ids: np.ndarray) -> np.ndarray:
        """bool, shape of ``ids`` [contexts, length]."""
        kept = ~np.isin(ids, self.special)
        if not self.first:
            kept[:, 0] = False
        return kept


@dataclass(frozen=True)
class ShardPlan:
    """One shard: contexts ``start`` … ``stop`` − 1 of ``split``."""

    index: int
    split: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options that change the result, with their effective values."""

    hook: str
    ctx_len: int
    bos: bool
    keep_special: bool
    heldout: float
    dtype: str
    batch_size: int
    tokens: int | None
    max_norm: float | None = None

    def plan(self, source: ModelSource, texts: Texts) -> h.Plan:
        """What the cache will be made of. Reads the text to hash it; tokenises nothing."""
        hook = parse_hook(self.hook).name
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        options = {**given, "hook": hook, "model": source.id, "revision": source.revision}
        return h.Plan("cache", h.CACHE, options, [texts.as_input()])


@dataclass(frozen=True)
class Prepared:
    """All that is known without the model's weights."""

    request: Request
    source: ModelSource
    texts: Texts
    config: Any
    """The model's `transformers` config."""
    tokenizer: Any
    site: Site
    """In the skeleton (no weights)."""
    corpus: Corpus
    rows: Rows
    shards: list[ShardPlan]
    per_batch: int
    """Contexts per forward pass."""
    d_in: int
    bos_id: int | None
    separator_id: int | None

    @cached_property
    def splits(self) -> dict[str, dict[str, int]]:
        """Per split: rows (before any is dropped by its norm), contexts, documents, tokens."""
        return {
            name: {
                "rows": count_rows(contexts, self.rows),
                "contexts": len(contexts),
                "documents": contexts.n_documents,
                "tokens": contexts.n_tokens,
            }
            for name, contexts in splits(self.corpus).items()
        }

    @property
    def n_bytes(self) -> int:
        """Bytes of all activations and row tensors."""
        rows = sum(counts["rows"] for counts in self.splits.values())
        return rows * (self.d_in * ITEM_SIZE[self.request.dtype] + 4 * len(ROW_TENSORS))

    def tokens_of(self, shard: ShardPlan) -> int:
        contexts = splits(self.corpus)[shard.split]
        ranges = contexts.batches(shard.start, shard.stop, self.per_batch)
        return sum(contexts.take(a, b)[0].size for a, b in ranges)

    def manifest(self) -> dict[str, Any]:
        """The manifest's config: what is needed to use the cache."""
        names, request = self.tokenizer.convert_ids_to_tokens, self.request
        return {
            "d_in": self.d_in,
            "ctx_len": request.ctx_len,
            "bos": None if self.bos_id is None else names(self.bos_id),
            "bos_id": self.bos_id,
            "separator": None if self.separator_id is None else names(self.separator_id),
            "separator_id": self.separator_id,
            "dropped_rows": [] if request.keep_special else ["position 0", "special tokens"],
            "dropped_ids": self.rows.special.tolist(),
            "dtype": request.dtype,
            "batch_size": request.batch_size,
            "text": self.texts.name,
            "tokens": request.tokens,
            **dataclasses.asdict(self.corpus.counts),
            "heldout": request.heldout,
            "heldout_rule": HELDOUT_RULE,
        }


def prepare(request: Request, source: ModelSource, texts: Texts, shard_bytes: int) -> Prepared:
    """Look the site up, tokenise and pack. Raises ``ConfigError`` or ``ArtifactError`` for what cannot work."""
    config = load_config(source)
    site = find_site(skeleton(config), request.hook)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest and request.ctx_len > longest:
        raise ConfigError(f"--ctx-len {request.ctx_len}: the model reads at most {longest} tokens")
    tokenizer = load_tokenizer(source)
    bos = tokenizer.bos_token_id if request.bos else None
    candidates = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id)
    separator = next((i for i in candidates if i is not None), None)
    corpus = tokenise(
        texts.open(),
        lambda batch: tokenizer(batch, add_special_tokens=False)["input_ids"],
        separator=separator,
        bos=bos,
        ctx_len=request.ctx_len,
        heldout=request.heldout,
        limit=request.tokens,
    )
    d_in = hidden_size(config)
    per_batch = max(request.batch_size // request.ctx_len, 1)
    shards = plan_shards(corpus, per_batch, shard_bytes // (request.ctx_len * d_in * ITEM_SIZE[request.dtype]))
    special = set() if request.keep_special else special_ids(tokenizer)
    rows = Rows(np.array(sorted(special), dtype=np.int32), first=request.keep_special)
    return Prepared(
        request, source, texts, config, tokenizer, site, corpus, rows, shards, per_batch, d_in, bos, separator
    )


def plan_shards(corpus: Corpus, per_batch: int, per_shard: int) -> list[ShardPlan]:
    """Cut each split into shards of ``per_shard`` contexts, made whole batches of ``per_batch`` contexts."""
    step = max(per_shard // per_batch, 1) * per_batch
    ranges = [
        (split, start, min(start + step, len(contexts)))
        for split, contexts in splits(corpus).items()
        for start in range(0, len(contexts), step)
    ]
    return [ShardPlan(i, *r) for i, r in enumerate(ranges)]


def splits(corpus: Corpus) -> dict[str, Contexts]:
    """The splits by name, in the order in which they are stored."""
    return {TRAIN: corpus.train, HELDOUT: corpus.heldout}


def count_rows(contexts: Contexts, rows: Rows) -> int:
    """Rows that will be stored of ``contexts``."""
    return sum(int(rows.keep(contexts.take(a, b)[0]).sum()) for a, b in contexts.batches(0, len(contexts), 4096))


def norm_limit(lm: LanguageModel, site: Site, prepared: Prepared) -> float | None:
    """The largest norm a row may have: ``max_norm`` times the median norm of the first forward batch's rows."""
    if prepared.request.max_norm is None:
        return None
    contexts = prepared.corpus.train
    start, stop = next(iter(contexts.batches(0, len(contexts), prepared.per_batch)))
    acts = _rows_of(lm, site, contexts, start, stop, prepared.rows, None)["acts"]
    return prepared.request.max_norm * float(acts.float().norm(dim=1).median())


def write(lm: LanguageModel, site: Site, prepared: Prepared, out: CacheWriter, limit: float | None) -> Iterator[int]:
    """Compute and write the shards that ``out`` does not have; yields the tokens read, after each forward batch.

    Rows of a norm above ``limit`` are dropped. One thread writes; two shards at most wait for it. What it raises is
    raised here.
    """
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, "writer") as writer:
        for shard in prepared.shards:
            whole = None
            if not out.has(shard.index):
                contexts, parts = splits(prepared.corpus)[shard.split], []
                for start, stop in contexts.batches(shard.start, shard.stop, prepared.per_batch):
                    part = _rows_of(lm, site, contexts, start, stop, prepared.rows, limit)
                    parts.append(part)
                    yield int((part["input_ids"] >= 0).sum())
                whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            pending.append(writer.submit(out.add, shard.split, whole))
            while len(pending) > 2:
                pending.popleft().result()
        for future in pending:
            future.result()


def _rows_of(
    lm: LanguageModel, site: Site, contexts: Contexts, start: int, stop: int, rows: Rows, limit: float | None
) -> dict[str, Tensor]:
    """The tensors of a shard for one forward batch; rows of a norm above ``limit`` are left out."""
    ids, documents = contexts.take(start, stop)
    n, length = ids.shape
    keep = torch.from_numpy(rows.keep(ids))
    acts = capture(lm, site, torch.from_numpy(ids).long())
    if limit is not None:
        keep &= ~(acts.float().norm(dim=-1) > limit).cpu()  # a NaN stays, to be reported
    numbers = contexts.first + np.arange(start, stop, dtype=np.int32)
    grids = {
        "tokens": ids,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (n, length)),
        "contexts": np.broadcast_to(numbers[:, None], (n, length)),
        "documents": documents,
    }
    padded = np.full((n, contexts.ctx_len), -1, dtype=np.int32)
    padded[:, :length] = ids
    return {
        "acts": acts[keep.to(acts.device)].cpu(),
        **{name: torch.from_numpy(np.array(grid, dtype=np.int32))[keep] for name, grid in grids.items()},
        "input_ids": torch.from_numpy(padded),
    }
