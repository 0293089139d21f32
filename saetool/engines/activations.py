"""Where the activations of latents come from: an SAE over a cache, or what another tool stored."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Int

from saetool.artifacts.cache import Cache
from saetool.artifacts.delphi import DelphiLatents
from saetool.core.sae import SAE
from saetool.engines import firings, stretches
from saetool.engines.firings import Advance, Firing
from saetool.engines.stretches import Text


class Activations(Protocol):
    """The activations of every latent on some rows of text."""

    @property
    def n_rows(self) -> int: ...

    def text(self, skip_positions: int) -> Text: ...

    def counts(self, latents: Sequence[int] | None, advance: Advance) -> Int[np.ndarray, " L"]:
        """Rows on which each of ``latents`` (None: all) is active; ``advance`` is told of every row read."""
        ...

    def collect(self, latents: Sequence[int], advance: Advance) -> Iterator[Firing]:
        """The activations of each of ``latents``, in the order asked."""
        ...


@dataclass(frozen=True)
class Encoded:
    """``sae`` over ``splits`` of ``cache``."""

    sae: SAE
    cache: Cache
    splits: Sequence[str]
    device: str

    @property
    def n_rows(self) -> int:
        return sum(self.cache.rows(split) for split in self.splits)

    def text(self, skip_positions: int) -> Text:
        return stretches.read_text(self.cache, self.splits, skip_positions)

    def counts(self, latents: Sequence[int] | None, advance: Advance) -> Int[np.ndarray, " L"]:
        return firings.count(self.sae, self.cache, self.splits, self.device, advance, latents)

    def collect(self, latents: Sequence[int], advance: Advance) -> Iterator[Firing]:
        return firings.collect(self.sae, self.cache, self.splits, latents, self.device, advance)


@dataclass(frozen=True)
class Stored:
    """Activations in delphi's layout, of an SAE with ``d_sae`` latents."""

    latents: DelphiLatents
    d_sae: int

    @property
    def n_rows(self) -> int:
        return self.latents.tokens.size

    def text(self, skip_positions: int) -> Text:
        n, length = self.latents.tokens.shape
        contexts = np.repeat(np.arange(n, dtype=np.int64), length)
        positions = np.tile(np.arange(length, dtype=np.int64), n)
        return stretches.cut(self.latents.tokens.ravel(), contexts, contexts, positions, skip_positions)

    def counts(self, latents: Sequence[int] | None, advance: Advance) -> Int[np.ndarray, " L"]:
        total = np.zeros(self.d_sae, dtype=np.int64)
        for part in self.latents.parts(latents, self.d_sae):
            total += np.bincount(part.latent[part.value > 0], minlength=self.d_sae)
        advance(self.n_rows)
        return total if latents is None else total[list(latents)]

    def collect(self, latents: Sequence[int], advance: Advance) -> Iterator[Firing]:
        found: dict[int, Firing] = {}
        for part in self.latents.parts(latents, self.d_sae):
            active = part.value > 0
            row, latent, value = part.row[active], part.latent[active], part.value[active]
            order = np.lexsort((row, latent))
            row, latent, value = row[order], latent[order], value[order]
            for one in latents:
                mine = slice(*np.searchsorted(latent, [one, one + 1]))
                if mine.start < mine.stop:
                    found[one] = Firing(one, row[mine], value[mine])
        advance(self.n_rows)
        nothing = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        for one in latents:
            yield found.get(one) or Firing(one, *nothing)
