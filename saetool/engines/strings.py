"""Token ids as text, and text as token ids."""

import collections
from collections.abc import Iterable, Sequence

from saetool.core import ngram
from saetool.errors import ArtifactError


class Strings:
    """The strings of a vocabulary's token ids. ``where`` names their file in errors."""

    def __init__(self, vocabulary: Sequence[str], where: str) -> None:
        self._vocabulary = vocabulary
        self._where = where
        self._ids: dict[str, list[int]] | None = None
        self.words = ngram.alike(vocabulary)
        """Which tokens are the same word."""

    def __call__(self, token: int) -> str:
        if token >= len(self._vocabulary):
            raise ArtifactError(
                f"{self._where}: has {len(self._vocabulary)} strings, and token {token} occurs", "make the cache again"
            )
        return self._vocabulary[token]

    def ids(self, text: str) -> list[int]:
        """The tokens that have this string."""
        if self._ids is None:
            self._ids = collections.defaultdict(list)
            for token, string in enumerate(self._vocabulary):
                self._ids[string].append(token)
        return self._ids.get(text, [])

    def word(self, text: str) -> list[int]:
        """The tokens that are this word, in any case and spacing."""
        if ngram.word_of(text) is None:
            return []
        return [i for i, string in enumerate(self._vocabulary) if ngram.word_of(string) == ngram.word_of(text)]

    def of(self, tokens: Iterable[int]) -> dict[str, str]:
        """The strings of some ids (those below 0, padding, left out), for a header."""
        return {str(t): self(t) for t in sorted({int(t) for t in tokens}) if t >= 0}
