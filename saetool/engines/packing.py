"""Documents → tokens → splits → contexts, as far as they are wanted.

documents  empty ones and repeats (equal after whitespace normalisation) are left out and counted
splits     each document belongs to one split, by its number alone (``is_heldout``), but near-duplicates to the same one
contexts   each split's documents, joined by a separator token, cut into runs of ``ctx_len`` tokens (BOS included)

Tokens stay in memory, eight bytes each: a hundredth and less of the activations they give.
"""

import dataclasses
import hashlib
import queue
import re
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from saetool.engines.background import stand_back
from saetool.engines.near_duplicates import NearDuplicates
from saetool.errors import ArtifactError

GOLDEN = 0.6180339887498949
"""(√5 − 1)/2: its multiples modulo 1 are spread evenly over [0, 1) and in step with no period of the text."""
HELDOUT_RULE = (
    f"document i = 0, 1, … is held out if frac((i + 1) * {GOLDEN}) < heldout; a near-duplicate goes where the first of "
    "its kind is; if none is held out, the last one without a near-duplicate is"
)


def is_heldout(document: int, share: float) -> bool:
    """Whether document number ``document`` (from 0) is held out; see ``HELDOUT_RULE``.

    "Every tenth" would be in step with texts that come in turns (five topics, say) and hold out one kind only.
    """
    return (document + 1) * GOLDEN % 1.0 < share


