"""The stitching record (``saetool/stitch@1``): what ``engines/stitch.py`` found, as JSON."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saetool.artifacts.sae import SAEFile
from saetool.core.matching import Matchings
from saetool.core.sae import unit_rows
from saetool.core.statistics import quantile
from saetool.core.stitch import Partition
from saetool.engines.stitch import Comparison


def sae_entry(file: SAEFile) -> dict[str, Any]:
    """One of the SAEs compared."""
    return {
        "name": file.name,
        "sha256": file.sha256,
        "d_sae": file.sae.d_sae,
        "arch": file.sae.arch,
        "seed": file.header.seed,
    }


def pair_entry(small: SAEFile, large: SAEFile, comparison: Comparison, data: dict[str, Any] | None) -> dict[str, Any]:
    """One pair: what the decoders say, and ``data``, what the activations say (None without a cache).

    ``novel`` + ``reconstruction`` + ``zero_large`` = ``n_large``; shares are of the latents with a direction. Cosines
    of latents without one are NaN (null in the file), and so is ``nearest``.
    """
    found, parts, null = comparison.found, comparison.parts, comparison.null
    cosines = found.max_cosine[~found.zero_large]
    of_small = found.max_cosine_of_small[~found.zero_small]
    edges = found.edges
    return {
        "small": small.name,
        "large": large.name,
        "small_sha256": small.sha256,
        "large_sha256": large.sha256,
        "n_small": small.sae.d_sae,
        "n_large": large.sae.d_sae,
        "zero_small": int(found.zero_small.sum()),
        "zero_large": int(found.zero_large.sum()),
        "novel": int(parts.novel.sum()),
        "reconstruction": int(parts.reconstruction.sum()),
        "novel_share": parts.novel_share,
        "reconstruction_share": 1 - parts.novel_share,
        "unmatched_small": int(parts.unmatched.sum()),
        "components": parts.n_components,
        "component_shapes": [list(shape) for shape in parts.shapes()],
        "largest_component_share": _largest_share(parts),
        "largest_components": [list(sizes) for sizes in parts.largest(10)],
        "max_cosine": {
            "mean": float(cosines.mean()),
            "median": quantile(cosines, 0.5),
            "sd": float(cosines.std(correction=0)),
            "values": found.max_cosine.tolist(),
        },
        "nearest": [j if j >= 0 else None for j in found.nearest.tolist()],
        "mean_max_cosine_of_small": float(of_small.mean()),
        "edges": [
            [s, big, c]
            for s, big, c in zip(edges.small.tolist(), edges.large.tolist(), edges.cosine.tolist(), strict=True)
        ],
        "sweep": [_sweep_entry(theta, p, cosines) for theta, p in comparison.sweep.items()],
        "null": _null_entry(null, parts.theta),
        "null_shuffled": _null_entry(comparison.shuffled, parts.theta),
        "matching": None if comparison.matchings is None else _matching_entry(comparison.matchings, parts.theta),
        "data": data,
    }


def _largest_share(parts: Partition) -> float:
    """Members of the largest component among all latents that are in one; 0 without components."""
    return int(parts.sizes.sum(1).max()) / int(parts.sizes.sum()) if parts.n_components else 0.0


def _null_entry(null: Tensor, theta: float) -> dict[str, float]:
    """Max cosines of large latents to rows that know nothing of them."""
    return {
        "max_cosine_mean": float(null.mean()),
        "max_cosine_q99": quantile(null, 0.99),
        "reconstruction_share": float((null >= theta).double().mean()),
    }


def _matching_entry(found: Matchings, theta: float) -> dict[str, Any]:
    """One-to-one matchings: mean cosines of the matched pairs, and how many of them reach theta."""
    entry: dict[str, Any] = {"same_partner": found.same_partner()}
    for name, matching in (("decoder", found.by_decoder), ("encoder", found.by_encoder), ("both", found.by_both)):
        reach = {"decoder": matching.decoder >= theta, "encoder": matching.encoder >= theta}
        reach["both"] = reach["decoder"] & reach["encoder"]
        entry[name] = {
            "decoder_cosine_mean": float(matching.decoder.mean()),
            "encoder_cosine_mean": float(matching.encoder.mean()),
            "shared": float(reach[name].double().mean()),
        }
    return entry


def _sweep_entry(theta: float, parts: Partition | None, cosines: Tensor) -> dict[str, Any]:
    """Counts at another theta; only those of single latents where it joins too many pairs for components."""
    novel = int((cosines < theta).sum())
    largest = [] if parts is None else parts.largest(1)
    return {
        "theta": theta,
        "novel": novel,
        "novel_share": novel / len(cosines),
        "components": None if parts is None else parts.n_components,
        "unmatched_small": None if parts is None else int(parts.unmatched.sum()),
        "largest_component": None if parts is None else sum(largest[0]) if largest else 0,
    }


def bias_entry(files: Sequence[SAEFile], mse: list[list[float]]) -> dict[str, Any]:
    """MSE of each SAE (row) with the output bias of each (column), and the cosines of those biases (Fig. 17)."""
    biases = torch.stack([f.sae.b_dec.double() for f in files])
    unit = unit_rows(biases)
    return {"saes": [f.name for f in files], "mse": mse, "b_dec_cosine": (unit @ unit.T).clamp(-1, 1).tolist()}


def summary(pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of a record that fit a line, for ``--json``: one entry a pair."""
    names = ("small", "large", "novel", "reconstruction", "novel_share", "unmatched_small", "components")
    measured = ("n_tokens", "mse_small", "mse_large", "l0_small", "l0_large", "auc", "best_theta")
    return {
        "pairs": [
            {name: pair[name] for name in names}
            | ({name: pair["data"][name] for name in measured} if pair["data"] else {})
            for pair in pairs
        ]
    }
