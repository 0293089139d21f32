"""What other libraries' SAEs compute, each written from its own definition, in its own tensor names and orientation.

These formulas prove imports: an imported SAE must give the same activations and reconstructions on a probe as the
formula of the library that wrote it. So they share no code with ``core/sae.py`` and ``core/activations.py``, and
nothing else uses them. ``t`` are the tensors as stored; x [n, d] are raw activations; the result is z [n, F] and
x̂ [n, d].

    SAELens                sae_lens/saes/*.py of sae-lens 6.54
    sparsify               sparsify/sparse_coder.py and fused_encoder.py of eai-sparsify 1.3
    dictionary_learning    dictionary.py, trainers/{top_k,batch_top_k,matryoshka_batch_top_k}.py of version 0.1
    BatchTopK, matryoshka  sae.py of bartbussmann/BatchTopK and bartbussmann/matryoshka_sae
    OpenAI                 sparse_autoencoder/model.py of openai/sparse_autoencoder
    Llamascopium           models/sae.py of llamascopium 2.0 (lm-saes before)
    Gemma Scope            the tutorial's JumpReLU SAE (arXiv 2408.05147)
    Qwen Scope, Goodfire   their model cards' forward passes
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


class Coded(NamedTuple):
    """Activations [n, F] and reconstructions [n, d]."""

    z: Tensor
    x_hat: Tensor


# --- what several of them use ----------------------------------------------------------------------------------


def _keep_largest(scores: Tensor, k: int) -> Tensor:
    """1 at the k largest entries of each row."""
    mask = torch.zeros_like(scores)
    return mask.scatter(1, torch.sort(scores, dim=1, descending=True).indices[:, :k], 1.0)


def _keep_largest_of_batch(scores: Tensor, k: float | int) -> Tensor:
    """1 at the n·k largest entries of the whole matrix."""
    order = torch.sort(scores.flatten(), descending=True).indices
    mask = torch.zeros_like(scores).flatten()
    mask[order[: int(k * len(scores))]] = 1.0
    return mask.view_as(scores)


def _standardised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x − μ)/(σ + 1e-5), μ, σ of each row; σ with d − 1."""
    mu = x.sum(1, keepdim=True) / x.shape[1]
    sigma = ((x - mu).square().sum(1, keepdim=True) / (x.shape[1] - 1)).sqrt()
    return (x - mu) / (sigma + 1e-5), mu, sigma


# --- SAELens ---------------------------------------------------------------------------------------------------


def saelens(
    t: Tensors,
    x: Tensor,
    *,
    architecture: str,
    apply_b_dec_to_input: bool,
    normalize_activations: str = "none",
    k: float | int | None = None,
    rescale_acts_by_decoder_norm: bool = False,
    whole_batch: bool = False,
) -> Coded:
    """standard, gated, topk, abstopk, jumprelu; batchtopk as trained (``whole_batch``) or with its topk_threshold."""
    if normalize_activations == "layer_norm":
        x, mu, sigma = _standardised(x)
    elif normalize_activations == "constant_norm_rescale":
        coefficient = x.shape[1] ** 0.5 / x.square().sum(1, keepdim=True).sqrt()
        x = x * coefficient
    sae_in = x - t["b_dec"] if apply_b_dec_to_input else x
    norms = t["W_dec"].square().sum(1).sqrt() if rescale_acts_by_decoder_norm else torch.ones_like(t["W_dec"][:, 0])
    if architecture == "gated":
        gate = sae_in @ t["W_enc"] + t["b_gate"]
        magnitude = sae_in @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]
        acts = torch.where(gate > 0, magnitude.clamp(min=0), torch.zeros_like(magnitude))
    else:
        hidden_pre = (sae_in @ t["W_enc"] + t["b_enc"]) * norms
        if architecture == "standard":
            acts = hidden_pre.clamp(min=0)
        elif architecture == "jumprelu":
            acts = hidden_pre.clamp(min=0) * (hidden_pre > t["threshold"])
        elif architecture == "topk":
            assert k is not None
            acts = (hidden_pre * _keep_largest(hidden_pre, int(k))).clamp(min=0)
        elif architecture == "abstopk":
            assert k is not None
            acts = hidden_pre * _keep_largest(hidden_pre.abs(), int(k))
        elif whole_batch:
            assert k is not None
            rectified = hidden_pre.clamp(min=0)
            acts = rectified * _keep_largest_of_batch(rectified, k)
        else:
            acts = hidden_pre.clamp(min=0) * (hidden_pre > t["topk_threshold"])
    out = (acts / norms) @ t["W_dec"] + t["b_dec"]
    if normalize_activations == "layer_norm":
        out = out * sigma + mu
    elif normalize_activations == "constant_norm_rescale":
        out = out / coefficient
    return Coded(acts, out)


