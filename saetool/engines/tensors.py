"""Matrices of activations from anywhere (vision, proteins, another framework) → a cache.

    .npy                        one matrix [rows, d]
    .safetensors, .st           the one matrix in it, or the tensor that is named

Rows with the same id (an image's patches, a protein's residues) are one document, and so on one side of the split;
without ids each row is its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saetool.artifacts import header as h
from saetool.artifacts.cache import HELDOUT, STORAGE, TRAIN
from saetool.artifacts.cache_writer import CacheWriter, as_stored
from saetool.engines.packing import is_heldout
from saetool.errors import ArtifactError, ConfigError

SCHEMA = "tensors"
MEDIAN_SAMPLE = 65_536
"""Rows, from the start, whose median norm ``max_norm`` is a multiple of."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options that change the result, with their effective values."""

    heldout: float
    storage: str | None
    """One of ``STORAGE``; None: the type of the first matrix (float64 becomes float32)."""
    tensor: str | None
    ids: str | None
    limit: int | None
    """Rows used, from the start; None: all."""
    max_norm: float | None = None
    center: bool = False


@dataclass(frozen=True)
class Matrix:
    """One file's matrix; rows are read as they are wanted."""

    path: Path
    name: str
    shape: tuple[int, int]
    dtype: torch.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` … ``stop`` − 1, [n, d]."""
        if self.path.suffix == ".npy":
            return torch.from_numpy(np.array(_load_npy(self.path)[start:stop]))
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            return file.get_slice(self.name)[start:stop]


@dataclass(frozen=True)
class Source:
    """All matrices, one below the other."""

    request: Request
    matrices: tuple[Matrix, ...]
    ids: Tensor | None
    """int64 [rows]: the input's own ids."""
    documents: Tensor
    """int32 [rows]: number of each row's document, in the order of first appearance."""
    inputs: tuple[h.Input, ...]

    @property
    def n_rows(self) -> int:
        return len(self.documents)

    @property
    def d_in(self) -> int:
        return self.matrices[0].shape[1]

    @property
    def storage(self) -> str:
        own = str(self.matrices[0].dtype).removeprefix("torch.")
        return self.request.storage or (own if own in STORAGE and own != "int8" else "float32")

    @property
    def name(self) -> str:
        """Of the first file and tensor, for people."""
        return self.matrices[0].name

    @property
    def row_bytes(self) -> int:
        """Bytes a row takes on disk."""
        scale = 4 if self.storage == "int8" else 0
        return self.d_in * STORAGE[self.storage] + scale + 8 + 8 * (self.ids is not None)

    def plan(self) -> h.Plan:
        request = self.request
        options: dict[str, Any] = {
            "source": SCHEMA,
            "heldout": request.heldout,
            "storage": self.storage,
            "tensor": request.tensor,
            "ids": None if request.ids is None else Path(request.ids).name,
            "tokens": request.limit,
            "max_norm": request.max_norm,
            "center": request.center,
        }
        return h.Plan("cache", h.CACHE, {k: v for k, v in options.items() if v is not None}, self.inputs)

    def chunks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """Number of the first row, and rows, about ``size`` at a time."""
        first = 0
        for matrix in self.matrices:
            n = min(matrix.shape[0], self.n_rows - first)
            for start in range(0, n, size):
                yield first + start, matrix.rows(start, min(start + size, n))
            first += n


def open_source(paths: Sequence[str], request: Request) -> Source:
    """Look at the files; no row is read. Raises ``ArtifactError`` or ``ConfigError`` for what cannot be used."""
    files = [Path(path) for path in paths]
    for file in files:
        if not file.is_file():
            raise ArtifactError(f"{file}: no such file", "--from-tensors takes .npy and .safetensors files")
    matrices = tuple(_matrix(file, request.tensor) for file in files)
    for matrix in matrices:
        if matrix.shape[1] != matrices[0].shape[1]:
            raise ArtifactError(
                f"{matrix.path}: width {matrix.shape[1]}, and {matrices[0].path} has {matrices[0].shape[1]}",
                "all matrices go into one cache: cache them apart",
            )
    n = sum(matrix.shape[0] for matrix in matrices)
    n = n if request.limit is None else min(n, request.limit)
    if not n:
        raise ArtifactError(f"{files[0]}: has no rows")
    ids, extra = (None, []) if request.ids is None else _ids(files, request.ids)
    if ids is not None and len(ids) < n:
        raise ArtifactError(f"--ids {request.ids}: {len(ids)} ids for {n} rows", "one id a row is needed")
    ids = None if ids is None else ids[:n]
    inputs = tuple(h.Input("acts", file.name, h.sha256_file(file), SCHEMA) for file in (*files, *extra))
    return Source(request, matrices, ids, _documents(ids, n), inputs)


def _load_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ArtifactError(f"{path}: not a readable .npy file ({str(error).splitlines()[0]})") from None


def _matrix(path: Path, wanted: str | None) -> Matrix:
    if path.suffix == ".npy":
        array = _load_npy(path)
        if array.ndim != 2 or array.dtype.kind != "f":
            raise ArtifactError(f"{path}: {array.dtype} {list(array.shape)}, where a matrix of floats was expected")
        return Matrix(path, path.stem, (array.shape[0], array.shape[1]), torch.from_numpy(np.array(array[:0])).dtype)
    if path.suffix not in (".safetensors", ".st"):
        raise ArtifactError(f"{path}: neither .npy nor .safetensors", "save the matrix as one of them")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_slice(name)[:0] for name in file.keys() if len(file.get_slice(name).get_shape())}  # noqa: SIM118
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in found}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: not a readable safetensors file ({error})") from None
    matrices = [name for name, t in found.items() if len(shapes[name]) == 2 and t.is_floating_point()]
    has = f"has {', '.join(f'{name} {list(shape)}' for name, shape in sorted(shapes.items())[:6]) or 'no tensors'}"
    if wanted is None and len(matrices) != 1:
        raise ArtifactError(f"{path}: which matrix? It {has}", "name it with --tensor")
    name = wanted or matrices[0]
    if name not in matrices:
        raise ArtifactError(f'{path}: no matrix of floats "{name}" ({has})', "name one with --tensor")
    return Matrix(path, name, (shapes[name][0], shapes[name][1]), found[name].dtype)


def _ids(files: Sequence[Path], wanted: str) -> tuple[Tensor, list[Path]]:
    """int64 [rows], and the file they are in where it is a file of its own."""
    if wanted.endswith(".npy"):
        file = Path(wanted)
        if not file.is_file():
            raise ArtifactError(f"--ids {wanted}: no such file")
        parts, extra = [torch.from_numpy(np.array(_load_npy(file)))], [file]
    else:
        from safetensors import safe_open

        parts, extra = [], []
        for file in files:
            if file.suffix == ".npy":
                raise ConfigError(f"--ids {wanted}: {file} holds one matrix and no names", "give --ids FILE.npy")
            with safe_open(file, "pt") as opened:
                if wanted not in opened.keys():  # noqa: SIM118
                    raise ArtifactError(f'{file}: no tensor "{wanted}" for --ids')
                parts.append(opened.get_tensor(wanted))
    ids = torch.cat(parts)
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ArtifactError(
            f"--ids {wanted}: {ids.dtype} {list(ids.shape)}, where a list of whole numbers was expected"
        )
    return ids.long(), extra


def _documents(ids: Tensor | None, n: int) -> Tensor:
    """int32 [n]: documents numbered in the order in which they first appear."""
    if ids is None:
        return torch.arange(n, dtype=torch.int32)
    _, first, inverse = np.unique(ids.numpy(), return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int32)
    rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    return torch.from_numpy(rank[inverse])


@dataclass(frozen=True)
class Split:
    """Which rows each split has, before any is dropped by its norm."""

    heldout: Tensor
    """bool [rows]."""

    @staticmethod
    def of(source: Source) -> "Split":
        n_documents = int(source.documents.max()) + 1
        held = np.array([is_heldout(i, source.request.heldout) for i in range(n_documents)])
        if source.request.heldout > 0 and not held.any() and n_documents > 1:
            held[-1] = True
        return Split(torch.from_numpy(held)[source.documents.long()])

    def rows(self, name: str) -> Tensor:
        return self.heldout if name == HELDOUT else ~self.heldout

    def counts(self, source: Source) -> dict[str, dict[str, int]]:
        return {
            name: {
                "rows": int(self.rows(name).sum()),
                "contexts": 0,
                "documents": len(source.documents[self.rows(name)].unique()),
                "tokens": int(self.rows(name).sum()),
            }
            for name in (TRAIN, HELDOUT)
        }


def norm_limit(source: Source) -> float | None:
    """``max_norm`` times the median norm of the first rows."""
    if source.request.max_norm is None:
        return None
    norms, n = [], 0
    for _, rows in source.chunks(8192):
        norms.append(_changed(source, rows).float().norm(dim=1))
        n += len(rows)
        if n >= MEDIAN_SAMPLE:
            break
    return source.request.max_norm * float(torch.cat(norms).median())


def write(source: Source, split: Split, writer: CacheWriter, per_shard: int, limit: float | None) -> Iterator[int]:
    """Write the shards that are missing; yields the rows read, one split after the other."""
    index = 0
    for name in (TRAIN, HELDOUT):
        mine = split.rows(name)
        for start, rows in source.chunks(per_shard):
            stop = start + len(rows)
            kept = mine[start:stop].nonzero().squeeze(1)
            if len(kept):
                if not writer.has(index):
                    tensors = _shard(source, rows, kept, start, limit)
                    stored, sums = as_stored(tensors["acts"], source.storage)
                    writer.write(index, name, {**tensors, **stored}, sums)
                index += 1
            yield len(kept)


def _shard(source: Source, rows: Tensor, kept: Tensor, start: int, limit: float | None) -> dict[str, Tensor]:
    acts = _changed(source, rows[kept])
    if limit is not None:
        inside = ~(acts.float().norm(dim=1) > limit)
        acts, kept = acts[inside], kept[inside]
    numbers = kept + start
    tensors = {"acts": acts, "documents": source.documents[numbers], "positions": numbers.int()}
    return tensors if source.ids is None else {**tensors, "ids": source.ids[numbers]}


def _changed(source: Source, rows: Tensor) -> Tensor:
    """Rows as they are stored (int8 ones before that)."""
    exact = rows.float()
    if source.request.center:
        exact = exact - exact.mean(dim=1, keepdim=True)
    return exact if source.storage == "int8" else exact.to(getattr(torch, source.storage))
