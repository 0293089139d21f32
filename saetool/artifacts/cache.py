"""An activation cache: a folder of safetensors shards and a ``manifest.json``, written last.

    manifest.json      header, shards with their hashes, splits, scalar statistics
    shard-00000.st     acts [rows, d], and per row: tokens, positions, contexts, documents (int32);
                       input_ids [contexts, ctx_len]: what the model read, -1 after the end of a shorter context
    statistics.st      mean [d] and variance [d] of the train split (float64)
    vocabulary.json    the tokenizer's string of each token id, so that no tokenizer is needed later

Rows of one context (a packed run of ``ctx_len`` tokens) are consecutive and in order; contexts are numbered from 0
within the cache, and every shard belongs to one split, ``train`` or ``heldout``: the split is by document.
A cache is identified by the SHA-256 of its manifest, which holds the SHA-256 of every shard.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

TRAIN, HELDOUT = "train", "heldout"
ROW_TENSORS = ("tokens", "positions", "contexts", "documents")
HINT = "caches are made by: saetool cache -o acts"


@dataclass(frozen=True)
class Shard:
    """One shard as the manifest lists it."""

    name: str
    split: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Cache:
    """An opened cache. Opening reads the manifest and checks the shards' sizes; tensors are memory-mapped on use."""

    path: Path
    header: h.Header
    shards: tuple[Shard, ...]
    splits: dict[str, dict[str, int]]
    """Per split: rows, contexts, documents, tokens (tokens before rows were dropped)."""
    statistics: dict[str, float]
    """Of the train split: mean_sq_norm (E‖x‖²), mean_norm, total_variance, … (names say what they are)."""
    sha256: str

    @property
    def d_in(self) -> int:
        return int(self.header.config["d_in"])

    def rows(self, split: str) -> int:
        return sum(s.rows for s in self.shards if s.split == split)

    def as_input(self, role: str = "acts") -> h.Input:
        return h.Input(role, self.path.name, self.sha256, h.CACHE)

    def shard_tensors(self, shard: Shard) -> dict[str, "Tensor"]:
        """The shard's tensors, memory-mapped."""
        return container.open_tensors(self.path / shard.name, ["acts", *ROW_TENSORS])

    def iter_split(self, split: str) -> Iterator[dict[str, "Tensor"]]:
        """The tensors of each shard of ``split``, in stored order."""
        for shard in self.shards:
            if shard.split == split:
                yield self.shard_tensors(shard)

    def row_tensor(self, split: str, name: str) -> "Tensor":
        """One of ``ROW_TENSORS`` over the whole split, int32 [rows]."""
        import torch

        parts = [tensors[name] for tensors in self.iter_split(split)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)

    def first_context(self, split: str) -> int:
        """The number of the split's first context: they are numbered through the cache, one split after the other."""
        order = list(dict.fromkeys(s.split for s in self.shards))
        return sum(self.splits[earlier]["contexts"] for earlier in order[: order.index(split)])

    def input_ids(self, split: str) -> "Tensor":
        """The token ids the model read, int32 [contexts, ctx_len] over the whole split, in order.

        BOS and special tokens, whose rows may have been dropped, are in it; -1 follows the end of a shorter context.
        """
        import torch

        parts = [
            container.open_tensors(self.path / s.name, ["input_ids"])["input_ids"]
            for s in self.shards
            if s.split == split
        ]
        return torch.cat(parts) if parts else torch.empty(0, self.header.config["ctx_len"], dtype=torch.int32)

    @cached_property
    def vocabulary(self) -> list[str]:
        """The string of each token id."""
        return container.read_json(self.path / "vocabulary.json")[1]["strings"]

    def moments(self) -> dict[str, "Tensor"]:
        """``mean`` and ``variance`` [d] of the train split, float64."""
        return container.read_tensors(self.path / "statistics.st", h.STATISTICS).tensors


