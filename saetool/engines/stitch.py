"""Compares SAEs by their decoders, and measures what their latents do to each other's reconstruction.

One read of a cache serves all pairs: each batch is encoded once by each SAE.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array, vstack
from torch import Tensor

from saetool.core import sparse
from saetool.core.cosines import max_cosines
from saetool.core.effects import (
    Cumulative,
    FiringErrors,
    Group,
    Scaling,
    Sums,
    Swaps,
    activation_cosine,
    added,
    ascending_rank,
    cumulative,
    group_rank,
    groups,
    removed,
    scaling,
    swaps,
    with_bias,
)
from saetool.core.interpolation import Curve, DataSums, LatentSums, PairSums, curve, firings
from saetool.core.matching import Matchings, match
from saetool.core.prediction import Prediction, Roc, predict, roc
from saetool.core.sae import SAE, require_plain
from saetool.core.similarity import Similarity, random_directions, shuffled_coordinates, similarity
from saetool.core.stitch import Deltas, Partition, Path, partition, path
from saetool.engines.reader import Reader

_BATCH, _ENTRIES = 4096, 33_554_432
"""Tokens encoded at once, and the most entries of one batch's activations where they are multiplied out (128 MB)."""
_HELD = 24_000_000
"""Activations (12 bytes each) held before their pairs are counted; counting has a cost of its own in n_latents²."""

NULL_ROWS = 4096
"""Large latents from which the nulls are estimated."""


@dataclass(frozen=True)
class Comparison:
    """What the decoders of two SAEs alone say."""

    found: Similarity
    parts: Partition
    sweep: dict[float, Partition | None]
    """The same at each theta of the sweep; None where it joins so many pairs that components say nothing."""
    null: Float[Tensor, " n_usable"]
    """Max cosine of large latents (``NULL_ROWS``, evenly spaced) to as many random directions as small latents."""
    shuffled: Float[Tensor, " n_usable"]
    """The same to the small SAE's rows with every coordinate shuffled among them (each keeps its distribution)."""
    matchings: Matchings | None
    """One-to-one, where asked for."""


def compare(
    small: SAE, large: SAE, theta: float, sweep: Sequence[float], seed: int, device: str, *, matched: bool = False
) -> Comparison:
    """Novel and reconstruction latents of ``large`` at ``theta`` and over a sweep, and nulls."""
    if torch.device(device).type == "mps":  # has no float64
        device = "cpu"
    rows = large.W_dec.to(device)
    found = similarity(small.W_dec.to(device), rows, theta, sweep)
    some = rows[torch.linspace(0, len(rows) - 1, min(len(rows), NULL_ROWS)).round().long()]
    return Comparison(
        found,
        partition(found, theta),
        {t: partition(found, t) if t in found.labels else None for t in sweep},
        max_cosines(random_directions(*small.W_dec.shape, torch.Generator().manual_seed(seed)).to(device), some),
        max_cosines(shuffled_coordinates(small.W_dec, torch.Generator().manual_seed(seed)).to(device), some),
        match(small, large) if matched else None,
    )


@dataclass(frozen=True)
class Job:
    """Two of the SAEs (by number), and the way from one to the other."""

    small: int
    large: int
    found: Similarity
    parts: Partition
    path: Path
    ranks: Int[Tensor, "n_orders n_large"]
    """Ascending max cosine, then the random orders in which the groups are added."""


def job(
    small: int,
    large: int,
    comparison: Comparison,
    order: str,
    seed: int,
    n_orders: int = 0,
    effects: Deltas | None = None,
) -> Job:
    """The way between two SAEs at the comparison's theta, and ``n_orders`` random orders; drawn from ``seed`` alone."""
    found, parts = comparison.found, comparison.parts
    way = path(found, parts, order, torch.Generator().manual_seed(seed), effects)
    orders = [group_rank(parts, torch.Generator().manual_seed(seed + n)) for n in range(n_orders)]
    return Job(small, large, found, parts, way, torch.stack([ascending_rank(found.max_cosine), *orders]))


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
    deltas: Deltas
    """Change of the small SAE's MSE by each large latent, each component swap, each small latent left out, alone."""
    swaps: Swaps
    prediction: Prediction
    roc: Roc
    groups: list[Group]
    cumulative: Cumulative
    scaling: Scaling
    activation_cosine: Float[Tensor, " n_large"]
    firing_errors: Float[Tensor, "4 n_large"]
    """MSE where each large latent fires and where not, of the small SAE, then of the large one."""
    curve: Curve


