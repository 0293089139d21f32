"""An activation cache: a folder of safetensors shards and a ``manifest.json``, written last.

    manifest.json      header, shards with their hashes, splits, scalar statistics, profile (outlier dimensions, top
                       tokens, quantiles of the norm)
    shard-00000.st     acts [rows, d]; int8 ones with scales [rows] (float32): a row is scale · acts
                       per row: tokens, positions, contexts, documents (int32);
                       input_ids [contexts, ctx_len]: what the model read, -1 after the end of a shorter context
    statistics.st      mean, variance, geometric_median [d] of the train split (float64)
    vocabulary.json    the tokenizer's string of each token id, so that no tokenizer is needed later

A cache made from tensors has no tokens, contexts, input_ids and vocabulary; its positions are row numbers of the input,
and ids [rows] (int64) are the input's own, where it has them.

Rows of one context (a packed run of ``ctx_len`` tokens) are consecutive and in order; contexts are numbered from 0
within the cache, and every shard belongs to one split, ``train`` or ``heldout``: the split is by document.
A cache is identified by the SHA-256 of its manifest, which holds the SHA-256 of every shard.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

TRAIN, HELDOUT = "train", "heldout"
ROW_TENSORS = ("tokens", "positions", "contexts", "documents")
TENSOR_ROWS = ("positions", "documents")
"""What rows have in a cache that was made from tensors."""
INT8 = "int8"
STORAGE = {"float32": 4, "bfloat16": 2, "float16": 2, INT8: 1}
"""How activations can be stored, with bytes per element; int8 takes four more per row."""
MEDIAN_ROWS = 16_384
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
    profile: dict[str, Any] = field(default_factory=dict)
    """Of the train split: outlier dimensions, norm quantiles, top tokens. Empty in a cache of schema 1."""

    @property
    def d_in(self) -> int:
        return int(self.header.config["d_in"])

    def rows(self, split: str) -> int:
        return sum(s.rows for s in self.shards if s.split == split)

    def as_input(self, role: str = "acts") -> h.Input:
        return h.Input(role, self.path.name, self.sha256, h.CACHE)

    @property
    def storage(self) -> str:
        """How activations are stored: float32, bfloat16, float16 or int8."""
        return str(self.header.config["storage"])

    @property
    def has_tokens(self) -> bool:
        """Whether the rows are of text; a cache made from tensors has none."""
        return self.header.config.get("source") != "tensors"

    def check_text(self) -> None:
        """Raise ``ArtifactError`` unless the rows are of text."""
        if not self.has_tokens:
            raise ArtifactError(f"{self.path}: made from tensors, so there is no text in it", "cache text instead")

    def stored(self, shard: Shard) -> dict[str, "Tensor"]:
        """``acts`` as stored and, where they are int8, ``scales``; memory-mapped."""
        return container.open_tensors(self.path / shard.name, ["acts", *(["scales"] if self.storage == INT8 else [])])

    def shard_tensors(self, shard: Shard) -> dict[str, "Tensor"]:
        """``acts`` and the rows' tensors, memory-mapped; int8 activations are made float32 (and take memory)."""
        from saetool.core.quantize import dequantize_rows

        names = ROW_TENSORS if self.has_tokens else TENSOR_ROWS
        acts = self.stored(shard)
        whole = dequantize_rows(acts["acts"], acts["scales"]) if "scales" in acts else acts["acts"]
        return {"acts": whole, **container.open_tensors(self.path / shard.name, names)}

    def iter_split(self, split: str) -> Iterator[dict[str, "Tensor"]]:
        """The tensors of each shard of ``split``, in stored order."""
        for shard in self.shards:
            if shard.split == split:
                yield self.shard_tensors(shard)

    def row_tensor(self, split: str, name: str) -> "Tensor":
        """One of ``ROW_TENSORS`` over the whole split, int32 [rows]."""
        import torch

        if not self.has_tokens and name not in (*TENSOR_ROWS, "ids"):
            raise ArtifactError(f"{self.path}: made from tensors, so its rows have no {name}", "cache text instead")
        parts = [
            container.open_tensors(self.path / shard.name, [name])[name]
            for shard in self.shards
            if shard.split == split
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)

    def sample(self, split: str, n: int) -> "Tensor":
        """At most ``n`` rows of ``split``, evenly spaced, float32 [n, d]."""
        import torch

        from saetool.core.quantize import dequantize_rows

        total, start, parts = self.rows(split), 0, []
        wanted = (torch.arange(min(n, total), dtype=torch.float64) + 0.5) * total / max(min(n, total), 1)
        for shard in self.shards:
            if shard.split == split:
                mine = (wanted[(wanted >= start) & (wanted < start + shard.rows)]).long() - start
                acts = {name: tensor[mine] for name, tensor in self.stored(shard).items()}
                parts.append(
                    dequantize_rows(acts["acts"], acts["scales"]) if "scales" in acts else acts["acts"].float()
                )
                start += shard.rows
        return torch.cat(parts) if parts else torch.empty(0, self.d_in)

    def first_context(self, split: str) -> int:
        """The number of the split's first context: they are numbered through the cache, one split after the other."""
        order = list(dict.fromkeys(s.split for s in self.shards))
        return sum(self.splits[earlier]["contexts"] for earlier in order[: order.index(split)])

    def input_ids(self, split: str) -> "Tensor":
        """The token ids the model read, int32 [contexts, ctx_len] over the whole split, in order.

        BOS and special tokens, whose rows may have been dropped, are in it; -1 follows the end of a shorter context.
        """
        import torch

        self.check_text()
        parts = [
            container.open_tensors(self.path / s.name, ["input_ids"])["input_ids"]
            for s in self.shards
            if s.split == split
        ]
        return torch.cat(parts) if parts else torch.empty(0, self.header.config["ctx_len"], dtype=torch.int32)

    @cached_property
    def vocabulary(self) -> list[str]:
        """The string of each token id."""
        self.check_text()
        return container.read_json(self.path / "vocabulary.json")[1]["strings"]

    def moments(self) -> dict[str, "Tensor"]:
        """``mean``, ``variance`` and ``geometric_median`` [d] of the train split, float64.

        The geometric median is that of ``MEDIAN_ROWS`` evenly spaced rows; it is computed here for a cache of schema 1.
        """
        from saetool.core.statistics import geometric_median

        tensors = container.read_tensors(self.path / "statistics.st", h.STATISTICS).tensors
        if "geometric_median" not in tensors:
            tensors["geometric_median"] = geometric_median(self.sample(TRAIN, MEDIAN_ROWS))
        return tensors

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """Check the hash of every shard: yields its name, and what is wrong with it or None. Needs no torch."""
        for shard in self.shards:
            try:
                found = h.sha256_file(self.path / shard.name)
            except OSError as error:
                yield shard.name, f"cannot be read ({error.strerror})"
                continue
            wrong = f"has the hash {found[:16]}… where the manifest says {shard.sha256[:16]}…"
            yield shard.name, None if found == shard.sha256 else wrong


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
    if header.config.get("storage") not in STORAGE:
        raise ArtifactError(f"{manifest}: activations are stored as {header.config.get('storage')}", "update saetool")
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
    profile = payload.get("profile", {})
    return Cache(path, header, shards, splits, statistics, h.sha256_file(manifest), profile)
