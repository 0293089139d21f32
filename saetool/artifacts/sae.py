"""One SAE in one ``.st`` file: ``W_enc``, ``b_enc``, ``W_dec``, ``b_dec`` and, where known, ``threshold``.

Where an SAE is read, a folder or file of another library will do, and an ``hf://`` address (artifacts/foreign):
``load`` is the one place that knows.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from saetool.artifacts import container, hub, writing
from saetool.artifacts import header as h
from saetool.artifacts.kinds import is_foreign
from saetool.config import ARCHITECTURES, FOREIGN_ARCHITECTURES
from saetool.core.activations import Pursuit
from saetool.core.sae import SAE, check, check_shapes
from saetool.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from saetool.artifacts.foreign import Read
    from saetool.artifacts.foreign.imported import Asked

_REQUIRED = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class SAEFile:
    """An SAE as read from a file, with what the file says about itself."""

    name: str
    """File name without folders, or ``-``."""
    sae: SAE
    header: h.Header
    sha256: str

    @property
    def d_in(self) -> int:
        return self.sae.d_in

    @property
    def inference(self) -> str:
        return self.sae.inference

    @property
    def is_meta(self) -> bool:
        """Whether it was trained on decoder rows."""
        return "decoder" in (self.header.config.get("hook"), self.header.model.get("hook_name"))

    def meta_parents(self) -> list[dict[str, str]]:
        """The inputs that say which SAEs this meta-SAE was made from. Raises ``ArtifactError`` where none do."""
        if not self.is_meta:
            raise ArtifactError(f"{self.name}: is not a meta-SAE", "one is made by: saetool meta SAE.st -o meta.st")
        found = [item for item in self.header.inputs if item["role"] == "parent"]
        if not found:
            raise ArtifactError(f"{self.name}: a meta-SAE that does not say what it was made from", "make it again")
        return found

    def as_input(self, role: str) -> h.Input:
        return h.Input(role, self.name, self.sha256, self.header.schema)


def config_of(sae: SAE) -> dict[str, object]:
    """The facts of ``sae`` that its header's config must state."""
    return {
        "arch": sae.arch,
        "k": sae.k,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "inference": sae.inference,
        "strict_threshold": True,
        "apply_b_dec_to_input": sae.subtract_b_dec,
        "decoder_norm": "unit" if _unit_rows(sae) else "free",
        "input_normalization": sae.normalization,
        **({"pursuit": dataclasses.asdict(sae.pursuit)} if sae.pursuit else {}),
    }


def _unit_rows(sae: SAE) -> bool:
    """Whether every decoder row has norm 1, within 1e-3, or is zero."""
    norms = sae.W_dec.norm(dim=1)
    return bool((((norms - 1).abs() <= 1e-3) | (norms == 0)).all())


def read_foreign(path: Path, asked: "Asked | None" = None) -> tuple["Read", h.Plan]:
    """Another library's SAE, proved, and the plan of the conversion: the header that ours will have, and its key."""
    from saetool.artifacts import foreign

    if not hub.is_address(path) and not path.exists():
        raise ArtifactError(f"{path}: no such file or folder")
    read = foreign.read(path, asked)
    options = {"format": read.format, **(asked.said() if asked else {})}
    return read, h.Plan("convert", h.SAE, options, [read.as_input()])


def converted_header(read: "Read", plan: h.Plan) -> h.Header:
    """The header of an imported SAE: its facts, where it comes from, and the proof."""
    from saetool.artifacts import foreign

    imported = read.imported
    config = {
        **config_of(imported.sae),
        **imported.config,
        "source": read.source(),
        "proof": foreign.proof_record(read.proof),
    }
    model = {
        "id": imported.model,
        "revision": None,
        "hook_name": imported.hook_name,
        "hf_hook_name": imported.hf_hook_name,
        "width": imported.sae.d_in,
    }
    return plan.header(config=config, model=model, dtype="float32")


def beside(path: Path, ending: str) -> Path:
    """A file name next to the SAE at ``path``: ``sae.st`` → ``sae-ending.st``, for an address in this folder."""
    if hub.is_address(path):
        return Path(f"{hub.parse(str(path)).path.rpartition('/')[2] or 'sae'}-{ending}.st")
    name = path.resolve().name if path.name in ("", "..") else path.name
    stem = name if path.is_dir() else Path(name).stem
    return path.with_name(f"{stem}-{ending}.st") if path.name else Path(f"{stem}-{ending}.st")


def load(path: Path, asked: "Asked | None" = None) -> SAEFile:
    """Read and check the SAE at ``path`` (``-``: standard input). Raises ``ArtifactError`` naming what is wrong.

    Another library's SAE is imported and proved (artifacts/foreign); its hash is that of the files it was read from,
    and ``asked`` is what they do not say.
    """
    if is_foreign(path):
        foreign, plan = read_foreign(path, asked)
        return SAEFile(foreign.name, foreign.imported.sae, converted_header(foreign, plan), foreign.sha256)
    where = "standard input" if str(path) == "-" else str(path)
    read = container.read_tensors(path, h.SAE, "SAEs are made by: saetool train, threshold, stitch, meta")
    header, tensors = read.header, read.tensors
    missing = [name for name in _REQUIRED if name not in tensors]
    if missing:
        raise ArtifactError(f"{where}: lacks the tensor {', '.join(missing)}", "make or copy it again")
    config = header.config
    if config.get("arch") not in (*ARCHITECTURES, *FOREIGN_ARCHITECTURES):
        raise ArtifactError(f"{where}: architecture {config.get('arch')!r} is unknown", "update saetool")
    try:
        check_shapes(tensors, where)
        sae = SAE(
            **{name: tensors[name].float() for name in _REQUIRED},
            threshold=tensors["threshold"].float() if "threshold" in tensors else None,
            arch=config["arch"],
            k=config.get("k"),
            subtract_b_dec=bool(config.get("apply_b_dec_to_input", True)),
            normalization=str(config.get("input_normalization", "none")),
            pursuit=Pursuit(**config["pursuit"]) if config.get("pursuit") else None,
        )
        check(sae, where)
    except ConfigError as error:
        raise ArtifactError(error.message, "make or copy it again") from None
    except TypeError:
        raise ArtifactError(f"{where}: its pursuit {config['pursuit']!r} is damaged", "make or copy it again") from None
    return SAEFile(path.name, sae, header, read.sha256)


def save(path: Path, sae: SAE, header: h.Header) -> str:
    """Write ``sae`` to ``path`` atomically and return the file's SHA-256."""
    return writing.write_tensors(path, tensors_of(sae), header)


def tensors_of(sae: SAE) -> dict[str, "Tensor"]:
    """The tensors of ``sae`` by name: four, and the threshold where there is one."""
    tensors = {name: getattr(sae, name) for name in _REQUIRED}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
    return tensors
