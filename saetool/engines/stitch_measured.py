"""What the activations say of a pair, as the ``data`` of a stitching record (``saetool/stitch@1``)."""

from typing import Any

import torch
from torch import Tensor

from saetool.core.statistics import quantile
from saetool.core.stitch import Partition
from saetool.engines.stitch import Comparison, Job, Measured

AGREEMENT_FROM = 0.5
"""Decoder cosine above which activation cosines are compared with it, as in the paper's Fig. 8."""


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
        "effects": {
            "delta_mse": measured.deltas.added.tolist(),
            "firing_rate": large.fires.tolist(),
            "removed_delta_mse": measured.deltas.removed.tolist(),
        },
        "auc": measured.prediction.auc,
        "best_theta": measured.prediction.best_theta,
        "best_balanced_accuracy": measured.prediction.best_balanced_accuracy,
        "roc": _lists(measured.roc),
        "swaps": _swaps_entry(measured, parts),
        "cumulative": _lists(measured.cumulative),
        "latent_scaling": _scaling_entry(measured, parts, alive),
        "activation_cosine": _agreement_entry(measured, comparison),
        "firing_errors": _firing_entry(measured, parts, alive),
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


def _lists(values: Any) -> dict[str, Any]:
    """The tensors of a dataclass, as lists."""
    return {name: tensor.tolist() for name, tensor in vars(values).items()}


def _swaps_entry(measured: Measured, parts: Partition) -> dict[str, Any]:
    """Each component swapped alone in the intact small SAE, with its sizes [small, large]; medians are relative."""
    mse, l0 = measured.swaps.mse, measured.swaps.l0
    return {
        "sizes": parts.sizes.tolist(),
        "delta_mse": mse.tolist(),
        "delta_l0": l0.tolist(),
        "median_mse": quantile(mse / measured.small.mse, 0.5),
        "median_l0": quantile(l0 / measured.small.l0, 0.5),
        "raise_mse": _share(mse > 0),
        "lower_l0": _share(l0 < 0),
    }


def _scaling_entry(measured: Measured, parts: Partition, alive: Tensor) -> dict[str, Any]:
    """β of the small SAE's error and reconstruction for each large latent (``core/effects.py``), and group medians."""
    found = measured.scaling
    entry: dict[str, Any] = _lists(found)
    for group, mine in (("novel", parts.novel & alive), ("reconstruction", parts.reconstruction & alive)):
        entry[f"median_of_{group}"] = {
            "error": quantile(found.error[mine], 0.5),
            "reconstruction": quantile(found.reconstruction[mine], 0.5),
        }
    return entry


def _agreement_entry(measured: Measured, comparison: Comparison) -> dict[str, Any]:
    """Activation cosine of each large latent and the small one nearest to it, beside their decoder cosine (Fig. 8)."""
    mine, decoder = measured.activation_cosine, comparison.found.max_cosine
    known = ~mine.isnan() & (decoder > AGREEMENT_FROM)
    pair = torch.stack([mine[known], decoder[known]])
    r2 = float(torch.corrcoef(pair)[0, 1] ** 2) if int(known.sum()) > 2 else None
    return {"values": mine.tolist(), "decoder_cosine_above": AGREEMENT_FROM, "n": int(known.sum()), "r2": r2}


def _firing_entry(measured: Measured, parts: Partition, alive: Tensor) -> dict[str, Any]:
    """MSE of both SAEs on the tokens where a large latent fires and on the others; means over latents (Fig. 11)."""
    names = ("small_where_fires", "small_elsewhere", "large_where_fires", "large_elsewhere")
    entry: dict[str, Any] = {name: row.tolist() for name, row in zip(names, measured.firing_errors, strict=True)}
    for group, mine in (("novel", parts.novel & alive), ("reconstruction", parts.reconstruction & alive)):
        means = measured.firing_errors[:, mine].nanmean(1).tolist()
        entry[f"mean_of_{group}"] = dict(zip(names, means, strict=True))
    return entry


def _share(mine: Tensor) -> float:
    return float(mine.double().mean()) if len(mine) else float("nan")


def _relative(value: Tensor, truth: float) -> float:
    return abs(float(value) - truth) / truth if truth else float("nan")
