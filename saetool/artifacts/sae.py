"""One SAE in one ``.st`` file: ``W_enc``, ``b_enc``, ``W_dec``, ``b_dec`` and, where known, ``threshold``."""

from dataclasses import dataclass
from pathlib import Path

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.config import ARCHITECTURES
from saetool.core.sae import SAE, check, check_shapes
from saetool.errors import ArtifactError, ConfigError

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
        "decoder_norm": "unit",
    }


def load(path: Path) -> SAEFile:
    """Read and check the SAE at ``path`` (``-``: standard input). Raises ``ArtifactError`` naming what is wrong."""
    where = "standard input" if str(path) == "-" else str(path)
    if path.is_dir():
        raise ArtifactError(f"{path}: is a folder where an SAE file (.st) was expected")
    read = container.read_tensors(path, h.SAE, "SAEs are made by: saetool train, threshold, stitch, meta")
    header, tensors = read.header, read.tensors
    missing = [name for name in _REQUIRED if name not in tensors]
    if missing:
        raise ArtifactError(f"{where}: lacks the tensor {', '.join(missing)}", "make or copy it again")
    config = header.config
    if config.get("arch") not in ARCHITECTURES:
        raise ArtifactError(f"{where}: architecture {config.get('arch')!r} is unknown", "update saetool")
    try:
        check_shapes(tensors, where)
        sae = SAE(
            **{name: tensors[name].float() for name in _REQUIRED},
            threshold=tensors["threshold"].float() if "threshold" in tensors else None,
            arch=config["arch"],
            k=config.get("k"),
            subtract_b_dec=bool(config.get("apply_b_dec_to_input", True)),
        )
        check(sae, where)
    except ConfigError as error:
        raise ArtifactError(error.message, "make or copy it again") from None
    return SAEFile(path.name, sae, header, read.sha256)


def save(path: Path, sae: SAE, header: h.Header) -> str:
    """Write ``sae`` to ``path`` atomically and return the file's SHA-256."""
    tensors = {name: getattr(sae, name) for name in _REQUIRED}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
    return container.write_tensors(path, tensors, header)
