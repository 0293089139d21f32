"""Reading artifacts: strictly, and without pickle. What writes them is in ``writing``.

``read_header`` and ``read_contents`` need no torch: a safetensors file is eight bytes of length, a JSON header and
the raw tensors, and its first two parts are read here directly, which also catches truncation.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from saetool.artifacts import header as h
from saetool.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

METADATA_KEY, METADATA = "saetool", "__metadata__"
_MAX_HEADER = 100_000_000  # the safetensors format's own limit
ITEM_SIZE = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


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


def read_contents(path: Path) -> Contents:
    """Header and shapes of the ``.st`` file at ``path``; no torch, no tensor is read."""
    raw, size = _open_prefix(path)
    return _parse_prefix(raw, size, str(path))


FOREIGN_SUFFIXES = (".npz", ".pt", ".pth")
"""Of files that saetool never writes as its own."""


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
        if info.dtype not in ITEM_SIZE or any(not isinstance(s, int) or s < 0 for s in info.shape):
            raise ArtifactError(f"{where}: tensor {name} has an unusable type or shape", "make or copy it again")
        first, last = spans[name]
        if not 0 <= first <= last or last - first != math.prod(info.shape) * ITEM_SIZE[info.dtype]:
            raise ArtifactError(
                f"{where}: tensor {name} is declared as {list(info.shape)} {info.dtype}, and has {last - first} bytes",
                "make or copy it again",
            )
    return tensors, metadata
