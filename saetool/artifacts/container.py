"""Reading and writing files: atomically, strictly, without pickle.

``read_header`` and ``tensor_infos`` need no torch: a safetensors file is eight bytes of length, a JSON header and
the raw tensors, and its first two parts are read here directly, which also catches truncation.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from saetool.artifacts import header as h
from saetool.artifacts import hub
from saetool.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

METADATA_KEY, METADATA = "saetool", "__metadata__"
_MAX_HEADER = 100_000_000  # the safetensors format's own limit
_ITEM_SIZE = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_DTYPE_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_RANK = ["BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64"]
"""safetensors' order of types: a file holds the last of these first."""
_PIECE = 1 << 20
_NUMBERS = re.compile(r"\[\n[-+.,0-9eEnul\s]*\]")
"""A list of numbers and nulls over several lines; no string of a JSON text holds a line's end."""


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Contents:
    """Header and tensor shapes of one safetensors file, read without its tensors."""

    header: h.Header
    tensors: dict[str, TensorInfo]


# --- reading ---------------------------------------------------------------------------------------------------


def read_contents(path: Path) -> Contents:
    """Header and shapes of the ``.st`` file at ``path``; no torch, no tensor is read."""
    raw, size = _open_prefix(path)
    return _parse_prefix(raw, size, str(path))


FOREIGN_SUFFIXES = (".npz", ".pt", ".pth")
"""Of files that saetool never writes as its own."""


def is_foreign(path: Path) -> bool:
    """Whether ``path``, where an SAE is wanted, is another library's: an address, a folder, a file of a kind that is
    never ours, or safetensors without our header. No torch."""
    if str(path) == "-":
        return False
    if hub.is_address(path) or path.is_dir() or path.suffix in FOREIGN_SUFFIXES:
        return True
    return path.suffix == ".safetensors" and path.is_file() and METADATA_KEY not in read_table(path)[1]


def read_header(path: Path) -> h.Header:
    """The header of any artifact: ``.st``, ``.json``, ``.jsonl``, or the folder of a cache."""
    if path.is_dir():
        return read_json(path / "manifest.json")[0]
    with _opening(path) as file:
        first = file.read(9)
    if len(first) == 9 and first[8:9] == b"{" and first[:1] != b"{":
        return read_contents(path).header
    if path.suffix == ".jsonl":
        return read_jsonl(path)[0]
    return read_json(path)[0]


def read_standard_input() -> Contents:
    """Header and shapes of an artifact of any kind that is piped in."""
    data, where = sys.stdin.buffer.read(), "standard input"
    if data[8:9] == b"{" and data[:1] != b"{":
        return _parse_prefix(data, len(data), where)
    text = _decoded(data, where)
    first = text.partition("\n")[0]
    return Contents(_parse_json(text if first == "{" else first, where)[0], {})  # of JSONL, the first line


@dataclass(frozen=True)
class Loaded:
    """A safetensors artifact, read whole."""

    header: h.Header
    tensors: dict[str, "Tensor"]
    """On the CPU, in the stored types."""
    sha256: str


def read_tensors(path: Path, schema: str, hint: str | None = None) -> Loaded:
    """Read a ``.st`` file of kind ``schema``, tensors and all; ``-`` reads standard input."""
    from safetensors.torch import load, load_file

    if str(path) == "-":
        data = sys.stdin.buffer.read()
        contents = _parse_prefix(data, len(data), "standard input")
        h.expect(contents.header, schema, "standard input", hint)
        return Loaded(contents.header, load(data), h.sha256_bytes(data))
    header = read_contents(path).header if path.suffix == ".st" else read_header(path)
    h.expect(header, schema, str(path), hint)
    return Loaded(header, load_file(path), h.sha256_file(path))


