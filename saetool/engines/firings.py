"""Where latents fire in a cache: counts of every latent, and the sparse activations of some.

The cache is encoded in blocks and only what is positive is kept: never rows × d_sae at once.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetool.artifacts.cache import Cache
from saetool.core.sae import SAE
from saetool.errors import ArtifactError

BLOCK_VALUES = 16_000_000
"""Latent activations held at once while encoding (64 MB)."""
GROUP_FIRINGS = 64_000_000
"""Activations kept at once (20 bytes each); more latents than that fit are read in several passes."""

Advance = Callable[[int], object]


@dataclass(frozen=True)
class Firing:
    """All activations of one latent."""

    latent: int
    rows: Int[np.ndarray, " m"]
    """Row numbers, rising; rows count through the splits read, in order."""
    values: Float[np.ndarray, " m"]
    """Positive."""


@dataclass(frozen=True)
class Block:
    """Activations of some latents on a run of rows, ordered by latent, then row."""

    rows: Int[np.ndarray, " m"]
    which: Int[np.ndarray, " m"]
    """Which of the latents asked for."""
    values: Float[np.ndarray, " m"]


def only(sae: SAE, latents: Sequence[int]) -> SAE:
    """``sae`` with some of its latents, where each latent is encoded on its own (relu, jumprelu)."""
    ids = torch.as_tensor(list(latents), dtype=torch.int64)
    return dataclasses.replace(
        sae,
        W_enc=sae.W_enc[:, ids],
        b_enc=sae.b_enc[ids],
        W_dec=sae.W_dec[ids],
        threshold=None if sae.threshold is None else sae.threshold[ids],
    )


def _encode(
    sae: SAE, cache: Cache, splits: Sequence[str], latents: Sequence[int] | None, device: str, advance: Advance
) -> Iterator[tuple[int, Float[Tensor, "n L"]]]:
    """Blocks of activations of ``latents`` (None: all) with the number of their first row."""
    rest = None
    if latents is not None:
        if sae.inference in ("relu", "jumprelu"):
            sae = only(sae, latents)
        else:  # topk: latents compete, all must be encoded
            rest = torch.as_tensor(list(latents), device=device)
    sae = sae.map(lambda t: t.to(device))
    size = max(1, min(8192, BLOCK_VALUES // sae.d_sae))
    row = 0
    for split in splits:
        for tensors in cache.iter_split(split):
            for acts in tensors["acts"].split(size):
                x = acts.to(device, torch.float32)
                if not torch.isfinite(x.sum()):  # NaN is above no threshold: it would pass for silence
                    raise ArtifactError(f"{cache.path}: its activations hold NaN or infinity", "make the cache again")
                z = sae.encode(x)
                yield row, z if rest is None else z[:, rest]
                row += len(acts)
                advance(len(acts))


def count(
    sae: SAE, cache: Cache, splits: Sequence[str], device: str, advance: Advance, latents: Sequence[int] | None = None
) -> Int[np.ndarray, " L"]:
    """Rows on which each latent (of ``latents``, or all) is active."""
    total = None
    for _, z in _encode(sae, cache, splits, latents, device, advance):
        active = (z > 0).sum(0)
        total = active if total is None else total + active
    assert total is not None  # an empty split is refused before
    return total.cpu().numpy()


def groups(latents: Sequence[int], counts: Int[np.ndarray, " L"], budget: int = GROUP_FIRINGS) -> list[list[int]]:
    """``latents`` in order, cut into groups whose activations together stay within ``budget``."""
    out: list[list[int]] = []
    filled = 0
    for latent, n in zip(latents, counts.tolist(), strict=True):
        if not out or filled + n > budget:
            out.append([])
            filled = 0
        out[-1].append(latent)
        filled += n
    return out


def collect(
    sae: SAE, cache: Cache, splits: Sequence[str], latents: Sequence[int], device: str, advance: Advance
) -> Iterator[Firing]:
    """The activations of each of ``latents``, in the order asked."""
    blocks = []
    for first, z in _encode(sae, cache, splits, latents, device, advance):
        which, row = (z > 0).T.nonzero(as_tuple=True)
        value = z[row, which].float()
        blocks.append(Block(*(t.cpu().numpy() for t in ((row + first).int(), which.int(), value))))
    yield from by_latent(latents, blocks)


def by_latent(latents: Sequence[int], blocks: list[Block]) -> Iterator[Firing]:
    """The activations in ``blocks``, latent after latent. Empties ``blocks``, so that no two copies are held."""
    total = np.zeros(len(latents), dtype=np.int64)
    for block in blocks:
        total += np.bincount(block.which, minlength=len(latents))
    starts = np.concatenate([[0], np.cumsum(total)])
    rows, values = np.empty(starts[-1], dtype=np.int32), np.empty(starts[-1], dtype=np.float32)
    filled = starts[:-1].copy()
    for block in _taken(blocks):
        n = np.bincount(block.which, minlength=len(latents))
        at = (filled - np.cumsum(n) + n)[block.which] + np.arange(len(block.which))
        rows[at], values[at] = block.rows, block.values
        filled += n
    for i, latent in enumerate(latents):
        mine = slice(int(starts[i]), int(starts[i + 1]))
        yield Firing(latent, rows[mine].astype(np.int64), values[mine])


def _taken(blocks: list[Block]) -> Iterator[Block]:
    blocks.reverse()
    while blocks:
        yield blocks.pop()
