"""OpenMOSS: Llamascopium folders (``config.json`` and ``sae_weights.safetensors``), and the released Llama Scope SAEs
(``hyperparams.json`` and ``checkpoints/final.safetensors``).

W_E [d, F], b_E, W_D [F, d], b_D, ``activation_function.log_jumprelu_threshold``,
``dataset_average_activation_norm.HOOK``. With dataset-wise normalisation inputs are scaled to an average norm of √d,
which is folded.
Where latents are ranked with their decoder norms (topk, batchtopk), decoder rows are scaled to norm 1.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor

from saetool.artifacts.foreign import files
from saetool.artifacts.foreign.imported import (
    Asked,
    Found,
    Imported,
    exact,
    float32,
    named,
    oriented,
    refuse,
    scaled,
    setting,
    shapes,
    take,
    whole_k,
)
from saetool.core import peers
from saetool.core.sae import SAE

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
SCOPE_CONFIG, SCOPE_WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_THETA = "activation_function.log_jumprelu_threshold"
_OLD = {"encoder.weight": "W_E", "encoder.bias": "b_E", "decoder.weight": "W_D", "decoder.bias": "b_D",
        "log_jumprelu_threshold": _THETA}  # fmt: skip


def read(found: Found, asked: Asked) -> Imported:
    """The SAE of a Llamascopium folder."""
    config = files.read_json(found.folder / CONFIG)
    t = files.read_safetensors(found.weights)
    hook = setting(config, found, "hook_point_in", str)
    _check_kind(config, found, t)
    if "encoder.weight" in t:  # before Llamascopium the two layers were nn.Linear
        t = {_OLD.get(name, name): tensor for name, tensor in t.items()}
        t |= {"W_E": t["W_E"].T.contiguous(), "W_D": t["W_D"].T.contiguous()}
    take(t, found, "W_E", "b_E", "W_D")
    f = len(t["b_E"])
    d = len(t["b_D"]) if "b_D" in t else setting(config, found, "d_model", int)
    t = oriented(t, found, asked, "W_E", "W_D", d, f, enc_rows="d", bare=False)
    act_fn = setting(config, found, "act_fn", str, "relu").lower()
    if act_fn not in ("relu", "jumprelu", "topk", "batchtopk"):
        raise refuse(found, f"act_fn {act_fn!r} is none of an SAE", "known: relu, jumprelu, topk, batchtopk")
    include = bool(setting(config, found, "sparsity_include_decoder_norm", bool, True))
    norm = _norm(config, t, found, hook)
    token_wise = config.get("norm_activation", "dataset-wise") == "token-wise"
    ranked = act_fn in ("topk", "batchtopk")
    k = whole_k(asked.k or setting(config, found, "top_k", int), found, f) if ranked else 0
    settings: dict[str, Any] = {
        "act_fn": act_fn, "norm": norm, "token_wise": token_wise, "include_decoder_norm": include, "k": k
    }  # fmt: skip
    sae = _sae(t, d, act_fn, include, k)
    if act_fn == "jumprelu":
        take(t, found, _THETA)
        shapes(t, found, activation_function__log_jumprelu_threshold=(f,))
        theta = t[_THETA].double().exp()
        theta = theta / t["W_D"].double().norm(dim=1) if include else theta
        sae = SAE(**{**vars(sae), "threshold": theta})
    sae = scaled(sae, None if norm is None else math.sqrt(d) / norm).map(lambda v: v.to(torch.float32).contiguous())
    return Imported(
        sae=SAE(**{**vars(sae), "normalization": "per_token_norm" if token_wise else "none"}),
        formula=named(peers.llamascopium, **settings),
        other=exact(t, peers.llamascopium, **settings),
        settings=config,
        model=config.get("model_name"),
        hook_name=hook,
        whole_batch=act_fn == "batchtopk",
    )


def _sae(t: dict[str, Tensor], d: int, act_fn: str, include: bool, k: int) -> SAE:
    """The SAE on normalised inputs, in float64."""
    w_enc, b_enc, w_dec = t["W_E"].double(), t["b_E"].double(), t["W_D"].double()
    if include and act_fn in ("topk", "batchtopk"):
        norms = w_dec.norm(dim=1)
        w_enc, b_enc, w_dec = w_enc * norms, b_enc * norms, w_dec / norms[:, None]
    return SAE(
        W_enc=w_enc,
        b_enc=b_enc,
        W_dec=w_dec,
        b_dec=t["b_D"].double() if "b_D" in t else torch.zeros(d, dtype=torch.float64),
        threshold=None,
        arch=act_fn,
        k=k or None,
        subtract_b_dec=False,
    )


def _check_kind(config: dict[str, Any], found: Found, t: dict[str, Tensor]) -> None:
    if config.get("sae_type", "sae") != "sae":
        raise refuse(found, f"a Llamascopium {config['sae_type']}, which is no SAE", "saetool reads sae_type sae")
    if config.get("use_glu_encoder") or "W_E_glu" in t or "encoder_glu.weight" in t:
        raise refuse(found, "a GLU encoder, which is more than one linear layer", "saetool reads plain encoders")
    if config.get("apply_decoder_bias_to_pre_encoder") and config.get("use_decoder_bias", True):
        raise refuse(found, "a decoder bias subtracted before the encoder, in an old version's order", "ask its author")
    if config.get("hook_point_out", config.get("hook_point_in")) != config.get("hook_point_in"):
        raise refuse(
            found,
            f"a transcoder from {config.get('hook_point_in')} to {config.get('hook_point_out')}",
            "saetool reads SAEs",
        )


def _norm(config: dict[str, Any], t: dict[str, Tensor], found: Found, hook: str) -> float | None:
    """The data set's average activation norm, where inputs are scaled by it."""
    way = setting(config, found, "norm_activation", str, "dataset-wise")
    if way in ("inference", "token-wise"):
        return None
    if way != "dataset-wise":
        raise refuse(found, f"norm_activation {way!r} depends on the batch", "saetool needs one token to be enough")
    stored = t.get(f"dataset_average_activation_norm.{hook}")
    table = config.get("dataset_average_activation_norm")
    if stored is None and isinstance(table, dict):
        stored = table.get(hook, table.get("in"))
    if stored is None or not float(stored) > 0:
        raise refuse(found, "dataset-wise normalisation without the average norm", "save it with that library again")
    return float(stored)


