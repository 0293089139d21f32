"""SAEs of other libraries: one small module for each, read as SAE files of ours and, where they can be, written.

    path or hf:// address → find (which library?) → read (tensors, their formula) → proved → an SAE with a header

Every import is proved before it is used: on a fixed probe, the source library's own formula (core/peers.py) and our
SAE must give the same activations and reconstructions (core/proof.py). The differences go into the header.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saetool.artifacts import header as h
from saetool.artifacts import hub
from saetool.artifacts.foreign import (
    batchtopk,
    dictionary_learning,
    gemma_scope,
    llamascopium,
    openai,
    saelens,
    single,
    sparsify,
)
from saetool.artifacts.foreign.find import find
from saetool.artifacts.foreign.imported import Asked, Found, Imported, with_asked
from saetool.config import SAE_FORMATS, SAE_TARGETS
from saetool.core.proof import TOLERANCE, Proof
from saetool.core.sae import SAE, check
from saetool.errors import ArtifactError, ConfigError

READERS: dict[str, Callable[[Found, Asked], Imported]] = {
    "saelens": saelens.read,
    "sparsify": sparsify.read,
    "dictionary_learning": dictionary_learning.read,
    "batchtopk": batchtopk.read,
    "openai": openai.read,
    "llamascopium": llamascopium.read,
    "llama_scope": llamascopium.read_scope,
    "gemma_scope": gemma_scope.read,
    "gemma_scope_2": gemma_scope.read_2,
    "qwen_scope": single.read_qwen,
    "goodfire": single.read_goodfire,
}
WRITERS: dict[str, Callable[[SAE, h.Header, Path], None]] = {
    "saelens": saelens.write,
    "sparsify": sparsify.write,
    "dictionary_learning": dictionary_learning.write,
    "batchtopk": batchtopk.write,
    "gemma_scope": gemma_scope.write,
}


assert (tuple(READERS), tuple(WRITERS)) == (SAE_FORMATS, SAE_TARGETS)


@dataclasses.dataclass(frozen=True)
class Read:
    """An imported SAE, proved."""

    name: str
    format: str
    imported: Imported
    proof: Proof
    sha256: str
    """Of the names and hashes of all files that were read."""
    address: dict[str, str] | None = None
    """The hub's repository, commit and path, for an hf:// address."""

    def source(self) -> dict[str, Any]:
        """What our header says of where it comes from."""
        settings = h.finite(self.imported.settings)
        source = {"format": self.format, "formula": self.imported.formula, "settings": settings}
        return source | ({"hub": self.address} if self.address else {})

    def as_input(self) -> h.Input:
        return h.Input("source", self.name, self.sha256, self.format)


def read(path: Path, asked: Asked | None = None) -> Read:
    """Read and prove the SAE at ``path`` (a folder, a file, an hf:// address).

    Raises ``ArtifactError`` if it cannot be read or the proof fails, ``ConfigError`` for what must be asked.
    """
    asked = asked or Asked()
    where = str(path) if not hub.is_address(path) else str(path).replace("hf:/", "hf://", 1).replace(":///", "://")
    local = hub.fetch(where) if hub.is_address(path) else path
    found = find(local, where, asked)
    imported = with_asked(READERS[found.format](found, asked), asked)
    try:
        check(imported.sae, where)
    except ConfigError as error:
        raise ArtifactError(error.message, "the source's own weights are unusable") from None
    proof = imported.proved()
    if not proof.holds:
        raise ArtifactError(refusal(where, imported.formula, proof), "it was not imported; please report this file")
    address = hub.described(where, local) if hub.is_address(path) else None
    return Read(found.name, found.format, imported, proof, fingerprint(found), address)


def refusal(where: str, formula: str, proof: Proof) -> str:
    """Why a proof does not hold, in one line."""
    if not proof.active:
        return f"{where}: no latent fires on the probe at any scale, so nothing can be proved"
    if proof.rows_at_threshold > proof.rows // 7:
        return f"{where}: {proof.rows_at_threshold} rows of the probe lie at a threshold, too many to prove anything"
    return (
        f"{where}: our reading and {formula} differ on the probe, by {proof.max_difference_z:.2g} in activations up to "
        f"{proof.largest_z:.2g} and {proof.max_difference_x_hat:.2g} in reconstructions up to "
        f"{proof.largest_x_hat:.2g} (tolerance {TOLERANCE:g} of the largest)"
    )


def fingerprint(found: Found) -> str:
    """One SHA-256 over the names and hashes of the files that were read."""
    from saetool.artifacts.foreign.files import regular

    listed = []
    for file in found.files:
        if file.exists():
            inside = file.is_relative_to(found.folder)
            name = file.relative_to(found.folder).as_posix() if inside else file.name
            listed.append([name, h.sha256_file(regular(file))])
    return h.sha256_bytes(h.canonical(sorted(listed)).encode())


def proof_record(proof: Proof) -> dict[str, Any]:
    """The proof as headers keep it."""
    return {**dataclasses.asdict(proof), "tolerance": TOLERANCE}
