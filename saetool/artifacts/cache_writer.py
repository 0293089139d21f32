"""Writing an activation cache: shard by shard into ``NAME.partial/``, which becomes ``NAME`` when the manifest is in.

    shard-00000.st      written atomically, in any order and by any process
    shard-00000.json    its rows, size and hash: what tells a whole shard from a torn one; gone when all is written
    key                 what the work is for and how it is cut, so that another command does not continue it

One process at a time writes a cache: it holds a lock on the folder, which ends with the process however that ends.
"""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from saetool.artifacts import container, writing
from saetool.artifacts import header as h
from saetool.artifacts.cache import INT8, TRAIN, Cache, Shard
from saetool.artifacts.cache_statistics import SUMS, describe
from saetool.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

    from saetool.core.statistics import Sums

_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I8": INT8}


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


def partial_folder(path: Path) -> Path:
    """Where the cache at ``path`` is while it is written."""
    real = Path(os.path.realpath(path))
    return real.with_name(real.name + ".partial")


def interrupted_layout(path: Path, plan: h.Plan) -> str | None:
    """The layout of unfinished work towards ``plan`` at ``path``, None if there is none."""
    key = partial_folder(path) / "key"
    found, _, layout = (key.read_text() if key.is_file() else "").partition(" ")
    return layout if found == plan.key else None


class CacheWriter:
    """Writes one cache. ``write`` may be called from several threads, for different shards.

    Shards are the resume points: one that is there with the size and hash it was written with is kept, if it is of the
    same key. Statistics are summed per shard in float64 and combined in shard order, so that an interrupted and
    resumed run, or one of several processes, gives the same bytes as an undisturbed one.
    """

    def __init__(
        self,
        path: Path,
        plan: h.Plan,
        *,
        resume: bool = True,
        storage: str | None = None,
        layout: str = "",
        leader: bool = True,
    ) -> None:
        """``storage`` ``int8`` makes eight-bit rows of what is written; otherwise activations are stored as given.

        ``layout`` is what else the shards depend on: work of another layout is not continued. Of several processes,
        all but the ``leader`` take the folder as it is; they must start after it.
        """
        check_output(path)
        self.path = Path(os.path.realpath(path))  # a link to a folder stays a link
        self.plan = plan
        self.storage = storage
        self._mark = f"{plan.key} {layout}".strip()
        self.partial = partial_folder(path)
        self._lock = _lock(self.partial, path) if leader else None
        self._known: dict[int, Shard] = {}
        self._next = 0
        if leader:
            if not (resume and self._resumable()):
                for entry in self.partial.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            for torn in self.partial.glob(".*.tmp"):  # what a killed run was writing
                torn.unlink()
            self._check_shards()
            if not (self.partial / "key").exists():
                writing.write_bytes(self.partial / "key", self._mark.encode())
        self.refresh()

    def close(self) -> None:
        """Let go of the folder; what was written stays."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _resumable(self) -> bool:
        key, manifest = self.partial / "key", self.partial / "manifest.json"
        if key.is_file():
            return key.read_text() == self._mark
        # Killed between the last write and the rename.
        return manifest.is_file() and container.read_header(manifest).key == self.plan.key

    def _name(self, index: int) -> str:
        return f"shard-{index:05d}.st"

    def _check_shards(self) -> None:
        """Remove every shard that is not what its record says: torn, changed, or without a record."""
        manifest = self.partial / "manifest.json"
        if manifest.is_file() and not (self.partial / "key").is_file():  # the records are gone, the manifest has them
            for entry in container.read_json(manifest)[1]["shards"]:
                self._record(Shard(**entry))
        for file in sorted(self.partial.glob("shard-*.st")):
            shard = _read_record(file.with_suffix(".json"))
            if shard is None or file.stat().st_size != shard.bytes or h.sha256_file(file) != shard.sha256:
                file.unlink()
        for record in self.partial.glob("shard-*.json"):
            if not record.with_suffix(".st").exists():
                record.unlink()

    def _record(self, shard: Shard) -> None:
        text = json.dumps(dataclasses.asdict(shard), sort_keys=True)
        writing.write_bytes((self.partial / shard.name).with_suffix(".json"), text.encode())

    def refresh(self) -> None:
        """See what is there, other processes' shards included."""
        for record in self.partial.glob("shard-*.json"):
            shard = _read_record(record)
            if shard is not None:
                self._known[int(record.stem.rpartition("-")[2])] = shard

    def has(self, index: int) -> bool:
        """Whether shard ``index`` is there, whole."""
        return index in self._known

    def rows(self, split: str) -> int:
        """Rows of ``split`` written so far."""
        return sum(shard.rows for shard in self._known.values() if shard.split == split)

    def add(self, split: str, tensors: "dict[str, Tensor]") -> None:
        """Write the next shard: ``acts`` [rows, d], not yet as they are stored, and whatever belongs to the rows."""
        stored, sums = as_stored(tensors["acts"], self.storage)
        self.write(self._next, split, {**tensors, **stored}, sums)
        self._next += 1

    def write(self, index: int, split: str, tensors: "dict[str, Tensor]", sums: "Sums") -> None:
        """Write shard ``index``: what ``as_stored`` gives for its activations, and whatever belongs to the rows.

        Raises ``ArtifactError`` if an activation is NaN or infinite, or the disk is full.
        """
        name = self._name(index)
        if not sums.finite:
            import torch

            rows = tensors.get("scales", tensors["acts"]).view(len(tensors["acts"]), -1)
            bad = ~torch.isfinite(rows).all(dim=1)
            raise ArtifactError(
                f"{self.path}: the activations hold NaN or infinity (row {int(bad.int().argmax())} of {name})",
                "try --dtype float32; a model that overflows in a smaller type shows this",
            )
        stored = {**tensors, **{tensor: getattr(sums, field) for field, tensor in SUMS.items()}}
        file = self.partial / name
        header = self.plan.header(config={"split": split, "index": index})
        try:
            sha256 = writing.write_tensors(file, stored, header)
            shard = Shard(name, split, len(tensors["acts"]), file.stat().st_size, sha256)
            self._record(shard)
        except ArtifactError as error:
            if os.strerror(errno.ENOSPC) not in error.message:
                raise
            raise ArtifactError(
                f"{self.path}: the disk is full; {len(self._known)} finished shards are kept in {self.partial.name}/",
                "free some space and run the same command: it goes on from there",
            ) from None
        self._known[index] = shard

    def finish(
        self,
        header: h.Header,
        splits: dict[str, dict[str, int]],
        vocabulary: list[str] | None,
        n_shards: int | None = None,
    ) -> str:
        """Write statistics, vocabulary and manifest, and move the folder to its name. Returns the manifest's hash."""
        self.refresh()
        n_shards = len(self._known) if n_shards is None else n_shards
        shards = [self._known[index] for index in range(n_shards)]
        if not any(shard.rows for shard in shards if shard.split == TRAIN):
            raise ArtifactError(f"{self.path}: no activations to write", "give more text")
        dtype = container.read_contents(self.partial / shards[0].name).tensors["acts"].dtype
        config = {**header.config, "storage": _STORED[dtype]}
        header = dataclasses.replace(header, config=config)
        cache = Cache(self.partial, header, tuple(shards), splits, {}, "")
        statistics, profile, tensors = describe(cache, vocabulary)
        about = dataclasses.replace(header, schema=h.STATISTICS)
        writing.write_tensors(self.partial / "statistics.st", tensors, about)
        if vocabulary is not None:
            writing.write_json(self.partial / "vocabulary.json", about, {"strings": vocabulary})
        sha256 = writing.write_json(
            self.partial / "manifest.json",
            header,
            {
                "shards": [dataclasses.asdict(s) for s in shards],
                "splits": splits,
                "statistics": statistics,
                "profile": profile,
            },
        )
        (self.partial / "key").unlink()
        for record in self.partial.glob("shard-*.json"):
            record.unlink()
        if self.path.exists():  # --overwrite: the old cache goes only when the new one is whole
            shutil.rmtree(self.path)
        os.replace(self.partial, self.path)
        self.close()
        return sha256


