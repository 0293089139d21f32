"""SAELens folders: ``cfg.json`` and ``sae_weights.safetensors``, of version 6 and of the flat configurations before.

    standard, gated, topk, abstopk, jumprelu     inference SAEs
    matching_pursuit                             no encoder of its own: a loop over the decoder
    batchtopk, matryoshka_batchtopk              training checkpoints; saved for inference they say jumprelu

gated becomes a jumprelu SAE (exactly, see ``gated``), abstopk a topk SAE of twice the width (a latent for each sign),
rescale_acts_by_decoder_norm is folded into unit decoder rows. Transcoders predict another place's activations,
temporal SAEs read a whole context: these are refused.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saetool.artifacts import header as h
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
    refuse,
    scaled,
    setting,
    shapes,
    take,
    whole_k,
)
from saetool.core import peers
from saetool.core.activations import Pursuit
from saetool.core.sae import SAE
from saetool.errors import ConfigError

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.54.12"
"""The version whose layout is written, and whose code it was compared with."""
_PROVENANCE = "saetool_provenance"
_NORMALIZATIONS = {"none": "none", "layer_norm": "per_token", "constant_norm_rescale": "per_token_norm"}
_TRAINED = {"relu": "standard", "matryoshka": "matryoshka_batchtopk"}
_REFUSED = {
    "temporal": "it reads a whole context with attention, and saetool's verbs read single tokens",
}


def read(found: Found, asked: Asked) -> Imported:
    """The SAE of a SAELens folder."""
    config = _modern(files.read_json(found.folder / CONFIG))
    t = files.read_safetensors(found.weights)
    architecture = str(config["architecture"])
    if architecture in _REFUSED:
        raise refuse(found, f"a SAELens {architecture} SAE cannot be read", _REFUSED[architecture])
    if "transcoder" in architecture or "W_skip" in t:
        raise refuse(found, f"a {architecture}, which predicts another place's activations", "saetool reads SAEs")
    if architecture == "matching_pursuit":
        return _pursuit(t, config, found, asked)
    if architecture not in ("standard", "gated", "topk", "abstopk", "jumprelu", "batchtopk", "matryoshka_batchtopk"):
        raise refuse(found, f"SAELens architecture {architecture!r} is unknown", "update saetool")
    subtract = bool(setting(config, found, "apply_b_dec_to_input", (bool, int), True))
    bias = "b_gate" if architecture == "gated" else "b_enc"
    t = _finetuned(t, config, found)
    take(t, found, "W_enc", "W_dec", "b_dec", bias)
    d, f = len(t["b_dec"]), len(t[bias])
    t = oriented(t, found, asked, "W_enc", "W_dec", d, f, enc_rows="d", bare=False)
    kind = _normalization(config, asked, found)
    scale = _scale(config, asked, found)
    metadata = config.get("metadata") if isinstance(config.get("metadata"), dict) else {}
    rescale = bool(config.get("rescale_acts_by_decoder_norm", architecture.endswith("batchtopk")))
    sae, k = _sae(t, found, asked, architecture, config, metadata, subtract, rescale and architecture != "jumprelu")
    whole = sae.arch == "batchtopk" and sae.threshold is None
    formula = {
        "architecture": "batchtopk" if architecture.startswith("matryoshka") else architecture,
        "apply_b_dec_to_input": subtract,
        "normalize_activations": {v: n for n, v in _NORMALIZATIONS.items()}[kind],
        "k": k,
        "rescale_acts_by_decoder_norm": rescale and architecture != "jumprelu",
        "whole_batch": whole,
    }
    other = exact(t, peers.saelens, **formula)
    sae = SAE(**{**vars(scaled(sae, scale)), "normalization": kind})
    return Imported(
        sae=sae,
        formula=named(peers.saelens, **formula) + ("" if scale is None else f", on inputs times {scale}"),
        other=_in_units(_split_signs(other) if architecture == "abstopk" else other, scale),
        settings=config,
        config=_kept(config, metadata, sae.d_sae),
        model=metadata.get("model_name"),
        hook_name=metadata.get("hook_name"),
        hf_hook_name=metadata.get("hf_hook_name"),
        whole_batch=whole,
    )


def _pursuit(t: dict[str, Tensor], config: dict[str, Any], found: Found, asked: Asked) -> Imported:
    """A matching_pursuit SAE: W_dec and b_dec, which is added back only where it was subtracted."""
    take(t, found, "W_dec", "b_dec")
    subtract = bool(setting(config, found, "apply_b_dec_to_input", (bool, int), True))
    if _normalization(config, asked, found) != "none" or _scale(config, asked, found) is not None:
        raise refuse(found, "matching pursuit on normalised inputs", "save it for inference in SAELens: it folds")
    f, d = t["W_dec"].shape
    shapes(t, found, b_dec=(d,))
    steps = setting(config, found, "max_iterations", int, None)
    settings: dict[str, Any] = {
        "residual_threshold": float(setting(config, found, "residual_threshold", (int, float), 1e-2)),
        "max_iterations": d if steps is None else steps,
        "stop_on_duplicate_support": bool(setting(config, found, "stop_on_duplicate_support", bool, True)),
    }
    tensors = float32(
        W_enc=t["W_dec"].T,
        b_enc=torch.zeros(f),
        W_dec=t["W_dec"],
        b_dec=t["b_dec"] if subtract else torch.zeros(d),
    )
    sae = SAE(**tensors, threshold=None, arch="matching_pursuit", k=None, subtract_b_dec=subtract,
              pursuit=Pursuit(**settings))  # fmt: skip
    settings["apply_b_dec_to_input"] = subtract
    metadata = config.get("metadata") if isinstance(config.get("metadata"), dict) else {}
    return Imported(
        sae=sae,
        formula=named(peers.saelens_matching_pursuit, **settings),
        other=exact(t, peers.saelens_matching_pursuit, **settings),
        settings=config,
        model=metadata.get("model_name"),
        hook_name=metadata.get("hook_name"),
        hf_hook_name=metadata.get("hf_hook_name"),
    )


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration in the layout of version 6; older ones were flat, with other names."""
    if isinstance(config.get("metadata"), dict) or "sae_lens_version" in config:
        return {"architecture": "standard", **config}
    renamed = {
        "hook_point": "hook_name",
        "hook_point_head_index": "hook_head_index",
        "activation_fn_str": "activation_fn",
    }
    new = {renamed.get(name, name): value for name, value in config.items()}
    new.setdefault("architecture", "standard")
    arguments = new.get("activation_fn_kwargs")
    if new.get("activation_fn") == "topk" and isinstance(arguments, dict) and arguments.get("k") is not None:
        new |= {"architecture": "topk", "k": arguments["k"]}
    elif new.get("activation_fn") in ("tanh-relu", "topk"):
        new["architecture"] = str(new["activation_fn"])
    normalized = new.get("normalize_activations")
    if normalized is None or isinstance(normalized, bool):
        new["normalize_activations"] = "expected_average_only_in" if normalized else "none"
    names = ("model_name", "hook_name", "hook_head_index", "context_size", "prepend_bos", "dataset_path",
             "model_from_pretrained_kwargs", "sae_lens_training_version", "neuronpedia_id")  # fmt: skip
    new["metadata"] = {name: new[name] for name in names if name in new}
    return new


