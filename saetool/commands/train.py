"""``saetool train``: activations → SAEs."""

from pathlib import Path
from typing import Annotated

import typer

from saetool.artifacts import container, writing
from saetool.artifacts import header as h
from saetool.artifacts.cache import open_cache
from saetool.commands.train_plan import describe, products, settings
from saetool.commands.train_source import CacheSource, LiveSource, Source, Wanted
from saetool.config import ARCHITECTURES, RECIPES, CacheConfig, TrainConfig
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
    Seed,
    resolve_device,
)

SAES, OPTIMIZER, SPARSITY, START = "The SAE", "Optimisation", "Sparsity and dead latents", "Starting point"
LIVE = "A model in place of a cache"


def train(
    context: typer.Context,
    acts: Annotated[Path, typer.Argument(help="The activation cache.")] = Path("acts"),
    preset: Annotated[
        str | None, typer.Option(help=f"Start from a recipe: {', '.join(RECIPES)}.", rich_help_panel=START)
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="Start from the settings of this SAE, on the same data.", rich_help_panel=START),
    ] = None,
    arch: Annotated[str, typer.Option(help=f"{', '.join(ARCHITECTURES)}.", rich_help_panel=SAES)] = TrainConfig.arch,
    latents: Annotated[
        str,
        typer.Option(
            help="Width; several (768,1536) train a ladder at once, or are the nested widths of a matryoshka.",
            rich_help_panel=SAES,
        ),
    ] = str(TrainConfig.latents),
    k: Annotated[
        int, typer.Option(help="Active latents per token (batchtopk, topk, matryoshka).", rich_help_panel=SAES)
    ] = TrainConfig.k,
    decoder_norm: Annotated[
        str | None,
        typer.Option(
            help="Decoder rows: unit, or free and folded on save.",
            show_default="free for relu and gated",
            rich_help_panel=SAES,
        ),
    ] = None,
    freeze_decoder: Annotated[
        bool,
        typer.Option(
            "--freeze-decoder", help="Leave the decoder at its random start: a control.", rich_help_panel=SAES
        ),
    ] = TrainConfig.freeze_decoder,
    b_dec_init: Annotated[
        str, typer.Option(help="b_dec starts at the mean, geometric-median or zero.", rich_help_panel=SAES)
    ] = TrainConfig.b_dec_init,
    normalize: Annotated[
        bool,
        typer.Option(
            "--normalize/--no-normalize", help="Scale inputs to E‖x‖² = d (folded on save).", rich_help_panel=SAES
        ),
    ] = TrainConfig.normalize,
    tokens: Annotated[
        str, typer.Option(help="Length of the run in tokens: 500k, 8M.", rich_help_panel=OPTIMIZER)
    ] = "8M",
    batch_size: Annotated[
        int, typer.Option(help="Tokens per step.", rich_help_panel=OPTIMIZER)
    ] = TrainConfig.batch_size,
    lr: Annotated[
        float | None,
        typer.Option(help="Adam's learning rate.", show_default="2e-4·√(16384/latents)", rich_help_panel=OPTIMIZER),
    ] = None,
    warmup: Annotated[
        float, typer.Option(help="Share (above 1: number) of the steps with rising lr.", rich_help_panel=OPTIMIZER)
    ] = TrainConfig.warmup,
    decay: Annotated[
        float,
        typer.Option(help="Share (above 1: number) of the last steps, with falling lr.", rich_help_panel=OPTIMIZER),
    ] = TrainConfig.decay,
    clip: Annotated[
        float, typer.Option(help="Largest norm of the gradient; 0: any.", rich_help_panel=OPTIMIZER)
    ] = TrainConfig.clip,
    dtype: Annotated[
        str, typer.Option(help="Matrix products of relu, gated, jumprelu: fp32, bf16.", rich_help_panel=OPTIMIZER)
    ] = TrainConfig.dtype,
    l1: Annotated[
        float, typer.Option(help="λ of relu and gated, on inputs with E‖x‖² = d.", rich_help_panel=SPARSITY)
    ] = TrainConfig.l1,
    l0: Annotated[
        float, typer.Option(help="λ of jumprelu, on inputs with E‖x‖² = d.", rich_help_panel=SPARSITY)
    ] = TrainConfig.l0,
    penalty: Annotated[
        str, typer.Option(help="What λ of jumprelu weighs: l0 or tanh.", rich_help_panel=SPARSITY)
    ] = TrainConfig.penalty,
    sparsity_warmup: Annotated[
        float, typer.Option(help="Share (above 1: number) of the steps with rising λ.", rich_help_panel=SPARSITY)
    ] = TrainConfig.sparsity_warmup,
    bandwidth: Annotated[
        float | None, typer.Option(help="Kernel width of jumprelu.", show_default="0.1", rich_help_panel=SPARSITY)
    ] = None,
    aux_alpha: Annotated[
        float, typer.Option(help="Weight of AuxK (batchtopk, topk, matryoshka).", rich_help_panel=SPARSITY)
    ] = TrainConfig.aux_alpha,
    aux_scale: Annotated[
        str, typer.Option(help="AuxK's own scale: plain, dead-share, variance.", rich_help_panel=SPARSITY)
    ] = TrainConfig.aux_scale,
    k_aux: Annotated[
        int | None,
        typer.Option(help="Dead latents AuxK uses.", show_default="power of 2 near d/2", rich_help_panel=SPARSITY),
    ] = None,
    dead_after: Annotated[
        str | None,
        typer.Option(
            help="Tokens without firing until a latent is dead.",
            show_default="10M or a tenth of the run",
            rich_help_panel=SPARSITY,
        ),
    ] = None,
    resample: Annotated[
        str | None,
        typer.Option(
            help="Tokens between resamplings of dead latents (relu).", show_default="never", rich_help_panel=SPARSITY
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Compute activations while training: hub id, folder or .gguf.", rich_help_panel=LIVE),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Files, folders or globs of text, as of saetool cache.", rich_help_panel=LIVE),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="A dataset of the hub as text.", rich_help_panel=LIVE)] = None,
    hook: Annotated[str | None, typer.Option(help="Where in the model.", rich_help_panel=LIVE)] = None,
    layer: Annotated[int | None, typer.Option(help="Short for blocks.L.hook_resid_post.", rich_help_panel=LIVE)] = None,
    ctx_len: Annotated[
        int, typer.Option("--ctx-len", "--context-size", help="Tokens per context.", rich_help_panel=LIVE)
    ] = CacheConfig.ctx_len,
    max_norm: Annotated[
        float | None, typer.Option(help="Drop rows above this multiple of the median norm.", rich_help_panel=LIVE)
    ] = CacheConfig.max_norm,
    out: Annotated[
        str,
        typer.Option("-o", "--out", help="The SAE; {latents} in it is the width.", rich_help_panel="Files"),
    ] = "sae.st",
    log: Log = None,
    log_every: Annotated[
        int | None,
        typer.Option(help="Steps between log records.", show_default="1/200 of the run", rich_help_panel="Files"),
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write the metrics for TensorBoard here, too.", rich_help_panel="Files")
    ] = None,
    overwrite: Overwrite = False,
    checkpoint_every: Annotated[
        float, typer.Option(help="Seconds between checkpoints (OUT.ckpt.st).", rich_help_panel="Running")
    ] = 60.0,
    export_partial: Annotated[
        bool,
        typer.Option(
            "--export-partial", help="Train no more: write the checkpoint as an SAE.", rich_help_panel="Running"
        ),
    ] = False,
    resume: Resume = True,
    seed: Seed = TrainConfig.seed,
    device: Device = "auto",
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: DebugFlag = False,
) -> None:
    """Train sparse autoencoders on the train split of a cache.

    Several widths share one read of the data; each file equals the one trained alone. Under torchrun the batch is
    divided among the processes. With --model or --text no cache is needed: a model computes activations meanwhile.

    Example: saetool train acts --arch batchtopk --k 32 --latents 768,1536 -o 'sae-{latents}.st'
    """
    console = Console(quiet=quiet, as_json=json_)
    wanted_live = Wanted(model, text or [], dataset, hook, layer, ctx_len, max_norm)
    source: Source = LiveSource(wanted_live, console) if wanted_live.any() else CacheSource(open_cache(acts))
    base, widths = settings(context, source)
    if log_every is not None and log_every < 1:
        raise ConfigError(f"--log-every {log_every}: must be at least 1")
    wanted = products(base, widths, source, out)
    if dry_run:
        console.plan(describe(base, wanted, source, preset))
        return

    from saetool.commands.train_run import Run
    from saetool.engines.processes import join

    processes, device = join(resolve_device(device), tensors=True)
    if not export_partial:
        done = [p for p in wanted if writing.up_to_date(p.path, p.plan, overwrite=overwrite)]
        processes.wait()  # before any of them is made
        for product in done if processes.leads else []:
            header = container.read_header(product.path)
            metrics = dict(header.config.get("train_metrics", {}))
            console.emit(header, product.path, h.sha256_file(product.path), metrics, fresh=False)
        wanted = [p for p in wanted if p not in done]
    if wanted:
        run = Run(console, source, wanted, processes, device, log, tensorboard)
        if export_partial:
            run.export_partial(overwrite=overwrite)
        else:
            run.go(resume=resume, checkpoint_every=checkpoint_every, log_every=log_every)
    processes.leave()
