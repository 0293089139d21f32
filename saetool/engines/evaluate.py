"""Quality of SAEs: reconstruction and sparsity from a cache, and cross-entropy with x̂ in the model's place.

Many SAEs share one read of the cache, and one clean forward pass per batch of contexts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saetool.artifacts.cache import Cache
from saetool.core.metrics import Quality, QualitySums, density_histogram
from saetool.core.sae import SAE
from saetool.engines.model import LanguageModel
from saetool.engines.reader import Reader
from saetool.engines.source import Site, logits_with
from saetool.errors import ArtifactError


@dataclass(frozen=True)
class Read:
    """``n`` more tokens were read."""

    n: int


@dataclass(frozen=True)
class Reconstruction:
    """One SAE's quality on the tokens read, and the histogram of log10 firing frequencies."""

    quality: Quality
    density_edges: list[float]
    density_counts: list[int]
    n_tokens: int


@dataclass(frozen=True)
class CrossEntropy:
    """Mean next-token loss (nats) at the cached positions; ablation and splicing act at those positions alone.

    ``ce_loss_score_*`` = (ablated − spliced) / (ablated − clean): 1 is perfect, 0 as bad as the ablation.
    """

    n_tokens: int
    ce_loss_without_sae: float
    ce_loss_with_sae: float
    ce_loss_with_zero_ablation: float
    ce_loss_with_mean_ablation: float
    """Ablated to the mean activation of the cache's train split."""
    ce_loss_score_zero: float
    ce_loss_score_mean: float


@torch.no_grad()
def reconstruct(
    saes: Sequence[SAE], reader: Reader, batch_size: int, limit: int | None = None
) -> Iterator[Read | list[Reconstruction]]:
    """Evaluate ``saes`` on the rows of ``reader`` in stored order (at most ``limit``); the last event is the result."""
    total, n = torch.zeros(reader.d_in, dtype=torch.float64), 0
    for x in reader.sequential(batch_size, limit):
        total += x.double().sum(0).cpu()
        n += len(x)
    sums = [QualitySums(sae.d_in, sae.d_sae, total / n) for sae in saes]
    for x in reader.sequential(batch_size, limit):
        for sae, mine in zip(saes, sums, strict=True):
            z = sae.encode(x)
            mine.add(x, z, sae.decode(z, x))
        yield Read(len(x))
    yield [Reconstruction(s.result(), *density_histogram(s.fired, s.n), s.n) for s in sums]


@dataclass(frozen=True)
class Contexts:
    """Token ids as the model saw them, and which positions have a row in the cache."""

    ids: Int[Tensor, "n_contexts ctx_len"]
    cached: Bool[Tensor, "n_contexts ctx_len"]
    """The other positions hold BOS or a special token whose row was dropped."""


def contexts(cache: Cache, split: str, n_tokens: int) -> Contexts:
    """The first whole contexts of ``split``, about ``n_tokens`` tokens. Raises ``ArtifactError`` if there are none."""
    ids = cache.input_ids(split).long()
    positions, numbers = cache.row_tensor(split, "positions").long(), cache.row_tensor(split, "contexts").long()
    cached = torch.zeros(ids.shape, dtype=torch.bool)
    cached[numbers - cache.first_context(split), positions] = True
    whole = (ids >= 0).all(dim=1)
    ids, cached = ids[whole], cached[whole]
    if not len(ids):
        raise ArtifactError(f"{cache.path}: its {split} split has no whole context", "cache more text")
    n = max(n_tokens // ids.shape[1], 1)
    return Contexts(ids[:n], cached[:n])


@torch.no_grad()
def cross_entropy(
    lm: LanguageModel,
    site: Site,
    saes: Sequence[SAE],
    data: Contexts,
    mean: Float[Tensor, " d_in"],
    batch_size: int,
) -> Iterator[Read | list[CrossEntropy]]:
    """CE of ``lm`` clean, ablated at ``site``, and with each SAE's x̂ there; ``batch_size`` in contexts."""
    variants: list[Callable[[Tensor], Tensor] | None] = [None, torch.zeros_like, lambda a: mean.to(a).expand_as(a)]
    variants += [_reconstructor(sae) for sae in saes]
    totals, n = torch.zeros(len(variants), dtype=torch.float64), 0
    device = next(lm.model.parameters()).device
    for ids, cached in zip(data.ids.split(batch_size), data.cached.split(batch_size), strict=True):
        ids, cached = ids.to(device), cached.to(device)
        counted = cached[:, :-1]
        for i, variant in enumerate(variants):
            replace = None if variant is None else _at(cached, variant)
            logits = logits_with(lm, site, ids, replace)[:, :-1][counted]
            loss = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][counted], reduction="sum")
            totals[i] += loss.double().cpu()
        n += int(counted.sum())
        yield Read(int(counted.sum()))
    clean, zero, ablated, *spliced = (totals / n).tolist()
    yield [
        CrossEntropy(n, clean, ce, zero, ablated, _score(zero, ce, clean), _score(ablated, ce, clean)) for ce in spliced
    ]


def _score(ablated: float, spliced: float, clean: float) -> float:
    return (ablated - spliced) / (ablated - clean) if ablated != clean else float("nan")


def _reconstructor(sae: SAE) -> Callable[[Tensor], Tensor]:
    def replace(acts: Tensor) -> Tensor:
        x = acts.reshape(-1, acts.shape[-1]).float()
        return sae.decode(sae.encode(x), x).reshape(acts.shape).to(acts.dtype)

    return replace


def _at(cached: Tensor, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``function`` at the cached positions, the model's own activations elsewhere."""
    return lambda acts: torch.where(cached[..., None], function(acts), acts)
