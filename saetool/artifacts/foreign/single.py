"""Single releases that are one ``.pt`` file: Qwen Scope (``layerN.sae.pt``) and Goodfire.

Qwen Scope uses SAELens' names for transposed matrices, W_enc [F, d] and W_dec [d, F]; k is in the repository's name
(``…-L0_50``), and so is the model. Goodfire has two linear layers with a ReLU between them.
"""

import re

from saetool.artifacts.foreign import files
from saetool.artifacts.foreign.imported import (
    Asked,
    Found,
    Imported,
    ask,
    exact,
    float32,
    named,
    oriented,
    take,
    whole_k,
)
from saetool.core import peers
from saetool.core.sae import SAE


def read_qwen(found: Found, asked: Asked) -> Imported:
    """A Qwen Scope SAE."""
    t, _ = files.read_torch(found.weights)
    take(t, found, "W_enc", "b_enc", "W_dec", "b_dec")
    d, f = len(t["b_dec"]), len(t["b_enc"])
    t = oriented(t, found, asked, "W_enc", "W_dec", d, f, enc_rows="linear", bare=True)
    place = f"{found.where}/{found.weights}"
    repository = re.search(r"SAE-Res-(.+?)-W\d+K-L0_(\d+)", place)
    if asked.k is None and repository is None:
        raise ask(found, "k (it is in the repository's name, …-L0_50)", "--k N")
    k = whole_k(asked.k or int(repository.group(2) if repository else 0), found, f)
    layer = re.search(r"layer(\d+)\.sae\.pt", found.weights.name)
    sae = SAE(
        **float32(W_enc=t["W_enc"].T, b_enc=t["b_enc"], W_dec=t["W_dec"].T, b_dec=t["b_dec"]),
        threshold=None,
        arch="topk",
        k=k,
        subtract_b_dec=False,
    )
    return Imported(
        sae=sae,
        formula=named(peers.qwen_scope, k=k),
        other=exact(t, peers.qwen_scope, k=k),
        model=f"Qwen/{repository.group(1)}" if repository else None,
        hook_name=f"blocks.{int(layer.group(1))}.hook_resid_post" if layer else None,
        hf_hook_name=f"model.layers.{int(layer.group(1))}" if layer else None,
    )


_GOODFIRE = re.compile(r"(Llama-[\d.]+-\d+B-Instruct)-SAE-l(\d+)")


def read_goodfire(found: Found, asked: Asked) -> Imported:
    """A Goodfire SAE."""
    t, _ = files.read_torch(found.weights)
    names = ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias")
    take(t, found, *names)
    d, f = len(t["decoder_linear.bias"]), len(t["encoder_linear.bias"])
    t = oriented(t, found, asked, names[0], names[2], d, f, enc_rows="linear", bare=False)
    sae = SAE(
        **float32(
            W_enc=t["encoder_linear.weight"].T,
            b_enc=t["encoder_linear.bias"],
            W_dec=t["decoder_linear.weight"].T,
            b_dec=t["decoder_linear.bias"],
        ),
        threshold=None,
        arch="relu",
        k=None,
        subtract_b_dec=False,
    )
    release = _GOODFIRE.search(found.weights.name)
    layer = int(release.group(2)) if release else None
    return Imported(
        sae=sae,
        formula=named(peers.goodfire),
        other=exact(t, peers.goodfire),
        model=f"meta-llama/{release.group(1)}" if release else None,
        hook_name=None if layer is None else f"blocks.{layer}.hook_resid_post",
        hf_hook_name=None if layer is None else f"model.layers.{layer}",
    )
