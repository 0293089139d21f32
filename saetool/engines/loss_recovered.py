"""What x̂ in the model's place costs: cross-entropy and KL of a real forward pass with it.

One clean pass per batch of contexts serves every SAE and both ablations. Activations are replaced at the positions
whose rows the cache holds (not at BOS and dropped tokens). Those are also the positions that are counted; the
cross-entropy, of the token that follows, at all of them but a context's last.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saetool.artifacts.cache import Cache
from saetool.core import sparse
from saetool.core.behaviour import ce_and_kl, cross_entropy
from saetool.core.bootstrap import Interval, intervals
from saetool.core.sae import SAE
from saetool.engines.evaluate import SEED, Read
from saetool.engines.model import LanguageModel
from saetool.engines.source import Site
from saetool.engines.splice import Splice
from saetool.errors import ArtifactError


@dataclass(frozen=True)
class LossRecovered:
    """Means over the counted tokens, in nats.

    ce_loss_score_* = (CE ablated − CE spliced) / (CE ablated − CE clean): 1 is perfect, 0 as bad as the ablation.
    kl_div_score_* = (KL ablated − KL spliced) / KL ablated.
    Ablations: to zero, and to the mean activation of the cache's train split.
    """

    n_tokens: int
    """With a next token: those of the cross-entropies."""
    ce_loss_without_sae: float
    ce_loss_with_sae: float
    ce_loss_with_zero_ablation: float
    ce_loss_with_mean_ablation: float
    ce_loss_score_zero: float
    ce_loss_score_mean: float
    kl_div_with_sae: float
    """KL(clean ‖ spliced)."""
    kl_div_with_zero_ablation: float
    kl_div_with_mean_ablation: float
    kl_div_score_zero: float
    kl_div_score_mean: float


@dataclass(frozen=True)
class Measured:
    """One SAE's figures and their 95% intervals by document (empty if there is one document only)."""

    values: LossRecovered
    intervals: dict[str, Interval]
    n_documents: int


@dataclass(frozen=True)
class Contexts:
    """Token ids as the model saw them, and what the cache knows of each position."""

    ids: Int[Tensor, "n_contexts ctx_len"]
    cached: Bool[Tensor, "n_contexts ctx_len"]
    """Which positions have a row; the others hold BOS or a token whose row was dropped."""
    documents: Int[Tensor, "n_contexts ctx_len"]
    """Of the positions that have a row."""
    centered: bool = False
    """Whether the rows are without their mean over d (``cache --center``): x̂ then goes to the model with it."""


