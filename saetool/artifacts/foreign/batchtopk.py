"""The BatchTopK and Matryoshka authors' repositories: ``NAME_STEP/sae.pt`` and ``config.json``.

W_enc [d, F], W_dec [F, d], b_enc, b_dec; the topk kinds leave out b_enc, jumprelu subtracts nothing and has
``jumprelu.log_threshold``; matryoshka_sae adds a running ``threshold``. ``input_unit_norm`` standardises each token,
which no weights can hold: it is recorded (``input_normalization`` per_token), and encode and decode do it.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saetool.artifacts import header as h
from saetool.artifacts.foreign import files, pytorch
from saetool.artifacts.foreign.dictionary_learning import ELSEWHERE
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
    take,
    whole_k,
)
from saetool.core import peers
from saetool.core.sae import SAE
from saetool.errors import ConfigError

CONFIG, WEIGHTS = "config.json", "sae.pt"


def read(found: Found, asked: Asked) -> Imported:
    """The SAE of a checkpoint folder, or of a ``sae.pt`` alone with what the user says of it."""
    t, _ = files.read_torch(found.weights)
    config = files.read_json(found.configs[0]) if found.configs else {}
    take(t, found, "W_enc", "W_dec", "b_dec", "b_enc")
    d, f = len(t["b_dec"]), len(t["b_enc"])
    t = oriented(t, found, asked, "W_enc", "W_dec", d, f, enc_rows="d", bare=not found.configs)
    kind, matryoshka = _kind(t, config, found, asked)
    unit_norm = _unit_norm(config, found, asked)
    k = None
    if kind in ("topk", "batchtopk"):
        said = asked.k or config.get("top_k")
        if said is None:
            raise ask(found, "k", "--k N")
        k = whole_k(said, found, f)
    threshold: Tensor | None = None
    if kind == "jumprelu":
        threshold = take(t, found, "jumprelu.log_threshold")["jumprelu.log_threshold"].double().exp()
    elif kind == "batchtopk" and "threshold" in t and t["threshold"].numel() == 1 and float(t["threshold"]) > 0:
        threshold = torch.full((f,), float(t["threshold"]))
    way = "threshold" if kind == "batchtopk" and threshold is not None else kind
    settings = {"kind": way, "input_unit_norm": unit_norm, "k": k}
    sae = SAE(
        **float32(
            W_enc=t["W_enc"],
            b_enc=t["b_enc"] if kind in ("vanilla", "jumprelu") else torch.zeros(f),
            W_dec=t["W_dec"],
            b_dec=t["b_dec"],
        ),
        threshold=None if threshold is None else threshold.to(torch.float32),
        arch={"vanilla": "relu"}.get(kind, kind),
        k=k,
        subtract_b_dec=kind != "jumprelu",
        normalization="per_token" if unit_norm else "none",
    )
    hook = config.get("hook_point")
    return Imported(
        sae=sae,
        formula=named(peers.batchtopk_repository, **settings),
        other=exact(t, peers.batchtopk_repository, **settings),
        settings=config,
        config=_facts(config, matryoshka),
        model=str(config["model_name"]) if config.get("model_name") else None,
        hook_name=str(hook) if hook else None,
        whole_batch=kind == "batchtopk" and threshold is None,
    )


def _facts(config: dict[str, Any], matryoshka: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if isinstance(config.get("batch_size"), int):
        facts["batch_size"] = config["batch_size"]  # what the threshold is estimated on
    if matryoshka:
        facts["group_sizes"] = [int(n) for n in re.findall(r"\d+", str(config.get("group_sizes", "")))]
    return facts


def _kind(t: dict[str, Tensor], config: dict[str, Any], found: Found, asked: Asked) -> tuple[str, bool]:
    """vanilla, topk, batchtopk or jumprelu, and whether it is a matryoshka SAE."""
    said = re.sub("[^a-z]", "", str(config.get("sae_type", "")).lower())
    if "jumprelu.log_threshold" in t:
        return "jumprelu", False
    if "matryoshka" in said:
        return "batchtopk", True
    if said in ("vanilla", "topk", "batchtopk", "jumprelu"):
        return said, False
    if said:
        raise refuse(found, f"sae_type {config['sae_type']!r} is unknown", "known: vanilla, topk, batchtopk, jumprelu")
    if asked.arch is None:
        raise ask(found, "which kind of SAE it is", "--arch relu|topk|batchtopk")
    return {"relu": "vanilla"}.get(asked.arch, asked.arch), False


def _unit_norm(config: dict[str, Any], found: Found, asked: Asked) -> bool:
    said = config.get("input_unit_norm")
    if isinstance(said, bool):
        return said
    if asked.normalization is None:
        raise ask(found, "whether its inputs were standardised token by token", "--normalization none|per_token")
    return asked.normalization == "per_token"


# --- writing ---------------------------------------------------------------------------------------------------


def write(sae: SAE, header: h.Header, folder: Path) -> None:
    """Write ``sae`` for the BatchTopK repository's ``BatchTopKSAE``, ``TopKSAE``, ``VanillaSAE`` or ``JumpReLUSAE``."""
    if sae.normalization == "per_token_norm":
        raise ConfigError("the BatchTopK repository has no per_token_norm normalisation", "--to saelens can state it")
    if sae.inference in ("matryoshka", "groupmax", "matching_pursuit"):
        raise ConfigError(f"the BatchTopK repository has no {sae.inference} SAEs", ELSEWHERE)
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    shift = sae.b_dec.double() @ sae.W_enc.double()
    if sae.threshold is not None:
        if float(sae.threshold.min()) <= 0:
            raise ConfigError(
                "the BatchTopK repository keeps logarithms of thresholds, and this SAE has one that is not positive",
                "--to saelens takes any threshold",
            )
        kind = "jumprelu"
        tensors["jumprelu.log_threshold"] = sae.threshold.double().log().to(sae.threshold.dtype)
        if sae.subtract_b_dec:
            tensors["b_enc"] = (sae.b_enc.double() - shift).to(sae.b_enc.dtype)
    else:
        kind = {"relu": "vanilla"}.get(sae.inference, sae.inference)
        if not sae.subtract_b_dec:
            tensors["b_enc"] = (sae.b_enc.double() + shift).to(sae.b_enc.dtype)
        if kind != "vanilla" and bool(tensors["b_enc"].any()):
            raise ConfigError(
                f"the BatchTopK repository's {kind} SAEs have no encoder bias, and this one has",
                "--to saelens or --to dictionary_learning keep it; with a threshold it can go as jumprelu",
            )
    pytorch.save(tensors, folder / WEIGHTS)
    config = {
        "sae_type": kind,
        "act_size": sae.d_in,
        "dict_size": sae.d_sae,
        "input_unit_norm": sae.normalization == "per_token",
        "model_name": header.model.get("id"),
        "hook_point": header.model.get("hook_name"),
        "seed": header.seed if header.seed is not None else 0,
        "device": "cpu",
        "dtype": "torch.float32",
        "bandwidth": 0.001,
        "top_k": sae.k,
    }
    (folder / CONFIG).write_text(json.dumps(config, sort_keys=True, indent=2) + "\n")
