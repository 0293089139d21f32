"""Reading files that may be compressed: ``.gz``, ``.zst``, or neither."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from saetool.errors import ArtifactError

COMPRESSED = {".gz": "gzip", ".zst": "Zstandard"}
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}


def inner_suffix(path: Path) -> str:
    """The suffix that says what is in the file: ``.jsonl`` of ``a.jsonl.gz``; lower case."""
    suffixes = [s.lower() for s in path.suffixes]
    return (suffixes[-2:-1] or [".txt"])[0] if suffixes[-1:] and suffixes[-1] in COMPRESSED else "".join(suffixes[-1:])


@contextmanager
def reading(path: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes of ``path``, as a stream. Raises ``ArtifactError`` for what cannot be read."""
    try:
        raw = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None
    with raw, _decompressed(raw, path.suffix.lower(), str(path)) as stream:
        yield stream


@contextmanager
def reading_bytes(data: bytes, where: str) -> Iterator[IO[bytes]]:
    """The decompressed ``data``, as a stream; compression is told by its first bytes."""
    suffix = next((suffix for magic, suffix in _MAGIC.items() if data.startswith(magic)), "")
    with _decompressed(io.BytesIO(data), suffix, where) as stream:
        yield stream


@contextmanager
def _decompressed(raw: IO[bytes], suffix: str, where: str) -> Iterator[IO[bytes]]:
    from pyarrow import ArrowException, CompressedInputStream

    try:
        if suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as stream:
                yield stream
        elif suffix == ".zst":
            with io.BufferedReader(CompressedInputStream(raw, "zstd")) as stream:
                yield stream
        else:
            yield raw
    except (EOFError, zlib.error, ArrowException, OSError) as error:
        kind = COMPRESSED.get(suffix)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        said = f"not readable as {kind}" if kind else "cannot be read"
        raise ArtifactError(f"{where}: {said} ({reason})", "is the file cut off?" if kind else None) from None