def as_stored(acts: "Tensor", storage: str | None) -> "tuple[dict[str, Tensor], Sums]":
    """``acts`` [rows, d] as a cache of ``storage`` has them, and the sums over those rows, computed on their device.

    Eight-bit rows are ``acts`` and ``scales``; any other storage is the type that ``acts`` have already.
    """
    from saetool.core.quantize import dequantize_rows, quantize_rows
    from saetool.core.statistics import row_sums

    if storage != INT8:
        return {"acts": acts}, row_sums(acts)
    q, scales = quantize_rows(acts)
    return {"acts": q, "scales": scales}, row_sums(dequantize_rows(q, scales))


def _lock(folder: Path, wanted: Path) -> int:
    """Make ``folder`` and lock it for this process; returns the descriptor that holds the lock.

    Raises ``ArtifactError`` if another process has it. On a file system without locks there is none.
    """
    import fcntl

    while True:
        folder.mkdir(exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # finished and renamed by another process just now
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ArtifactError(
                f"{wanted}: is being written by another process (it holds {folder.name}/)",
                "wait for it, or choose another output with -o",
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                return descriptor
        except FileNotFoundError:
            pass  # renamed between opening and locking
        os.close(descriptor)


def _read_record(path: Path) -> Shard | None:
    """A shard's record, or None where there is none that can be read (written atomically: then it was damaged)."""
    try:
        return Shard(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
