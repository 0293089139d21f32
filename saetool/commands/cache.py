"""``saetool cache``: text and a language model → activations of one or more layers; or tensors → the same form."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saetool.artifacts.cache_writer import check_output
from saetool.commands import cache_run
from saetool.config import DTYPES, PRESETS, STORES, CacheConfig, Preset
from saetool.console import Console
from saetool.errors import ConfigError
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
)

if TYPE_CHECKING:
    from saetool.engines.text import Texts

MODEL, TEXT, TENSORS, ROWS = "Model", "Text", "Tensors instead of text", "Rows"


def cache(
    text: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders, globs or - (standard input); .jsonl, .parquet, .csv hold one document a record; "
            "any of them may be .gz or .zst.",
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
        list[str] | None,
        typer.Option(
            "--hook",
            "--hook-name",
            "--hookpoint",
            help="blocks.L.hook_resid_pre (_resid_mid, _resid_post, _mlp_out, _attn_out), blocks.L.attn.hook_z, "
            "blocks.L.mlp.hook_post, or a module path: model.layers.L.mlp. Several: a cache each, from one pass.",
            show_default=f"{CacheConfig.hook} of the embedded model",
            rich_help_panel=MODEL,
        ),
    ] = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="Short for --hook blocks.L.hook_resid_post.", rich_help_panel=MODEL)
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="bf16, fp16 or fp32, of the model, on every device.", rich_help_panel=MODEL)
    ] = CacheConfig.dtype,
    store: Annotated[
        str | None,
        typer.Option(
            help="fp32, bf16, fp16, or int8 with a scale for each row.",
            show_default="as --dtype",
            rich_help_panel="Files",
        ),
    ] = CacheConfig.store,
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
    from_tensors: Annotated[
        list[str] | None,
        typer.Option(
            help="A matrix of activations, .npy or .safetensors, from anywhere; several go one below the other.",
            rich_help_panel=TENSORS,
        ),
    ] = None,
    tensor: Annotated[str | None, typer.Option(help="Which tensor of the file.", rich_help_panel=TENSORS)] = None,
    ids: Annotated[
        str | None,
        typer.Option(
            help="Whole numbers, one a row: a tensor of the file, or FILE.npy. Rows of one id (an image, a protein) "
            "are held out together.",
            rich_help_panel=TENSORS,
        ),
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
        typer.Option("--keep-special", help="Keep rows of position 0 and special tokens.", rich_help_panel=ROWS),
    ] = CacheConfig.keep_special,
    max_norm: Annotated[
        float | None,
        typer.Option(help="Drop rows with more than this multiple of the median norm (sinks).", rich_help_panel=ROWS),
    ] = CacheConfig.max_norm,
    center: Annotated[
        bool,
        typer.Option(
            "--center",
            help="Subtract each row's mean over its dimensions, as SAEs of TransformerLens' processed GPT-2 expect.",
            rich_help_panel=ROWS,
        ),
    ] = CacheConfig.center,
    heldout: Annotated[
        float, typer.Option(help="Share of documents that train never sees.", rich_help_panel=ROWS)
    ] = CacheConfig.heldout,
    out: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--out",
            help="The cache, a folder; {hook} in it is the hook's name.",
            show_default=f"{CacheConfig.out}, with several hooks {CacheConfig.out}-{{hook}}",
            rich_help_panel="Files",
        ),
    ] = None,
    log: Log = None,
    overwrite: Overwrite = False,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Tokens per forward pass.", show_default="from memory", rich_help_panel="Running"),
    ] = CacheConfig.batch_size,
    resume: Resume = True,
    device: Device = "auto",
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: DebugFlag = False,
) -> None:
    """Store the activations of one layer of a language model, with the tokens they belong to.

    The forward pass stops at that layer. A tenth of the documents is held out from training. Under torchrun, the
    processes share the work.

    Example: saetool cache --tokens 500k -o acts
    """
    _check(dtype, store, ctx_len, batch_size, heldout, max_norm)
    console = Console(quiet=quiet, as_json=json_)
    running = cache_run.Running(console, device, overwrite=overwrite, resume=resume, dry_run=dry_run, log=log)
    storage = None if store is None else STORES[store]
    limit = None if tokens is None else parse_count(tokens, "--tokens")
    if from_tensors:
        if text or dataset or model or hook or layer:
            raise ConfigError("--from-tensors needs no text, model or hook: the activations are there already")
        from saetool.engines import tensors as matrices

        wanted = matrices.Request(
            heldout=heldout,
            storage=storage,
            tensor=tensor,
            ids=ids,
            limit=limit,
            max_norm=max_norm,
            center=center,
        )
        cache_run.tensors(from_tensors, wanted, Path(out or CacheConfig.out), running)
        return
    if tensor or ids:
        raise ConfigError("--tensor and --ids go with --from-tensors")
    given = _preset(preset)
    hooks = _hooks(hook or [], layer or [], given, model)
    if given is not None:
        model = model or given.model
        dataset = dataset or (None if text else given.dataset)
        limit = limit or given.tokens
    if text and dataset:
        raise ConfigError(f"{text[0]} and --dataset {dataset}: one source of text is enough")
    pattern = out or (CacheConfig.out if len(hooks) == 1 else f"{CacheConfig.out}-{{hook}}")
    if len(hooks) > 1 and "{hook}" not in pattern:
        raise ConfigError(f"-o {pattern}: {len(hooks)} hooks need {{hook}} in the name", "-o 'acts-{hook}'")
    check_output(Path(pattern))
    embedded = not text and dataset is None

    from saetool.engines import cache_request

    request = cache_request.Request(
        ctx_len=ctx_len,
        bos=bos,
        keep_special=keep_special,
        max_norm=max_norm,
        center=center,
        heldout=heldout,
        dtype=DTYPES[dtype],
        storage=storage or DTYPES[dtype],
        batch_size=batch_size,
        tokens=CacheConfig.tokens if embedded and limit is None else limit,
    )
    cache_run.text(request, hooks, model, lambda: _texts(text, dataset, dataset_config, split, field), pattern, running)


def _check(
    dtype: str, store: str | None, ctx_len: int, batch_size: int | None, heldout: float, max_norm: float | None
) -> None:
    """Raise ``ConfigError`` for values that cannot work alone."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: unknown", f"one of {', '.join(DTYPES)}")
    if store is not None and store not in STORES:
        raise ConfigError(f"--store {store}: unknown", f"one of {', '.join(STORES)}")
    if ctx_len < 2 or (batch_size is not None and batch_size < 1):
        raise ConfigError("--ctx-len must be at least 2, --batch-size at least 1")
    if not 0 <= heldout < 1:
        raise ConfigError(f"--heldout {heldout}: not a share of the documents", "0 ≤ share < 1; 0 holds out nothing")
    if max_norm is not None and not max_norm > 1:
        raise ConfigError(f"--max-norm {max_norm}: must be above 1, the median itself")


