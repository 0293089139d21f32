"""The stitching record (``saetool/stitch@1``): what ``engines/stitch.py`` found, as JSON."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from saetool.artifacts.sae import SAEFile
from saetool.core.stitch import Partition
from saetool.engines.stitch import Comparison, Job, Measured


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
        "largest_components": [list(sizes) for sizes in parts.largest(10)],
        "max_cosine": {
            "mean": float(cosines.mean()),
            "median": _quantile(cosines, 0.5),
            "sd": float(cosines.std(correction=0)),
            "values": found.max_cosine.tolist(),
        },
        "nearest": [j if j >= 0 else None for j in found.nearest.tolist()],
        "mean_max_cosine_of_small": float(of_small.mean()),
        "edges": [
            [s, big, c]
            for s, big, c in zip(edges.small.tolist(), edges.large.tolist(), edges.cosine.tolist(), strict=True)
        ],
        "sweep": [_sweep_entry(p) for p in comparison.sweep],
        "null": {
            "max_cosine_mean": float(null.mean()),
            "max_cosine_q99": _quantile(null, 0.99),
            "reconstruction_share": float((null >= parts.theta).double().mean()),
        },
        "data": data,
    }


def _sweep_entry(parts: Partition) -> dict[str, Any]:
    largest = parts.largest(1)
    return {
        "theta": parts.theta,
        "novel": int(parts.novel.sum()),
        "novel_share": parts.novel_share,
        "components": parts.n_components,
        "unmatched_small": int(parts.unmatched.sum()),
        "largest_component": sum(largest[0]) if largest else 0,
    }


def _quantile(values: Tensor, q: float) -> float:
    """Linear between the two nearest values (torch.quantile refuses long inputs); NaN of nothing."""
    if not len(values):
        return float("nan")
    place = q * (len(values) - 1)
    ordered = values.sort().values
    low, high = ordered[int(place)], ordered[min(int(place) + 1, len(values) - 1)]
    return float(low + (high - low) * (place - int(place)))


def data_entry(
    measured: Measured, comparison: Comparison, job: Job, split: str, order: str, bias: str
) -> dict[str, Any]:
    """What the activations say of one pair. ``alive`` counts only latents that fired at least once on these tokens."""
    small, large, curve, parts = measured.small, measured.large, measured.curve, comparison.parts
    alive = large.fires > 0
    novel, rest = int((parts.novel & alive).sum()), int((parts.reconstruction & alive).sum())
    return {
        "split": split,
        "n_tokens": measured.n_tokens,
        "mse_small": small.mse,
        "mse_large": large.mse,
        "l0_small": small.l0,
        "l0_large": large.l0,
        "dead_small": int((small.fires == 0).sum()),
        "dead_large": int((~alive).sum()),
        "alive": {
            "novel": novel,
            "reconstruction": rest,
            "novel_share": novel / (novel + rest) if novel + rest else None,
        },
        "effects": {"delta_mse": measured.delta_mse.tolist(), "firing_rate": large.fires.tolist()},
        "auc": measured.prediction.auc,
        "best_theta": measured.prediction.best_theta,
        "best_balanced_accuracy": measured.prediction.best_balanced_accuracy,
        "groups": [
            {
                "theta": g.theta,
                "n_novel": g.n_novel,
                "n_reconstruction": g.n_reconstruction,
                "novel_delta": g.novel_delta,
                "reconstruction_delta": g.reconstruction_delta,
            }
            for g in measured.groups
        ],
        "path": {
            "order": order,
            "bias": bias,
            "theta": parts.theta,
            "n_add_steps": job.path.n_add,
            "n_swap_steps": job.path.n_swap,
            "mse": curve.mse.tolist(),
            "l0": curve.l0.tolist(),
            "n_latents": curve.n_latents.tolist(),
        },
        "path_end_error": {
            "mse_small": None if bias == "large" else _relative(curve.mse[0], small.mse),
            "mse_large": None if bias == "small" else _relative(curve.mse[-1], large.mse),
        },
    }


def _relative(value: Tensor, truth: float) -> float:
    return abs(float(value) - truth) / truth if truth else float("nan")


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