def _normalization(config: dict[str, Any], asked: Asked, found: Found) -> str:
    said = config.get("normalize_activations", "none")
    if said == "expected_average_only_in":
        return "none"  # a constant, see _scale
    if said == "covariance_whitening":
        raise refuse(found, "covariance whitening that was not folded in", "save it for inference in SAELens: it folds")
    if said not in _NORMALIZATIONS:
        raise refuse(found, f"normalize_activations {said!r} is unknown", "update saetool")
    if asked.normalization not in (None, _NORMALIZATIONS[said]):
        raise ConfigError(f"{found.where}: says normalize_activations {said}, and --normalization says otherwise")
    return _NORMALIZATIONS[said]


def _scale(config: dict[str, Any], asked: Asked, found: Found) -> float | None:
    """The constant that inputs were multiplied by: in the checkpoint's activation_scaler.json, or asked for."""
    if config.get("normalize_activations") != "expected_average_only_in":
        if asked.input_scale is not None:
            raise ConfigError(f"{found.where}: says that its inputs are not scaled, and --input-scale says otherwise")
        return None
    scaler = found.folder / "activation_scaler.json"
    if asked.input_scale is None and scaler.is_file():
        return float(setting(files.read_json(scaler), found, "scaling_factor", (int, float)))
    if asked.input_scale is None:
        raise ask(
            found,
            "the constant its inputs were scaled by (expected_average_only_in)",
            "--input-scale C, C = sqrt(d) / mean norm of its training activations",
        )
    return asked.input_scale