def saelens_matching_pursuit(
    t: Tensors,
    x: Tensor,
    *,
    apply_b_dec_to_input: bool,
    residual_threshold: float,
    max_iterations: int | None,
    stop_on_duplicate_support: bool,
) -> Coded:
    """matching_pursuit, one row after the other: a tied SAE, so b_dec is added only if it was subtracted."""
    acts = torch.zeros(len(x), len(t["W_dec"]), dtype=x.dtype)
    for row, mine in zip(x - t["b_dec"] if apply_b_dec_to_input else x, acts, strict=True):
        residual, support = row, set()
        for _ in range(len(row) if max_iterations is None else max_iterations):
            fits = t["W_dec"] @ residual
            best = int(torch.argmax(fits))
            value = max(float(fits[best]), 0.0)
            mine[best] += value
            residual = residual - value * t["W_dec"][best]
            grown = support | ({best} if value > 0 else set())
            stop = stop_on_duplicate_support and grown == support
            support = grown
            if stop or (residual_threshold > 0 and float(residual.square().sum().sqrt()) < residual_threshold):
                break
    out = acts @ t["W_dec"]
    return Coded(acts, out + t["b_dec"] if apply_b_dec_to_input else out)


# --- sparsify --------------------------------------------------------------------------------------------------


def sparsify_topk(t: Tensors, x: Tensor, *, k: int) -> Coded:
    """relu, then the k largest of each token; b_dec is always subtracted (only transcoders do not)."""
    pre_acts = ((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]).clamp(min=0)
    acts = pre_acts * _keep_largest(pre_acts, k)
    return Coded(acts, torch.einsum("nf,fd->nd", acts, t["W_dec"]) + t["b_dec"])


def sparsify_groupmax(t: Tensors, x: Tensor, *, k: int) -> Coded:
    """relu, then the largest of each of k groups of neighbouring latents."""
    pre_acts = ((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]).clamp(min=0)
    groups = pre_acts.reshape(len(x) * k, -1)
    acts = (groups * _keep_largest(groups, 1)).reshape(pre_acts.shape)
    return Coded(acts, torch.einsum("nf,fd->nd", acts, t["W_dec"]) + t["b_dec"])


# --- dictionary_learning ---------------------------------------------------------------------------------------


def dictionary_autoencoder(t: Tensors, x: Tensor) -> Coded:
    """AutoEncoder as ``from_pretrained`` gives it: decoder columns scaled to norm 1, the encoder by their norms."""
    norms = t["decoder.weight"].square().sum(0).sqrt()
    f = ((x - t["bias"]) @ (t["encoder.weight"] * norms[:, None]).T + t["encoder.bias"] * norms).clamp(min=0)
    return Coded(f, f @ (t["decoder.weight"] / norms).T + t["bias"])


def dictionary_autoencoder_new(t: Tensors, x: Tensor) -> Coded:
    """AutoEncoderNew: nothing is subtracted; the decoder has its own bias."""
    f = (x @ t["encoder.weight"].T + t["encoder.bias"]).clamp(min=0)
    return Coded(f, f @ t["decoder.weight"].T + t["decoder.bias"])