def contexts(cache: Cache, split: str, n_tokens: int) -> Contexts:
    """About ``n_tokens`` tokens in whole contexts, evenly spaced over ``split`` (a corpus is often sorted by kind).

    Raises ``ArtifactError`` if there is no whole context.
    """
    ids = cache.input_ids(split).long()
    positions, numbers = cache.row_tensor(split, "positions").long(), cache.row_tensor(split, "contexts").long()
    cached, documents = torch.zeros(ids.shape, dtype=torch.bool), torch.full(ids.shape, -1)
    at = (numbers - cache.first_context(split), positions)
    cached[at], documents[at] = True, cache.row_tensor(split, "documents").long()
    whole = (ids >= 0).all(dim=1).nonzero().squeeze(1)
    if not len(whole):
        raise ArtifactError(f"{cache.path}: its {split} split has no whole context", "cache more text")
    n = min(max(n_tokens // ids.shape[1], 1), len(whole))
    picked = whole[torch.linspace(0, len(whole) - 1, n).round().long()]
    return Contexts(ids[picked], cached[picked], documents[picked], bool(cache.header.config.get("center")))


@torch.no_grad()
def measure(
    lm: LanguageModel,
    site: Site,
    saes: Sequence[SAE],
    data: Contexts,
    mean: Float[Tensor, " d_in"],
    batch_size: int,
) -> Iterator[Read | list[Measured]]:
    """CE and KL of ``lm`` clean, ablated at ``site``, and with each SAE's x̂ there; ``batch_size`` in contexts.

    Events: tokens × passes done (one for each ablation and each SAE), then the result.
    """
    changes: list[Callable[[Tensor], Tensor]] = [lambda x: mean.to(x).expand_as(x)]
    changes += [_reconstruction(sae) for sae in saes]
    variants = [torch.zeros_like, *(partial(_changed, change, data.centered) for change in changes)]
    known = data.documents[data.cached].unique()
    ce_sums = torch.zeros(len(known), 2 + len(variants), dtype=torch.float64)  # n, clean, each variant
    kl_sums = torch.zeros(len(known), 1 + len(variants), dtype=torch.float64)  # n, each variant
    splice = Splice(lm, site)
    for ids, cached, documents in zip(
        *(t.split(batch_size) for t in (data.ids, data.cached, data.documents)), strict=True
    ):
        # Every position is computed, and the cached ones are picked after: picking rows of logits copies them all.
        here, targets = cached.to(lm.device)[..., None], ids.roll(-1, dims=1).flatten().to(lm.device)
        followed = cached.clone()
        followed[:, -1] = False
        groups = torch.searchsorted(known, documents.clamp_min(0)).flatten()
        run = splice.clean(ids)
        clean = run.logits.flatten(0, 1)
        ones = torch.ones(ids.numel(), dtype=torch.float64)
        ce, kl = [ones, cross_entropy(clean, targets)], [ones]
        for variant in variants:
            changed = torch.where(here, variant(run.acts).to(run.acts.dtype), run.acts)
            mine = ce_and_kl(splice.logits(run, changed).flatten(0, 1), clean, targets)
            ce.append(mine[0])
            kl.append(mine[1])
            yield Read(int(followed.sum()))
        for sums, values, counted in ((ce_sums, ce, followed.flatten()), (kl_sums, kl, cached.flatten())):
            sums.index_add_(0, groups[counted], torch.stack(values, dim=1)[counted])
    yield [_measured(ce_sums, kl_sums, i) for i in range(2, len(variants))]


def _measured(ce_sums: Float[Tensor, "documents _"], kl_sums: Float[Tensor, "documents _"], variant: int) -> Measured:
    """The figures of one SAE, which is variant number ``variant``, from sums by document."""
    mine = torch.cat([ce_sums[:, [0, 1, 2, 3, 2 + variant]], kl_sums[:, [0, 1, 2, 1 + variant]]], dim=1)
    generator = torch.Generator().manual_seed(SEED)
    values = {name: float(value) for name, value in _figures(mine.sum(0)).items()}
    found = intervals(mine, _figures, generator)
    return Measured(LossRecovered(n_tokens=int(mine[:, 0].sum()), **values), found, len(mine))


def _figures(sums: Float[Tensor, "*draws columns"]) -> dict[str, Tensor]:
    n, *ce_columns, n_kl, kl_zero, kl_mean, kl = sums.unbind(-1)
    clean, ce_zero, ce_mean, ce = (column / n for column in ce_columns)
    kl_zero, kl_mean, kl = kl_zero / n_kl, kl_mean / n_kl, kl / n_kl
    return {
        "ce_loss_without_sae": clean,
        "ce_loss_with_sae": ce,
        "ce_loss_with_zero_ablation": ce_zero,
        "ce_loss_with_mean_ablation": ce_mean,
        "ce_loss_score_zero": (ce_zero - ce) / (ce_zero - clean),
        "ce_loss_score_mean": (ce_mean - ce) / (ce_mean - clean),
        "kl_div_with_sae": kl,
        "kl_div_with_zero_ablation": kl_zero,
        "kl_div_with_mean_ablation": kl_mean,
        "kl_div_score_zero": (kl_zero - kl) / kl_zero,
        "kl_div_score_mean": (kl_mean - kl) / kl_mean,
    }


def _changed(change: Callable[[Tensor], Tensor], centered: bool, acts: Tensor) -> Tensor:
    """``change`` of the rows [n, d] as a cache has them, float32, in the shape of ``acts``."""
    x = acts.reshape(-1, acts.shape[-1]).float()
    if not centered:
        return change(x).reshape(acts.shape)
    row_means = x.mean(dim=1, keepdim=True)
    return (change(x - row_means) + row_means).reshape(acts.shape)


def _reconstruction(sae: SAE) -> Callable[[Tensor], Tensor]:
    screen = sparse.screen_of(sae)
    return lambda x: sparse.decode(sae, sparse.encode(sae, x, screen), x)
