"""sparsify folders: ``cfg.json`` and ``sae.safetensors`` of one hook point (topk and groupmax SAEs).

W_dec is stored [F, d], not transposed; b_dec is always subtracted from an SAE's input; ``num_latents`` 0 means
``expansion_factor`` times d. The folder's name is the hook point; the run's ``config.json`` above it names the model.
groupmax picks the largest of each of k groups of neighbouring latents.
"""

import json
from pathlib import Path
from typing import Any

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
    whole_k,
)
from saetool.core import peers
from saetool.core.sae import SAE
from saetool.errors import ConfigError

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def read(found: Found, asked: Asked) -> Imported:
    """The SAE of a sparsify folder."""
    config = files.read_json(found.folder / CONFIG)
    t = files.read_safetensors(found.weights)
    if config.get("transcode") or config.get("skip_connection") or "W_skip" in t:
        raise refuse(found, "a transcoder, which predicts another place's activations", "saetool reads SAEs")
    activation = setting(config, found, "activation", str, "topk")
    if activation not in ("topk", "groupmax"):
        raise refuse(found, f"activation {activation!r} is unknown", "known: topk, groupmax")
    if config.get("signed"):
        raise refuse(found, "signed topk, whose activations may be negative", "saetool reads the unsigned kind")
    take(t, found, "encoder.weight", "encoder.bias", "W_dec", "b_dec")
    d, f = len(t["b_dec"]), len(t["encoder.bias"])
    declared = setting(config, found, "num_latents", int, 0) or setting(config, found, "expansion_factor", int, 32) * d
    if config.get("d_in", d) != d or declared != f:
        raise refuse(
            found,
            f"its configuration says d_in {config.get('d_in')} and {declared} latents, its tensors {d} and {f}",
            "the files do not belong together; copy both again",
        )
    t = oriented(t, found, asked, "encoder.weight", "W_dec", d, f, enc_rows="F,F", bare=False)
    shapes(t, found, W_dec=(f, d))
    k = whole_k(asked.k or setting(config, found, "k", int), found, f)
    sae = SAE(
        **float32(W_enc=t["encoder.weight"].T, b_enc=t["encoder.bias"], W_dec=t["W_dec"], b_dec=t["b_dec"]),
        threshold=None,
        arch=activation,
        k=k,
        subtract_b_dec=True,
    )
    formula = peers.sparsify_topk if activation == "topk" else peers.sparsify_groupmax
    place = found.folder.parent.name if found.folder.name.startswith("seed") else found.folder.name
    return Imported(
        sae=sae,
        formula=named(formula, k=k),
        other=exact(t, formula, k=k),
        settings=config,
        model=_run(found).get("model"),
        hook_name=transformer_lens_name(place),
        hf_hook_name=place if transformer_lens_name(place) else None,
    )


def _run(found: Found) -> dict[str, Any]:
    """The run's configuration, one or two folders above, if it is there."""
    for folder in (found.folder.parent, found.folder.parent.parent):
        if (folder / "config.json").is_file():
            config = files.read_json(folder / "config.json")
            return config if isinstance(config.get("model"), str) else {}
    return {}


def write(sae: SAE, header: h.Header, folder: Path) -> None:
    """Write a topk or groupmax SAE as ``SparseCoder.load_from_disk`` reads it."""
    from safetensors.torch import save_file

    if sae.inference not in ("topk", "groupmax"):
        raise ConfigError(
            f"sparsify knows topk and groupmax alone, and this SAE encodes by {sae.inference}",
            "--to saelens takes relu, topk and jumprelu SAEs",
        )
    if sae.normalization != "none":
        raise ConfigError(
            f"sparsify has no {sae.normalization} normalisation", "--to saelens can state it (normalize_activations)"
        )
    b_enc = sae.b_enc.double()
    if not sae.subtract_b_dec:  # sparsify always subtracts: x W + b = (x − b_dec) W + (b + b_dec W)
        b_enc = b_enc + sae.b_dec.double() @ sae.W_enc.double()
    tensors = {
        "encoder.weight": sae.W_enc.T.contiguous(),
        "encoder.bias": b_enc.to(sae.b_enc.dtype),
        "W_dec": sae.W_dec.contiguous(),
        "b_dec": sae.b_dec,
    }
    config = {
        "activation": sae.inference,
        "expansion_factor": max(sae.d_sae // sae.d_in, 1),
        "normalize_decoder": header.config.get("decoder_norm") == "unit",
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
    }
    save_file({name: tensor.detach().cpu() for name, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, sort_keys=True, indent=2) + "\n")
