"""Stitching: what the larger SAE of each pair knows that the smaller does not, and what exchanging latents does."""

from collections.abc import Sequence
from typing import Any

from saetool.artifacts import header as h
from saetool.report.behaviour import agreement, cumulative, firing, losses, predictor, scaling, swaps
from saetool.report.blocks import (
    Column,
    Disclosure,
    Figure,
    Figures,
    Group,
    Section,
    Table,
    Text,
    num,
    number,
    pct,
    words,
)
from saetool.report.browser import component_browser
from saetool.report.collect import Artifact
from saetool.report.pair_figures import closeness, effects, group_effects
from saetool.report.pair_tables import biases, matching, shapes, sweep
from saetool.report.pairs import Pair, group_at, is_control, pairs_of
from saetool.report.path import path_error, path_sparsity
from saetool.report.run import Run
from saetool.report.splits import splits


def stitching(run: Run) -> Section | None:
    """A comparison of all pairs, then each pair on its own."""
    pairs = pairs_of(run)
    if not pairs:
        return None
    blocks: list[Any] = [splits(run, pairs), _comparison(pairs)]
    if not any(is_control(p) for _, p in pairs):
        blocks.append(
            Text("No seed control: stitch two SAEs of one width trained with different seeds to see the noise floor.")
        )
    seen: set[tuple[str, str]] = set()
    for i, (artifact, pair) in enumerate(pairs):
        two = pair["small_sha256"], pair["large_sha256"]
        blocks.append(_pair(run, artifact, pair, i, first=two not in seen))
        seen |= {two} if pair.get("data") else set()
    exchanged = {str(t.rows): t for artifact in run.found.of(h.STITCH) if (t := biases(artifact.payload))}
    blocks += exchanged.values()  # several θ of the same SAEs measure the same
    intro = (
        "A latent of the larger SAE is novel if its decoder direction has no cosine of at least θ with any latent of "
        "the smaller one, else a reconstruction latent."
    )
    return Section("stitching", "Stitching", intro, blocks)


def _comparison(pairs: Sequence[tuple[Artifact, Pair]]) -> Table:
    columns = [
        Column("pair", "small → large", numeric=False),
        Column("kind", "pairs of one width are the control: they differ by seed only", numeric=False),
        Column("θ", "cosine below which a latent is novel"),
        Column("novel", "latents of the larger SAE"),
        Column("novel share"),
        Column("novel share, alive", "among latents that fired on the evaluated tokens"),
        Column("reconstruction share"),
        Column("the same, random", "reconstruction share of random directions of the same shape"),
        Column("the same, shuffled", "of rows whose coordinates were permuted over the latents"),
        Column("mean max cos", "mean over the large SAE's latents of the largest cosine with a small one"),
        Column("median"),
        Column("unmatched", "latents of the small SAE without partner"),
        Column("components", "connected groups of small and large latents"),
        Column("AUC", "of max cosine as predictor of the sign of the effect on MSE"),
        Column("+ novel", "change of MSE when all novel latents are added to the small SAE"),
        Column("+ reconstruction", "change of MSE when all reconstruction latents are added"),
    ]
    rows = []
    for artifact, pair in pairs:
        theta = artifact.payload["theta"]
        group = group_at(pair, theta)
        rows.append(
            [
                words(f"{pair['small']} → {pair['large']}"),
                words("seed control" if is_control(pair) else "widths"),
                num(theta),
                num(pair["novel"]),
                pct(pair["novel_share"]),
                pct(((pair.get("data") or {}).get("alive") or {}).get("novel_share")),
                pct(pair["reconstruction_share"]),
                pct((pair.get("null") or {}).get("reconstruction_share")),
                pct((pair.get("null_shuffled") or {}).get("reconstruction_share")),
                num(pair["max_cosine"]["mean"]),
                num(pair["max_cosine"]["median"]),
                num(pair["unmatched_small"]),
                num(pair["components"]),
                num((pair.get("data") or {}).get("auc")),
                pct(group.get("novel_delta"), signed=True),
                pct(group.get("reconstruction_delta"), signed=True),
            ]
        )
    return Table("All pairs side by side", columns, rows, sortable=True)


def _pair(run: Run, artifact: Artifact, pair: Pair, index: int, *, first: bool) -> Group:
    """One pair at one θ; what does not depend on θ is drawn for the ``first`` of the same two SAEs only."""
    theta = artifact.payload["theta"]
    fid = f"pair-{index}"
    figures: list[Figure | None] = [closeness(pair, theta, fid)]
    further: list[Figure | None] = []
    elsewhere = ""
    data = pair.get("data")
    if data:
        if first:
            figures += [effects(run, pair, data, theta, fid), group_effects(pair, data, theta, fid)]
        else:
            elsewhere = (
                "What each latent does alone, and groups over θ, do not depend on the θ chosen: see the same pair "
            )
            elsewhere += "above."
        figures += [cumulative(pair, data, fid)]
        if data.get("path"):
            figures += [path_error(pair, data, fid), path_sparsity(pair, data, fid), losses(pair, data, fid)]
        further = [swaps(pair, data, fid), firing(pair, data, fid)]
        if first:
            further += [scaling(pair, data, theta, fid), predictor(pair, data, fid), agreement(pair, data, theta, fid)]
    blocks: list[Any] = [Figures([f for f in figures if f]), *([Text(elsewhere)] if elsewhere else [])]
    if data is None:
        blocks.append(Text("Effects on reconstruction were not measured: give saetool stitch an activation cache."))
    if drawn := [f for f in further if f]:
        blocks.append(Disclosure(f"Further measurements: {_and([_lower(f.title) for f in drawn])}", [Figures(drawn)]))
    tables = [sweep(pair, data, theta), shapes(pair), matching(pair, theta)]
    blocks += [*(t for t in tables if t), *component_browser(run, pair, theta, fid)]
    kind = "seed control" if is_control(pair) else f"{number(pair['n_small'])} → {number(pair['n_large'])} latents"
    return Group(fid, f"{pair['small']} → {pair['large']} ({kind}, θ = {theta:g})", blocks)


def _lower(title: str) -> str:
    return title[:1].lower() + title[1:]


def _and(parts: list[str]) -> str:
    return "; ".join(parts)
