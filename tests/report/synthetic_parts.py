"""The parts of a synthetic run's records that not every real record has, with values that fit what is there."""

from typing import Any

import numpy as np


def pair_parts(rng: np.random.Generator, pair: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """What activations say beyond the effects of single latents, for ``data`` of a stitched pair."""
    best = np.array(pair["max_cosine"]["values"])
    n, n_components = len(best), pair["components"]
    novel, rest = pair["novel"], n - pair["novel"]
    mse, theta = data["mse_small"], data["path"]["theta"]
    scaling = (1 - best + 0.1 * rng.normal(size=n)).tolist()
    curves = {}
    for name, size, end in (("novel", novel, -0.06), ("reconstruction", rest, 0.7)):
        at = np.linspace(0, size, min(size, 20) + 1).round().astype(int)
        curves[f"n_{name}"] = at.tolist()
        curves[name] = [(end * (at / max(size, 1)) ** (1 + 0.2 * k)).tolist() for k in range(3)]
    means = {"small_where_fires": 1.3 * mse, "small_elsewhere": mse, "large_where_fires": 1.1 * mse}
    last = len(data["path"]["mse"]) - 1
    ce = [
        {"step": s, "n_tokens": 2_000, "ce_loss_without_sae": 3.21, "ce_loss_with_sae": 3.7 - 0.2 * s / max(last, 1),
         "kl_div_with_sae": 0.5, "ce_loss_score_zero": 0.93}
        for s in sorted({0, last // 2, last})
    ]  # fmt: skip
    return {
        "roc": {"theta": [0.2, 0.6, 0.9, None], "false_positive": [1.0, 0.3, 0.05, 0.0],
                "true_positive": [1.0, 0.9, 0.4, 0.0]},
        "swaps": {"delta_mse": (0.1 * rng.normal(size=n_components)).tolist(),
                  "delta_l0": (-0.01 * rng.random(n_components)).tolist(), "sizes": [],
                  "median_mse": 0.0004, "median_l0": -0.0003, "raise_mse": 0.5, "lower_l0": 1.0},
        "cumulative": curves,
        "latent_scaling": {"error": scaling, "reconstruction": scaling,
                           "median_of_novel": {"error": 0.61, "reconstruction": 0.2},
                           "median_of_reconstruction": {"error": 0.12, "reconstruction": 0.8}},
        "activation_cosine": {"values": (0.9 * best).tolist(), "decoder_cosine_above": 0.5, "r2": 0.87, "n": rest},
        "firing_errors": {f"mean_of_{g}": {**means, "large_elsewhere": 0.8 * mse} for g in ("novel", "reconstruction")},
        "ce": ce,
        "alive": {"novel": novel, "reconstruction": rest, "novel_share": novel / n, "theta": theta},
    }  # fmt: skip


def matching() -> dict[str, Any]:
    """One-to-one matching of two SAEs."""
    part = {"decoder_cosine_mean": 0.81, "encoder_cosine_mean": 0.62, "shared": 0.755}
    return {"same_partner": 0.9, "decoder": part, "encoder": part, "both": {**part, "shared": 0.7}}


def bias_exchange(names: list[str]) -> dict[str, Any]:
    """MSE of each SAE with each other's output bias."""
    n = len(names)
    mse = [[60.0 - 5 * i + (0.0 if i == j else 0.25 * (1 + abs(i - j))) for j in range(n)] for i in range(n)]
    return {"saes": names, "mse": mse, "b_dec_cosine": [[1.0 if i == j else 0.997 for j in range(n)] for i in range(n)]}


def eval_parts(metrics: dict[str, Any], d: int, width: int) -> dict[str, Any]:
    """Intervals, the recovery bound, and quality by position and by token."""
    ev, bound = metrics["explained_variance"], metrics["l0"] * np.log(width / metrics["l0"])
    positions = list(range(1, 33))
    return {
        "intervals": {"explained_variance": [ev - 0.01, ev + 0.012]},
        "recovery_bound": {"bound": float(bound), "ratio": float(d / bound), "constant": 1},
        "by": {
            "position": {"ids": positions, "n": [100 + p for p in positions],
                         "explained_variance": [ev - 0.05 / p for p in positions],
                         "mse": [metrics["mse"] + 1 / p for p in positions]},
            "token": {"ids": [0, 6, 12, 30], "n": [900, 3, 40, 500], "explained_variance": [ev] * 4,
                      "mse": [metrics["mse"] * f for f in (1.0, 3.0, 2.0, 0.5)]},
        },
    }  # fmt: skip


def meta_parts(n_rows: int, n_meta: int, small: dict[str, Any], parent: dict[str, Any]) -> dict[str, Any]:
    """Baselines, panels of cosines, parents and members of a meta-SAE record."""
    edges = [round(0.05 * i, 2) for i in range(21)]

    def panel(at: int, n: int) -> dict[str, Any]:
        counts = [0] * 20
        counts[at], counts[at + 1] = n - n // 3, n // 3
        return {"edges": edges, "counts": counts, "mean": 0.05 * at + 0.03, "median": 0.05 * at + 0.025}

    sizes = {"within": n_meta, "within_parent": n_rows, "within_comparable": 64, "to_parent": n_meta}
    sizes |= {"random_to_parent": n_meta, "to_comparable": n_meta, "random_to_comparable": n_meta}
    sizes |= {"parent_to_meta": n_rows, "parent_to_comparable": n_rows, "parent_to_random": n_rows}
    explained = {"meta_sae": 0.534, "nearest_sae_latents": 0.21, "nearest_sae_latents_tuned": 0.4, "zero": -0.004}
    explained |= {"random_directions": -0.45, "mean": 0.0, "pca": 0.1, "omp_comparable": 0.47}
    bars = [
        {"name": n, "variance_explained": v, "mse_mean": (1 - v) / 48, "mean_active": 4.0, "threshold_mode": None}
        for n, v in explained.items()
    ]
    return {
        "bars": bars,
        "max_cosine": {name: panel(3 + i, n) for i, (name, n) in enumerate(sizes.items())},
        "meta_latents": {"n_members": [n_rows // (i + 1) for i in range(n_meta - 1)] + [0], "strongest_rows": []},
        "compare": {"pool": [{**small, "directions": 64}], "comparable": small["name"],
                    "shared_edges": {"edges": 900, "other_edges": 901, "overlap": 0.29, "chance": 0.11, "tau": 0.41}},
        "parents": [{**parent, "n_rows": n_rows, "left_out": {"zero": 0, "rare": 2}, "variance_explained": 0.512,
                     "mean_active": 4.02, "unexplained_rows": 3, "meta_latents_used": n_meta - 1,
                     "rows_by_active": [3, 10, 40, 60, n_rows - 113]}],
    }  # fmt: skip


PROFILE = {
    "sample_rows": 16_384,
    "distinct_tokens": 46,
    "norm_quantiles": [[0.01, 14.2], [0.25, 20.1], [0.5, 23.9], [0.75, 27.0], [0.99, 41.0], [0.999, 77.5]],
    "outlier_dims": [
        {"dim": 7, "mean_over_std": 9.25, "mean": -3.5, "variance_share": 0.031},
        {"dim": 21, "mean_over_std": 2.5, "mean": 1.5, "variance_share": 0.042},
    ],
}
STATISTICS = {"mean_sq_norm": 576.0, "mean_norm": 23.5, "median_norm": 23.9, "largest_norm": 80.25}
