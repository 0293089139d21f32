"""Training losses. All are sums over d and latents, and means over the batch, on inputs scaled to E‖x‖² = d.

    topk, batchtopk   ‖x − x̂‖² + α s ‖e − ê‖²            e = x − x̂ (detached), ê = z_aux W_dec: AuxK, no b_dec
    matryoshka        1/G Σ_g ‖x − x̂_g‖² + α s ‖e − ê‖²  x̂_g from the first w_g latents of one BatchTopK selection
                                                        (Bussmann et al. 2025, arXiv 2503.17547)
    relu              ‖x − x̂‖² + λ Σ_i z_i ‖W_dec,i‖      (Templeton et al. 2024)
    jumprelu          ‖x − x̂‖² + λ ‖z‖_0                 (arXiv 2407.14435, straight-through gradient of θ), or
                      ‖x − x̂‖² + λ Σ_i tanh(4 z_i ‖W_dec,i‖)                       (Circuits Updates, January 2025)
    gated             ‖x − x̂‖² + λ Σ_i relu(π_i) ‖W_dec,i‖ + ‖x − x̂(relu(π))‖²   π = x W_gate + b_gate
                                                        (arXiv 2404.16014, with decoder norms in place of unit rows)

z_aux keeps, per token, the k_aux largest *pre-selection* activations among dead latents (Gao et al. 2024,
arXiv 2406.04093, appendix A.2). s is 1, or a recipe's own scale (``AUX_SCALES``). These dense forms with autograd are
the definitions; ``core/gradients.py`` has the same gradients by hand over the active pairs alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saetool.core import activations

AUX_SCALES = ("plain", "dead-share", "variance")
"""s of AuxK: 1; min(dead / k_aux, 1) (SAELens, sparsify); 1 / Σ‖e − ē‖² (dictionary_learning, Gao et al.)."""
TANH_SCALE = 4.0


@dataclass(frozen=True)
class Parameters:
    """The trained tensors; latents are rows. Those that an architecture lacks are None."""

    encoder: Float[Tensor, "d_sae d_in"]
    """W_encᵀ (gated: W_gateᵀ)."""
    b_enc: Float[Tensor, " d_sae"]
    """gated: b_gate."""
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    log_threshold: Float[Tensor, " d_sae"] | None = None
    """jumprelu: learnt in place of θ, which keeps θ positive."""
    r_mag: Float[Tensor, " d_sae"] | None = None
    """gated: W_mag = W_gate · exp(r_mag)."""
    b_mag: Float[Tensor, " d_sae"] | None = None

    def named(self) -> dict[str, Tensor]:
        """Name → tensor, without the absent."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if getattr(self, name) is not None}


@dataclass(frozen=True)
class Objective:
    """What is minimised."""

    arch: str
    k: int | None = None
    sparsity: float = 0.0
    """λ of relu, gated (L1) or jumprelu (L0 or tanh)."""
    aux_alpha: float = 0.0
    k_aux: int = 0
    aux_scale: str = "plain"
    """One of ``AUX_SCALES``."""
    bandwidth: float = 0.0
    """Width ε of the rectangle kernel (jumprelu)."""
    penalty: str = "l0"
    """jumprelu: l0 or tanh."""
    prefixes: tuple[int, ...] = ()
    """matryoshka: widths w_1 < … < w_G = d_sae."""
    bfloat16: bool = False
    """Whether the dense matrix products run in bfloat16; everything between them stays float32."""


@dataclass(frozen=True)
class Share:
    """What one of several processes knows of the joint batch: it holds ``1/size`` of the rows."""

    size: int = 1
    gather: Callable[[Tensor], Tensor] | None = None
    """Joins the values of all processes; None where there is one."""


@dataclass(frozen=True)
class Losses:
    """One batch's loss and its parts; with several processes, this one's share of each mean."""

    loss: Float[Tensor, ""]
    mse: Float[Tensor, ""]
    """‖x − x̂‖², summed over d, mean over the batch."""
    sparsity: Float[Tensor, ""]
    """The unweighted penalty: Σ z‖W_dec‖, ‖z‖_0 or Σ tanh; 0 for topk, batchtopk and matryoshka."""
    aux: Float[Tensor, ""]
    """s ‖e − ê‖², unweighted; exactly 0 where no latent is dead."""
    fired: Bool[Tensor, " d_sae"]
    """Which latents were active at least once."""
    active: Int[Tensor, ""]
    """Active latents in the batch, all tokens together."""
    cut: float
    """The smallest value BatchTopK kept (0 for other architectures)."""