def _finetuned(t: dict[str, Tensor], config: dict[str, Any], found: Found) -> dict[str, Tensor]:
    """Old files' ``scaling_factor`` of each latent before decoding: into the decoder, where it was in use."""
    t = dict(t)
    factor = t.pop("scaling_factor", t.pop("finetuning_scaling_factor", None))
    if factor is None or torch.allclose(factor, torch.ones_like(factor)):
        return t
    if not config.get("finetuning_scaling_factor"):
        raise refuse(found, "has a scaling_factor that its configuration does not know", "ask its author which holds")
    take(t, found, "W_dec")
    return {**t, "W_dec": t["W_dec"] * factor[:, None]}


def _sae(
    t: dict[str, Tensor],
    found: Found,
    asked: Asked,
    architecture: str,
    config: dict[str, Any],
    metadata: dict[str, Any],
    subtract: bool,
    rescale: bool,
) -> tuple[SAE, float | None]:
    """The SAE on the inputs it was trained on, and the k of its formula."""
    f = t["W_enc"].shape[1]
    if architecture == "gated":
        take(t, found, "b_mag", "r_mag")
        shapes(t, found, b_mag=(f,), r_mag=(f,))
        return gated(t["W_enc"], t["b_gate"], t["b_mag"], t["r_mag"], t["W_dec"], t["b_dec"], subtract), None
    w_enc, b_enc, w_dec = t["W_enc"].double(), t["b_enc"].double(), t["W_dec"].double()
    if rescale:
        norms = w_dec.norm(dim=1)
        w_enc, b_enc, w_dec = w_enc * norms, b_enc * norms, w_dec / norms[:, None]
    arch, threshold, k = architecture, None, None
    raw_k: Any = None
    if architecture == "jumprelu":
        threshold = take(t, found, "threshold")["threshold"]
        shapes(t, found, threshold=(f,))
        arch, k = _trained_as(metadata, asked, found, f)
    elif architecture in ("topk", "abstopk"):
        raw_k = k = whole_k(asked.k or setting(config, found, "k", (int, float)), found, f)
        arch = "topk"
    elif architecture != "standard":
        raw_k = setting(config, found, "k", (int, float))
        k = whole_k(asked.k or raw_k, found, f)
        seen = float(t["topk_threshold"]) if "topk_threshold" in t else 0.0
        threshold = torch.full((f,), seen) if seen > 0 else None
        arch = "batchtopk"
    else:
        arch = "relu"
    if architecture == "abstopk":
        w_enc, b_enc = torch.cat([w_enc, -w_enc], dim=1), torch.cat([b_enc, -b_enc])
        w_dec = torch.cat([w_dec, -w_dec])
    tensors = float32(W_enc=w_enc, b_enc=b_enc, W_dec=w_dec, b_dec=t["b_dec"])
    theta = None if threshold is None else threshold.to(torch.float32).clone()
    return SAE(**tensors, threshold=theta, arch=arch, k=k, subtract_b_dec=subtract), raw_k


def _trained_as(metadata: dict[str, Any], asked: Asked, found: Found, f: int) -> tuple[str, int | None]:
    """A jumprelu file that was trained as BatchTopK says so: then its threshold can be estimated again."""
    if not str(metadata.get("training_architecture", "")).endswith("batchtopk") and asked.arch != "batchtopk":
        return "jumprelu", None
    details = metadata.get("training_architecture_details")
    k = asked.k or (details.get("k") if isinstance(details, dict) else None)
    if k is None or float(k) != int(k):
        return "jumprelu", None
    return "batchtopk", whole_k(k, found, f)


def gated(w: Tensor, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor, w_dec: Tensor, b_dec: Tensor, subtract: bool) -> SAE:
    """A gated SAE as the jumprelu SAE that it is (W as [d, F]).

    z = 1[xW + b_gate > 0] relu(xW e^r + b_mag). With W' = W e^r, b' = b_mag: p = xW' + b', and the gate is open where
    p > θ = b_mag − e^r b_gate. So z = p 1[p > θ] 1[p > 0].
    """
    grow = r_mag.double().exp()
    return SAE(
        **float32(W_enc=w.double() * grow, b_enc=b_mag, W_dec=w_dec, b_dec=b_dec),
        threshold=(b_mag.double() - grow * b_gate.double()).to(torch.float32),
        arch="jumprelu",
        k=None,
        subtract_b_dec=subtract,
    )