@dataclass(frozen=True)
class Found:
    """What all pairs, and all SAEs together, show on the tokens read."""

    pairs: list[Measured]
    bias_exchange: list[list[float]]
    """MSE of each SAE (row) with the output bias of each (column)."""


@torch.no_grad()
def measure(
    saes: Sequence[SAE],
    jobs: Sequence[Job],
    reader: Reader,
    *,
    bias: str,
    thetas: Sequence[float],
    limit: int | None = None,
) -> Iterator[Read | Found]:
    """Effects, groups at each of ``thetas`` and the whole path of each job; the last event is the result.

    Rows of ``reader`` in stored order, the first ``limit``. Raises ``ConfigError`` for an SAE that cannot encode
    single tokens.
    """
    for sae in saes:
        require_plain(sae, "stitching on data")
    reference = saes[0].b_dec.double().cpu()
    data = DataSums(reference)
    latents = [LatentSums(sae, reference) for sae in saes]
    pairs = [PairSums(latents[j.small], latents[j.large], j.path, j.parts, j.found.nearest, j.ranks) for j in jobs]
    where_firing = [FiringErrors(len(latents[j.large].W_dec)) for j in jobs]
    held: list[list[csr_array]] = [[] for _ in saes]
    screens = [sparse.screen_of(sae) for sae in saes]
    dense = [sae.d_sae for sae, screen in zip(saes, screens, strict=True) if screen is None]
    size = max(min(_BATCH, _ENTRIES // max(dense, default=1)), 1)
    for x in reader.sequential(size, limit):
        centred = x.cpu().double() - reference
        data.add(centred)
        errors = []
        for sae, screen, sums, mine in zip(saes, screens, latents, held, strict=True):
            mine.append(firings(sparse.encode(sae, x, screen)))
            errors.append(sums.add(mine[-1], centred))
        for j, firing in zip(jobs, where_firing, strict=True):
            firing.add(held[j.large][-1], errors[j.small], errors[j.large])
        if sum(z.nnz for mine in held for z in mine) > _HELD:
            _count(jobs, pairs, held)
        yield Read(len(x))
    _count(jobs, pairs, held)
    own = [_intact(data, sums) for sums in latents]
    result = []
    for j, of_pairs, firing in zip(jobs, pairs, where_firing, strict=True):
        sums = Sums(data, latents[j.small], latents[j.large], of_pairs)
        result.append(_measured(sums, j, firing, (own[j.small], own[j.large]), bias, thetas))
    yield Found(result, [[with_bias(sums, other.b_dec, data.n) for other in latents] for sums in latents])


def _measured(
    sums: Sums, j: Job, firing: FiringErrors, own: tuple[Intact, Intact], bias: str, thetas: Sequence[float]
) -> Measured:
    """Everything about one pair, from its sums."""
    swapped = swaps(sums, j.parts)
    deltas = Deltas(added(sums), swapped.mse, removed(sums))
    cosines, fires = j.found.max_cosine, sums.large.fired > 0
    prediction = predict(cosines, deltas.added, fires)
    best = [] if prediction.best_theta != prediction.best_theta else [prediction.best_theta]
    return Measured(
        n_tokens=sums.data.n,
        small=own[0],
        large=own[1],
        deltas=deltas,
        swaps=swapped,
        prediction=prediction,
        roc=roc(cosines, deltas.added, fires),
        groups=groups(cosines, sorted({*thetas, *best}), sums),
        cumulative=cumulative(sums, j.parts),
        scaling=scaling(sums),
        activation_cosine=activation_cosine(sums),
        firing_errors=firing.result(sums),
        curve=curve(sums.data, sums.small, sums.large, sums.pairs, j.path, bias),
    )


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
