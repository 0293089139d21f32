"""What a meta-SAE's latents are labelled from: its parents' latents, with their explanations.

Parents' latents are numbered through: those of the first parent from 0, those of the next one after them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.artifacts.sae import SAEFile
from saetool.core.meta import decoder_rows
from saetool.core.ngram import Entry
from saetool.core.sae import SAE
from saetool.engines import choice
from saetool.engines.choice import Tables
from saetool.engines.meta_labels import contexts
from saetool.engines.windows import Windows
from saetool.errors import ArtifactError


@dataclass(frozen=True)
class Parents:
    """The SAEs that a meta-SAE was made from, in its order."""

    files: Sequence[SAEFile]

    @property
    def first(self) -> list[int]:
        """The number of each parent's first latent; at the end, how many latents there are in all."""
        return np.cumsum([0, *(file.sae.d_sae for file in self.files)]).tolist()

    @property
    def n(self) -> int:
        return self.first[-1]

    @property
    def names(self) -> str:
        return ", ".join(file.name for file in self.files)

    def codes(self, meta: SAE) -> Float[np.ndarray, "n_parent n_meta"]:
        """The activations of ``meta`` on every latent's decoder row; none on a row of zeros."""
        z = np.zeros((self.n, meta.d_sae), dtype=np.float32)
        for first, file in zip(self.first, self.files, strict=False):
            rows = decoder_rows(file.sae)
            z[first + rows.latents.numpy()] = meta.encode(rows.rows).numpy()
        return z

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"name": file.name, "sha256": file.sha256, "first": first, "d_sae": file.sae.d_sae}
            for first, file in zip(self.first, self.files, strict=False)
        ]


@dataclass(frozen=True)
class Labels:
    """A file of explanations of one parent's latents."""

    path: Path
    header: h.Header
    records: list[dict[str, Any]]
    parent: int
    """Which of the parents it explains."""


@dataclass(frozen=True)
class Base:
    """The parents with what is known of their latents, which are numbered through."""

    parents: Parents
    tables: Tables
    strings: Mapping[int, str]
    """Of the token ids in tables."""
    members: Mapping[int, tuple[str, list[str]]]
    """Description and some contexts of each described latent."""

    def only_described(self) -> "Base":
        """With the tables of described latents alone."""
        described = np.array(sorted(self.members), dtype=np.int64)
        return dataclasses.replace(self, tables=self.tables.only(described))

    def text(self, token: int) -> str:
        return self.strings.get(token, f"#{token}")


def read(parents: Parents, files: Sequence[Labels]) -> Base:
    """Everything that ``files`` say. Raises ``ArtifactError`` for damaged records, or if none holds a table."""
    strings: dict[int, str] = {}
    tables: dict[int, tuple[Entry, ...]] = {}
    members: dict[int, tuple[str, list[str]]] = {}
    for labels in files:
        first, sae = parents.first[labels.parent], parents.files[labels.parent].sae
        strings |= {int(k): str(v) for k, v in labels.header.config.get("strings", {}).items()}
        tables |= {first + latent: table for latent, table in _tables(labels, sae.d_sae).items()}
        members |= {first + latent: said for latent, said in _members(labels).items()}
    return Base(parents, choice.token_tables(tables, parents.n, strings), strings, members)


def _tables(labels: Labels, d_sae: int) -> dict[int, tuple[Entry, ...]]:
    tables = {}
    try:
        for record in labels.records:
            if record.get("table"):
                tables[int(record["latent"])] = tuple(Entry(*entry) for entry in record["table"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{labels.path}: a record is damaged ({error})", "make the explanations again") from None
    if not tables:
        raise ArtifactError(f"{labels.path}: holds no token table", "explain the parent's latents first")
    if max(tables) >= d_sae:
        raise ArtifactError(f"{labels.path}: explains latent {max(tables)}, and the parent has {d_sae}")
    return tables


def _members(labels: Labels) -> dict[int, tuple[str, list[str]]]:
    """Descriptions of latents, with contexts where the windows are still beside the labels."""
    described = {int(r["latent"]): str(r["description"]) for r in labels.records if r.get("description")}
    found: dict[int, list[str]] = {}
    file = labels.path.with_suffix(".windows.st")
    stated = labels.header.config.get("windows_sha256")
    if str(labels.path) != "-" and file.is_file() and h.sha256_file(file) == stated:
        shown = container.read_tensors(file, h.WINDOWS)
        t = {name: tensor.numpy() for name, tensor in shown.tensors.items()}
        names = {int(k): str(v) for k, v in shown.header.config.get("strings", {}).items()}
        everything = Windows(t["tokens"], t["acts"], t["length"], t["role"], t["source"], t["document"])
        latents, first = np.unique(t["latent"], return_index=True)
        for latent, begin, end in zip(latents.tolist(), first, [*first[1:], len(t["latent"])], strict=True):
            rows = everything.pick(np.arange(len(t["latent"]))[begin:end])
            found[latent] = contexts(rows, lambda token: names.get(token, ""))
    return {latent: (text, found.get(latent, [])) for latent, text in described.items()}