def dictionary_gated(t: Tensors, x: Tensor) -> Coded:
    """GatedAutoEncoder."""
    x_enc = (x - t["decoder_bias"]) @ t["encoder.weight"].T
    f_mag = (t["r_mag"].exp() * x_enc + t["mag_bias"]).clamp(min=0)
    f = f_mag * (x_enc + t["gate_bias"] > 0)
    return Coded(f, f @ t["decoder.weight"].T + t["decoder_bias"])


def dictionary_topk(t: Tensors, x: Tensor, *, k: int, select: str) -> Coded:
    """AutoEncoderTopK (``select`` row) and BatchTopKSAE (threshold, or batch as in training)."""
    post_relu = ((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]).clamp(min=0)
    f = _selected(post_relu, k, select, t.get("threshold"))
    return Coded(f, f @ t["decoder.weight"].T + t["b_dec"])


def dictionary_matryoshka(t: Tensors, x: Tensor, *, k: int, select: str) -> Coded:
    """MatryoshkaBatchTopKSAE with all its groups active."""
    post_relu = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).clamp(min=0)
    f = _selected(post_relu, k, select, t.get("threshold"))
    return Coded(f, f @ t["W_dec"] + t["b_dec"])


def dictionary_jumprelu(t: Tensors, x: Tensor, *, apply_b_dec_to_input: bool = False) -> Coded:
    """JumpReluAutoEncoder; its flag for subtracting b_dec is false unless code sets it."""
    pre_jump = (x - t["b_dec"] if apply_b_dec_to_input else x) @ t["W_enc"] + t["b_enc"]
    f = (pre_jump * (pre_jump > t["threshold"])).clamp(min=0)
    return Coded(f, f @ t["W_dec"] + t["b_dec"])


def _selected(post_relu: Tensor, k: int, select: str, threshold: Tensor | None) -> Tensor:
    if select == "threshold":
        assert threshold is not None
        return post_relu * (post_relu > threshold)
    return post_relu * (_keep_largest if select == "row" else _keep_largest_of_batch)(post_relu, k)


# --- the BatchTopK authors' repositories -----------------------------------------------------------------------


def batchtopk_repository(t: Tensors, x: Tensor, *, kind: str, input_unit_norm: bool, k: int | None) -> Coded:
    """``kind``: vanilla, topk, batchtopk (as trained), threshold (matryoshka's inference), jumprelu.

    The topk variants leave out b_enc; jumprelu subtracts nothing.
    """
    if input_unit_norm:
        x, mu, sigma = _standardised(x)
    if kind == "jumprelu":
        pre = (x @ t["W_enc"] + t["b_enc"]).clamp(min=0)
        acts = pre * (pre > t["jumprelu.log_threshold"].exp())
    elif kind == "vanilla":
        acts = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).clamp(min=0)
    else:
        acts = ((x - t["b_dec"]) @ t["W_enc"]).clamp(min=0)
        if kind == "threshold":
            acts = torch.where(acts > t["threshold"], acts, torch.zeros_like(acts))
        else:
            assert k is not None
            acts = acts * (_keep_largest if kind == "topk" else _keep_largest_of_batch)(acts, k)
    out = acts @ t["W_dec"] + t["b_dec"]
    return Coded(acts, out * sigma + mu if input_unit_norm else out)


# --- OpenAI ----------------------------------------------------------------------------------------------------


