"""Finds a run's artifacts: every file below the given paths that carries a saetool header, whatever its name.

The scan is bounded, follows no linked folder, and looks at a file's first bytes before reading it. A cache is one
artifact (its manifest); its shards are not opened. A damaged artifact is a warning, never a silent gap.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from saetool.artifacts import container, records, train_log
from saetool.artifacts import header as h
from saetool.errors import ArtifactError
from saetool.report import shapes

MAX_ENTRIES = 100_000
MAX_DEPTH = 12
_MAX_JSON = 1 << 30  # bytes; no record of ours is near it
_SKIPPED = {"__pycache__", "node_modules"}
_ORDER = [h.CACHE, h.SAE, h.TRAIN_LOG, h.EVAL, h.STITCH, h.META, h.EXPLANATIONS, h.WINDOWS, h.RUN_LOG]
"""Kinds the page is made from, in the order of the pipeline."""

Form = Literal["tensors", "json", "jsonl"]


@dataclass(frozen=True)
class Artifact:
    """One artifact as found: what it is called on the page, what it says of itself, what it holds."""

    path: Path
    """Where it lies. For reading only: never shown."""
    label: str
    """Path below the folder that was searched, with ``/``."""
    sha256: str
    header: h.Header
    payload: Any = None
    """The record of a JSON artifact, the records of a JSONL one, the tensors of explanation windows."""
    shown: str | None = None
    """What to call it where its file name is not its own alone."""

    @property
    def schema(self) -> str:
        return self.header.schema

    @property
    def kind(self) -> str:
        return self.schema.partition("/")[2].partition("@")[0]

    @property
    def name(self) -> str:
        """File name without folders, as inputs of other artifacts name it, or ``shown``."""
        return self.shown or self.label.rpartition("/")[2]

    def as_input(self) -> h.Input:
        return h.Input(self.kind, self.label, self.sha256, self.schema)


@dataclass(frozen=True)
class Windows:
    """The windows of text behind explanations: what ``windows@1`` holds, as numpy arrays."""

    tokens: Any
    """Token ids, int [n, w]."""
    acts: Any
    """Activations of the window's latent, float [n, w]."""
    latent: Any
    """The latent a window belongs to, int [n]."""
    role: Any
    """What the window was used for, int [n]."""
    length: Any
    """Tokens of the window that are text, int [n]."""
    pred: Any = None
    """Activations predicted from the description, float [n, w]; None if the file has none."""
    pred_valid: Any = None
    """Whether a window was predicted, [n]."""


@dataclass(frozen=True)
class Found:
    """All artifacts of a run, in an order that does not depend on how they were named."""

    artifacts: tuple[Artifact, ...]
    warnings: tuple[str, ...] = ()
    ignored: int = 0
    """Files that are no artifacts, or none the page is made from."""

    def of(self, schema: str) -> list[Artifact]:
        return [a for a in self.artifacts if a.schema == schema]

    @cached_property
    def by_sha(self) -> dict[str, Artifact]:
        return {a.sha256: a for a in self.artifacts}

    @cached_property
    def stale(self) -> list[tuple[Artifact, dict[str, Any], Artifact]]:
        """(artifact, its input, the file found under that input's name, which has another hash)."""
        named: dict[str, list[Artifact]] = {}
        for artifact in self.artifacts:
            named.setdefault(artifact.label.rpartition("/")[2], []).append(artifact)
        return [
            (artifact, item, named[item["name"]][0])
            for artifact in self.artifacts
            for item in artifact.header.inputs
            if item["name"] in named and item["sha256"] not in self.by_sha
        ]


def collect(paths: Sequence[Path], *, output: Path | None = None) -> Found:
    """The artifacts at and below ``paths``; ``output`` is not looked at.

    Raises ``ArtifactError`` for a path that does not exist, and when nothing was recognised.
    """
    for path in paths:
        if not path.exists():
            raise ArtifactError(f"{path}: no such file or folder")
    own = None if output is None else os.path.realpath(output)
    warnings: set[str] = set()
    found: dict[str, Artifact] = {}
    ignored = 0
    seen: set[str] = set()
    for path, label, asked in _candidates(paths, warnings):
        real = os.path.realpath(path)
        if real in seen or real == own:
            continue
        seen.add(real)
        try:
            artifact = _read(path, label, asked=asked)
        except ArtifactError as error:
            warnings.add(f"{error.message.replace(str(path), label)}: left out")
            continue
        if artifact is None:
            ignored += 1
        elif artifact.sha256 not in found or label < found[artifact.sha256].label:
            found[artifact.sha256] = artifact  # a copy of the same file is the same artifact
    if not found:
        looked = ", ".join(str(p) for p in paths)
        damaged = f"; damaged: {'; '.join(sorted(warnings))}" if warnings else ""
        raise ArtifactError(
            f"{looked}: no artifact of saetool found ({ignored} other files){damaged}",
            "give files or folders written by saetool train, eval, stitch, meta, autointerp",
        )
    order = {schema: i for i, schema in enumerate(_ORDER)}
    artifacts = sorted(found.values(), key=lambda a: (order[a.schema], a.label, a.sha256))
    return Found(tuple(artifacts), tuple(sorted(warnings)), ignored)


