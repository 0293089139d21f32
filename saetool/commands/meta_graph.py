"""Decompositions as a graph: parent latents joined to their meta-latents, for Graphviz (.dot) and others (.graphml)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from saetool.artifacts import writing
from saetool.errors import ArtifactError, ConfigError

SUFFIXES = (".dot", ".gv", ".graphml")


def check_suffix(path: Path) -> None:
    """Raise unless the name says which format is wanted."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--graph {path}: of what format?", f"name it {path.stem}.dot (Graphviz) or .graphml")


def write(path: Path, payload: Mapping[str, Any], *, overwrite: bool) -> None:
    """Write the graph of a record. A file with other contents is replaced only with ``overwrite``."""
    data = (_graphml(payload) if path.suffix == ".graphml" else _dot(payload)).encode()
    writing.check_target(path)
    if path.exists() and path.read_bytes() != data and not overwrite:
        raise ArtifactError(f"{path}: exists and is another graph", "pass --overwrite to replace it")
    writing.write_bytes(path, data)


def _edges(payload: Mapping[str, Any]) -> Iterator[tuple[str, int, int, float]]:
    """(parent's name, its latent, meta-latent, weight)."""
    for i, parent in enumerate(payload["parents"]):
        parts = payload["decompositions"] if i == 0 else parent["decompositions"]
        for latent, indices, weights in zip(parts["latents"], parts["indices"], parts["weights"], strict=True):
            for index, weight in zip(indices, weights, strict=True):
                yield parent["name"], latent, index, weight


def _name(payload: Mapping[str, Any], parent: str, latent: int) -> str:
    return str(latent) if len(payload["parents"]) == 1 else f"{parent} {latent}"


def _dot(payload: Mapping[str, Any]) -> str:
    lines = ["graph meta {", "  rankdir=LR;", "  node [shape=plaintext];"]
    for parent, latent, index, weight in _edges(payload):
        name = _name(payload, parent, latent).replace("\\", "\\\\").replace('"', '\\"')
        lines.append(f'  "latent {name}" -- "meta {index}" [weight={round(1000 * weight)}, label="{weight:.3f}"];')
    return "\n".join([*lines, "}", ""])


def _graphml(payload: Mapping[str, Any]) -> str:
    found = list(_edges(payload))
    latents = dict.fromkeys(_name(payload, parent, latent) for parent, latent, _, _ in found)
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        '<graphml xmlns="http://graphml.graphdrawing.org/xmlns">',
        '<key id="kind" for="node" attr.name="kind" attr.type="string"/>',
        '<key id="weight" for="edge" attr.name="weight" attr.type="double"/>',
        '<graph id="meta" edgedefault="undirected">',
    ]
    nodes = [(f"latent {name}", "latent") for name in latents]
    nodes += [(f"meta {index}", "meta-latent") for index in sorted({index for _, _, index, _ in found})]
    lines += [f'<node id={quoteattr(name)}><data key="kind">{kind}</data></node>' for name, kind in nodes]
    for parent, latent, index, weight in found:
        source = quoteattr(f"latent {_name(payload, parent, latent)}")
        lines.append(f'<edge source={source} target="meta {index}"><data key="weight">{weight}</data></edge>')
    return "\n".join([*lines, "</graph>", "</graphml>", ""])