def open_tensors(path: Path, names: Sequence[str]) -> dict[str, "Tensor"]:
    """Some tensors of a ``.st`` file, memory-mapped: read from the disk as they are touched."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in names}


def read_json(path: Path) -> tuple[h.Header, dict[str, Any]]:
    """Header and payload of a JSON artifact; ``-`` reads standard input."""
    return _parse_json(_read_text(path), "standard input" if str(path) == "-" else str(path))


def _parse_json(text: str, where: str) -> tuple[h.Header, dict[str, Any]]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ArtifactError(f"{where}: not JSON ({error})", "is the file cut off? make it again") from None
    if not isinstance(data, dict) or METADATA_KEY not in data:
        raise ArtifactError(f"{where}: JSON without a saetool header", "was it written by saetool?")
    payload = {k: v for k, v in data.items() if k != METADATA_KEY}
    return h.parse(data[METADATA_KEY], where), payload


def read_jsonl(path: Path) -> tuple[h.Header, list[dict[str, Any]]]:
    """Header (first line) and records of a JSONL artifact; ``-`` reads standard input."""
    where = "standard input" if str(path) == "-" else str(path)
    records = []
    lines = _read_text(path).split("\n")  # not splitlines: U+2028 and its like are text, and may be in a token
    for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise ArtifactError(f"{where}: line {number} is not JSON", "is the file cut off? make it again") from None
    if not records or not isinstance(records[0], dict) or METADATA_KEY not in records[0]:
        raise ArtifactError(f"{where}: its first line is no saetool header", "was it written by saetool?")
    return h.parse(records[0][METADATA_KEY], where), records[1:]


def _read_text(path: Path) -> str:
    if str(path) == "-":
        return _decoded(sys.stdin.buffer.read(), "standard input")
    with _opening(path) as file:
        return _decoded(file.read(), str(path))


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ArtifactError(f"{where}: not a text file", "a JSON artifact of saetool was expected") from None


@contextmanager
def _opening(path: Path) -> Iterator[IO[bytes]]:
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ArtifactError(f"{path}: is a folder where a file was expected") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        yield file


def _open_prefix(path: Path) -> tuple[bytes, int]:
    """The first 8 + n bytes of a safetensors file (n = header length), and the file's size."""
    with _opening(path) as file:
        size = os.fstat(file.fileno()).st_size
        raw = file.read(8)
        n = int.from_bytes(raw, "little")
        if len(raw) == 8 and n <= min(_MAX_HEADER, size - 8):
            raw += file.read(n)
    return raw, size


def _parse_prefix(raw: bytes, size: int, where: str) -> Contents:
    """Header and shapes of a ``.st`` file from its prefix. ``size`` is the whole file's size in bytes."""
    tensors, metadata = _parse_table(raw, size, where)
    if METADATA_KEY not in metadata:
        raise ArtifactError(
            f"{where}: safetensors without a saetool header (tensors: {', '.join(sorted(tensors)[:6]) or 'none'})",
            "an SAE of another library is read as a folder with its configuration: saetool convert FOLDER -o sae.st",
        )
    try:
        data = json.loads(metadata[METADATA_KEY])
    except ValueError:
        raise ArtifactError(f"{where}: its saetool header is damaged (not JSON)", "make it again") from None
    return Contents(h.parse(data, where), tensors)


def read_table(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Shapes and metadata of any safetensors file, ours or not, checked against the file's size."""
    raw, size = _open_prefix(path)
    return _parse_table(raw, size, str(path))


def _parse_table(raw: bytes, size: int, where: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Check and parse a safetensors prefix: what it declares must be what the file's size can hold."""
    n = int.from_bytes(raw[:8], "little")
    if len(raw) < 9 or n > _MAX_HEADER or raw[8:9] != b"{":
        raise ArtifactError(f"{where}: not a safetensors file", "a .st file written by saetool was expected")
    if len(raw) < 8 + n:
        raise ArtifactError(f"{where}: cut off inside its header ({size} bytes)", "make or copy it again")
    try:
        table = json.loads(raw[8 : 8 + n])
        metadata = dict(table.pop(METADATA, {}))
        tensors = {name: TensorInfo(t["dtype"], tuple(t["shape"])) for name, t in table.items()}
        spans = {name: (int(t["data_offsets"][0]), int(t["data_offsets"][1])) for name, t in table.items()}
        end = max((last for _, last in spans.values()), default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise ArtifactError(f"{where}: its safetensors header is damaged", "make or copy it again") from None
    if size != 8 + n + end:
        raise ArtifactError(
            f"{where}: cut off: {size} bytes where its header promises {8 + n + end}", "make or copy it again"
        )
    for name, info in tensors.items():
        if info.dtype not in _ITEM_SIZE or any(not isinstance(s, int) or s < 0 for s in info.shape):
            raise ArtifactError(f"{where}: tensor {name} has an unusable type or shape", "make or copy it again")
        first, last = spans[name]
        if not 0 <= first <= last or last - first != math.prod(info.shape) * _ITEM_SIZE[info.dtype]:
            raise ArtifactError(
                f"{where}: tensor {name} is declared as {list(info.shape)} {info.dtype}, and has {last - first} bytes",
                "make or copy it again",
            )
    return tensors, metadata


# --- writing ---------------------------------------------------------------------------------------------------


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
        _write_out(data)
    else:
        with atomic_file(path) as file:
            file.write(data)
    return h.sha256_bytes(data)


def _write_out(data: bytes) -> None:
    """All of ``data`` to standard output. Raises ``ArtifactError``, or ``BrokenPipeError`` where nobody reads on."""
    left = memoryview(data)
    try:
        sys.stdout.flush()
        while left:  # with PYTHONUNBUFFERED a write takes what fits, and says so only by its result
            left = left[sys.stdout.buffer.write(left) :]
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ArtifactError(f"standard output: cannot be written ({error.strerror})") from None


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
        start, end = end, end + math.prod(shape) * _ITEM_SIZE[codes[name]]
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
    raise ArtifactError(
        f"{path}: exists and is not what was asked for ({plan.difference(found)})",
        "pass --overwrite to replace it, or choose another output with -o",
    )
