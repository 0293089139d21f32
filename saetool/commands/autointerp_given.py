"""Descriptions that are given, to be scored: ours, Neuronpedia's, another tool's, or written by hand."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.commands.autointerp_job import Job
from saetool.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from saetool.engines.autointerp import Explained
    from saetool.engines.judges import Explanation
    from saetool.engines.strings import Strings

HINT = 'one JSON object a line: {"latent": 3, "description": "…"}'


def read(path: Path, d_sae: int) -> dict[int, dict[str, Any]]:
    """The records of JSONL by latent: ``latent`` (or ``index``), ``description`` (or ``explanation``), ``table``."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not text'})") from None
    out: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            raise ArtifactError(f"{path}: line {number} is not JSON", HINT) from None
        if not isinstance(record, dict):
            raise ArtifactError(f"{path}: line {number} is no JSON object", HINT)
        if number == 1 and container.METADATA_KEY in record:
            h.expect(h.parse(record[container.METADATA_KEY], str(path)), h.EXPLANATIONS, str(path))
            continue
        latent = record.get("latent", record.get("index"))
        if isinstance(latent, str) and latent.isdecimal():
            latent = int(latent)
        if isinstance(latent, bool) or not isinstance(latent, int) or not 0 <= latent < d_sae:
            raise ArtifactError(f"{path}: line {number}: latent {latent!r} is none of 0 … {d_sae - 1}", HINT)
        description = record.get("description", record.get("explanation"))
        if description is None and record.get("status") in ("skipped", "failed"):
            continue
        if not isinstance(description, str) or not description.strip():
            raise ArtifactError(f"{path}: line {number}: latent {latent} has no description", HINT)
        if latent in out:
            raise ConfigError(f"{path}: describes latent {latent} twice")
        out[latent] = {"description": description, "table": record.get("table"), "explainer": record.get("explainer")}
    if not out:
        raise ArtifactError(f"{path}: holds no description", HINT)
    return out


def explanation(latent: int, record: dict[str, Any], strings: "Strings", path: Path, offline: bool) -> "Explanation":
    """A record as an explanation; without a language model its description must be a table, as ours are."""
    from saetool.core import ngram
    from saetool.engines.judges import Explanation

    if not offline:
        return Explanation(record["description"])
    table = ngram.parse(record["description"], strings.ids, strings.word)
    if record["explainer"] == "ngram" and isinstance(record["table"], list):
        try:
            table = tuple(ngram.Entry(*entry) for entry in record["table"])
        except TypeError:
            raise ArtifactError(f"{path}: latent {latent}: its table is damaged", "make it again") from None
    if table is None:
        raise ConfigError(
            f"{path}: latent {latent}: without a language model only tables of tokens can be scored",
            'pass a --backend, or write: Einstein 10; after "Al": "bert" 4',
        )
    return Explanation(record["description"], table)


def attach(
    job: Job, found: "list[Explained]", given: dict[int, dict[str, Any]], strings: "Strings"
) -> "list[Explained]":
    """The latents ``found`` with the descriptions that are ``given``."""
    assert job.explanations is not None
    missing = [e.latent for e in found if e.reason is None and e.latent not in given]
    if missing:
        raise ConfigError(
            f"{job.explanations}: has no description of latent {missing[0]} ({len(missing)} missing)",
            "leave --latents out: the latents described are scored",
        )
    path, offline = job.explanations, job.backend.offline
    return [
        e
        if e.reason
        else dataclasses.replace(e, explanation=explanation(e.latent, given[e.latent], strings, path, offline))
        for e in found
    ]