def open_cache(path: Path) -> Cache:
    """Open the cache in folder ``path``. Raises ``ArtifactError`` if it is none, unfinished or damaged."""
    manifest = path / "manifest.json"
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        raise ArtifactError(
            f"{path}: no such cache" + (f" (unfinished: {partial.name}/)" if partial.exists() else ""),
            "run the same saetool cache command again to finish it" if partial.exists() else HINT,
        )
    if not path.is_dir() or not manifest.exists():
        found = f"schema {container.read_header(path).schema}" if path.is_file() else "no manifest.json in it"
        raise ArtifactError(f"{path}: is not an activation cache ({found})", HINT)
    header, payload = container.read_json(manifest)
    h.expect(header, h.CACHE, str(manifest), HINT)
    try:
        shards = tuple(Shard(**s) for s in payload["shards"])
        splits, statistics = payload["splits"], payload["statistics"]
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{manifest}: damaged ({error})", "make the cache again") from None
    for shard in shards:
        file = path / shard.name
        size = file.stat().st_size if file.is_file() else None
        if Path(shard.name).name != shard.name or size is None:
            raise ArtifactError(f"{file}: missing from the cache", "make the cache again with --overwrite")
        if size != shard.bytes:
            raise ArtifactError(
                f"{file}: has {size} bytes where the manifest says {shard.bytes}",
                "make the cache again with --overwrite",
            )
    return Cache(path, header, shards, splits, statistics, h.sha256_file(manifest))


def check_output(path: Path) -> None:
    """Raise ``ArtifactError`` unless a cache can be written to the folder ``path``."""
    real = Path(os.path.realpath(path))
    if str(path) == "-":
        raise ArtifactError("-o -: a cache is a folder, it cannot go to standard output", "give -o FOLDER")
    if real.exists() and not real.is_dir():
        raise ArtifactError(f"{path}: is a file, and a cache is a folder", "choose another output with -o")
    if not real.parent.is_dir():
        raise ArtifactError(f"{path}: its folder {real.parent.name}/ does not exist", "make the folder first")
    if not os.access(real.parent, os.W_OK):
        raise ArtifactError(f"{path}: its folder is not writable", "choose another output with -o")


