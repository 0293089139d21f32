"""Training losses. All are sums over d and latents, and means over the batch, on inputs scaled to E‖x‖² = d.

    topk, batchtopk   ‖x − x̂‖² + α ‖e − ê‖²             e = x − x̂ (detached), ê = z_aux W_dec: AuxK, no b_dec
    relu              ‖x − x̂‖² + λ Σ_i z_i ‖W_dec,i‖      (Templeton et al. 2024)
    jumprelu          ‖x − x̂‖² + λ ‖z‖_0                  (arXiv 2407.14435, straight-through gradient of θ)

z_aux keeps, per token, the k_aux largest *pre-selection* activations among dead latents (Gao et al. 2024,
arXiv 2406.04093, appendix A.2).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saetool.core import activations


@dataclass(frozen=True)
class Parameters:
    """The trained tensors. ``log_threshold`` (jumprelu alone) is learnt in place of θ, which keeps θ positive."""

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    log_threshold: Float[Tensor, " d_sae"] | None = None

    def named(self) -> dict[str, Tensor]:
        """Name → tensor, without the absent."""
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "log_threshold")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class Objective:
    """What is minimised."""

    arch: str
    k: int | None = None
    sparsity: float = 0.0
    """λ of relu (L1) or jumprelu (L0)."""
    aux_alpha: float = 0.0
    k_aux: int = 0
    bandwidth: float = 0.0
    """Width ε of the rectangle kernel (jumprelu)."""


@dataclass(frozen=True)
class Losses:
    """One batch's loss and its parts."""

    loss: Float[Tensor, ""]
    mse: Float[Tensor, ""]
    """‖x − x̂‖², summed over d, mean over the batch."""
    sparsity: Float[Tensor, ""]
    """The unweighted penalty: Σ z‖W_dec‖ or ‖z‖_0; 0 for topk and batchtopk."""
    aux: Float[Tensor, ""]
    """‖e − ê‖², unweighted; exactly 0 where no latent is dead."""
    fired: Bool[Tensor, " d_sae"]
    """Which latents were active at least once."""
    active: Int[Tensor, ""]
    """Active latents in the batch, all tokens together."""
    cut: float
    """The smallest value BatchTopK kept (0 for other architectures)."""


def pre_activations(p: Parameters, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
    """(x − b_dec) W_enc + b_enc, with b_dec moved through W_enc: its gradient then costs a vector, not a batch."""
    return torch.addmm(p.b_enc - p.b_dec @ p.W_enc, x, p.W_enc)


def losses(
    p: Parameters,
    x: Float[Tensor, "n d_in"],
    objective: Objective,
    dead: Bool[Tensor, " d_sae"] | None = None,
    cut_hint: float = 0.0,
    sparsity_weight: float = 1.0,
) -> Losses:
    """The loss on batch ``x``. ``dead`` marks latents for AuxK (None: none); ``sparsity_weight`` is λ's warm-up factor.

    ``cut_hint`` speeds up the BatchTopK selection and changes nothing (see ``activations.batch_topk_cut``).
    """
    pre = pre_activations(p, x)
    zero = torch.zeros((), device=x.device)
    cut, sparsity, aux = 0.0, zero, zero
    match objective.arch:
        case "batchtopk":
            kept = activations.batch_topk_cut(pre.detach(), _k(objective), cut_hint)
            cut = float(kept)
            z = activations.keep_at_least(pre, kept)
        case "topk":
            z = activations.topk(pre, _k(objective))
        case "relu":
            z = pre.relu()
            sparsity = (z * p.W_dec.norm(dim=1)).sum() / len(x)
        case "jumprelu":
            assert p.log_threshold is not None
            threshold = p.log_threshold.exp()
            z = activations.jumprelu_ste(pre, threshold, objective.bandwidth)
            sparsity = activations.step_ste(pre, threshold, objective.bandwidth).sum() / len(x)
        case other:
            raise AssertionError(other)
    error = x - torch.addmm(p.b_dec, z, p.W_dec)
    mse = error.square().sum() / len(x)
    if dead is not None and objective.aux_alpha and bool(dead.any()):
        aux = aux_k(p, pre, error.detach(), dead, objective.k_aux)
    loss = mse + objective.sparsity * sparsity_weight * sparsity + objective.aux_alpha * aux
    fired = (z.detach() > 0).sum(0)
    return Losses(loss, mse.detach(), sparsity.detach(), aux.detach(), fired > 0, fired.sum(), cut)


def aux_k(
    p: Parameters,
    pre: Float[Tensor, "n d_sae"],
    error: Float[Tensor, "n d_in"],
    dead: Bool[Tensor, " d_sae"],
    k_aux: int,
) -> Float[Tensor, ""]:
    """‖e − ê‖², mean over the batch: ê from the ``k_aux`` largest pre-selection activations of the dead latents."""
    indices = dead.nonzero().squeeze(1)
    z = activations.topk(pre[:, indices], min(k_aux, len(indices)))
    return (error - z @ p.W_dec[indices]).square().sum() / len(error)


def _k(objective: Objective) -> int:
    assert objective.k is not None
    return objective.k
