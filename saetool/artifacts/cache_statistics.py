"""What the manifest of a cache says of its train split."""

from typing import TYPE_CHECKING, Any

from saetool.artifacts import container
from saetool.artifacts.cache import MEDIAN_ROWS, TRAIN, Cache

if TYPE_CHECKING:
    from torch import Tensor

    from saetool.core.statistics import Moments, Sums

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999)
N_TOP = 20
"""Outlier dimensions and top tokens that are listed."""
SUMS = {"x": "sum", "squares": "sum_of_squares", "norms": "sum_of_norms", "largest": "largest_norm"}
"""Fields of ``Sums`` → tensors of a shard."""


def describe(
    cache: Cache, vocabulary: list[str] | None
) -> "tuple[dict[str, float], dict[str, Any], dict[str, Tensor]]":
    """Statistics, profile and tensors of the train split of ``cache``, whose shards are all written."""
    from saetool.core.statistics import geometric_median, moments

    sample = cache.sample(TRAIN, MEDIAN_ROWS)
    found = moments(total(cache, TRAIN), cache.rows(TRAIN))
    norms = sample.double().norm(dim=1)
    profile: dict[str, Any] = {
        "sample_rows": len(sample),
        "norm_quantiles": [[q, float(norms.quantile(q))] for q in QUANTILES],
        "outlier_dims": _outliers(found),
        **(_top_tokens(cache, vocabulary) if vocabulary is not None else {}),
    }
    tensors = {"mean": found.mean, "variance": found.variance, "geometric_median": geometric_median(sample)}
    return _scalars(found, float(norms.median())), profile, tensors


def total(cache: Cache, split: str, limit: int | None = None) -> "Sums":
    """Sums over the rows of ``split`` (the first ``limit``), in shard order: of whole shards those they hold, and only
    of a part of one computed. The split must have rows."""
    from saetool.core.statistics import Sums, row_sums

    found: Sums | None = None
    left = cache.rows(split) if limit is None else limit
    for shard in cache.shards:
        if shard.split != split or not left:
            continue
        if shard.rows <= left:
            tensors = container.open_tensors(cache.path / shard.name, list(SUMS.values()))
            mine = Sums(**{field: tensors[name] for field, name in SUMS.items()})
        else:
            mine = row_sums(cache.shard_tensors(shard)["acts"][:left])
        found = mine if found is None else found + mine
        left -= min(shard.rows, left)
    assert found is not None
    return found


def _scalars(found: "Moments", median_norm: float) -> dict[str, float]:
    from saetool.core.statistics import OUTLIER_RATIO

    total, ratio = float(found.variance.sum()), found.outlier_ratio
    return {
        "mean_sq_norm": found.mean_sq_norm,
        "mean_norm": found.mean_norm,
        "median_norm": median_norm,
        "largest_norm": found.largest_norm,
        "total_variance": total,
        "largest_dim_variance_share": float(found.variance.max()) / total if total else 0.0,
        "largest_dim": int(found.variance.argmax()),
        "mean_vector_sq_norm_share": float(found.mean.square().sum()) / found.mean_sq_norm if found.mean_sq_norm else 0,
        "largest_mean_over_std": float(ratio.max()),
        "n_outlier_dims": int((ratio > OUTLIER_RATIO).sum()),
    }


def _outliers(found: "Moments") -> list[dict[str, float]]:
    """The dimensions with the largest |mean| / std."""
    total = float(found.variance.sum())
    top = found.outlier_ratio.topk(min(N_TOP, len(found.mean)))
    return [
        {
            "dim": int(dim),
            "mean_over_std": float(ratio),
            "mean": float(found.mean[dim]),
            "variance_share": float(found.variance[dim]) / total if total else 0.0,
        }
        for dim, ratio in zip(top.indices, top.values, strict=True)
    ]


def _top_tokens(cache: Cache, vocabulary: list[str]) -> dict[str, Any]:
    """How many different tokens the train split has, and the most frequent: [id, text, rows]."""
    import torch

    counts = torch.bincount(cache.row_tensor(TRAIN, "tokens").long(), minlength=len(vocabulary))
    # Equal counts in the order of ids: torch's topk leaves their order open.
    order = torch.argsort(counts, descending=True, stable=True)[:N_TOP].tolist()
    top = [[i, vocabulary[i] if i < len(vocabulary) else "", int(counts[i])] for i in order if counts[i]]
    return {"distinct_tokens": int((counts > 0).sum()), "top_tokens": top}
