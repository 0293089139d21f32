"""Activation functions of sparse autoencoders.

    relu        z = max(p, 0)
    topk        z keeps the k largest of max(p, 0) in each row            (Gao et al. 2024, arXiv 2406.04093)
    batch_topk  z keeps the n·k largest of max(p, 0) over n rows at once  (Bussmann et al. 2024, arXiv 2412.06410)
    jumprelu    z = p · 1[p > θ]                                          (Rajamanoharan et al. 2024, arXiv 2407.14435)
    groupmax    z keeps the largest of max(p, 0) in each of k groups of neighbouring latents             (sparsify)
    matching_pursuit  z is built in steps: the decoder row that fits the rest of x best, as much of it as fits, and
                again on what is left                                                                     (SAELens)

p are the pre-activations. Kept values are unchanged; a selected zero is no activation: count active as z > 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def topk(p: Float[Tensor, "n d_sae"], k: int) -> Float[Tensor, "n d_sae"]:
    """Keep the ``k`` largest positive values of each row, zero the rest."""
    positive = p.relu()
    if k == p.shape[-1]:  # AuxK with few dead latents: nothing to rank
        return positive
    values, indices = positive.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(positive).scatter(-1, indices, values)


def groupmax(p: Float[Tensor, "n d_sae"], k: int) -> Float[Tensor, "n d_sae"]:
    """Keep the largest positive value of each of ``k`` equal groups of neighbouring latents, zero the rest."""
    groups = p.relu().unflatten(1, (k, -1))
    values, indices = groups.max(dim=2, keepdim=True)
    return torch.zeros_like(groups).scatter(2, indices, values).flatten(1)


@dataclass(frozen=True)
class Pursuit:
    """When matching pursuit stops: after so many steps, or for a row earlier."""

    max_iterations: int
    residual_threshold: float
    """A row is done when the norm of what is left is below this; 0: never for that reason."""
    stop_on_duplicate_support: bool
    """A row is done when a step added no latent."""


def matching_pursuit(
    x: Float[Tensor, "n d_in"], rows: Float[Tensor, "d_sae d_in"], pursuit: Pursuit
) -> Float[Tensor, "n d_sae"]:
    """Activations of the decoder ``rows`` for ``x``: in each step the row with the largest ⟨rest, row⟩ > 0 gets that
    much, and it is taken off the rest."""
    z, rest = torch.zeros(len(x), len(rows), dtype=x.dtype, device=x.device), x.clone()
    done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    before = z != 0
    for _ in range(pursuit.max_iterations):
        values, indices = (rest @ rows.T).relu().max(dim=1)
        values = values.masked_fill(done, 0.0)
        z.scatter_add_(1, indices[:, None], values[:, None])
        rest = rest - values[:, None] * rows[indices]
        support = z != 0
        if pursuit.stop_on_duplicate_support:
            done |= (support == before).all(dim=1)
        before = support
        if pursuit.residual_threshold > 0:
            done |= rest.norm(dim=1) < pursuit.residual_threshold
        if done.all():
            break
    return z


def batch_topk_cut(
    p: Float[Tensor, "n d_sae"], k: int, hint: float = 0.0, gather: Callable[[Tensor], Tensor] | None = None
) -> Float[Tensor, ""]:
    """The smallest value BatchTopK keeps here: the (n·k)-th largest of max(p, 0), or 0 if too few are positive.

    ``hint`` is a guess of the cut (last batch's, a little lowered). Only values above it are ranked, which is exact
    whenever at least n·k are; otherwise all positive values are ranked. The result does not depend on it.
    ``gather`` joins the values of several processes, among all of which n·k are then kept.
    """
    wanted = p.shape[0] * k
    for floor in (max(hint, 0.0), 0.0):
        survivors = p[p > floor]
        survivors = gather(survivors) if gather else survivors
        if survivors.numel() >= wanted:
            return survivors.kthvalue(survivors.numel() - wanted + 1).values
    return torch.zeros((), dtype=p.dtype, device=p.device)


def keep_at_least(p: Float[Tensor, "n d_sae"], cut: Float[Tensor, ""]) -> Float[Tensor, "n d_sae"]:
    """p where p ≥ ``cut`` and p > 0, else 0."""
    # One pass where a mask takes four: p > the number before cut is p ≥ cut. A third of the time at 1024 × 576.
    before = torch.nextafter(cut, torch.full_like(cut, -torch.inf)).clamp_min(0)
    return torch.nn.functional.threshold(p, float(before), 0.0)


def batch_topk(p: Float[Tensor, "n d_sae"], k: int, hint: float = 0.0) -> Float[Tensor, "n d_sae"]:
    """Keep the n·``k`` largest positive values of the whole batch, zero the rest (values tied with the cut stay)."""
    return keep_at_least(p, batch_topk_cut(p.detach(), k, hint))


def jumprelu(p: Float[Tensor, "n d_sae"], threshold: Float[Tensor, " d_sae"]) -> Float[Tensor, "n d_sae"]:
    """p where p > θ (strictly) and p > 0, else 0."""
    return p * ((p > threshold) & (p > 0))


class _JumpReLU(torch.autograd.Function):
    """JumpReLU with the rectangle-kernel straight-through gradient of θ (arXiv 2407.14435, eq. 11)."""

    @staticmethod
    def forward(ctx, p, threshold, bandwidth):  # type: ignore[override]
        ctx.save_for_backward(p, threshold)
        ctx.bandwidth = bandwidth
        return p * (p > threshold)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        p, threshold = ctx.saved_tensors
        near = ((p - threshold).abs() < ctx.bandwidth / 2).to(p.dtype)
        grad_threshold = -(threshold / ctx.bandwidth) * (near * grad).sum(0)
        return grad * (p > threshold), grad_threshold, None


class _Step(torch.autograd.Function):
    """1[p > θ], whose gradient reaches θ alone (arXiv 2407.14435, eq. 12)."""

    @staticmethod
    def forward(ctx, p, threshold, bandwidth):  # type: ignore[override]
        ctx.save_for_backward(p, threshold)
        ctx.bandwidth = bandwidth
        return (p > threshold).to(p.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        p, threshold = ctx.saved_tensors
        near = ((p - threshold).abs() < ctx.bandwidth / 2).to(p.dtype)
        return None, -(near * grad).sum(0) / ctx.bandwidth, None


def jumprelu_ste(
    p: Float[Tensor, "n d_sae"], threshold: Float[Tensor, " d_sae"], bandwidth: float
) -> Float[Tensor, "n d_sae"]:
    """JumpReLU of max(p, 0) for training: exact forward, rectangle-kernel gradient of ``threshold``."""
    return _JumpReLU.apply(p.relu(), threshold, bandwidth)


def step_ste(
    p: Float[Tensor, "n d_sae"], threshold: Float[Tensor, " d_sae"], bandwidth: float
) -> Float[Tensor, "n d_sae"]:
    """1[max(p, 0) > θ] for the L0 penalty: exact forward, rectangle-kernel gradient of ``threshold``."""
    return _Step.apply(p.relu(), threshold, bandwidth)
