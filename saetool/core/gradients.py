"""Gradients of a training step: by autograd over the dense losses, or by hand over the active pairs.

With z the kept activations, g = ∂L/∂x̂ = −2 (x − x̂) / n and dz = ∂L/∂z = g · W_dec[latent] at each kept pair:

    ∂L/∂W_dec[i] = Σ z g        ∂L/∂W_enc[i] = Σ dz (x − b_dec)        ∂L/∂b_enc[i] = Σ dz      (sums over i's pairs)
    ∂L/∂b_dec    = Σ g − (∂L/∂b_enc) W_encᵀ

so that everything but the encoder's product costs O(pairs · d) (algorithm: ``core/ops``). In a matryoshka step the
latents between prefixes g−1 and g see the summed gradients of the reconstructions from g on. Both ways give the same
step, to the rounding of float32; which is faster depends on d_sae / k (``by_hand``).
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saetool.config import SPARSE
from saetool.core import ops
from saetool.core.losses import Losses, Objective, Parameters, Share, aux_k, aux_scale, losses
from saetool.core.ops import Pairs

DENSE_ELEMENTS = 2**26
"""Rows · latents that the dense form handles at once; larger batches are summed from blocks of rows."""


def by_hand(objective: Objective, d_sae: int) -> bool:
    """Whether the gradients are taken over the pairs: where that is the faster way."""
    return objective.arch in SPARSE and objective.k is not None and d_sae >= 8 * objective.k


def backward(
    p: Parameters,
    x: Float[Tensor, "n d_in"],
    objective: Objective,
    dead: Bool[Tensor, " d_sae"] | None = None,
    cut_hint: float = 0.0,
    sparsity_weight: float = 1.0,
    share: Share = Share(),
) -> Losses:
    """The losses on ``x``, with ``.grad`` of each trained parameter set. Arguments as of ``losses.losses``."""
    n, d_sae = len(x), len(p.encoder)
    for tensor in p.named().values():
        tensor.grad = None
    if by_hand(objective, d_sae):
        with torch.no_grad():
            return _over_pairs(p, x, objective, dead, cut_hint, share)
    if objective.arch in SPARSE or n * d_sae <= DENSE_ELEMENTS:
        result = losses(p, x, objective, dead, cut_hint, sparsity_weight, share)
        result.loss.backward()
        return replace(result, loss=result.loss.detach())
    return _in_blocks(p, x, objective, sparsity_weight, share)


def _in_blocks(
    p: Parameters, x: Float[Tensor, "n d_in"], objective: Objective, sparsity_weight: float, share: Share
) -> Losses:
    """The dense form for losses that are sums over rows, a block of rows at a time: gradients add up."""
    n, parts = len(x), []
    step = max(DENSE_ELEMENTS // len(p.encoder), 1)
    for rows in x.split(step):
        part = losses(p, rows, objective, None, 0.0, sparsity_weight, share)
        weight = len(rows) / n
        (part.loss * weight).backward()
        parts.append((weight, part))
    mean = {
        name: torch.stack([weight * getattr(part, name).detach() for weight, part in parts]).sum()
        for name in ("loss", "mse", "sparsity", "aux")
    }
    fired = torch.stack([part.fired for _, part in parts]).any(0)
    return Losses(**mean, fired=fired, active=sum((part.active for _, part in parts), parts[0][1].active * 0), cut=0.0)


def _over_pairs(
    p: Parameters,
    x: Float[Tensor, "n d_in"],
    objective: Objective,
    dead: Bool[Tensor, " d_sae"] | None,
    cut_hint: float,
    share: Share,
) -> Losses:
    n = len(x) * share.size
    k = objective.k or 0
    centred = x - p.b_dec
    cut = 0.0
    if objective.arch == "topk":
        pairs = ops.topk(centred, p.encoder, p.b_enc, k)
    else:
        pairs, cut = ops.batch_topk(centred, p.encoder, p.b_enc, n * k, cut_hint, share.gather)
    prefixes = objective.prefixes if objective.arch == "matryoshka" else (len(p.encoder),)
    groups = _groups(pairs, prefixes)
    error = centred
    errors = []
    for group in groups:
        error = error - ops.decode(group, p.W_dec)
        errors.append(error)
    squares = torch.stack([e.square().sum() for e in errors]) / n
    mse, loss = squares[-1], squares.mean()
    # Each group of latents sees the gradients of all reconstructions that it is part of.
    g: Tensor | float = 0.0
    dz = torch.empty_like(pairs.values)
    d_decoder = None
    end = len(dz)
    for group, e in zip(reversed(groups), reversed(errors), strict=True):
        g = g - e * (2 / (n * len(groups)))
        dz[end - len(group.rows) : end] = ops.pair_dots(group, g, p.W_dec)
        end -= len(group.rows)
        if p.W_dec.requires_grad:
            sums = ops.pair_sums(group, group.values, g)
            d_decoder = sums if d_decoder is None else d_decoder.add_(sums)
    p.encoder.grad = ops.pair_sums(pairs, dz, centred)
    p.b_enc.grad = torch.zeros_like(p.b_enc).index_add_(0, pairs.latents, dz)
    p.W_dec.grad = d_decoder
    aux = x.new_zeros(())
    if dead is not None and objective.aux_alpha and bool(dead.any()):
        aux = _add_aux(p, centred, errors[-1], objective, dead, share)
        loss = loss + objective.aux_alpha * aux
    p.b_dec.grad = g.sum(0) - p.b_enc.grad @ p.encoder
    fired = pairs.firings()
    return Losses(loss, mse, x.new_zeros(()), aux, fired > 0, fired.sum(), cut)


def _groups(pairs: Pairs, prefixes: tuple[int, ...]) -> list[Pairs]:
    """The pairs of the latents between one prefix and the next."""
    if len(prefixes) == 1:
        return [pairs]
    ends = torch.searchsorted(pairs.latents, torch.tensor(prefixes, device=pairs.latents.device)).tolist()
    return [pairs.subset(slice(a, b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _add_aux(
    p: Parameters,
    centred: Float[Tensor, "n d_in"],
    error: Float[Tensor, "n d_in"],
    objective: Objective,
    dead: Bool[Tensor, " d_sae"],
    share: Share,
) -> Float[Tensor, ""]:
    """AuxK over the dead latents alone, in blocks of rows; adds to the gradients and returns s ‖e − ê‖².

    Autograd on copies of those latents: few, as a rule, and then this costs little beside the encoder's product.
    """
    indices = dead.nonzero().squeeze(1)
    own = Parameters(*(t[indices].detach().requires_grad_() for t in (p.encoder, p.b_enc, p.W_dec)), p.b_dec)
    every = torch.ones(len(indices), dtype=torch.bool, device=centred.device)
    scale = aux_scale(objective, error, len(indices), share)
    total = centred.new_zeros(())
    step = max(DENSE_ELEMENTS // 4 // len(indices), 1)
    with torch.enable_grad():
        for rows, e in zip(centred.split(step), error.split(step), strict=True):
            pre = torch.addmm(own.b_enc, rows, own.encoder.T)
            part = aux_k(own, pre, e, every, objective.k_aux) * (scale * len(rows) / (len(centred) * share.size))
            (objective.aux_alpha * part).backward()
            total += part.detach()
    for tensor, mine in ((p.encoder, own.encoder), (p.b_enc, own.b_enc), (p.W_dec, own.W_dec)):
        if tensor.grad is not None and mine.grad is not None:
            tensor.grad.index_add_(0, indices, mine.grad)
    return total
