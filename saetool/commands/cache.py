"""``saetool cache``: text and a language model → activations of one layer."""

import dataclasses
import os
import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saetool.artifacts import cache as cache_files
from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.config import DTYPES, PRESETS, CacheConfig, Preset
from saetool.console import Console, Interruption
from saetool.errors import ArtifactError, ConfigError
from saetool.options import (
    DebugFlag,
    Device,
    DryRun,
    Json,
    Log,
    Overwrite,
    Quiet,
    Resume,
    parse_count,
    resolve_device,
)

if TYPE_CHECKING:
    pass

MODEL, TEXT = "Model", "Text"


def cache(
    text: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders, globs or - (standard input); .jsonl, .parquet, .csv hold one document a record.",
            show_default="the embedded BBC news corpus",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id, folder or .gguf file.", show_default="the embedded SmolLM2-135M", rich_help_panel=MODEL
        ),
    ] = None,
    hook: Annotated[
        str | None,
        typer.Option(
            "--hook",
            "--hook-name",
            "--hookpoint",
            help="blocks.L.hook_resid_pre (_resid_post, _mlp_out, _attn_out), or a module path: model.layers.L.mlp.",
            show_default=f"{CacheConfig.hook} of the embedded model",
            rich_help_panel=MODEL,
        ),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Short for --hook blocks.L.hook_resid_post.", rich_help_panel=MODEL)
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="bf16 or fp32, of model and storage, on every device.", rich_help_panel=MODEL)
    ] = CacheConfig.dtype,
    preset: Annotated[
        str | None,
        typer.Option(help=f"A named setting: {', '.join(PRESETS)} (needs the hub).", rich_help_panel=MODEL),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="A dataset of the hub (streamed) or of a local folder.", rich_help_panel=TEXT),
    ] = None,
    dataset_config: Annotated[
        str | None, typer.Option(help="Configuration of --dataset.", rich_help_panel=TEXT)
    ] = None,
    split: Annotated[str, typer.Option(help="Split of --dataset.", rich_help_panel=TEXT)] = "train",
    field: Annotated[
        str | None,
        typer.Option(help="Field that holds the text of a record.", show_default="text", rich_help_panel=TEXT),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Use so many tokens of the text: 500k, 2M.",
            show_default="500k of the embedded corpus, else all",
            rich_help_panel=TEXT,
        ),
    ] = None,
    ctx_len: Annotated[
        int, typer.Option("--ctx-len", "--context-size", help="Tokens per context.", rich_help_panel=TEXT)
    ] = CacheConfig.ctx_len,
    bos: Annotated[
        bool, typer.Option("--bos/--no-bos", help="Begin each context with BOS.", rich_help_panel=TEXT)
    ] = CacheConfig.bos,
    keep_special: Annotated[
        bool,
        typer.Option("--keep-special", help="Keep rows of position 0 and special tokens.", rich_help_panel=TEXT),
    ] = CacheConfig.keep_special,
    max_norm: Annotated[
        float | None,
        typer.Option(help="Drop rows with more than this multiple of the median norm (sinks).", rich_help_panel=TEXT),
    ] = CacheConfig.max_norm,
    heldout: Annotated[
        float, typer.Option(help="Share of documents that train never sees.", rich_help_panel=TEXT)
    ] = CacheConfig.heldout,
    out: Annotated[Path, typer.Option("-o", "--out", help="The cache, a folder.", rich_help_panel="Files")] = Path(
        CacheConfig.out
    ),
    log: Log = None,
    overwrite: Overwrite = False,
    batch_size: Annotated[
        int, typer.Option(help="Tokens per forward pass.", rich_help_panel="Running")
    ] = CacheConfig.batch_size,
    resume: Resume = True,
    device: Device = "auto",
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: DebugFlag = False,
) -> None:
    """Store the activations of one layer of a language model, with the tokens they belong to.

    The forward pass stops at that layer. A tenth of the documents is held out from training.

    Example: saetool cache --tokens 500k -o acts
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: unknown", f"one of {', '.join(DTYPES)}")
    if ctx_len < 2 or batch_size < 1:
        raise ConfigError("--ctx-len must be at least 2, --batch-size at least 1")
    if not 0 <= heldout < 1:
        raise ConfigError(f"--heldout {heldout}: not a share of the documents", "0 ≤ share < 1; 0 holds out nothing")
    if max_norm is not None and not max_norm > 1:
        raise ConfigError(f"--max-norm {max_norm}: must be above 1, the median itself")
    console = Console(quiet=quiet, as_json=json_)
    given = _preset(preset)
    if given is not None:
        model = model or given.model
        hook = hook if hook or layer is not None else given.hook
        dataset = dataset or (None if text else given.dataset)
        tokens = tokens or str(given.tokens)
    if text and dataset:
        raise ConfigError(f"{text[0]} and --dataset {dataset}: one source of text is enough")
    cache_files.check_output(out)
    place = resolve_device(device)

    from saetool.engines import cache as engine
    from saetool.engines.model import find_model

    request = engine.Request(
        hook=_hook(hook, layer, model),
        ctx_len=ctx_len,
        bos=bos,
        keep_special=keep_special,
        max_norm=max_norm,
        heldout=heldout,
        dtype=DTYPES[dtype],
        batch_size=batch_size,
        tokens=_tokens(tokens, embedded=not text and dataset is None),
    )
    source = find_model(model)
    texts = _texts(text, dataset, dataset_config, split, field)
    if model is None:
        console.say(f"no --model given: {source.id}, the embedded one")
    if not text and dataset is None:
        console.say(f"no text given: {texts.name}, the embedded corpus")
    plan = request.plan(source, texts)
    if container.up_to_date(out, plan, overwrite=overwrite):
        found = cache_files.open_cache(out)
        console.emit(found.header, out, found.sha256, {**_by_split(found.splits), **found.statistics}, fresh=False)
        return
    prepared = engine.prepare(request, source, texts, CacheConfig.shard_bytes)
    if dry_run:
        console.plan(_description(prepared, out))
        return
    _run(prepared, plan, out, console, place, resume=resume, log=log)


def _preset(name: str | None) -> Preset | None:
    if name is not None and name not in PRESETS:
        raise ConfigError(f"--preset {name}: unknown", f"one of {', '.join(PRESETS)}")
    return PRESETS[name] if name else None


def _hook(hook: str | None, layer: int | None, model: str | None) -> str:
    if hook is not None and layer is not None:
        raise ConfigError("--hook and --layer say the same thing: give one of them")
    if layer is not None:
        if layer < 0:
            raise ConfigError(f"--layer {layer}: counting starts at 0")
        return f"blocks.{layer}.hook_resid_post"
    if hook is None and model is not None:
        raise ConfigError("--model needs --hook or --layer", "such as --layer 8, or --hook blocks.8.hook_resid_pre")
    return hook or CacheConfig.hook


def _tokens(tokens: str | None, *, embedded: bool) -> int | None:
    if tokens is None:
        return CacheConfig.tokens if embedded else None
    return parse_count(tokens, "--tokens")


def _texts(
    text: list[str] | None, dataset: str | None, dataset_config: str | None, split: str, field: str | None
) -> "Texts":
    from saetool.engines import text as sources

    if text:
        return sources.from_paths(text, field)
    if dataset is not None:
        return sources.from_dataset(dataset, dataset_config, split, field)
    return sources.embedded()


def _description(prepared: "Prepared", out: Path) -> dict[str, Any]:
    source, site = prepared.source, prepared.site
    return {
        "output": str(out),
        "model": f"{source.id} ({source.revision})",
        "site": f"{site.hook_name} = {site.hf_hook_name}, width {prepared.d_in}",
        "text": prepared.texts.name,
        **dataclasses.asdict(prepared.corpus.counts),
        **_by_split(prepared.splits),
        "shards": len(prepared.shards),
        "bytes": prepared.n_bytes,
    }


def _by_split(splits: dict[str, dict[str, int]]) -> dict[str, int]:
    return {f"{name}_{split}": n for split, counts in splits.items() for name, n in counts.items()}


def _run(
    prepared: "Prepared",
    plan: h.Plan,
    out: Path,
    console: Console,
    device: str,
    *,
    resume: bool,
    log: Path | None,
) -> None:
    """Load the weights, fill the shards that are missing, write the manifest."""
    from saetool.engines import cache as engine
    from saetool.engines.model import load, vocabulary
    from saetool.engines.source import find_site

    _check_space(out, prepared.n_bytes)
    request = prepared.request
    lm = load(prepared.source, prepared.config, prepared.tokenizer, device=device, dtype=request.dtype)
    site = find_site(lm.model, request.hook)
    writer = cache_files.CacheWriter(out, plan, resume=resume)
    done = sum(prepared.tokens_of(s) for s in prepared.shards if writer.has(s.index))
    splits = prepared.splits
    total = sum(counts["tokens"] for counts in splits.values())
    console.say(f"{total:,} tokens through {site.hf_hook_name} on {device}" + (f", {done:,} done" if done else ""))
    if not splits[cache_files.HELDOUT]["rows"] and request.heldout:
        console.say(f"warning: nothing is held out ({prepared.corpus.counts.documents} document): give more documents")
    if request.bos and prepared.bos_id is None:
        console.say("the tokenizer has no BOS token: contexts begin with text")
    started = time.monotonic()
    limit = engine.norm_limit(lm, site, prepared)
    work = engine.write(lm, site, prepared, writer, limit)
    with closing(work), Interruption() as interruption, console.progress("cache", total, "tokens", done) as advance:
        for n in work:
            advance(n)
            if interruption.requested:
                console.say("stopped; the same command goes on from the last whole shard")
                raise KeyboardInterrupt
    seconds = time.monotonic() - started
    model = {
        **lm.reference,
        "hook_name": site.hook_name,
        "hf_hook_name": site.hf_hook_name,
        "width": prepared.d_in,
    }
    config = {**prepared.manifest(), **_kept_by_norm(prepared, writer, limit)}
    header = plan.header(config=config, model=model, dtype=request.dtype)
    sha256 = writer.finish(header, _stored(splits, writer), vocabulary(lm.tokenizer))
    found = cache_files.open_cache(out)
    _write_log(log, out, total - done, seconds, device)
    console.emit(header, out, sha256, {**_by_split(found.splits), **found.statistics})


def _stored(splits: dict[str, dict[str, int]], writer: cache_files.CacheWriter) -> dict[str, dict[str, int]]:
    """``splits`` with the rows that were written: some may have been dropped by their norm."""
    return {name: {**counts, "rows": writer.rows(name)} for name, counts in splits.items()}


def _kept_by_norm(prepared: "Prepared", writer: cache_files.CacheWriter, limit: float | None) -> dict[str, object]:
    """What the manifest says of rows dropped by their norm."""
    if limit is None:
        return {}
    dropped = sum(counts["rows"] - writer.rows(name) for name, counts in prepared.splits.items())
    return {"max_norm": prepared.request.max_norm, "norm_limit": limit, "rows_dropped_by_norm": dropped}


def _check_space(out: Path, needed: int) -> None:
    real = Path(os.path.realpath(out))
    partial = real.with_name(real.name + ".partial")
    there = sum(f.stat().st_size for f in partial.iterdir()) if partial.is_dir() else 0
    free = shutil.disk_usage(real.parent).free
    if needed > free + there:
        raise ArtifactError(
            f"{out}: needs {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free there",
            "use fewer --tokens, or another output with -o",
        )


def _write_log(log: Path | None, out: Path, tokens: int, seconds: float, device: str) -> None:
    if log is None:
        return
    import torch

    record = {
        "verb": "cache",
        "out": str(out),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    try:
        with open(log, "a") as file:
            file.write(h.canonical(record) + "\n")
    except OSError as error:
        raise ArtifactError(f"--log {log}: cannot be written ({error.strerror})") from None