def _candidates(paths: Sequence[Path], warnings: set[str]) -> Iterator[tuple[Path, str, bool]]:
    """(file or cache folder, its label, whether it was named itself), each root labelled the same in any order."""
    roots = sorted({os.path.realpath(p if p.is_dir() else p.parent) for p in paths})
    prefixes = _prefixes(roots)
    budget = [MAX_ENTRIES]
    for path in paths:
        if path.is_dir():
            prefix = prefixes[os.path.realpath(path)]
            if _is_cache(path):
                yield path, prefix.rstrip("/") or Path(os.path.realpath(path)).name, True
            else:
                for file, inside in _scan(path, budget):
                    yield file, prefix + inside, False
        elif path.name == "manifest.json" and _is_cache(path.parent):
            yield path.parent, Path(os.path.realpath(path.parent)).name, True
        else:
            yield path, prefixes[os.path.realpath(path.parent)] + path.name, True
    if budget[0] <= 0:
        warnings.add(f"more than {MAX_ENTRIES:,} files below the given folders: the rest was not looked at")


def _prefixes(roots: list[str]) -> dict[str, str]:
    """A short prefix for each root folder: none if there is one, else its path below what they share."""
    if len(roots) == 1:
        return {roots[0]: ""}
    shared = Path(os.path.commonpath(roots))
    if len(shared.parts) >= 3:
        below = {root: Path(root).relative_to(shared).as_posix() for root in roots}
        return {root: "" if short == "." else f"{short}/" for root, short in below.items()}
    names = [Path(root).name for root in roots]  # nothing shared: the folders' own names, no absolute path
    numbered = [f"{n} ({names[:i].count(n) + 1})" if names[:i].count(n) else n for i, n in enumerate(names)]
    return {root: f"{name}/" for root, name in zip(roots, numbered, strict=True)}


def _scan(root: Path, budget: list[int]) -> Iterator[tuple[Path, str]]:
    """Files and cache folders below ``root`` with their path inside it. Hidden and linked folders are passed by."""
    stack = [(root, "", 0)]
    while stack:
        folder, inside, depth = stack.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
        except OSError:
            continue
        for entry in entries:
            budget[0] -= 1
            if budget[0] <= 0:
                return
            path, name = Path(entry.path), inside + entry.name
            if entry.is_dir(follow_symlinks=False):
                if _is_cache(path):
                    yield path, name
                elif depth < MAX_DEPTH and not entry.name.startswith(".") and entry.name not in _SKIPPED:
                    stack.append((path, f"{name}/", depth + 1))
            elif entry.is_file() and not entry.name.startswith("."):
                yield path, name


def _is_cache(folder: Path) -> bool:
    """Whether ``folder`` has a manifest that says it is an activation cache (a damaged one still counts)."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return False
    if any(folder.glob("shard-*.st")):
        return True
    try:
        return container.read_header(manifest).schema == h.CACHE
    except ArtifactError:
        return False


def _form(path: Path) -> Form | None:
    """How ``path`` must be read if it is an artifact; None if it is something else. Damaged files keep their form."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            first = file.read(9)
            if first[8:9] == b"{" and first[:1] != b"{":
                n = int.from_bytes(first[:8], "little")
                whole = n <= size - 8
                return "tensors" if (whole and b"saetool" in file.read(n)) or (not whole and _is(path, ".st")) else None
            if first[:1] != b"{" or size > _MAX_JSON:
                return "tensors" if _is(path, ".st") else None
            data = first + file.read()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None
    line = data.partition(b"\n")[0]
    try:
        json.loads(line)
        form: Form = "jsonl"
        if data.count(b"\n") <= 1 and not _is(path, ".jsonl"):
            form = "json"
    except ValueError:
        form = "jsonl" if _is(path, ".jsonl") else "json"
    if b'"saetool"' in data:
        return form
    if not _is(path, ".json", ".jsonl"):
        return None
    try:
        json.loads(data if form == "json" else line)
    except ValueError:
        return form  # cut off before its header: the reader says so
    return None


