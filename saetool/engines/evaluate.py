"""Quality of SAEs from a cache alone: no model runs.

Many SAEs share one pass over the rows; their mean is in the cache. What is kept of the rows are sums: by
document, for intervals, and where asked for by position in the context and by token.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetool.artifacts.cache import Cache
from saetool.artifacts.cache_statistics import total
from saetool.core import sparse
from saetool.core.bootstrap import Interval, intervals
from saetool.core.metrics import (
    COLUMNS,
    DecoderCosine,
    Quality,
    QualitySums,
    Ratios,
    RecoveryBound,
    decoder_cosine,
    density_histogram,
    frac_variance_explained,
    ratios,
    recovery_bound,
)
from saetool.core.sae import SAE
from saetool.core.statistics import moments
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
    of: dict[str, Int[Tensor, " n"]]
    """Of each row, what was asked for: its document, position, token."""


def rows(
    cache: Cache, split: str, size: int, limit: int | None, device: str, names: Sequence[str] = ("document",)
) -> Iterator[Rows]:
    """The rows of ``split`` (the first ``limit``) in stored order, at most ``size`` at a time."""
    left = cache.rows(split) if limit is None else limit
    for tensors in cache.iter_split(split):
        n = min(len(tensors["acts"]), left)
        left -= n
        for start in range(0, n, size):
            part = slice(start, min(start + size, n))
            of = {name: tensors[f"{name}s"][part].long() for name in names}
            yield Rows(tensors["acts"][part].to(device, torch.float32), of)


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
    n = cache.rows(split) if limit is None else min(limit, cache.rows(split))
    if not n:
        raise ArtifactError(f"{cache.path}: its {split} split is empty", "cache more text")
    found = moments(total(cache, split, n), n)
    where = "cpu" if device == "mps" else device  # mps has no float64
    found = dataclasses.replace(found, mean=found.mean.to(where), variance=found.variance.to(where))
    documents = cache.row_tensor(split, "documents")[:n].unique().long()
    sizes = {name: int(cache.row_tensor(split, f"{name}s")[:n].max()) + 1 for name in by}
    sizes["document"] = len(documents)
    screens = [sparse.screen_of(sae) for sae in saes]
    sums = [QualitySums(sae.d_sae, found, sizes) for sae in saes]
    for part in rows(cache, split, batch_size, limit, device, list(sizes)):
        numbers = {**part.of, "document": torch.searchsorted(documents, part.of["document"])}
        for sae, screen, mine in zip(saes, screens, sums, strict=True):
            codes = sparse.encode(sae, part.acts, screen)
            mine.add(part.acts, codes, sparse.decode(sae, codes, part.acts), numbers)
        yield Read(len(part.acts))
    yield [_result(sae, mine, by) for sae, mine in zip(saes, sums, strict=True)]


def _result(sae: SAE, sums: QualitySums, by: Sequence[str]) -> Reconstruction:
    quality = sums.result()
    generator = torch.Generator().manual_seed(SEED)
    table = sums.by["document"]
    if len(sums.residuals) == len(table):
        table = torch.cat([table, sums.residuals], dim=1)
    found = intervals(table, partial(_statistics, sae.d_in), generator)
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


def _statistics(d_in: int, sums: Float[Tensor, "n columns"]) -> dict[str, Tensor]:
    """The metrics from column sums, which the residuals' may follow."""
    found = ratios(sums[:, : len(COLUMNS)], d_in)._asdict()
    if sums.shape[1] > len(COLUMNS):
        found["frac_variance_explained"] = frac_variance_explained(sums[:, : len(COLUMNS)], sums[:, len(COLUMNS) :])
    return found


def _breakdown(sums: Float[Tensor, "groups columns"], d_in: int) -> Breakdown:
    ids = (sums[:, COLUMNS.index("n")] > 0).nonzero().squeeze(1)
    found: Ratios = ratios(sums[ids], d_in)
    n = [int(v) for v in sums[ids, COLUMNS.index("n")]]
    wanted = ("l0", "l1", "mse", "explained_variance", "cossim")
    return Breakdown(ids.tolist(), n, {name: getattr(found, name).tolist() for name in wanted})