def read_scope(found: Found, asked: Asked) -> Imported:
    """A released Llama Scope SAE."""
    config = files.read_json(found.folder / SCOPE_CONFIG)
    t = files.read_safetensors(found.weights)
    take(t, found, "encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    d, f = len(t["decoder.bias"]), len(t["encoder.bias"])
    t = oriented(t, found, asked, "encoder.weight", "decoder.weight", d, f, enc_rows="linear", bare=False)
    _check_kind(config, found, t)
    if setting(config, found, "act_fn", str, "jumprelu").lower() != "jumprelu":
        raise refuse(found, f"act_fn {config['act_fn']!r}", "the released Llama Scope SAEs are jumprelu")
    if setting(config, found, "norm_activation", str) != "dataset-wise":
        raise refuse(found, f"norm_activation {config['norm_activation']!r}", "the released SAEs are dataset-wise")
    table = setting(config, found, "dataset_average_activation_norm", dict)
    norm, out = (float(setting(table, found, side, (int, float))) for side in ("in", "out"))
    if not norm > 0 or norm != out:
        raise refuse(found, f"average norms {norm} in and {out} out", "an SAE has one")
    threshold = float(setting(config, found, "jump_relu_threshold", (int, float)))
    include = bool(setting(config, found, "sparsity_include_decoder_norm", bool, True))
    c = math.sqrt(d) / norm
    theta = torch.full((f,), threshold, dtype=torch.float64)
    if include:
        theta = theta / t["decoder.weight"].double().norm(dim=0)
    sae = SAE(
        **float32(
            W_enc=t["encoder.weight"].T,
            b_enc=t["encoder.bias"].double() / c,
            W_dec=t["decoder.weight"].T,
            b_dec=t["decoder.bias"].double() / c,
            threshold=theta,
        ),
        arch="jumprelu",
        k=None,
        subtract_b_dec=False,
    )
    settings = {"norm": norm, "threshold": threshold, "include_decoder_norm": include}
    model = re.match(r"Llama3_1-8B-Base", found.folder.name)
    return Imported(
        sae=sae,
        formula=named(peers.llama_scope, **settings),
        other=exact(t, peers.llama_scope, **settings),
        settings=config,
        model="meta-llama/Llama-3.1-8B" if model else None,
        hook_name=setting(config, found, "hook_point_in", str),
    )
