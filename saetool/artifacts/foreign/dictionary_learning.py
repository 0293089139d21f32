"""dictionary_learning: ``trainer_N/ae.pt`` with its ``config.json``, or the ``ae.pt`` alone.

AutoEncoder             bias, encoder.weight [F, d], encoder.bias, decoder.weight [d, F]; read as its from_pretrained
                        gives it, with unit decoder rows
AutoEncoderNew          encoder.*, decoder.weight, decoder.bias
AutoEncoderTopK,        encoder.*, decoder.weight, b_dec, k, threshold (−1: never set). The tensors are the same:
BatchTopKSAE            the configuration says which, or --arch
MatryoshkaBatchTopKSAE  W_enc [d, F], b_enc, W_dec [F, d], b_dec, k, threshold, group_sizes
JumpReluAutoEncoder     W_enc, b_enc, W_dec, b_dec, threshold [F]
GatedAutoEncoder        decoder_bias, encoder.weight, r_mag, gate_bias, mag_bias, decoder.weight
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saetool.artifacts import header as h
from saetool.artifacts.foreign import files, pytorch
from saetool.artifacts.foreign.imported import (
    Asked,
    Found,
    Imported,
    ask,
    exact,
    float32,
    named,
    oriented,
    refuse,
    shapes,
    take,
    whole_k,
)
from saetool.artifacts.foreign.saelens import gated
from saetool.core import peers
from saetool.core.sae import SAE, fold_decoder_norms
from saetool.errors import ConfigError

CONFIG, WEIGHTS = "config.json", "ae.pt"
ELSEWHERE = "--to sparsify holds groupmax SAEs, --to saelens those of matching pursuit"


def read(found: Found, asked: Asked) -> Imported:
    """The SAE of a dictionary_learning trainer."""
    t, _ = files.read_torch(found.weights)
    config = files.read_json(found.configs[0]) if found.configs else {}
    trainer = config.get("trainer") if isinstance(config.get("trainer"), dict) else {}
    kind = _dict_class(t, trainer, found, asked)
    if kind == "GatedAutoEncoder":
        part = _gated(t, found, asked)
    elif kind in ("AutoEncoder", "AutoEncoderNew"):
        part = _relu(t, found, asked, kind)
    elif kind == "JumpReluAutoEncoder":
        part = _jumprelu(t, found, asked)
    else:
        part = _topk(t, trainer, found, asked, kind)
    sae, formula, other, extra = part
    name = str(trainer.get("submodule_name") or "")
    return Imported(
        sae=sae,
        formula=formula,
        other=other,
        settings=config,
        config={"dict_class": kind, **extra},
        model=str(trainer["lm_name"]) if trainer.get("lm_name") else None,
        hook_name=_hook(name),
        hf_hook_name=None,
        whole_batch=sae.arch == "batchtopk" and sae.threshold is None,
    )


def _hook(submodule: str) -> str | None:
    """``resid_post_layer_8`` and its like, as the library's demos name submodules."""
    match = re.fullmatch(r"(resid_pre|resid_post|mlp_out|attn_out)_layer_(\d+)", submodule)
    return f"blocks.{int(match.group(2))}.hook_{match.group(1)}" if match else None


def _dict_class(t: dict[str, Tensor], trainer: dict[str, Any], found: Found, asked: Asked) -> str:
    """What the configuration says, or what only one class's tensors can be."""
    known = ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE",
             "JumpReluAutoEncoder", "GatedAutoEncoder")  # fmt: skip
    said = trainer.get("dict_class")
    if said is not None:
        if said not in known:
            raise refuse(found, f"dict_class {said!r} is unknown", f"known: {', '.join(known)}")
        return "AutoEncoderNew" if said == "AutoEncoder" and "decoder.bias" in t else str(said)  # its trainer says so
    if "gate_bias" in t:
        return "GatedAutoEncoder"
    if "group_sizes" in t:
        return "MatryoshkaBatchTopKSAE"
    if "W_enc" in t:
        return "JumpReluAutoEncoder"
    if "decoder.bias" in t:
        return "AutoEncoderNew"
    if "bias" in t:
        return "AutoEncoder"
    if asked.arch is None:
        raise ask(found, "whether it is a topk or a batchtopk SAE (the tensors are the same)", "--arch topk|batchtopk")
    return {"topk": "AutoEncoderTopK", "batchtopk": "BatchTopKSAE"}[asked.arch]


