"""``saetool inspect``: header, history and shapes of any artifact, without torch."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from saetool.artifacts import container
from saetool.artifacts.cache import Cache, open_cache
from saetool.artifacts.header import CACHE, KINDS, Header
from saetool.artifacts.kinds import is_foreign
from saetool.errors import ArtifactError, ConfigError
from saetool.options import DebugFlag, Json


def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            help="A .st, .json or .jsonl artifact (- for standard input), a cache, or another library's SAE."
        ),
    ],
    verify: Annotated[bool, typer.Option("--verify", help="Check the hashes of all shards of a cache.")] = False,
    json_: Json = False,
    debug: DebugFlag = False,
) -> None:
    """Show what a file is, what made it, and from what; of a cache also what its activations are like.

    Example: saetool inspect sae.st
    """
    header, shapes = _contents(file)
    cache = open_cache(file) if header.schema == CACHE and file.is_dir() else None
    if verify:
        _verify(file, cache)
    if json_:
        record: dict[str, Any] = {"header": header.to_json(), "tensors": shapes}
        if cache is not None:
            record |= {"splits": cache.splits, "statistics": cache.statistics, "profile": cache.profile}
            record["verified"] = verify
        print(json.dumps(record, sort_keys=True, ensure_ascii=False))
        return
    name = "standard input" if str(file) == "-" else file
    print(f"{name}: {KINDS[header.schema]} ({header.schema}, saetool {header.version})")
    print(f"key      {header.key}")
    for title, fields in (("config", header.config), ("model", header.model)):
        for name, value in sorted(fields.items()):
            print(f"{title:<8} {name} = {_short(value)}")
    for name, value in (("seed", header.seed), ("dtype", header.dtype)):
        if value is not None:
            print(f"{name:<8} {value}")
    for name, (dtype, shape) in shapes.items():
        print(f"tensor   {name} {dtype} {shape}")
    if cache is not None:
        for line in _statistics(cache):
            print(line)
    for item in header.inputs:
        print(f"input    {item['role']}: {item['name']} sha256 {item['sha256'][:16]}… ({item['schema']})")
    for number, entry in enumerate(header.history, 1):
        options = " ".join(f"{k}={_short(v)}" for k, v in sorted(entry["options"].items()))
        print(f"history  {number}. {entry['verb']} {options} (saetool {entry['version']})")


def _contents(file: Path) -> tuple[Header, dict[str, Any]]:
    """The header, and type and shape of each tensor."""
    if is_foreign(file) and not (file / "manifest.json").is_file():
        from saetool.artifacts import sae as sae_files

        loaded = sae_files.load(file)
        return loaded.header, {n: ["F32", list(t.shape)] for n, t in sae_files.tensors_of(loaded.sae).items()}
    if str(file) == "-":
        contents = container.read_standard_input()
    elif file.suffix == ".st":
        contents = container.read_contents(file)
    else:
        contents = container.Contents(container.read_header(file), {})
    return contents.header, {n: [t.dtype, list(t.shape)] for n, t in contents.tensors.items()}


def _verify(file: Path, cache: Cache | None) -> None:
    """Raise ``ArtifactError`` naming every shard whose hash is not the manifest's."""
    if cache is None:
        raise ConfigError(f"{file}: --verify is for a cache; other files are read whole, or not at all")
    wrong = [f"{name} {problem}" for name, problem in cache.verify() if problem]
    if wrong:
        raise ArtifactError(f"{file}: {'; '.join(wrong)}", "make the cache again with --overwrite")
    print(f"{file}: {len(cache.shards)} shards, all hashes right", file=sys.stderr)


def _statistics(cache: Cache) -> Iterator[str]:
    """Lines about the splits and, of the train split, the activations."""
    for name, counts in cache.splits.items():
        yield f"split    {name}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items())
    yield f"shards   {len(cache.shards)}, {sum(s.bytes for s in cache.shards):,} bytes"
    for name, value in sorted(cache.statistics.items()):
        yield f"train    {name} = {value:.6g}" if value is not None else f"train    {name} = undefined"
    profile = cache.profile
    if "norm_quantiles" in profile:
        quantiles = "  ".join(f"{q:g}: {value:.4g}" for q, value in profile["norm_quantiles"])
        yield f"norms    {quantiles} (quantiles of {profile['sample_rows']:,} rows)"
    for entry in profile.get("outlier_dims", ())[:5]:
        ratio = "inf" if entry["mean_over_std"] is None else f"{entry['mean_over_std']:.2f}"
        yield f"outlier  dimension {entry['dim']}: |mean|/std {ratio}, {entry['variance_share']:.1%} of the variance"
    if "top_tokens" in profile:
        top = "  ".join(f"{_short(text)} {n:,}" for _, text, n in profile["top_tokens"][:10])
        yield f"tokens   {profile['distinct_tokens']:,} different; most frequent: {top}"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if len(text) <= 120 else text[:117] + "…"
