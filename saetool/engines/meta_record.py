"""The record of a meta-SAE: variance explained, decompositions, nearest directions, baselines (schema meta@1)."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saetool.config import TrainConfig
from saetool.core import meta as core
from saetool.core import meta_baselines as baselines
from saetool.core import sparse
from saetool.core.cosines import max_cosine_to_others, max_cosines
from saetool.core.meta_edges import shared_edges
from saetool.core.sae import SAE, unit_rows
from saetool.core.similarity import random_directions
from saetool.core.statistics import quantile
from saetool.engines.meta import Trained

STRONGEST = 10
"""Members listed for each meta-latent."""


@dataclass(frozen=True)
class Parent:
    """One SAE whose decoder rows are explained."""

    name: str
    sha256: str
    d_sae: int
    rows: core.Rows
    """Those that are used."""
    zero: int
    """Rows of norm zero, left out."""
    rare: int
    """Latents left out because they fire too rarely."""

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256, "d_sae": self.d_sae}


@dataclass(frozen=True)
class Compared:
    """An SAE to compare the meta-SAE with."""

    name: str
    sha256: str
    rows: Float[Tensor, "n d"]
    """Unit norm, none of them zero."""


@dataclass(frozen=True)
class Bars:
    """Replacements of the meta-SAE's decoder, and what training the encoder anew made of them."""

    nearest: Float[Tensor, "m d"] | None
    nearest_tuned: Trained | None
    random: Float[Tensor, "m d"]
    random_tuned: Trained | None


def joined(parents: Sequence[Parent]) -> Float[Tensor, "n d"]:
    """All parents' rows."""
    return torch.cat([parent.rows.rows for parent in parents])


def comparable(compared: Sequence[Compared], width: int) -> Compared | None:
    """The SAE whose width is nearest to ``width``, by ratio."""
    return min(compared, key=lambda c: abs(math.log(len(c.rows) / width)), default=None)


def control(name: str, trained: Trained, rows: Float[Tensor, "n d"]) -> dict[str, Any]:
    """A meta-SAE trained on ``rows`` without structure, evaluated on them."""
    batch = core.explain(trained.sae, rows, batch=True)
    return {
        "name": name,
        **dataclasses.asdict(core.explain(trained.sae, rows)),
        "train_mode": batch.variance_explained,
    }


def payload(
    parents: Sequence[Parent],
    trained: Trained,
    config: TrainConfig,
    compared: Sequence[Compared],
    bars: Bars,
    weights: Float[Tensor, " n"] | None,
) -> dict[str, Any]:
    """Everything of the record but the controls."""
    meta, rows, first = trained.sae, joined(parents), parents[0]
    found = core.codes(meta, rows)
    at, batch = core.explained_by(meta, rows, found), core.explain(meta, rows, batch=True)
    explained = {"threshold_mode": at.variance_explained, "train_mode": batch.variance_explained}
    if weights is not None:
        explained["threshold_mode_weighted"] = core.explained_by(meta, rows, found, weights).variance_explained
    like = comparable(compared, meta.d_sae)
    edges = shared_edges(found, rows, like.rows) if like else None
    return {
        "parent": first.to_json(),
        "parents": [_parent(parent, meta, decomposed=i > 0) for i, parent in enumerate(parents)],
        "n_rows": len(rows),
        "k": config.k,
        "d_sae": config.latents,
        "threshold": float(meta.threshold[0]) if meta.threshold is not None else None,
        "variance_explained": explained,
        "mse_mean": {"threshold_mode": at.mse_mean, "train_mode": batch.mse_mean},
        "mean_active": at.mean_active,
        "dead": at.dead,
        "unexplained_rows": at.unexplained_rows,
        "max_cosine": _cosines(rows, meta, like, config.seed),
        "decompositions": _decompositions(meta, first.rows),
        "meta_latents": _members(found),
        "compare": {
            "pool": [{"name": c.name, "sha256": c.sha256, "directions": len(c.rows)} for c in compared],
            "comparable": like.name if like else None,
            "shared_edges": dataclasses.asdict(edges) if edges else None,
        },
        "bars": _bars(rows, meta, batch, bars, like, config),
    }


def _parent(parent: Parent, meta: SAE, *, decomposed: bool) -> dict[str, Any]:
    found = core.codes(meta, parent.rows.rows)
    one = core.explained_by(meta, parent.rows.rows, found)
    return {
        **parent.to_json(),
        "n_rows": len(parent.rows.rows),
        "left_out": {"zero": parent.zero, "rare": parent.rare},
        "variance_explained": one.variance_explained,
        "mean_active": one.mean_active,
        "unexplained_rows": one.unexplained_rows,
        "meta_latents_used": int((found.fired > 0).sum()),
        "rows_by_active": torch.bincount(found.counts).tolist(),
        **({"decompositions": _decompositions(meta, parent.rows)} if decomposed else {}),
    }