def openai(t: Tensors, x: Tensor, *, k: int | None) -> Coded:
    """With ``k``: TopK, whose inputs are layer-normalised; without: ReLU on the inputs as they are."""
    if k is not None:
        x, mu, sigma = _standardised(x)
    latents_pre_act = (x - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"]
    latents = latents_pre_act.clamp(min=0)
    if k is not None:
        latents = latents * _keep_largest(latents_pre_act, k)
    recons = latents @ t["decoder.weight"].T + t["pre_bias"]
    return Coded(latents, recons * sigma + mu if k is not None else recons)


# --- OpenMOSS --------------------------------------------------------------------------------------------------


def llamascopium(
    t: Tensors, x: Tensor, *, act_fn: str, norm: float | None, token_wise: bool, include_decoder_norm: bool, k: int
) -> Coded:
    """SparseAutoEncoder. ``norm``: average norm of the data set, to which √d is scaled; z is in the data's units.

    Where selection is by rank and includes the decoder norms, z is given in units of unit decoder rows.
    """
    root = x.shape[1] ** 0.5
    factor = root / x.square().sum(1, keepdim=True).sqrt() if token_wise else torch.ones_like(x[:, :1])
    if norm is not None:
        factor = factor * (root / norm)
    hidden_pre = (x * factor) @ t["W_E"] + t["b_E"]
    norms = t["W_D"].square().sum(1).sqrt()
    scores = hidden_pre * norms if include_decoder_norm else hidden_pre
    if act_fn == "relu":
        mask = (scores > 0).to(x.dtype)
    elif act_fn == "jumprelu":
        mask = (scores > t["activation_function.log_jumprelu_threshold"].exp()).to(x.dtype)
    else:
        rectified = scores.clamp(min=0)
        mask = (_keep_largest if act_fn == "topk" else _keep_largest_of_batch)(rectified, k) * (rectified > 0)
    feature_acts = hidden_pre * mask
    out = feature_acts @ t["W_D"]
    if "b_D" in t:
        out = out + t["b_D"]
    z = feature_acts * norms if act_fn in ("topk", "batchtopk") and include_decoder_norm else feature_acts
    return Coded(z if token_wise or norm is None else z / (root / norm), out / factor)


def llama_scope(t: Tensors, x: Tensor, *, norm: float, threshold: float, include_decoder_norm: bool) -> Coded:
    """The released Llama Scope SAEs: trained on inputs of average norm √d; the threshold is in the data's units.

    That it is follows from the release: thresholds grow with the layers' activation norms (0.202 at norm 6.3,
    0.355 at 10.8, 0.754 at 29.1), and SAELens' loader, contributed with the release, reads them so.
    """
    c = x.shape[1] ** 0.5 / norm
    hidden_pre = ((x * c) @ t["encoder.weight"].T + t["encoder.bias"]) / c
    scores = hidden_pre * t["decoder.weight"].square().sum(0).sqrt() if include_decoder_norm else hidden_pre
    f = hidden_pre.clamp(min=0) * (scores > threshold)
    return Coded(f, ((f * c) @ t["decoder.weight"].T + t["decoder.bias"]) / c)


# --- single releases -------------------------------------------------------------------------------------------


def gemma_scope(t: Tensors, x: Tensor, *, embedding: bool = False) -> Coded:
    """JumpReLU without a pre-encoder bias. The embedding SAEs were trained on x/√d: their encoder reads x/√d and
    their decoder writes √d times its rows."""
    w_enc = t["W_enc"] if "W_enc" in t else t["w_enc"]
    w_dec = t["W_dec"] if "W_dec" in t else t["w_dec"]
    root = x.shape[1] ** 0.5 if embedding else 1.0
    pre_acts = (x / root) @ w_enc + t["b_enc"]
    acts = (pre_acts > t["threshold"]) * pre_acts.clamp(min=0)
    return Coded(acts, (acts @ w_dec) * root + t["b_dec"])


def qwen_scope(t: Tensors, x: Tensor, *, k: int) -> Coded:
    """TopK with the matrices stored as W_enc [F, d] and W_dec [d, F]; nothing is subtracted."""
    pre_acts = x @ t["W_enc"].T + t["b_enc"]
    acts = (pre_acts * _keep_largest(pre_acts, k)).clamp(min=0)
    return Coded(acts, acts @ t["W_dec"].T + t["b_dec"])


def goodfire(t: Tensors, x: Tensor) -> Coded:
    """Two linear layers with a ReLU between them."""
    acts = (x @ t["encoder_linear.weight"].T + t["encoder_linear.bias"]).clamp(min=0)
    return Coded(acts, acts @ t["decoder_linear.weight"].T + t["decoder_linear.bias"])
