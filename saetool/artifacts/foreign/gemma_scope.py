"""Gemma Scope 1 (``layer_L/width_W/average_l0_N/params.npz``) and 2 (``params.safetensors`` and ``config.json``).

W_enc [d, F], W_dec [F, d], b_enc, b_dec, threshold [F]; nothing is subtracted before the encoder. Embedding SAEs were
trained on x/√d: folded. The hook is in the folder's name, or in the configuration.
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from saetool.artifacts import header as h
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
    setting,
    shapes,
    take,
    transformer_lens_name,
)
from saetool.core import peers
from saetool.core.sae import SAE
from saetool.errors import ConfigError

WEIGHTS, CONFIG_2, WEIGHTS_2 = "params.npz", "config.json", "params.safetensors"


def read(found: Found, asked: Asked) -> Imported:
    """A Gemma Scope 1 SAE."""
    t = {name.replace("w_", "W_", 1) if name.startswith("w_") else name: v for name, v in _npz(found).items()}
    factor = t.get("scaling_factor")
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        raise refuse(found, "a scaling_factor other than 1", "it is not in the format's definition; ask its author")
    place = f"{found.where}/{found.folder}".replace("\\", "/")
    imported = _sae(t, found, asked, ("W_enc", "W_dec"), embedding="embedding" in place)
    hook, model = _from_path(place)
    return Imported(**{**vars(imported), "hook_name": hook, "model": model})


def _npz(found: Found) -> dict[str, Tensor]:
    return files.read_npz(found.weights)


def read_2(found: Found, asked: Asked) -> Imported:
    """A Gemma Scope 2 SAE."""
    config = files.read_json(found.configs[0]) if found.configs else {}
    t = files.read_safetensors(found.weights)
    if "affine_skip_connection" in t or config.get("hf_hook_point_out"):
        raise refuse(found, "a transcoder, which predicts another place's activations", "saetool reads SAEs")
    architecture = setting(config, found, "architecture", str, "jump_relu")
    if architecture != "jump_relu":
        raise refuse(found, f"architecture {architecture!r}", "Gemma Scope 2 SAEs say jump_relu")
    imported = _sae(t, found, asked, ("w_enc", "w_dec"), embedding=False)
    module = config.get("hf_hook_point_in")
    place = f"{found.where}/{found.folder}".replace("\\", "/")
    hook = transformer_lens_name(str(module)) if module else None
    model = config.get("model_name")
    return Imported(
        **{
            **vars(imported),
            "settings": config,
            "hook_name": hook or _from_path(place)[0],
            "hf_hook_name": str(module) if module else None,
            "model": str(model) if model else None,
        }
    )


def _sae(t: dict[str, Tensor], found: Found, asked: Asked, names: tuple[str, str], *, embedding: bool) -> Imported:
    enc, dec = names
    take(t, found, enc, dec, "b_enc", "b_dec", "threshold")
    d, f = len(t["b_dec"]), len(t["b_enc"])
    if t[dec].dim() == 3:
        raise refuse(found, "a cross-layer transcoder", "saetool reads SAEs")
    t = oriented(t, found, asked, enc, dec, d, f, enc_rows="d", bare=True)
    shapes(t, found, threshold=(f,))
    root = math.sqrt(d) if embedding else 1.0
    sae = SAE(
        **float32(
            W_enc=t[enc].double() / root,
            b_enc=t["b_enc"],
            W_dec=t[dec].double() * root,
            b_dec=t["b_dec"],
            threshold=t["threshold"],
        ),
        arch="jumprelu",
        k=None,
        subtract_b_dec=False,
    )
    formula = peers.gemma_scope
    return Imported(sae=sae, formula=named(formula, embedding=embedding), other=exact(t, formula, embedding=embedding))


def _from_path(place: str) -> tuple[str | None, str | None]:
    """Hook and model from ``gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82``, as far as it says them."""
    layer = re.search(r"layer_(\d+)", place)
    release = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att)\b", place)
    kind = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}.get(
        release.group(3) if release else ""
    )
    model = None
    if release:
        model = f"google/gemma-2-{release.group(1)}" + ("-it" if release.group(2) == "it" else "")
    if "embedding" in place:
        return "hook_embed", model
    return (f"blocks.{int(layer.group(1))}.{kind}" if layer and kind else None), model


# --- writing ---------------------------------------------------------------------------------------------------


def write(sae: SAE, header: h.Header, folder: Path) -> None:
    """Write ``params.npz``: JumpReLU with nothing subtracted before the encoder."""
    import numpy as np

    if sae.inference not in ("jumprelu", "relu"):
        raise ConfigError(
            f"Gemma Scope files hold thresholds, and this SAE encodes by {sae.inference}",
            "estimate one: saetool threshold SAE.st -o WITH-THRESHOLD.st, and convert that",
        )
    if sae.normalization != "none":
        raise ConfigError(f"Gemma Scope files have no {sae.normalization} normalisation", "--to saelens can state it")
    b_enc = sae.b_enc
    if sae.subtract_b_dec:
        b_enc = (b_enc.double() - sae.b_dec.double() @ sae.W_enc.double()).to(b_enc.dtype)
    threshold = torch.zeros_like(b_enc) if sae.threshold is None else sae.threshold
    tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_enc": b_enc, "b_dec": sae.b_dec, "threshold": threshold}
    arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
    with open(folder / WEIGHTS, "wb") as file:
        np.savez(file, **arrays)
