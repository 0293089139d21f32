"""The header that every artifact carries: what it is, what made it, and from what.

A safetensors file carries it as canonical JSON in **one** metadata key, ``saetool`` (with several keys the
file's bytes would depend on a hash seed); a JSON file carries the same object under ``"saetool"``. It holds no
time, host, user, absolute path, device or duration: equal inputs give equal bytes.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saetool import __version__
from saetool.errors import ArtifactError

SAE = "saetool/sae@1"
CACHE = "saetool/cache@2"
SHARD = "saetool/shard@1"
STATISTICS = "saetool/statistics@1"
CHECKPOINT = "saetool/checkpoint@1"
EVAL = "saetool/eval@1"
STITCH = "saetool/stitch@1"
META = "saetool/meta@1"
EXPLANATIONS = "saetool/explanations@1"
WINDOWS = "saetool/windows@1"
TRAIN_LOG = "saetool/trainlog@2"
RUN_LOG = "saetool/runlog@1"
REPORT = "saetool/report@1"
EXPORT = "saetool/export@1"
ARRAYS = "saetool/arrays@1"

KINDS = {
    SAE: "an SAE",
    CACHE: "an activation cache",
    SHARD: "one shard of an activation cache",
    STATISTICS: "the statistics of an activation cache",
    CHECKPOINT: "a training checkpoint",
    EVAL: "an evaluation record",
    STITCH: "a stitching record",
    META: "a meta-SAE record",
    EXPLANATIONS: "explanations",
    WINDOWS: "explanation windows",
    TRAIN_LOG: "a training log",
    RUN_LOG: "a log of calls",
    REPORT: "a report",
    EXPORT: "an SAE exported for another library",
    ARRAYS: "the long lists of a record",
}


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, UTF-8, NaN and infinity refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Input:
    """One file that an artifact was made from: its role, file name (no folder), hash and schema."""

    role: str
    name: str
    sha256: str
    schema: str

    def to_json(self) -> dict[str, str]:
        return {"role": self.role, "name": self.name, "sha256": self.sha256, "schema": self.schema}


@dataclass(frozen=True)
class Header:
    """What an artifact says about itself (see the module's docstring)."""

    schema: str
    config: dict[str, Any]
    """Kind-specific and complete: whatever is needed to use the artifact."""
    key: str
    """SHA-256 over the verb, the options that change the result, the inputs' hashes and the schema."""
    model: dict[str, Any] = field(default_factory=dict)
    """Language model id, revision, hook and width."""
    inputs: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry per verb run on the way here, oldest first: verb, options, version, inputs' hashes."""
    seed: int | None = None
    dtype: str | None = None
    version: str = __version__
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields of a newer writer that this version does not know; kept, never dropped."""

    def to_json(self) -> dict[str, Any]:
        return {
            **self.extra,
            "schema": self.schema,
            "version": self.version,
            "config": self.config,
            "model": self.model,
            "inputs": self.inputs,
            "history": self.history,
            "seed": self.seed,
            "dtype": self.dtype,
            "key": self.key,
        }


def _cache_2(data: dict[str, Any]) -> dict[str, Any]:
    """cache@1 → cache@2: activations were stored in the model's type, and no text was split by near-duplicates."""
    return {**data, "schema": CACHE, "config": {"storage": data.get("dtype"), **data.get("config", {})}}


def _train_log_2(data: dict[str, Any]) -> dict[str, Any]:
    """trainlog@1 had this program's metric names, which ``train_log.ours`` takes beside SAELens'."""
    return {**data, "schema": TRAIN_LOG}


_MIGRATIONS = {"saetool/cache@1": _cache_2, "saetool/trainlog@1": _train_log_2}
"""Old schema → the header of the next one; what else changed is read where it is read."""

_FIELDS = ("schema", "version", "config", "model", "inputs", "history", "seed", "dtype", "key")


def parse(data: Any, where: str) -> Header:
    """The header in ``data`` (parsed JSON). Raises ``ArtifactError`` naming ``where`` if it is none we can read."""
    if not isinstance(data, dict) or not isinstance(data.get("schema"), str):
        raise ArtifactError(f"{where}: its saetool header is damaged (no schema)", "make the file again")
    while data["schema"] in _MIGRATIONS:
        data = _MIGRATIONS[data["schema"]](data)
    schema = data["schema"]
    if schema not in KINDS:
        known = {s.partition("@")[0]: s for s in KINDS}
        name = schema.partition("@")[0]
        if name in known:
            raise ArtifactError(
                f"{where}: schema {schema}, and this saetool ({__version__}) reads {known[name]}",
                "update saetool",
            )
        raise ArtifactError(f"{where}: unknown schema {schema}", "update saetool, or check the file")
    missing = [name for name in _FIELDS if name not in data]
    if missing:
        raise ArtifactError(f"{where}: its saetool header lacks {', '.join(missing)}", "make the file again")
    return Header(
        **{name: data[name] for name in _FIELDS},
        extra={name: value for name, value in data.items() if name not in _FIELDS},
    )


def expect(header: Header, schema: str, where: str, hint: str | None = None) -> Header:
    """``header`` if it is of kind ``schema``, else an error that says what was found and what was wanted."""
    if header.schema != schema:
        raise ArtifactError(
            f"{where}: is {KINDS[header.schema]} (schema {header.schema}) where {KINDS[schema]} was expected",
            hint,
        )
    return header


@dataclass(frozen=True)
class Plan:
    """What a command is about to make: enough for the key, before any work, and for the header, after it."""

    verb: str
    schema: str
    options: Mapping[str, Any]
    """The options that change the result, all of them, with their effective values."""
    inputs: Sequence[Input] = ()
    parents: Sequence[Header] = ()
    """Headers of the inputs; their histories come first in the product's."""

    @property
    def key(self) -> str:
        """Equal key ⇔ the same result is wanted: verb, options, inputs' hashes, schema."""
        wanted = {
            "verb": self.verb,
            "schema": self.schema,
            "options": finite(dict(self.options)),
            "inputs": [[i.role, i.sha256] for i in self.inputs],
        }
        return sha256_bytes(canonical(wanted).encode())

    def header(
        self,
        *,
        config: Mapping[str, Any] | None = None,
        model: Mapping[str, Any] | None = None,
        seed: int | None = None,
        dtype: str | None = None,
    ) -> Header:
        """The product's header; ``config`` defaults to the options. The parents' history entries come once each."""
        history: list[dict[str, Any]] = []
        for parent in self.parents:
            history.extend(entry for entry in parent.history if entry not in history)
        entry = {
            "verb": self.verb,
            "options": finite(dict(self.options)),
            "version": __version__,
            "inputs": [i.sha256 for i in self.inputs],
        }
        return Header(
            schema=self.schema,
            config=finite(dict(self.options if config is None else config)),
            key=self.key,
            model=dict(model or {}),
            inputs=[i.to_json() for i in self.inputs],
            history=[*history, entry],
            seed=seed,
            dtype=dtype,
        )

    def difference(self, found: Header) -> str:
        """In a few words, what was asked for differently when ``found`` was made."""
        if not found.history or found.history[-1]["verb"] != self.verb or found.schema != self.schema:
            made = found.history[-1]["verb"] if found.history else "?"
            return f"made by {made}: {KINDS[found.schema]}"
        before, now = found.history[-1]["options"], finite(dict(self.options))
        changed = [
            f"{name} {before.get(name)} there, {now.get(name)} here"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
        theirs = {(i["role"], i["sha256"]) for i in found.inputs}
        changed += [f"{i.role} input changed" for i in self.inputs if (i.role, i.sha256) not in theirs]
        return "; ".join(changed)[:300] or "inputs changed"


def finite(value: Any) -> Any:
    """``value`` with NaN and infinities as null: JSON has no other way to write an undefined number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
