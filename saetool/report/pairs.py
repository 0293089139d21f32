"""What every part of the page needs of stitched pairs: order, control pairs, group effects, colours, bins."""

from collections.abc import Sequence
from typing import Any

from saetool.artifacts import header as h
from saetool.report.collect import Artifact
from saetool.report.run import Run

NOVEL, RECONSTRUCTION, NEUTRAL = 1, 0, 6
"""Series (colour, dash, marker) of the two groups of latents, and of lines for comparison."""
TABLE_ROWS = 16
"""Rows of the table under a curve; it says how many points there are."""

Pair = dict[str, Any]
Edge = tuple[int, int, float]
"""(small latent, large latent, cosine ≥ θ)."""


def is_control(pair: Pair) -> bool:
    """Whether a pair is two SAEs of one width: the same thing learned twice."""
    return pair["n_small"] == pair["n_large"]


def pairs_of(run: Run) -> list[tuple[Artifact, Pair]]:
    """All pairs of all stitching records: pairs of widths first, by width, the larger θ first, then pairs of seeds."""
    found = [(artifact, pair) for artifact in run.found.of(h.STITCH) for pair in artifact.payload["pairs"]]

    def place(item: tuple[Artifact, Pair]) -> tuple[Any, ...]:
        artifact, pair = item
        return is_control(pair), pair["n_small"], pair["n_large"], pair["large"], -artifact.payload["theta"]

    return sorted(found, key=place)


def group_at(pair: Pair, theta: float | None) -> dict[str, Any]:
    """The measured effects of adding whole groups at ``theta``; empty if they were not measured there."""
    groups = (pair.get("data") or {}).get("groups") or []
    return next((g for g in groups if theta is not None and abs((g.get("theta") or 0) - theta) < 1e-9), {})


def histogram(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """How many of ``values`` lie in each [edge, next edge), the last bin closed."""
    counts = [0] * (len(edges) - 1)
    for value in values:
        low, high = 0, len(edges) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if value >= edges[middle] else (low, middle)
        counts[low] += 1
    return counts


def components(edges: list[Any]) -> list[list[Edge]]:
    """The connected components of a bipartite graph as lists of edges, the largest (by latents) first."""
    parent: dict[tuple[int, int], tuple[int, int]] = {}

    def root(node: tuple[int, int]) -> tuple[int, int]:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for small, large, _ in edges:
        parent[root((0, small))] = root((1, large))
    found: dict[tuple[int, int], list[Edge]] = {}
    for small, large, cosine in edges:
        found.setdefault(root((0, small)), []).append((small, large, cosine))
    lists = [sorted(edge_list) for edge_list in found.values()]
    return sorted(lists, key=lambda c: (-sum(shape(c)), c[0]))


def shape(component: list[Edge]) -> tuple[int, int]:
    """(small latents, large latents) of a component."""
    return len({a for a, _, _ in component}), len({b for _, b, _ in component})
