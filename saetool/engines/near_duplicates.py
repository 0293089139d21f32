"""Near-duplicate documents: MinHash over runs of words.

Two documents are near-duplicates if about ``THRESHOLD`` or more of their runs of ``SHINGLE`` words (of those in
either) are in both; where only their tokens are known, of runs of tokens. The share is estimated by ``N_HASHES`` minima
(Broder 1997); pairs worth estimating are those that agree in one of the ``BANDS`` groups of minima: of pairs that share
0.8, 98% do.

Everything is by fixed hash functions: the same documents in the same order give the same answer anywhere.
About 1 kB of memory a document.
"""

import hashlib
import re

import numpy as np
from jaxtyping import Int, UInt64

SHINGLE, N_HASHES, BANDS, THRESHOLD = 5, 32, 8, 0.75
_WORDS_REMEMBERED = 1_000_000
_WORD = re.compile(r"\w+")


class NearDuplicates:
    """Documents are shown one after the other, and each is compared with all before it."""

    def __init__(self) -> None:
        generator = np.random.Generator(np.random.PCG64(0))
        self._factors = generator.integers(0, 2**63, (N_HASHES, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._places = generator.integers(0, 2**63, SHINGLE, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._mixers = generator.integers(0, 2**63, N_HASHES // BANDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._words: dict[str, int] = {}
        self._bands: list[dict[int, int]] = [{} for _ in range(BANDS)]
        self._signatures: list[bytes] = []

    def add(self, text: str) -> int | None:
        """The number (from 0, in the order of ``add``) of the first near-duplicate of ``text`` found, or None."""
        return self._add(np.fromiter((self._hash(w) for w in _WORD.findall(text.lower())), dtype=np.uint64))

    def add_tokens(self, ids: Int[np.ndarray, " n"]) -> int | None:
        """The same of a document of token ids."""
        return self._add((ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))

    def _add(self, words: UInt64[np.ndarray, " n"]) -> int | None:
        number = len(self._signatures)
        signature = self._signature(words)
        self._signatures.append(signature.tobytes())
        keys = (signature.reshape(BANDS, -1).astype(np.uint64) * self._mixers).sum(1).tolist()
        earlier = sorted({known[key] for known, key in zip(self._bands, keys, strict=True) if key in known})
        for known, key in zip(self._bands, keys, strict=True):
            known.setdefault(key, number)
        return next((e for e in earlier if self._similarity(e, signature) >= THRESHOLD), None)

    def _similarity(self, number: int, signature: np.ndarray) -> float:
        return float((np.frombuffer(self._signatures[number], dtype=np.uint32) == signature).mean())

    def _signature(self, words: UInt64[np.ndarray, " n"]) -> np.ndarray:
        """uint32 [N_HASHES]: the least hash of any run of words, by each hash function."""
        if len(words) < SHINGLE:  # one run, padded
            words = np.concatenate([words, np.zeros(SHINGLE - len(words), dtype=np.uint64)])
        runs = len(words) - SHINGLE + 1
        hashes = np.zeros(runs, dtype=np.uint64)
        for place, factor in enumerate(self._places):
            hashes += words[place : place + runs] * factor
        hashes ^= hashes >> np.uint64(29)
        return ((hashes * self._factors).min(axis=1) >> np.uint64(32)).astype(np.uint32)

    def _hash(self, word: str) -> int:
        found = self._words.get(word)
        if found is None:
            if len(self._words) >= _WORDS_REMEMBERED:
                self._words.clear()
            digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
            found = self._words[word] = int.from_bytes(digest, "little")
        return found
