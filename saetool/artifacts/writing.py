"""Writing artifacts: whole or not at all, and never over something else.

A file is written beside its target and takes its place when it is complete. The same content gives the same bytes.
"""

import errno
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from saetool.artifacts import header as h
from saetool.artifacts.container import ITEM_SIZE, METADATA, METADATA_KEY, read_header
from saetool.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_DTYPE_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_RANK = ["BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64"]
"""safetensors' order of types: a file holds the last of these first."""
_PIECE = 1 << 20
_NUMBERS = re.compile(r"\[\n[-+.,0-9eEnul\s]*\]")
"""A list of numbers and nulls over several lines; no string of a JSON text holds a line's end."""


def check_target(path: Path) -> Path:
    """The real file that writing to ``path`` would replace; raises if it could not be written.

    Symlinks are followed, so that the link survives; anything but a regular file is refused.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "not a regular file"
        raise ArtifactError(f"{path}: is {kind}", "choose another output with -o")
    if not target.parent.is_dir():
        raise ArtifactError(f"{path}: its folder {target.parent.name}/ does not exist", "make the folder first")
    if not os.access(target.parent, os.W_OK):
        raise ArtifactError(f"{path}: its folder is not writable", "choose another output with -o")
    return target


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that becomes ``path`` when the block ends well, and vanishes when it does not."""
    target = check_target(path)
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else new_mode()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    except OSError as error:
        hint = "free some space there, or choose another output with -o" if error.errno == errno.ENOSPC else None
        raise ArtifactError(f"{path}: cannot be written ({error.strerror})", hint) from None
    finally:
        temporary.unlink(missing_ok=True)


def new_mode() -> int:
    """The permissions of a new file: what the umask leaves of rw-rw-rw-."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_bytes(path: Path, data: bytes) -> str:
    """Write ``data`` atomically to ``path`` (``-``: standard output) and return its SHA-256."""
    if str(path) == "-":
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        with atomic_file(path) as file:
            file.write(data)
    return h.sha256_bytes(data)


@dataclass(frozen=True)
class Stacked:
    """A tensor whose rows are made while they are written, some after the others: it is never held as a whole."""

    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], "Iterable[np.ndarray]"]
    """Arrays [n_i, …] with Σ n_i = shape[0], of ``dtype`` or without loss converted to it."""


def _write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """``write_bytes`` of parts that are made while they are written."""
    if str(path) == "-":
        return write_bytes(path, b"".join(parts))
    digest = hashlib.sha256()
    with atomic_file(path) as file:
        for part in parts:
            for start in range(0, len(part), _PIECE):  # hashed while it is in the processor's cache
                piece = memoryview(part)[start : start + _PIECE]
                digest.update(piece)
                file.write(piece)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: "Mapping[str, Tensor | Stacked]", header: h.Header) -> str:
    """Write a ``.st`` file atomically and return its SHA-256. ``-`` writes to standard output, if no terminal.

    The tensors go to the file from where they are; safetensors' own ``save`` copies them twice on the way.
    """
    if str(path) == "-" and sys.stdout.isatty():
        raise ArtifactError("refusing to write tensors to a terminal", "redirect it, or give -o FILE.st")
    prefix, parts = _layout(tensors, {METADATA_KEY: h.canonical(header.to_json())})
    return _write_parts(path, itertools.chain([prefix], parts))


def _layout(tensors: "Mapping[str, Tensor | Stacked]", metadata: dict[str, str]) -> tuple[bytes, Iterator[memoryview]]:
    """Length and header of a safetensors file, and the bytes of its tensors in the order of the file."""
    codes = {name: _dtype_code(str(t.dtype)) for name, t in tensors.items()}
    order = sorted(tensors, key=lambda name: (-_RANK.index(codes[name]), name))
    table: dict[str, Any] = {METADATA: metadata}
    end = 0
    for name in order:
        shape = list(tensors[name].shape)
        start, end = end, end + math.prod(shape) * ITEM_SIZE[codes[name]]
        table[name] = {"dtype": codes[name], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    parts = (part for name in order for part in _parts(tensors[name]))
    return len(text).to_bytes(8, "little") + text, parts


def _parts(tensor: "Tensor | Stacked") -> Iterator[memoryview]:
    """The bytes of a tensor; nothing for an empty one."""
    if not isinstance(tensor, Stacked):
        if tensor.numel():
            yield memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(_bytes_type()).numpy())
        return
    rows = 0
    for part in tensor.parts():
        assert part.shape[1:] == tensor.shape[1:]
        rows += len(part)
        if part.size:
            yield memoryview(part.astype(tensor.dtype, order="C", copy=False)).cast("B")
    assert rows == tensor.shape[0]


def _bytes_type() -> Any:
    import torch

    return torch.uint8


def _dtype_code(name: str) -> str:
    """safetensors' word for a torch dtype: ``torch.bfloat16`` → ``BF16``."""
    return _DTYPE_CODES[name.removeprefix("torch.")]


def json_bytes(header: h.Header, payload: Mapping[str, Any]) -> bytes:
    """A JSON artifact: the header under ``saetool``, indented, keys sorted, undefined numbers null. A list of numbers
    is one line: half of the bytes, where there is one for each latent."""
    data = h.finite({**payload, METADATA_KEY: header.to_json()})
    text = json.dumps(data, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    text = _NUMBERS.sub(lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
    return (text + "\n").encode("utf-8")


def write_json(path: Path, header: h.Header, payload: Mapping[str, Any]) -> str:
    """Write a JSON artifact atomically (``-``: standard output) and return its SHA-256."""
    return write_bytes(path, json_bytes(header, payload))


def write_jsonl(path: Path, header: h.Header, records: Iterable[dict[str, Any]]) -> str:
    """Write a JSONL artifact atomically: the header's line, then one line a record. Returns its SHA-256."""
    first = {METADATA_KEY: h.finite(header.to_json())}
    lines = itertools.chain([first], (h.finite(record) for record in records))
    return _write_parts(path, (f"{h.canonical(line)}\n".encode() for line in lines))


# --- outputs that exist already --------------------------------------------------------------------------------


def up_to_date(path: Path, plan: h.Plan, *, overwrite: bool) -> bool:
    """Whether the artifact at ``path`` is the one wanted (equal key); its time is renewed if so.

    Raises ``ArtifactError`` when ``path`` cannot be written, or holds something else and ``overwrite`` is false.
    """
    if str(path) == "-":
        return False
    if plan.schema == h.CACHE:
        path = path / "manifest.json"
        if not path.exists():
            if path.parent.is_dir() and any(path.parent.iterdir()):
                raise ArtifactError(
                    f"{path.parent}: is a folder with something else in it", "choose another output with -o"
                )
            return False
    else:
        check_target(path)
        if not path.exists():
            return False
    if overwrite:
        return False
    try:
        found = read_header(path)
    except ArtifactError as error:
        raise ArtifactError(
            f"{error.message}: exists, will not be replaced", "pass --overwrite to replace it"
        ) from None
    if found.key == plan.key:
        os.utime(path)
        return True
    raise another(path, plan, found)


def another(path: Path, plan: h.Plan, found: h.Header) -> ArtifactError:
    """The error where ``path`` holds what was made by another request than ``plan``."""
    return ArtifactError(
        f"{path}: exists and is not what was asked for ({plan.difference(found)})",
        "pass --overwrite to replace it, or choose another output with -o",
    )
