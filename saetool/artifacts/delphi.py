"""Latent activations as delphi stores them: a folder of ``{first}_{last}.safetensors``, one per range of latents.

    locations    [n, 3]   context, position, latent (counted from the file's first latent, in older files from 0)
    activations  [n]
    tokens       [contexts, length]   (the same in every file)

A single such file, with latents counted from 0, is read too. There are no documents in it: each context is its own.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saetool.artifacts import header as h
from saetool.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np

SCHEMA = "delphi/latents"
"""What inputs of this kind are called in headers."""
_RANGE = re.compile(r"(\d+)_(\d+)\.safetensors")


@dataclass(frozen=True)
class Range:
    """One file."""

    path: Path
    first: int
    last: int | None
    """None: all latents."""


@dataclass(frozen=True)
class Part:
    """What one file holds, in the order stored."""

    row: "np.ndarray"
    """Context times context length plus position."""
    latent: "np.ndarray"
    value: "np.ndarray"


@dataclass(frozen=True)
class DelphiLatents:
    """An opened folder."""

    path: Path
    ranges: tuple[Range, ...]
    tokens: "np.ndarray"
    """[contexts, length], int32."""

    def as_input(self, role: str = "acts") -> h.Input:
        """Identified by the names and hashes of its files."""
        digest = hashlib.sha256()
        for part in self.ranges:
            digest.update(f"{part.path.name} {h.sha256_file(part.path)}\n".encode())
        return h.Input(role, self.path.name, digest.hexdigest(), SCHEMA)

    def parts(self, latents: Iterable[int] | None, d_sae: int) -> Iterable[Part]:
        """The activations in the files that hold any of ``latents`` (None: all), file by file."""
        wanted = None if latents is None else set(latents)
        for part in self.ranges:
            of_part = range(part.first, d_sae if part.last is None else part.last + 1)
            if wanted is None or any(latent in of_part for latent in wanted):
                yield self._read(part, d_sae)

    def _read(self, part: Range, d_sae: int) -> Part:
        import numpy as np

        tensors = _tensors(part.path, ("locations", "activations"))
        locations, value = tensors["locations"].astype(np.int64), tensors["activations"].astype(np.float32)
        n, length = self.tokens.shape
        if locations.ndim != 2 or locations.shape[1] != 3 or len(locations) != len(value):
            raise ArtifactError(f"{part.path}: locations {list(locations.shape)} where [{len(value)}, 3] was expected")
        if not np.isfinite(value).all():
            raise ArtifactError(f"{part.path}: its activations hold NaN or infinity", "make it again")
        context, position, latent = locations.T
        if part.last is not None and latent.max(initial=0) <= part.last - part.first:
            latent = latent + part.first
        for name, column, limit in (("context", context, n), ("position", position, length), ("latent", latent, d_sae)):
            if len(column) and not 0 <= column.min() <= column.max() < limit:
                raise ArtifactError(f"{part.path}: {name} {column.max()} among {limit}", "is it of this SAE?")
        return Part(context * length + position, latent, value)


def is_delphi(path: Path) -> bool:
    """Whether ``path`` looks like delphi's: a folder with such files, or one safetensors file."""
    if path.is_dir():
        return any(_RANGE.fullmatch(p.name) for p in path.iterdir())
    return path.suffix == ".safetensors" and path.is_file()


def open_delphi(path: Path) -> DelphiLatents:
    """Open ``path`` (``is_delphi`` said yes). Raises ``ArtifactError`` naming what is wrong."""
    import numpy as np

    if path.is_dir():
        found = [(m, p) for p in path.iterdir() if (m := _RANGE.fullmatch(p.name))]
        ranges = sorted((Range(p, int(m[1]), int(m[2])) for m, p in found), key=lambda r: r.first)
    else:
        ranges = [Range(path, 0, None)]
    tokens = _tensors(ranges[0].path, ("tokens",))["tokens"]
    if tokens.ndim != 2:
        raise ArtifactError(f"{ranges[0].path}: tokens {list(tokens.shape)} where [contexts, length] was expected")
    return DelphiLatents(path, tuple(ranges), tokens.astype(np.int32))


def _tensors(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            missing = [name for name in names if name not in file.keys()]  # noqa: SIM118 (not a mapping)
            if missing:
                raise ArtifactError(
                    f"{path}: lacks the tensor {', '.join(missing)} (it has {', '.join(sorted(file.keys())[:6])})",
                    "delphi's latents were expected, stored with their tokens",
                )
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: cut off, or not a safetensors file ({error})", "make or copy it again") from None