def is_artifact(path: Path) -> bool:
    """Whether the file at ``path`` looks like an artifact (it may be a damaged one)."""
    return path.is_file() and _form(path) is not None


def _is(path: Path, *suffixes: str) -> bool:
    return path.suffix in suffixes


def _read(path: Path, label: str, *, asked: bool) -> Artifact | None:
    """The artifact at ``path``; None if it is something else, or of a kind that has no place on the page."""
    if path.is_dir():
        manifest = path / "manifest.json"
        header, payload = container.read_json(manifest)
        h.expect(header, h.CACHE, str(manifest))
        if problem := shapes.mismatch(header, payload):
            raise ArtifactError(f"{path}: is damaged ({problem})")
        return Artifact(path, label, h.sha256_file(manifest), header, payload)
    form = _form(path)
    if form is None:
        if asked and path.suffix not in (".html", ".htm"):
            raise ArtifactError(f"{path}: is no artifact of saetool")
        return None
    payload: Any = None
    if form == "tensors":
        header = container.read_contents(path).header
    elif form == "json":
        header, payload = records.read(path)
    else:
        header, payload = container.read_jsonl(path)
    if header.schema not in _ORDER or header.schema == h.CACHE:
        return None
    header, payload = h.parse(h.finite(header.to_json()), str(path)), h.finite(payload)
    if header.schema == h.TRAIN_LOG:  # a log that several runs were appended to holds several headers
        payload = [train_log.ours(record) for record in payload if container.METADATA_KEY not in record]
    if header.schema == h.RUN_LOG:
        payload = _usages(header, payload)
    if problem := shapes.mismatch(header, payload):
        raise ArtifactError(f"{path}: is damaged ({problem})")
    if header.schema == h.WINDOWS:
        payload = _windows(path)
    return Artifact(path, label, h.sha256_file(path), header, payload)


def _usages(header: h.Header, records: list[Any]) -> list[dict[str, Any]]:
    """What each session of a log used, with the key of what it made (``of``): a log holds a header for each."""
    of = header.history[-1]["options"].get("key") if header.history else None
    out = []
    for record in records:
        if container.METADATA_KEY in record:
            history = record[container.METADATA_KEY].get("history") or [{}]
            of = (history[-1].get("options") or {}).get("key")
        elif record.get("event") == "usage":
            out.append(record | {"of": of})
    return out


def _windows(path: Path) -> Windows:
    """The tensors of a ``windows@1`` file. Raises ``ArtifactError`` if one is missing or does not fit the others."""
    tensors = container.read_tensors(path, h.WINDOWS).tensors
    names = ("tokens", "acts", "latent", "role", "length")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ArtifactError(f"{path}: lacks the tensor {', '.join(missing)}")
    arrays = {name: tensors[name].numpy() for name in names}
    n = len(arrays["tokens"])
    if arrays["acts"].shape != arrays["tokens"].shape or any(len(a) != n for a in arrays.values()):
        raise ArtifactError(f"{path}: its tensors differ in length")
    predicted = {name: tensors[name].numpy() for name in ("pred", "pred_valid") if name in tensors}
    if len(predicted) == 2 and predicted["pred"].shape == arrays["acts"].shape and len(predicted["pred_valid"]) == n:
        arrays |= predicted
    return Windows(**arrays)


def strings_of(found: Found, windows: Artifact) -> dict[int, str] | None:
    """The strings of the tokens in ``windows``: from its header, else from the cache it was made from."""
    stated = windows.header.config.get("strings")
    if isinstance(stated, dict):
        return {int(k): str(v) for k, v in stated.items() if str(k).isdecimal()}
    return vocabulary_of(found, {item["sha256"] for item in windows.header.inputs})


def vocabulary_of(found: Found, hashes: set[str]) -> dict[int, str] | None:
    """The strings of a cache that is among these inputs (or the only one, if there are no inputs); None without it."""
    caches = found.of(h.CACHE)
    mine = [c for c in caches if c.sha256 in hashes] or (caches if len(caches) == 1 and not hashes else [])
    for cache in mine:
        file = cache.path / "vocabulary.json"
        try:
            strings = container.read_json(file)[1].get("strings")
        except ArtifactError:  # the page then says that it shows token numbers, and what is needed for the text
            continue
        if isinstance(strings, list):
            return dict(enumerate(map(str, strings)))
    return None