def _decompositions(meta: SAE, rows: core.Rows) -> dict[str, Any]:
    parts = core.decompose(meta, rows)
    return {
        "latents": [latent for latent, _, _ in parts],
        "indices": [indices for _, indices, _ in parts],
        "weights": [[round(w, 6) for w in weights] for _, _, weights in parts],
    }


def _members(found: sparse.Codes) -> dict[str, Any]:
    """Of each meta-latent: on how many rows it is active, and the rows (numbers among all used) it is strongest on."""
    order = found.values.argsort(descending=True, stable=True)
    order = order[found.latents[order].argsort(stable=True)]
    sizes = found.fired.tolist()
    tokens = [part[:STRONGEST].tolist() for part in found.tokens[order].split(sizes)]
    return {"n_members": sizes, "strongest_rows": tokens}


def _cosines(rows: Tensor, meta: SAE, like: Compared | None, seed: int) -> dict[str, Any]:
    """The three panels of Fig. 6, and chance: random directions in place of the meta-latents."""
    from saetool.core.similarity import similarity

    directions = unit_rows(meta.W_dec)
    chance = torch.Generator().manual_seed(seed + 2)
    null = unit_rows(torch.randn(directions.shape, generator=chance))

    def closest(of: Tensor, to: Tensor) -> dict[str, Any]:
        return _histogram(similarity(to, of, theta=1.0).max_cosine)

    panels = {
        "within": _histogram(max_cosine_to_others(directions)),
        "within_parent": _histogram(max_cosine_to_others(rows)),
        "to_parent": closest(directions, rows),
        "random_to_parent": closest(null, rows),
        "parent_to_meta": closest(rows, directions),
        "parent_to_random": _histogram(max_cosines(random_directions(*directions.shape, chance).to(rows.device), rows)),
    }
    if like is not None:
        panels |= {
            "within_comparable": _histogram(max_cosine_to_others(like.rows)),
            "to_comparable": closest(directions, like.rows),
            "random_to_comparable": closest(null, like.rows),
            "parent_to_comparable": closest(rows, like.rows),
        }
    return panels


def _histogram(maxima: Float[Tensor, " n"]) -> dict[str, Any]:
    edges, counts, mean = core.cosine_histogram(maxima)
    return {"edges": edges, "counts": counts, "mean": mean, "median": quantile(maxima.double(), 0.5)}


def _bars(
    rows: Float[Tensor, "n d"],
    meta: SAE,
    batch: core.Explained,
    bars: Bars,
    like: Compared | None,
    config: TrainConfig,
) -> list[dict[str, Any]]:
    """Fig. 20 and its like: every bar has k active directions a row, on average over all rows or (pca, omp) exactly.

    Untuned bars keep the meta-SAE's activations. Where directions at cosine c replace its own, about V (2c − 1) of its
    V stays: nothing at c = 1/2, and below that they are worse than predicting zero.
    """

    def bar(name: str, quality: tuple[float, float], active: float | None, at: float | None = None) -> dict[str, Any]:
        explained, mse = quality
        return {
            "name": name,
            "mse_mean": mse,
            "variance_explained": explained,
            "mean_active": active,
            "threshold_mode": at,
        }

    def of_sae(name: str, sae: SAE) -> dict[str, Any]:
        one = core.explain(sae, rows, batch=True)
        at = core.explain(sae, rows).variance_explained
        return bar(name, (one.variance_explained, one.mse_mean), one.mean_active, at)

    assert config.k is not None
    found = [of_sae("meta_sae", meta)]
    assert found[0]["mse_mean"] == batch.mse_mean
    for name, directions, tuned in (
        ("nearest_sae_latents", bars.nearest, bars.nearest_tuned),
        ("random_directions", bars.random, bars.random_tuned),
    ):
        if directions is not None:
            found.append(of_sae(name, core.with_decoder(meta, directions)))
        if tuned is not None:
            found.append(of_sae(f"{name}_tuned", tuned.sae))
    mean = rows.double().mean(0).expand_as(rows)
    found.append(bar("zero", core.quality(rows, torch.zeros_like(rows)), 0.0))
    found.append(bar("mean", core.quality(rows, mean), 0.0))
    found.append(bar("pca", core.quality(rows, baselines.pca(rows, config.k)), float(config.k)))
    atoms = {"omp_meta_sae": meta.W_dec, "omp_random_directions": bars.random}
    if like is not None:
        atoms["omp_comparable"] = like.rows
    for name, directions in atoms.items():
        found.append(bar(name, core.quality(rows, baselines.omp(rows, directions, config.k)), float(config.k)))
    return found
