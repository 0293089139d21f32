"""SAEs of one name in several folders are told apart: a page of two runs has two ``sae-768.st``.

A record names SAEs by file name and hash. Where a name stands for several hashes, every mention of those SAEs gets the
end of their path that differs; all other names stay as they are.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from saetool.artifacts import header as h
from saetool.report.collect import Artifact

Names = Mapping[str, str]
"""What to call an SAE, by its hash."""


def told_apart(artifacts: Sequence[Artifact]) -> tuple[Artifact, ...]:
    """``artifacts`` with names that stand for one SAE each, as far as their folders tell."""
    folders: dict[str, dict[str, str]] = {}  # file name → hash → folder
    for artifact in sorted(artifacts, key=lambda a: a.schema != h.SAE):  # an SAE's own folder, else its record's
        folder = artifact.label.rpartition("/")[0]
        for name, sha256 in _mentioned(artifact):
            folders.setdefault(name, {}).setdefault(sha256, folder)
    names: dict[str, str] = {}
    beside: dict[tuple[str, str], str] = {}
    for name, places in folders.items():
        if len(set(places.values())) > 1:
            short = _ends(sorted(set(places.values())))
            for sha256, folder in places.items():
                names[sha256] = beside[folder, name] = f"{short[folder]}/{name}".lstrip("/")
    return tuple(_renamed(artifact, names, beside) for artifact in artifacts) if names else tuple(artifacts)


def _mentioned(artifact: Artifact) -> Iterator[tuple[str, str]]:
    """(file name, hash) of every SAE that ``artifact`` is or was made from."""
    if artifact.schema == h.SAE:
        yield artifact.name, artifact.sha256
    for item in artifact.header.inputs:
        if item["schema"] == h.SAE:
            yield item["name"], item["sha256"]


def _ends(folders: Sequence[str]) -> dict[str, str]:
    """The shortest ends of paths that differ."""
    parts = {folder: folder.split("/") for folder in folders}
    for n in range(1, max(map(len, parts.values())) + 1):
        ends = {folder: "/".join(path[-n:]) for folder, path in parts.items()}
        if len(set(ends.values())) == len(ends):
            return ends
    return {folder: folder for folder in folders}


def _renamed(artifact: Artifact, names: Names, beside: Mapping[tuple[str, str], str]) -> Artifact:
    inputs = [{**i, "name": names.get(i["sha256"], i["name"])} for i in artifact.header.inputs]
    header = dataclasses.replace(artifact.header, inputs=inputs)
    payload = _in_record(artifact.payload, names)
    if artifact.schema == h.TRAIN_LOG:  # its records have names alone: of the files beside it
        folder = artifact.label.rpartition("/")[0]
        payload = [{**r, "sae": beside.get((folder, r["sae"]), r["sae"])} for r in payload]
    if artifact.schema == h.META and (compared := payload.get("compare")):  # one of the pool, by its name alone
        pool = zip(artifact.payload["compare"].get("pool") or [], compared.get("pool") or [], strict=True)
        named = {old["name"]: new["name"] for old, new in pool}
        compared["comparable"] = named.get(compared.get("comparable"), compared.get("comparable"))
    return dataclasses.replace(artifact, header=header, payload=payload, shown=names.get(artifact.sha256))


def _in_record(value: Any, names: Names) -> Any:
    """``value`` with ``name`` beside a known ``sha256``, and ``x`` beside a known ``x_sha256``, replaced."""
    if isinstance(value, list):
        return [_in_record(v, names) for v in value] if value and isinstance(value[0], dict) else value
    if not isinstance(value, dict):
        return value
    out = {key: _in_record(v, names) for key, v in value.items()}
    for key, sha256 in value.items():
        name = "name" if key == "sha256" else key.removesuffix("_sha256")
        if (key == "sha256" or key.endswith("_sha256")) and sha256 in names and isinstance(value.get(name), str):
            out[name] = names[sha256]
    return out