def pre_activations(p: Parameters, x: Float[Tensor, "n d_in"], bfloat16: bool = False) -> Float[Tensor, "n d_sae"]:
    """(x − b_dec) W_enc + b_enc, with b_dec moved through W_enc: its gradient then costs a vector, not a batch."""
    return _product(x, p.encoder.T, p.b_enc - p.encoder @ p.b_dec, bfloat16)


def _product(a: Tensor, b: Tensor, bias: Tensor, bfloat16: bool) -> Tensor:
    if not bfloat16:
        return torch.addmm(bias, a, b)
    return (a.bfloat16() @ b.bfloat16()).float() + bias


def losses(
    p: Parameters,
    x: Float[Tensor, "n d_in"],
    objective: Objective,
    dead: Bool[Tensor, " d_sae"] | None = None,
    cut_hint: float = 0.0,
    sparsity_weight: float = 1.0,
    share: Share = Share(),
) -> Losses:
    """The loss on batch ``x``. ``dead`` marks latents for AuxK (None: none); ``sparsity_weight`` is λ's warm-up factor.

    ``cut_hint`` speeds up the BatchTopK selection and changes nothing (see ``activations.batch_topk_cut``).
    """
    pre = pre_activations(p, x, objective.bfloat16)
    zero = torch.zeros((), device=x.device)
    cut, sparsity, aux, extra = 0.0, zero, zero, zero
    match objective.arch:
        case "batchtopk" | "matryoshka":
            kept = activations.batch_topk_cut(pre.detach(), _k(objective) * share.size, cut_hint, share.gather)
            cut = float(kept)
            z = activations.keep_at_least(pre, kept)
        case "topk":
            z = activations.topk(pre, _k(objective))
        case "relu":
            z = pre.relu()
            sparsity = (z * p.W_dec.norm(dim=1)).sum()
        case "jumprelu":
            assert p.log_threshold is not None
            threshold = p.log_threshold.exp()
            z = activations.jumprelu_ste(pre, threshold, objective.bandwidth)
            if objective.penalty == "tanh":
                sparsity = (TANH_SCALE * z * p.W_dec.norm(dim=1)).tanh().sum()
            else:
                sparsity = activations.step_ste(pre, threshold, objective.bandwidth).sum()
        case "gated":
            assert p.r_mag is not None and p.b_mag is not None
            gate = pre.relu()
            z = (pre > 0) * ((pre - p.b_enc) * p.r_mag.exp() + p.b_mag).relu()
            sparsity = (gate * p.W_dec.norm(dim=1)).sum()
            extra = (x - _product(gate, p.W_dec, p.b_dec, objective.bfloat16)).square().sum()
        case other:
            raise AssertionError(other)
    n = len(x) * share.size
    error = x - _product(z, p.W_dec, p.b_dec, objective.bfloat16)
    mse = error.square().sum() / n
    reconstruction = mse if objective.arch != "matryoshka" else _prefix_losses(p, x, z, objective.prefixes).mean() / n
    if dead is not None and objective.aux_alpha and bool(dead.any()):
        scale = aux_scale(objective, error.detach(), int(dead.sum()), share)
        aux = scale * aux_k(p, pre, error.detach(), dead, objective.k_aux) / share.size
    sparsity = sparsity / n
    loss = reconstruction + extra / n + objective.sparsity * sparsity_weight * sparsity + objective.aux_alpha * aux
    fired = (z.detach() > 0).sum(0)
    return Losses(loss, mse.detach(), sparsity.detach(), aux.detach(), fired > 0, fired.sum(), cut)


def _prefix_losses(
    p: Parameters, x: Float[Tensor, "n d_in"], z: Float[Tensor, "n d_sae"], prefixes: tuple[int, ...]
) -> Float[Tensor, " prefixes"]:
    """Σ‖x − x̂_g‖² of each prefix of the latents."""
    errors, x_hat, start = [], p.b_dec, 0
    for width in prefixes:
        x_hat = x_hat + z[:, start:width] @ p.W_dec[start:width]
        errors.append((x - x_hat).square().sum())
        start = width
    return torch.stack(errors)


def aux_scale(objective: Objective, error: Float[Tensor, "n d_in"], n_dead: int, share: Share) -> float:
    """s of AuxK: a constant to the gradient."""
    match objective.aux_scale:
        case "dead-share":
            return min(n_dead / objective.k_aux, 1.0)
        case "variance":  # of the joint batch, from each process's sums
            sums = torch.cat([error.sum(0), error.square().sum().reshape(1)])
            if share.gather is not None:
                sums = share.gather(sums).view(share.size, -1).sum(0)
            n = len(error) * share.size
            variance = float(sums[-1] / n - (sums[:-1] / n).square().sum())
            return 1 / variance if variance > 0 else 0.0
        case _:
            return 1.0


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