def _preset(name: str | None) -> Preset | None:
    if name is not None and name not in PRESETS:
        raise ConfigError(f"--preset {name}: unknown", f"one of {', '.join(PRESETS)}")
    return PRESETS[name] if name else None


def _hooks(hooks: list[str], layers: list[int], preset: Preset | None, model: str | None) -> list[str]:
    """The hooks asked for, by ``--hook`` or ``--layer``, or those that go without saying."""
    if hooks and layers:
        raise ConfigError("--hook and --layer say the same thing: give one of them")
    for layer in layers:
        if layer < 0:
            raise ConfigError(f"--layer {layer}: counting starts at 0")
    wanted = hooks or [f"blocks.{layer}.hook_resid_post" for layer in layers]
    if not wanted and preset is not None:
        wanted = [preset.hook]
    if not wanted and model is not None:
        raise ConfigError("--model needs --hook or --layer", "such as --layer 8, or --hook blocks.8.hook_resid_pre")
    return wanted or [CacheConfig.hook]


def _texts(
    text: list[str] | None, dataset: str | None, dataset_config: str | None, split: str, field: str | None
) -> "Texts":
    from saetool.engines import text as sources

    if text:
        return sources.from_paths(text, field)
    if dataset is not None:
        return sources.from_dataset(dataset, dataset_config, split, field)
    return sources.embedded()
