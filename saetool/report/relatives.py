"""How single latents are related: nearest latents in other SAEs, components, meta-latents. Both directions of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from saetool.artifacts import header as h
from saetool.report.collect import Artifact
from saetool.report.pairs import Edge, Pair, components, is_control, pairs_of
from saetool.report.run import Run

MAX_LISTED = 5
"""Relatives listed of each kind, the closest first."""

Key = tuple[str, int]
"""A latent: (hash that stands for its SAE, number)."""
_Weights = dict[int, dict[int, float]]
_Parts = tuple[str, str, str, _Weights, _Weights]
_Components = tuple[int, float, tuple[str, str], tuple[str, str], dict[tuple[int, int], list[Edge]]]


@dataclass(frozen=True)
class Relation:
    """The latents of one other SAE that a latent is related to, the closest first."""

    title: str
    what: str
    value: str
    """What ``found`` holds beside each latent: cosine or weight."""
    sae: str
    """The other SAE (the hash that stands for it)."""
    found: tuple[tuple[int, float], ...]
    total: int
    """How many there are; ``found`` holds the first ``MAX_LISTED``."""


@dataclass(frozen=True)
class Family:
    """The component of a stitched pair that a latent belongs to; without latents: it has none at this θ."""

    pair: int
    """Its place among the page's pairs."""
    theta: float
    small_name: str
    large_name: str
    small_sae: str
    large_sae: str
    small: tuple[int, ...]
    large: tuple[int, ...]
    first: Edge | None
    """Its first edge: what names the component."""
    is_small: bool
    """Whether the latent asked about is one of the smaller SAE's."""


@dataclass(frozen=True)
class Relatives:
    """All relations that stitching and meta records state."""

    run: Run

    def of(self, key: Key) -> list[Relation]:
        """The relations of one latent: nearest latents by SAE, meta-latents, latents it is part of."""
        sae, latent = key
        out = []
        for (mine, other), table in self._cosines.items():
            if mine == sae and (found := table.get(latent)):
                out.append(_relation(f"Nearest in {self._titles[other]}", "latent", "cosine", other, found))
        for parent, meta, name, parts, members in self._parts:
            if parent == sae and (found := parts.get(latent)):
                out.append(_relation(f"Its meta-latents ({name})", "meta-latent", "weight", meta, found))
            if meta == sae and (found := members.get(latent)):
                out.append(_relation("Latents it is part of", "latent", "weight", parent, found))
        return out

    def families(self, key: Key) -> list[Family]:
        """The latent's component in every stitched pair of widths that its SAE is part of."""
        sae, latent = key
        out = []
        for i, theta, names, saes, members in self._components:
            for side in (0, 1):
                if saes[side] != sae:
                    continue
                component = members.get((side, latent))
                small = tuple(sorted({a for a, _, _ in component})) if component else ()
                large = tuple(sorted({b for _, b, _ in component})) if component else ()
                first = component[0] if component else None
                out.append(Family(i, theta, *names, *saes, small, large, first, side == 0))
        return out

    def name(self, sae: str) -> str:
        """The file name of an SAE that some record speaks of; '' if none does."""
        return self._names.get(sae, "")

    @cached_property
    def _pairs(self) -> list[tuple[Artifact, Pair, str, str]]:
        return [
            (a, p, self.run.identity(p["small_sha256"]), self.run.identity(p["large_sha256"]))
            for a, p in pairs_of(self.run)
        ]

    @cached_property
    def _names(self) -> dict[str, str]:
        names = {}
        for _, pair, small, large in self._pairs:
            names |= {small: pair["small"], large: pair["large"]}
        for artifact in self.run.found.of(h.META):
            parent = artifact.payload["parent"]
            names.setdefault(self.run.identity(parent["sha256"]), parent["name"])
            meta = self.run.meta_sha256(artifact)
            if meta in self.run.found.by_sha:
                names.setdefault(self.run.identity(meta), self.run.found.by_sha[meta].name)
        return names

    @cached_property
    def _titles(self) -> dict[str, str]:
        widths = {}
        for _, pair, small, large in self._pairs:
            widths |= {small: pair["n_small"], large: pair["n_large"]}
        return {sae: f"{self._names[sae]} ({width:,} latents)" for sae, width in widths.items()}

    @cached_property
    def _cosines(self) -> dict[tuple[str, str], dict[int, dict[int, float]]]:
        """(SAE, other SAE) → latent → {latent of the other: cosine}; a pair stitched at several θ counts once."""
        out: dict[tuple[str, str], dict[int, dict[int, float]]] = {}
        for _, pair, small, large in self._pairs:
            up, down = out.setdefault((small, large), {}), out.setdefault((large, small), {})
            closest = zip(pair.get("nearest") or [], pair["max_cosine"]["values"], strict=False)
            nearest = [(a, b, c) for b, (a, c) in enumerate(closest) if a is not None and c is not None]
            for a, b, cosine in [*nearest, *(pair.get("edges") or [])]:
                up.setdefault(a, {})[b] = cosine
                down.setdefault(b, {})[a] = cosine
        return out

    @cached_property
    def _components(self) -> list[_Components]:
        out = []
        for i, (artifact, pair, small, large) in enumerate(self._pairs):
            if is_control(pair):
                continue
            members: dict[tuple[int, int], list[Edge]] = {}
            for component in components(pair.get("edges") or []):
                for a, b, _ in component:
                    members[0, a] = members[1, b] = component
            names = (pair["small"], pair["large"])
            out.append((i, artifact.payload["theta"], names, (small, large), members))
        return out

    @cached_property
    def _parts(self) -> list[_Parts]:
        """(parent, meta-SAE, its name, meta-latents of every latent, latents of every meta-latent) of each record."""
        out = []
        for artifact in self.run.found.of(h.META):
            record = artifact.payload.get("decompositions") or {"latents": [], "indices": [], "weights": []}
            parts: dict[int, dict[int, float]] = {}
            members: dict[int, dict[int, float]] = {}
            for latent, indices, weights in zip(record["latents"], record["indices"], record["weights"], strict=True):
                for index, weight in zip(indices, weights, strict=True):
                    parts.setdefault(latent, {})[index] = weight
                    members.setdefault(index, {})[latent] = weight
            parent = self.run.identity(artifact.payload["parent"]["sha256"])
            sha = self.run.meta_sha256(artifact)
            meta = self.run.identity(sha) if sha else ""
            name = self._names.get(meta, artifact.name)
            out.append((parent, meta, name, parts, members))
        return out


def _relation(title: str, what: str, value: str, sae: str, found: Mapping[int, float]) -> Relation:
    ranked = sorted(found.items(), key=lambda p: (-p[1], p[0]))
    return Relation(title, what, value, sae, tuple(ranked[:MAX_LISTED]), len(ranked))