class Contexts:
    """One split, packed: context c is BOS (if any) and the stream's tokens from c·body, body = ctx_len − 1 with BOS.

    The last context may be shorter, and is there if it has at least two tokens (BOS included). The split grows while
    documents are added; only when all are in is the shorter context its last one.
    """

    def __init__(self, ctx_len: int, bos: int | None, separator: int | None = None) -> None:
        self.ctx_len, self.bos, self._separator = ctx_len, bos, separator
        self.first = 0
        """Number of the first context within the cache."""
        self.n_documents = 0
        self._last = 0
        self._n = 0
        self._ids, self._documents = np.empty(1024, dtype=np.int32), np.empty(1024, dtype=np.int32)

    @property
    def ids(self) -> np.ndarray:
        """int32 [n]: the split's documents, joined by the separator."""
        return self._ids[: self._n]

    @property
    def documents(self) -> np.ndarray:
        """int32 [n]: the document of each token; a separator belongs to the document before it."""
        return self._documents[: self._n]

    def add(self, number: int, tokens: np.ndarray) -> None:
        """The next document."""
        if self.n_documents and self._separator is not None:
            self._extend(np.array([self._separator], dtype=np.int32), self._last)
        self._extend(tokens, number)
        self._last = number
        self.n_documents += 1

    def _extend(self, tokens: np.ndarray, number: int) -> None:
        end = self._n + len(tokens)
        if end > len(self._ids):
            size = max(end, 2 * len(self._ids))
            self._ids, self._documents = np.resize(self._ids, size), np.resize(self._documents, size)
        self._ids[self._n : end], self._documents[self._n : end] = tokens, number
        self._n = end

    @property
    def body(self) -> int:
        return self.ctx_len - (self.bos is not None)

    @property
    def n_full(self) -> int:
        return self._n // self.body

    def __len__(self) -> int:
        rest = self._n % self.body
        return self.n_full + (rest > 0 and rest + (self.bos is not None) >= 2)

    @property
    def n_tokens(self) -> int:
        """Tokens that the model reads, BOS included."""
        return min(self._n, len(self) * self.body) + len(self) * (self.bos is not None)

    def take(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and documents, each int32 [stop − start, length], of contexts ``start`` … ``stop`` − 1.

        The shorter last context comes alone (no padding).
        """
        assert start < stop <= len(self) and (stop <= self.n_full or stop - start == 1)
        part = slice(start * self.body, stop * self.body)
        ids = self.ids[part].reshape(stop - start, -1)
        documents = self.documents[part].reshape(stop - start, -1)
        return self._with_bos(ids, documents)

    def _with_bos(self, ids: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.bos is None:
            return ids, documents
        beginning = np.full_like(ids[:, :1], self.bos)
        return np.concatenate([beginning, ids], axis=1), np.concatenate([documents[:, :1], documents], axis=1)

    def pick(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``take`` of any contexts, int64 [n]; the shorter last one alone."""
        if len(numbers) == 1 or np.array_equal(numbers, np.arange(numbers[0], numbers[0] + len(numbers))):
            return self.take(int(numbers[0]), int(numbers[-1]) + 1)
        assert numbers.max() < self.n_full
        at = numbers[:, None] * self.body + np.arange(self.body)
        return self._with_bos(self.ids[at], self.documents[at])

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
    near_duplicates: int = 0
    """Used, and in the same split as the earlier document that they are nearly equal to."""


@dataclass(frozen=True)
class Encoded:
    """One document that is new and has tokens, and what was left out before it."""

    index: int
    """Number among the new documents, those without a token included."""
    like: int | None
    """``index`` of an earlier near-duplicate."""
    ids: np.ndarray
    """int32 tokens; empty at the end of the text, to bring the last counts."""
    duplicates: int
    empty: int


class Corpus:
    """The splits, packed as far as they were asked for.

    ``limit`` bounds the tokens of text (separators counted, BOS not) of both splits together; documents are taken in
    order and the last one is cut.
    """

    def __init__(
        self,
        documents: Generator[Encoded],
        *,
        separator: int | None,
        bos: int | None,
        ctx_len: int,
        heldout: float,
        limit: int | None = None,
    ) -> None:
        self.train, self.heldout = (Contexts(ctx_len, bos, separator) for _ in range(2))
        self.counts = Counts(0, 0, 0)
        self.complete = False
        self._documents, self._share, self._limit = documents, heldout, limit
        self._joins = int(separator is not None)
        self._sides: dict[int, bool] = {}
        self._waiting: list[tuple[int, Encoded]] | None = [] if heldout > 0 else None
        """Documents until the first held-out one: if there is none, one of them will be."""
        self._total = 0

    @property
    def n_tokens(self) -> int:
        """Tokens that the model reads, BOS included, of what was read so far."""
        return self.train.n_tokens + self.heldout.n_tokens

    def close(self) -> None:
        """End the reading, where it is by a thread."""
        self._documents.close()

    def grow(self, contexts: Contexts, n: int | None) -> bool:
        """Read on until ``contexts`` (one of the splits) has ``n`` full ones, or all where ``n`` is None; whether it
        has. Raises ``ArtifactError`` for no text."""
        while not self.complete and (n is None or contexts.n_full < n):
            self._take(next(self._documents))
        return n is None or contexts.n_full >= n

    def read_on(self, seconds: float) -> bool:
        """Read on for at most so long; whether all is read."""
        end = time.monotonic() + seconds
        while not self.complete and time.monotonic() < end:
            self._take(next(self._documents))
        return self.complete

    def _take(self, document: Encoded) -> None:
        number, side = self.counts.documents, is_heldout(self.counts.documents, self._share)
        if document.like is not None:
            side = self._sides.get(document.like, side)
        used = self.heldout if side else self.train
        waits = bool(self._waiting) and not side  # their separators are not in the split yet
        joins = self._joins * (used.n_documents > 0 or waits)
        ids = document.ids
        if self._limit is not None:
            ids = ids[: max(self._limit - self._total - joins, 0)]
        near = self.counts.near_duplicates
        self.counts = Counts(number, document.duplicates, document.empty, near)
        if not len(ids):
            self._finish()
            return
        self._sides[document.index] = side
        self.counts = Counts(number + 1, document.duplicates, document.empty, near + (document.like is not None))
        self._total += len(ids) + joins
        if self._waiting is not None and not side:
            self._waiting.append((number, dataclasses.replace(document, ids=ids)))
            return
        self._release(None)
        used.add(number, ids)

    def _release(self, held: int | None) -> None:
        """Put the waiting documents into the train split, but number ``held``."""
        for number, document in self._waiting or ():
            (self.heldout if number == held else self.train).add(number, document.ids)
        self._waiting = None

    def _finish(self) -> None:
        waiting = self._waiting or []
        alone = {d.index for _, d in waiting if d.like is None} - {d.like for _, d in waiting}
        single = [number for number, d in waiting if d.index in alone]
        self._release(single[-1] if single and len(waiting) > 1 else None)
        if not self.counts.documents:
            raise ArtifactError("the text is empty: no document with a token in it", "give more text")
        self.heldout.first = len(self.train)
        self.complete = True


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
    """Documents → tokens → splits → contexts, all at once (see ``Corpus``). Raises ``ArtifactError`` for no text."""
    corpus = Corpus(encoded(texts, encode), separator=separator, bos=bos, ctx_len=ctx_len, heldout=heldout, limit=limit)
    corpus.grow(corpus.train, None)
    return corpus


def encoded(texts: Iterable[str], encode: Callable[[list[str]], list[list[int]]]) -> Generator[Encoded]:
    """The tokens of each new document; an empty one comes last, with the final counts."""
    seen: set[bytes] = set()
    near = NearDuplicates()
    index = duplicates = empty = 0

    def fresh() -> Iterator[tuple[str, Encoded]]:
        nonlocal index, duplicates, empty
        for text in texts:
            normal = re.sub(r"\s+", " ", text).strip()
            digest = hashlib.blake2b(normal.encode(), digest_size=16).digest()
            if not normal:
                empty += 1
            elif digest in seen:
                duplicates += 1
            else:
                seen.add(digest)
                yield text, Encoded(index, near.add(normal), np.empty(0, dtype=np.int32), duplicates, empty)
                index += 1

    documents = fresh()
    without_token = 0
    while batch := list(islice(documents, 64)):
        for ids, (_, found) in zip(encode([text for text, _ in batch]), batch, strict=True):
            if ids:
                tokens = np.asarray(ids, dtype=np.int32)
                yield Encoded(found.index, found.like, tokens, found.duplicates, found.empty + without_token)
            else:
                without_token += 1
    yield Encoded(index, None, np.empty(0, dtype=np.int32), duplicates, empty + without_token)


def ahead(documents: Iterator[Encoded], size: int = 128) -> Generator[Encoded]:
    """``documents``, read by a thread of their own, at most ``size`` ahead; what it raises is raised here.

    The thread ends with the iterator. `tokenizers` encodes outside Python's lock, on all processors.
    """
    box: queue.Queue[Encoded | BaseException] = queue.Queue(size)
    stop = threading.Event()

    def put(item: Encoded | BaseException) -> bool:
        while not stop.is_set():
            try:
                box.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        stand_back()
        try:
            for document in documents:
                if not put(document):
                    return
        except BaseException as error:  # handed over, and raised where the documents are read
            put(error)

    thread = threading.Thread(target=work, name="tokeniser", daemon=True)
    thread.start()
    try:
        while True:
            item = box.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if not len(item.ids):
                return
    finally:
        stop.set()
        thread.join()
