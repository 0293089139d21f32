"""Quality of SAEs from a cache alone: no model runs.

Many SAEs share one pass over the rows (after a light one for their mean). What is kept of the rows are sums: by
document, for intervals, and where asked for by position in the context and by token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetool.artifacts.cache import Cache
from saetool.core import sparse
from saetool.core.bootstrap import Interval, intervals
from saetool.core.metrics import (
    COLUMNS,
    DecoderCosine,
    Moments,
    Quality,
    QualitySums,
    Ratios,
    RecoveryBound,
    decoder_cosine,
    density_histogram,
    ratios,
    recovery_bound,
)
from saetool.core.sae import SAE
from saetool.errors import ArtifactError

BREAKDOWNS = ("position", "token")
SEED = 0
"""Of the bootstrap: the same documents are drawn for every SAE, so that their intervals can be compared."""


@dataclass(frozen=True)
class Read:
    """``n`` more tokens were read."""

    n: int


@dataclass(frozen=True)
class Breakdown:
    """Metrics by position in the context or by token id; groups without a token are left out."""

    ids: list[int]
    n: list[int]
    """Tokens of each."""
    metrics: dict[str, list[float]]


@dataclass(frozen=True)
class Reconstruction:
    """One SAE's quality on the tokens read."""

    quality: Quality
    intervals: dict[str, Interval]
    """95% of the metrics that are functions of sums by document; empty if there is one document only."""
    decoder: DecoderCosine
    bound: RecoveryBound
    density_edges: list[float]
    density_counts: list[int]
    """Histogram of log10 of the firing frequencies."""
    breakdowns: dict[str, Breakdown]
    n_tokens: int
    n_documents: int


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a split, all of one shard."""

    acts: Float[Tensor, "n d_in"]
    """float32, on the device."""
    documents: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    tokens: Int[Tensor, " n"]


def rows(cache: Cache, split: str, size: int, limit: int | None, device: str) -> Iterator[Rows]:
    """The rows of ``split`` (the first ``limit``) in stored order, at most ``size`` at a time."""
    left = cache.rows(split) if limit is None else limit
    for tensors in cache.iter_split(split):
        n = min(len(tensors["acts"]), left)
        left -= n
        for start in range(0, n, size):
            part = slice(start, min(start + size, n))
            yield Rows(
                tensors["acts"][part].to(device, torch.float32),
                *(tensors[name][part].long() for name in ("documents", "positions", "tokens")),
            )


@torch.no_grad()
def reconstruct(
    saes: Sequence[SAE],
    cache: Cache,
    split: str,
    batch_size: int,
    *,
    limit: int | None = None,
    device: str = "cpu",
    by: Sequence[str] = (),
) -> Iterator[Read | list[Reconstruction]]:
    """Evaluate ``saes`` on the rows of ``split`` (the first ``limit``); the last event is the result."""
    shift = cache.moments()["mean"]
    moments = Moments(shift.to("cpu" if device == "mps" else device))  # mps has no float64
    seen, last_token, last_position = [], 0, 0
    for part in rows(cache, split, batch_size, limit, device):
        moments.add(part.acts)
        seen.append(part.documents.unique())
        last_token, last_position = (
            max(last_token, int(part.tokens.max())),
            max(last_position, int(part.positions.max())),
        )
    if not moments.n:
        raise ArtifactError(f"{cache.path}: its {split} split is empty", "cache more text")
    documents = torch.cat(seen).unique()
    sizes = {"document": len(documents), "position": last_position + 1, "token": last_token + 1}
    groups = {name: sizes[name] for name in ("document", *by)}
    encoders = [sparse.rows_of(sae) for sae in saes]
    sums = [QualitySums(sae.d_sae, moments, groups) for sae in saes]
    for part in rows(cache, split, batch_size, limit, device):
        numbers = {
            "document": torch.searchsorted(documents, part.documents),
            "position": part.positions,
            "token": part.tokens,
        }
        for sae, encoder, mine in zip(saes, encoders, sums, strict=True):
            codes = sparse.encode(sae, part.acts, encoder)
            mine.add(part.acts, codes, sparse.decode(sae, codes, part.acts), numbers)
        yield Read(len(part.acts))
    yield [_result(sae, mine, by) for sae, mine in zip(saes, sums, strict=True)]


def _result(sae: SAE, sums: QualitySums, by: Sequence[str]) -> Reconstruction:
    quality = sums.result()
    generator = torch.Generator().manual_seed(SEED)
    found = intervals(sums.by["document"], lambda s: ratios(s, sae.d_in)._asdict(), generator)
    alive = sae.d_sae - quality.dead
    return Reconstruction(
        quality=quality,
        intervals=found,
        decoder=decoder_cosine(sae),
        bound=recovery_bound(sae.d_in, quality.l0, alive),
        **dict(zip(("density_edges", "density_counts"), density_histogram(sums.fired, sums.n), strict=True)),
        breakdowns={name: _breakdown(sums.by[name].cpu(), sae.d_in) for name in by},
        n_tokens=sums.n,
        n_documents=len(sums.by["document"]),
    )


def _breakdown(sums: Float[Tensor, "groups columns"], d_in: int) -> Breakdown:
    ids = (sums[:, COLUMNS.index("n")] > 0).nonzero().squeeze(1)
    found: Ratios = ratios(sums[ids], d_in)
    n = [int(v) for v in sums[ids, COLUMNS.index("n")]]
    wanted = ("l0", "l1", "mse", "explained_variance", "cossim")
    return Breakdown(ids.tolist(), n, {name: getattr(found, name).tolist() for name in wanted})