def _split_signs(other: Any) -> Any:
    """abstopk's signed activations as two latents, one for each sign."""

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        z, x_hat = other(x)
        return torch.cat([z.clamp(min=0), (-z).clamp(min=0)], dim=1), x_hat

    return split


def _kept(config: dict[str, Any], metadata: dict[str, Any], d_sae: int) -> dict[str, Any]:
    """Facts of the header that the folder states: widths of a matryoshka SAE, and where the latents of a stitched one
    were trained, as we wrote it, unless what is there now has another number of latents."""
    kept = {"matryoshka_widths": config["matryoshka_widths"]} if "matryoshka_widths" in config else {}
    provenance = metadata.get(_PROVENANCE)
    stitched = provenance.get("stitched") if isinstance(provenance, dict) else None
    try:
        n_sources = len(stitched["sources"])
        runs = [(int(source), int(first), int(count)) for source, first, count in stitched["latents"]]
    except (TypeError, KeyError, ValueError):
        return kept
    plausible = all(0 <= source < n_sources and first >= 0 and count > 0 for source, first, count in runs)
    if plausible and sum(count for _, _, count in runs) == d_sae:
        kept["stitched"] = stitched
    return kept


def _in_units(other: Any, scale: float | None) -> Any:
    """The formula on inputs times ``scale``, its results divided by it."""
    if scale is None:
        return other
    return lambda x: tuple(part / scale for part in other(x * scale))


# --- writing ---------------------------------------------------------------------------------------------------


def write(sae: SAE, header: h.Header, folder: Path) -> None:
    """Write ``sae`` as SAELens ``SAE.load_from_disk`` reads it: standard, topk, jumprelu or matching_pursuit."""
    from safetensors.torch import save_file

    if sae.inference in ("batchtopk", "matryoshka"):
        raise ConfigError(
            "SAELens keeps a BatchTopK SAE as jumprelu, and this one has no threshold yet",
            "estimate it: saetool threshold SAE.st -o WITH-THRESHOLD.st, and convert that",
        )
    if sae.inference == "groupmax":
        raise ConfigError("SAELens has no groupmax SAEs", "--to sparsify holds it")
    architecture = {"relu": "standard"}.get(sae.inference, sae.inference)
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_b_dec,
        "normalize_activations": {v: n for n, v in _NORMALIZATIONS.items()}[sae.normalization],
        "reshape_activations": _reshaping(header),
        "metadata": _metadata(sae, header),
    }
    if architecture == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    if sae.pursuit is not None:
        config |= dataclasses.asdict(sae.pursuit)
        tensors = {"W_dec": sae.W_dec, "b_dec": sae.b_dec}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, sort_keys=True, indent=2, ensure_ascii=False) + "\n")


def _settings(header: h.Header) -> dict[str, Any]:
    source = header.config.get("source")
    return dict(source["settings"]) if isinstance(source, dict) and source.get("format") == "saelens" else {}


def _reshaping(header: h.Header) -> str:
    said = _settings(header).get("reshape_activations")
    return str(said) if said in ("none", "hook_z") else "none"


def _metadata(sae: SAE, header: h.Header) -> dict[str, Any]:
    """What SAELens and its users look for; an imported SAE keeps what its metadata said."""
    kept = _settings(header).get("metadata")
    metadata = {name: value for name, value in (kept if isinstance(kept, dict) else {}).items() if name != _PROVENANCE}
    metadata |= {
        "sae_lens_version": VERSION,
        "model_name": header.model.get("id"),
        "hook_name": header.model.get("hook_name"),
        "hf_hook_name": header.model.get("hf_hook_name"),
        "training_architecture": _TRAINED.get(sae.arch, sae.arch),
        _PROVENANCE: {
            "key": header.key,
            "version": header.version,
            "history": header.history,
            **({"stitched": header.config["stitched"]} if "stitched" in header.config else {}),
        },
    }
    if sae.k is not None:
        metadata["training_architecture_details"] = {"k": sae.k}
    return {name: value for name, value in metadata.items() if value is not None}
