"""Compares SAEs by their decoders, and measures what their latents do to each other's reconstruction.

One read of a cache serves all pairs: each batch is encoded once by each SAE.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.sparse import csr_array, vstack
from torch import Tensor

from saetool.core.interpolation import (
    Curve,
    DataSums,
    Group,
    LatentSums,
    PairSums,
    Prediction,
    ascending_rank,
    curve,
    effects,
    firings,
    groups,
    predict,
)
from saetool.core.sae import SAE, require_plain
from saetool.core.similarity import Similarity, random_max_cosines, similarity
from saetool.core.stitch import Partition, Path, partition, path
from saetool.engines.reader import Reader

_BATCH, _ENTRIES = 4096, 33_554_432
"""Tokens encoded at once, and the most entries of one batch's activations (128 MB)."""
_HELD = 16_000_000
"""Activations (12 bytes each) held before their pairs are counted; counting has a cost of its own in n_latents²."""


@dataclass(frozen=True)
class Comparison:
    """What the decoders of two SAEs alone say."""

    found: Similarity
    parts: Partition
    sweep: list[Partition]
    """The same at each theta of the sweep."""
    null: Float[Tensor, " n_usable"]
    """Max cosine of each large latent to random directions, as many as there are small latents."""


def compare(small: SAE, large: SAE, theta: float, sweep: Sequence[float], seed: int, device: str) -> Comparison:
    """Novel and reconstruction latents of ``large`` at ``theta`` and over a sweep, and a null; float64."""
    if torch.device(device).type == "mps":  # has no float64
        device = "cpu"
    rows = large.W_dec.to(device)
    found = similarity(small.W_dec.to(device), rows, theta, sweep)
    null = random_max_cosines(small.d_sae, rows, torch.Generator().manual_seed(seed))
    return Comparison(found, partition(found, theta), [partition(found, t) for t in sweep], null)


@dataclass(frozen=True)
class Job:
    """Two of the SAEs (by number), and the way from one to the other."""

    small: int
    large: int
    found: Similarity
    path: Path


def job(small: int, large: int, comparison: Comparison, order: str, seed: int) -> Job:
    """The way between two SAEs at the comparison's theta, its order drawn from ``seed`` alone."""
    way = path(comparison.found, comparison.parts, order, torch.Generator().manual_seed(seed))
    return Job(small, large, comparison.found, way)


@dataclass(frozen=True)
class Read:
    """``n`` more tokens were read."""

    n: int


@dataclass(frozen=True)
class Intact:
    """One SAE's own numbers, straight from x̂."""

    mse: float
    l0: float
    fires: Float[Tensor, " d_sae"]
    """Share of the tokens on which each latent fires."""


@dataclass(frozen=True)
class Measured:
    """What the latents of one pair do on the tokens read."""

    n_tokens: int
    small: Intact
    large: Intact
    delta_mse: Float[Tensor, " n_large"]
    """Change of the small SAE's MSE by each large latent alone."""
    prediction: Prediction
    groups: list[Group]
    curve: Curve


@torch.no_grad()
def measure(
    saes: Sequence[SAE],
    jobs: Sequence[Job],
    reader: Reader,
    *,
    bias: str,
    thetas: Sequence[float],
    limit: int | None = None,
) -> Iterator[Read | list[Measured]]:
    """Effects, groups at each of ``thetas`` and the whole path of each job; the last event is the result.

    Rows of ``reader`` in stored order, the first ``limit``. Raises ``ConfigError`` for an SAE that cannot encode
    single tokens.
    """
    for sae in saes:
        require_plain(sae, "stitching on data")
    reference = saes[0].b_dec.double().cpu()
    data = DataSums(reference)
    latents = [LatentSums(sae, reference) for sae in saes]
    ranks = [ascending_rank(j.found.max_cosine) for j in jobs]
    pairs = [PairSums(latents[j.small], latents[j.large], j.path, r) for j, r in zip(jobs, ranks, strict=True)]
    held: list[list[csr_array]] = [[] for _ in saes]
    size = max(min(_BATCH, _ENTRIES // max(sae.d_sae for sae in saes)), 1)
    for x in reader.sequential(size, limit):
        centred = x.cpu().double() - reference
        data.add(centred)
        for sae, sums, mine in zip(saes, latents, held, strict=True):
            z = firings(sae.encode(x))
            sums.add(z, centred)
            mine.append(z)
        if sum(z.nnz for mine in held for z in mine) > _HELD:
            _count(jobs, pairs, held)
        yield Read(len(x))
    _count(jobs, pairs, held)
    own = [_intact(data, sums) for sums in latents]
    result = []
    for j, sums, rank in zip(jobs, pairs, ranks, strict=True):
        small, large, cosines = latents[j.small], latents[j.large], j.found.max_cosine
        delta = effects(data, small, large, sums)
        prediction = predict(cosines, delta, large.fired > 0)
        best = [] if prediction.best_theta != prediction.best_theta else [prediction.best_theta]
        added = groups(cosines, sorted({*thetas, *best}), small, large, sums, rank)
        way = curve(data, small, large, sums, j.path, bias)
        result.append(Measured(data.n, own[j.small], own[j.large], delta, prediction, added, way))
    yield result


def _count(jobs: Sequence[Job], pairs: Sequence[PairSums], held: list[list[csr_array]]) -> None:
    """Move the held activations into the sums over pairs."""
    if not held[0]:
        return
    together = [vstack(mine, format="csr") for mine in held]
    for mine in held:
        mine.clear()
    for j, sums in zip(jobs, pairs, strict=True):
        sums.add(together[j.small], together[j.large])


def _intact(data: DataSums, sums: LatentSums) -> Intact:
    return Intact(sums.squared_error / data.n, float(sums.fired.sum()) / data.n, sums.fired.double() / data.n)