def _relu(t: dict[str, Tensor], found: Found, asked: Asked, kind: str) -> tuple[SAE, str, Any, dict[str, Any]]:
    bias = "bias" if kind == "AutoEncoder" else "decoder.bias"
    take(t, found, "encoder.weight", "encoder.bias", "decoder.weight", bias)
    d, f = len(t[bias]), len(t["encoder.bias"])
    t = oriented(t, found, asked, "encoder.weight", "decoder.weight", d, f, enc_rows="linear", bare=False)
    sae = SAE(
        W_enc=t["encoder.weight"].T.double(),
        b_enc=t["encoder.bias"].double(),
        W_dec=t["decoder.weight"].T.double(),
        b_dec=t[bias].double(),
        threshold=None,
        arch="relu",
        k=None,
        subtract_b_dec=kind == "AutoEncoder",
    )
    if kind == "AutoEncoder":
        sae = fold_decoder_norms(sae)
    formula = peers.dictionary_autoencoder if kind == "AutoEncoder" else peers.dictionary_autoencoder_new
    return sae.map(_float32), named(formula), exact(t, formula), {}


def _float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def _jumprelu(t: dict[str, Tensor], found: Found, asked: Asked) -> tuple[SAE, str, Any, dict[str, Any]]:
    take(t, found, "W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    d, f = len(t["b_dec"]), len(t["b_enc"])
    t = oriented(t, found, asked, "W_enc", "W_dec", d, f, enc_rows="d", bare=not found.configs)
    shapes(t, found, threshold=(f,))
    subtract = bool(asked.subtract_b_dec)  # the class's own default is false, and the file cannot say
    sae = SAE(
        **float32(W_enc=t["W_enc"], b_enc=t["b_enc"], W_dec=t["W_dec"], b_dec=t["b_dec"], threshold=t["threshold"]),
        arch="jumprelu",
        k=None,
        subtract_b_dec=subtract,
    )
    formula = peers.dictionary_jumprelu
    return sae, named(formula, apply_b_dec_to_input=subtract), exact(t, formula, apply_b_dec_to_input=subtract), {}


def _gated(t: dict[str, Tensor], found: Found, asked: Asked) -> tuple[SAE, str, Any, dict[str, Any]]:
    take(t, found, "encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias")
    d, f = len(t["decoder_bias"]), len(t["gate_bias"])
    t = oriented(t, found, asked, "encoder.weight", "decoder.weight", d, f, enc_rows="linear", bare=False)
    shapes(t, found, r_mag=(f,), mag_bias=(f,))
    sae = gated(
        t["encoder.weight"].T,
        t["gate_bias"],
        t["mag_bias"],
        t["r_mag"],
        t["decoder.weight"].T,
        t["decoder_bias"],
        subtract=True,
    )
    return sae, named(peers.dictionary_gated), exact(t, peers.dictionary_gated), {}


def _topk(
    t: dict[str, Tensor], trainer: dict[str, Any], found: Found, asked: Asked, kind: str
) -> tuple[SAE, str, Any, dict[str, Any]]:
    matryoshka = kind == "MatryoshkaBatchTopKSAE"
    enc, dec, bias = ("W_enc", "W_dec", "b_enc") if matryoshka else ("encoder.weight", "decoder.weight", "encoder.bias")
    take(t, found, enc, dec, bias, "b_dec")
    d, f = len(t["b_dec"]), len(t[bias])
    t = oriented(t, found, asked, enc, dec, d, f, enc_rows="d" if matryoshka else "linear", bare=False)
    stored = int(t["k"]) if "k" in t and t["k"].numel() == 1 else None
    said = asked.k or stored or trainer.get("k")
    if said is None:
        raise ask(found, "k", "--k N")
    k = whole_k(said, found, f)
    seen = float(t["threshold"]) if "threshold" in t and t["threshold"].numel() == 1 else -1.0
    topk = kind == "AutoEncoderTopK"  # it carries a threshold too, and encodes by rank
    threshold = torch.full((f,), seen) if not topk and seen >= 0 else None
    weights = (t[enc], t[dec]) if matryoshka else (t[enc].T, t[dec].T)
    sae = SAE(
        **float32(W_enc=weights[0], b_enc=t[bias], W_dec=weights[1], b_dec=t["b_dec"]),
        threshold=threshold,
        arch="topk" if topk else "batchtopk",
        k=k,
        subtract_b_dec=True,
    )
    formula = peers.dictionary_matryoshka if matryoshka else peers.dictionary_topk
    settings = {"k": k, "select": "row" if topk else "threshold" if threshold is not None else "batch"}
    extra = {"group_sizes": t["group_sizes"].tolist()} if matryoshka and "group_sizes" in t else {}
    return sae, named(formula, **settings), exact(t, formula, **settings), extra


# --- writing ---------------------------------------------------------------------------------------------------


def write(sae: SAE, header: h.Header, folder: Path) -> None:
    """Write ``sae`` as ``utils.load_dictionary`` reads it: the class whose encoder computes the same."""
    if sae.normalization != "none":
        raise ConfigError(
            f"dictionary_learning has no {sae.normalization} normalisation",
            "--to saelens can state it (normalize_activations)",
        )
    kind, tensors = _class_for(sae, header)
    pytorch.save(tensors, folder / WEIGHTS)
    trainer = {
        "dict_class": kind,
        "trainer_class": "exported by saetool",
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "lm_name": header.model.get("id"),
        "layer": _layer(header),
        "submodule_name": _submodule(header),
    }
    if kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        trainer["k"] = sae.k
    config = {"trainer": trainer, "buffer": {"d_submodule": sae.d_in, "io": "out"}}
    (folder / CONFIG).write_text(json.dumps(config, sort_keys=True, indent=2) + "\n")


def _class_for(sae: SAE, header: h.Header) -> tuple[str, dict[str, Tensor]]:
    linear = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "decoder.weight": sae.W_dec.T}
    ranked = {**linear, "encoder.bias": _b_enc(sae, subtract=True), "b_dec": sae.b_dec}
    if sae.inference == "relu":
        # AutoEncoder's loader scales decoder columns to norm 1, which would change z: then AutoEncoderNew.
        if header.config.get("decoder_norm") == "unit":
            return "AutoEncoder", {**linear, "encoder.bias": _b_enc(sae, subtract=True), "bias": sae.b_dec}
        return "AutoEncoderNew", {**linear, "encoder.bias": _b_enc(sae, subtract=False), "decoder.bias": sae.b_dec}
    if sae.inference == "topk":
        assert sae.k is not None
        counts = {"k": torch.tensor(sae.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
        return "AutoEncoderTopK", {**ranked, **counts}
    if sae.inference in ("groupmax", "matching_pursuit"):
        raise ConfigError(f"dictionary_learning has no {sae.inference} SAEs", ELSEWHERE)
    if sae.threshold is None:
        raise ConfigError(
            "dictionary_learning would let every positive latent of a BatchTopK SAE without a threshold fire",
            "estimate it: saetool threshold SAE.st -o WITH-THRESHOLD.st, and convert that",
        )
    theta = sae.threshold
    if (
        sae.arch in ("batchtopk", "matryoshka")
        and sae.k is not None
        and bool((theta == theta[0]).all())
        and float(theta[0]) >= 0
    ):
        counts = {"k": torch.tensor(sae.k, dtype=torch.int), "threshold": theta[0].clone()}
        return "BatchTopKSAE", {**ranked, **counts}
    return "JumpReluAutoEncoder", {
        "W_enc": sae.W_enc,
        "b_enc": _b_enc(sae, subtract=False),
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
        "threshold": theta,
    }


def _b_enc(sae: SAE, *, subtract: bool) -> Tensor:
    """b_enc of the same encoder where b_dec is subtracted from the input, or is not: they differ by b_dec W_enc."""
    shift = sae.b_dec.double() @ sae.W_enc.double()
    if subtract == sae.subtract_b_dec:
        return sae.b_enc
    return (sae.b_enc.double() + (shift if subtract else -shift)).to(sae.b_enc.dtype)


def _layer(header: h.Header) -> int | None:
    match = re.match(r"blocks\.(\d+)\.", str(header.model.get("hook_name")))
    return int(match.group(1)) if match else None


def _submodule(header: h.Header) -> str | None:
    name = str(header.model.get("hook_name"))
    match = re.fullmatch(r"blocks\.(\d+)\.hook_(resid_pre|resid_post|mlp_out|attn_out)", name)
    return f"{match.group(2)}_layer_{match.group(1)}" if match else header.model.get("hook_name")
