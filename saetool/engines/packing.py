"""Documents → tokens → splits → contexts.

documents  empty ones and repeats (equal after whitespace normalisation) are left out and counted
splits     each document belongs to one split, by its number alone (``is_heldout``)
contexts   each split's documents, joined by a separator token, cut into runs of ``ctx_len`` tokens (BOS included)
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from saetool.errors import ArtifactError

GOLDEN = 0.6180339887498949
"""(√5 − 1)/2: its multiples modulo 1 are spread evenly over [0, 1) and in step with no period of the text."""
HELDOUT_RULE = f"document i = 0, 1, … is held out if frac((i + 1) * {GOLDEN}) < heldout; if none is, the last one is"


def is_heldout(document: int, share: float) -> bool:
    """Whether document number ``document`` (from 0) is held out; see ``HELDOUT_RULE``.

    "Every tenth" would be in step with texts that come in turns (five topics, say) and hold out one kind only.
    """
    return (document + 1) * GOLDEN % 1.0 < share


@dataclass(frozen=True)
class Contexts:
    """One split, packed: context c is BOS (if any) and the stream's tokens from c·body, body = ctx_len − 1 with BOS.

    The last context may be shorter, and is there if it has at least two tokens (BOS included).
    """

    ids: np.ndarray
    """int32 [n]: the split's documents, joined by the separator."""
    documents: np.ndarray
    """int32 [n]: the document of each token; a separator belongs to the document before it."""
    ctx_len: int
    bos: int | None
    first: int = 0
    """Number of the first context within the cache."""

    @property
    def body(self) -> int:
        return self.ctx_len - (self.bos is not None)

    @property
    def n_full(self) -> int:
        return len(self.ids) // self.body

    def __len__(self) -> int:
        rest = len(self.ids) % self.body
        return self.n_full + (rest > 0 and rest + (self.bos is not None) >= 2)

    @property
    def n_documents(self) -> int:
        return len(np.unique(self.documents))

    @property
    def n_tokens(self) -> int:
        """Tokens that the model reads, BOS included."""
        return min(len(self.ids), len(self) * self.body) + len(self) * (self.bos is not None)

    def take(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and documents, each int32 [stop − start, length], of contexts ``start`` … ``stop`` − 1.

        The shorter last context comes alone (no padding).
        """
        assert start < stop <= len(self) and (stop <= self.n_full or stop - start == 1)
        part = slice(start * self.body, stop * self.body)
        ids = self.ids[part].reshape(stop - start, -1)
        documents = self.documents[part].reshape(stop - start, -1)
        if self.bos is not None:
            ids = np.concatenate([np.full_like(ids[:, :1], self.bos), ids], axis=1)
            documents = np.concatenate([documents[:, :1], documents], axis=1)
        return ids, documents

    def batches(self, start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
        """Ranges that cover contexts ``start`` … ``stop`` − 1, ``size`` at a time, the shorter last one alone."""
        full = min(stop, self.n_full)
        for at in range(start, full, size):
            yield at, min(at + size, full)
        if stop > full:
            yield full, stop


@dataclass(frozen=True)
class Counts:
    """What was found in the text, up to the last document used."""

    documents: int
    """Documents used."""
    duplicates: int
    """Left out: equal to an earlier one after whitespace normalisation."""
    empty: int
    """Left out: no text, or no token."""


@dataclass(frozen=True)
class Corpus:
    """The packed splits and what was counted on the way."""

    train: Contexts
    heldout: Contexts
    counts: Counts


def tokenise(
    texts: Iterable[str],
    encode: Callable[[list[str]], list[list[int]]],
    *,
    separator: int | None,
    bos: int | None,
    ctx_len: int,
    heldout: float,
    limit: int | None = None,
) -> Corpus:
    """Documents → tokens → splits → contexts. ``limit`` bounds the tokens of text (separators counted, BOS not) of
    both splits together; documents are taken in order and the last one is cut. Raises ``ArtifactError`` for no text.
    """
    kept: list[tuple[int, np.ndarray]] = []
    started = {True: False, False: False}
    total = duplicates = empty = 0
    for ids, duplicates_before, empty_before in _encoded(texts, encode):
        duplicates, empty = duplicates_before, empty_before
        mine = is_heldout(len(kept), heldout)
        joins = int(separator is not None and started[mine])
        if limit is not None:
            ids = ids[: max(limit - total - joins, 0)]
        if not len(ids):
            break
        kept.append((len(kept), ids))
        started[mine] = True
        total += len(ids) + joins
    if not kept:
        raise ArtifactError("the text is empty: no document with a token in it", "give more text")
    held = {i for i, _ in kept if is_heldout(i, heldout)}
    if heldout > 0 and not held and len(kept) > 1:
        held = {len(kept) - 1}
    train = _pack([d for d in kept if d[0] not in held], separator, ctx_len, bos, 0)
    rest = _pack([d for d in kept if d[0] in held], separator, ctx_len, bos, len(train))
    return Corpus(train, rest, Counts(len(kept), duplicates, empty))


def _encoded(
    texts: Iterable[str], encode: Callable[[list[str]], list[list[int]]]
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Token ids of each new document, with the number of duplicates and of empty documents before it.

    An empty array comes last, with the final numbers.
    """
    seen: set[bytes] = set()
    duplicates = empty = 0

    def fresh() -> Iterator[tuple[str, int, int]]:
        nonlocal duplicates, empty
        for text in texts:
            normal = re.sub(r"\s+", " ", text).strip()
            digest = hashlib.blake2b(normal.encode(), digest_size=16).digest()
            if not normal:
                empty += 1
            elif digest in seen:
                duplicates += 1
            else:
                seen.add(digest)
                yield text, duplicates, empty

    documents = fresh()
    without_token = 0
    while batch := list(islice(documents, 64)):
        for ids, (_, duplicates_before, empty_before) in zip(encode([b[0] for b in batch]), batch, strict=True):
            if ids:
                yield np.asarray(ids, dtype=np.int32), duplicates_before, empty_before + without_token
            else:
                without_token += 1
    yield np.empty(0, dtype=np.int32), duplicates, empty + without_token


def _pack(
    documents: list[tuple[int, np.ndarray]], separator: int | None, ctx_len: int, bos: int | None, first: int
) -> Contexts:
    ids, numbers = [], []
    for at, (number, tokens) in enumerate(documents):
        if at and separator is not None:
            ids.append(np.array([separator], dtype=np.int32))
            numbers.append(np.array([documents[at - 1][0]], dtype=np.int32))
        ids.append(tokens)
        numbers.append(np.full(len(tokens), number, dtype=np.int32))
    empty = np.empty(0, dtype=np.int32)
    return Contexts(np.concatenate([empty, *ids]), np.concatenate([empty, *numbers]), ctx_len, bos, first)
