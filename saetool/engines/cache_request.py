"""What is to be cached: the options, the model's site and the text, before any weights are read."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saetool.artifacts import header as h
from saetool.artifacts.cache import HELDOUT, ROW_TENSORS, STORAGE, TRAIN
from saetool.engines.model import ModelSource, load_config, load_tokenizer, skeleton, special_ids
from saetool.engines.packing import HELDOUT_RULE, Contexts, Corpus, ahead, encoded
from saetool.engines.sites import Site, find_site, parse_hook, site_width
from saetool.engines.text import Texts
from saetool.errors import ConfigError


@dataclass(frozen=True)
class Rows:
    """Which rows are kept, by their tokens."""

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


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options that change the result, with their effective values."""

    ctx_len: int
    bos: bool
    keep_special: bool
    heldout: float
    dtype: str
    """Of the model."""
    storage: str
    """One of ``STORAGE``."""
    tokens: int | None
    batch_size: int | None = None
    """In tokens; None: from memory, and then not part of the key: it changes rounding at most."""
    max_norm: float | None = None
    center: bool = False

    def plan(self, hook_name: str, source: ModelSource, text: h.Input) -> h.Plan:
        """What the cache of ``hook_name`` will be made of."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        options = {**given, "hook": hook_name, "model": source.id, "revision": source.revision}
        return h.Plan("cache", h.CACHE, options, [text])


def hook_names(hooks: Sequence[str], source: ModelSource) -> list[str]:
    """``hooks`` by the names under which they are recorded: a module path may be a place that has another name.

    Raises ``ConfigError`` for what is no site of the model, and for a site that is named twice.
    """
    parsed = [parse_hook(hook) for hook in hooks]
    names = [p.name for p in parsed]
    if any(p.place is None for p in parsed):
        model = skeleton(load_config(source))
        names = [find_site(model, name).hook_name for name in names]
    if len(set(names)) != len(names):
        raise ConfigError(f"--hook: {', '.join(hooks)} name a site twice")
    return names


@dataclass(frozen=True)
class Prepared:
    """All that is known without the model's weights."""

    request: Request
    source: ModelSource
    text: str
    """Name of the text."""
    config: Any
    """The model's `transformers` config."""
    tokenizer: Any
    sites: dict[str, Site]
    """By hook name; in the skeleton (no weights)."""
    widths: dict[str, int]
    """d of each site."""
    corpus: Corpus
    """Read as far as the first contexts; a thread reads on."""
    rows: Rows
    bos_id: int | None
    separator_id: int | None

    @property
    def splits(self) -> dict[str, Contexts]:
        """By name, in the order in which they are stored."""
        return {TRAIN: self.corpus.train, HELDOUT: self.corpus.heldout}

    def counts(self) -> dict[str, dict[str, int]]:
        """Per split: rows (before any is dropped by its norm), contexts, documents, tokens. Reads all the text."""
        self.corpus.grow(self.corpus.train, None)
        return {
            name: {
                "rows": count_rows(contexts, self.rows),
                "contexts": len(contexts),
                "documents": contexts.n_documents,
                "tokens": contexts.n_tokens,
            }
            for name, contexts in self.splits.items()
        }

    def row_bytes(self, hook: str) -> int:
        """Bytes a row takes on disk."""
        scale = 4 if self.request.storage == "int8" else 0
        return self.widths[hook] * STORAGE[self.request.storage] + scale + 4 * len(ROW_TENSORS)

    def manifest(self, hook: str, batch_size: int) -> dict[str, Any]:
        """The manifest's config: what is needed to use the cache."""
        names, request = self.tokenizer.convert_ids_to_tokens, self.request
        return {
            "d_in": self.widths[hook],
            "ctx_len": request.ctx_len,
            "bos": None if self.bos_id is None else names(self.bos_id),
            "bos_id": self.bos_id,
            "separator": None if self.separator_id is None else names(self.separator_id),
            "separator_id": self.separator_id,
            "dropped_rows": [] if request.keep_special else ["position 0", "special tokens"],
            "dropped_ids": self.rows.special.tolist(),
            "dtype": request.dtype,
            "storage": request.storage,
            "center": request.center,
            "batch_size": batch_size,
            "text": self.text,
            "tokens": request.tokens,
            **dataclasses.asdict(self.corpus.counts),
            "heldout": request.heldout,
            "heldout_rule": HELDOUT_RULE,
        }


def prepare(request: Request, source: ModelSource, texts: Texts, hooks: Sequence[str]) -> Prepared:
    """Look the sites up and begin to tokenise. Raises ``ConfigError`` or ``ArtifactError`` for what cannot work."""
    config = load_config(source)
    model = skeleton(config)
    sites = {hook: find_site(model, hook) for hook in hooks}
    widths = {hook: site_width(model, site) for hook, site in sites.items()}
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest and request.ctx_len > longest:
        raise ConfigError(f"--ctx-len {request.ctx_len}: the model reads at most {longest} tokens")
    tokenizer = load_tokenizer(source)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    bos = first if request.bos else None
    candidates = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id)
    separator = next((i for i in candidates if i is not None), None)
    corpus = reading(request, texts, tokenizer, bos, separator)
    special = set() if request.keep_special else special_ids(tokenizer)
    rows = Rows(np.array(sorted(special), dtype=np.int32), first=request.keep_special)
    return Prepared(request, source, texts.name, config, tokenizer, sites, widths, corpus, rows, bos, separator)


def reading(request: Request, texts: Texts, tokenizer: Any, bos: int | None, separator: int | None) -> Corpus:
    """The text, tokenised by a thread of its own; the first context is there."""
    documents = encoded(texts.open(), lambda batch: tokenizer(batch, add_special_tokens=False)["input_ids"])
    corpus = Corpus(
        ahead(documents),
        separator=separator,
        bos=bos,
        ctx_len=request.ctx_len,
        heldout=request.heldout,
        limit=request.tokens,
    )
    corpus.grow(corpus.train, 1)
    return corpus


def count_rows(contexts: Contexts, rows: Rows) -> int:
    """Rows that will be stored of ``contexts``, by their tokens."""
    return sum(int(rows.keep(contexts.take(a, b)[0]).sum()) for a, b in contexts.batches(0, len(contexts), 4096))