class CacheWriter:
    """Writes a cache shard by shard into ``NAME.partial/`` and renames it when the manifest is in.

    Shards are the resume points: one that is there is whole (each is written atomically) and, if its key is the
    wanted one, kept. Statistics are summed per shard in float64 and combined in shard order, so that an
    interrupted and resumed run gives the same bytes as an undisturbed one.
    """

    def __init__(self, path: Path, plan: h.Plan, *, resume: bool = True) -> None:
        check_output(path)
        self.path = Path(os.path.realpath(path))  # a link to a folder stays a link
        self.plan = plan
        self.partial = self.path.with_name(self.path.name + ".partial")
        if self.partial.exists() and not (resume and self._resumable()):
            shutil.rmtree(self.partial)
        self.partial.mkdir(exist_ok=True)
        for torn in self.partial.glob(".*.tmp"):  # what a killed run was writing
            torn.unlink()
        if not (self.partial / "key").exists():
            container.write_bytes(self.partial / "key", plan.key.encode())
        self._shards: list[Shard] = []
        self._sums: list[dict[str, Tensor]] = []

    def _resumable(self) -> bool:
        key, manifest = self.partial / "key", self.partial / "manifest.json"
        if key.is_file():
            return key.read_text() == self.plan.key
        # Killed between the last write and the rename.
        return manifest.is_file() and container.read_json(manifest)[0].key == self.plan.key

    def has(self, index: int) -> bool:
        """Whether shard ``index`` was finished by an earlier run."""
        return (self.partial / f"shard-{index:05d}.st").is_file()

    def rows(self, split: str) -> int:
        """Rows of ``split`` written so far."""
        return sum(shard.rows for shard in self._shards if shard.split == split)

    def add(self, split: str, tensors: dict[str, "Tensor"] | None) -> None:
        """Write the next shard: ``acts`` [rows, d], ``ROW_TENSORS`` and ``input_ids``; ``None`` keeps the one there.

        Raises ``ArtifactError`` if an activation is NaN or infinite.
        """
        import torch

        name = f"shard-{len(self._shards):05d}.st"
        file = self.partial / name
        if tensors is not None:
            sums = _sums(tensors["acts"])
            if not all(torch.isfinite(value).all() for value in sums.values()):
                bad = ~torch.isfinite(tensors["acts"]).all(dim=1)
                raise ArtifactError(
                    f"{self.path}: the activations hold NaN or infinity (row {int(bad.int().argmax())} of {name})",
                    "try --dtype float32; a model that overflows in bfloat16 shows this",
                )
            config = {"split": split, "index": len(self._shards)}
            container.write_tensors(file, {**tensors, **sums}, self.plan.header(config=config))
        contents = container.read_contents(file)
        loaded = container.open_tensors(file, ["sum", "sum_of_squares", "sum_of_norms"])
        self._sums.append({k: v.clone() for k, v in loaded.items()})
        rows = contents.tensors["acts"].shape[0]
        self._shards.append(Shard(name, split, rows, file.stat().st_size, h.sha256_file(file)))

    def finish(
        self,
        header: h.Header,
        splits: dict[str, dict[str, int]],
        vocabulary: list[str],
    ) -> str:
        """Write statistics, vocabulary and manifest, and move the folder to its name. Returns the manifest's hash."""
        import torch

        train = [s for s, shard in zip(self._sums, self._shards, strict=True) if shard.split == TRAIN]
        rows = sum(shard.rows for shard in self._shards if shard.split == TRAIN)
        if not rows:
            raise ArtifactError(f"{self.path}: no activations to write", "give more text")
        total = {name: sum((s[name] for s in train), torch.zeros(())) for name in train[0]}
        mean = total["sum"] / rows
        variance = (total["sum_of_squares"] / rows - mean.square()).clamp_min(0)
        mean_sq_norm = float(total["sum_of_squares"].sum() / rows)
        total_variance = float(variance.sum())
        statistics = {
            "mean_sq_norm": mean_sq_norm,
            "mean_norm": float(total["sum_of_norms"] / rows),
            "total_variance": total_variance,
            "largest_dim_variance_share": float(variance.max()) / total_variance if total_variance else 0.0,
            "largest_dim": int(variance.argmax()),
            "mean_vector_sq_norm_share": float(mean.square().sum()) / mean_sq_norm if mean_sq_norm else 0.0,
        }
        container.write_tensors(
            self.partial / "statistics.st",
            {"mean": mean, "variance": variance},
            dataclasses.replace(header, schema=h.STATISTICS),
        )
        container.write_json(
            self.partial / "vocabulary.json", dataclasses.replace(header, schema=h.STATISTICS), {"strings": vocabulary}
        )
        shards = [dataclasses.asdict(s) for s in self._shards]
        sha256 = container.write_json(
            self.partial / "manifest.json", header, {"shards": shards, "splits": splits, "statistics": statistics}
        )
        (self.partial / "key").unlink()
        if self.path.exists():  # --overwrite: the old cache goes only when the new one is whole
            shutil.rmtree(self.path)
        os.replace(self.partial, self.path)
        return sha256


def _sums(acts: "Tensor") -> dict[str, "Tensor"]:
    """Σx [d], Σx² [d] and Σ‖x‖ [1] over the rows of ``acts``, in float64.

    In small blocks, which stay in the processor's cache: 18 times as fast as the whole matrix at once.
    """
    import torch

    d = acts.shape[1]
    sums = {"sum": torch.zeros(d), "sum_of_squares": torch.zeros(d), "sum_of_norms": torch.zeros(1)}
    sums = {name: value.double() for name, value in sums.items()}
    for block in acts.split(64):
        exact = block.double()
        squares = exact.square()
        sums["sum"] += exact.sum(0)
        sums["sum_of_squares"] += squares.sum(0)
        sums["sum_of_norms"] += squares.sum(1).sqrt().sum()
    return sums
