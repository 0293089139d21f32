"""``saetool meta``: an SAE on the decoder directions of another SAE."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from saetool.config import META_PRESETS, MetaConfig
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
    parse_counts,
    resolve_device,
)

ROWS, LOOK, EDIT = "Rows", "Comparisons", "Editing"


def meta(
    context: typer.Context,
    saes: Annotated[
        list[Path], typer.Argument(metavar="SAE...", help="The parent; several: one meta-SAE of all their rows.")
    ],
    preset: Annotated[
        str | None, typer.Option(help=f"A published setting: {', '.join(META_PRESETS)}. Options given win.")
    ] = None,
    latents: Annotated[
        str | None, typer.Option(help="Meta-latents; several: 512,1024.", show_default="3/64 of the rows")
    ] = MetaConfig.latents,  # type: ignore[assignment]
    k: Annotated[str, typer.Option(help="Active meta-latents per row, on average; several: 2,4.")] = str(MetaConfig.k),
    steps: Annotated[int, typer.Option(help="Training steps.")] = MetaConfig.steps,
    batch_size: Annotated[int, typer.Option(help="Rows per step (all, if fewer).")] = MetaConfig.batch_size,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = MetaConfig.lr,
    acts: Annotated[Path | None, typer.Option(help="Count here how often latents fire.", rich_help_panel=ROWS)] = None,
    min_rate: Annotated[
        float | None,
        typer.Option(help="Leave out latents firing on this share of tokens or less.", rich_help_panel=ROWS),
    ] = MetaConfig.min_rate,
    weighted: Annotated[
        bool, typer.Option("--weighted", help="Draw rows as often as their latents fire.", rich_help_panel=ROWS)
    ] = MetaConfig.weighted,
    compare: Annotated[
        list[Path] | None,
        typer.Option(help="SAEs of the same site to compare with: a.st b.st.", rich_help_panel=LOOK),
    ] = None,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls/--no-controls", help="Train on random and shuffled rows as well.", rich_help_panel=LOOK
        ),
    ] = True,
    edit: Annotated[
        list[str] | None,
        typer.Option(help="Do not train: set META to V in a decoder row, as LATENT:META=V.", rich_help_panel=EDIT),
    ] = None,
    meta_sae: Annotated[
        Path, typer.Option("--meta-sae", help="The meta-SAE to edit with.", rich_help_panel=EDIT)
    ] = Path("meta.st"),
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild", help="Edited rows: of meta-latents alone, without the rest.", rich_help_panel=EDIT),
    ] = False,
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", help="The SAE; {latents}, {k} are filled in. Its record: .json.", rich_help_panel="Files"
        ),
    ] = Path("meta.st"),
    graph: Annotated[
        Path | None,
        typer.Option("--graph", "--dot", help="Also latent — meta-latent: .dot or .graphml.", rich_help_panel="Files"),
    ] = None,
    log: Log = None,
    overwrite: Overwrite = False,
    checkpoint_every: Annotated[
        float, typer.Option(help="Seconds between checkpoints (OUT.ckpt.st).", rich_help_panel="Running")
    ] = 60.0,
    resume: Resume = True,
    seed: Seed = MetaConfig.seed,
    device: Device = "auto",
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: DebugFlag = False,
) -> None:
    """Train a meta-SAE: which smaller set of directions are an SAE's latents made of?

    Writes an ordinary SAE file, and a record with variance explained, baselines, controls and decompositions. With
    --edit, no training: changes decoder rows through a meta-SAE, and writes the SAE.

    Example: saetool meta sae-1536.st --k 4 --compare sae-*.st -o meta.st
    """
    from saetool.commands import checks

    console = Console(quiet=quiet, as_json=json_)
    given = {n for n in context.params if context.get_parameter_source(n).name != "DEFAULT"}  # type: ignore[union-attr]
    checks.check_one_stdin([*saes, *(compare or [])])
    if edit:
        if len(saes) != 1 or "out" not in given:
            raise ConfigError("--edit needs one SAE and an output", "saetool meta SAE.st --edit 17:3=0 -o edited.st")
        from saetool.commands import meta_edit

        meta_edit.run(console, saes[0], meta_sae, edit, out, rebuild=rebuild, overwrite=overwrite, dry_run=dry_run)
        return
    for name in ("meta_sae", "rebuild"):
        if name in given:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for --edit", "saetool meta SAE.st --edit 17:3=0 -o edited.st"
            )
    chosen = {
        name: context.params[name]
        for name in ("steps", "batch_size", "lr", "min_rate", "weighted", "seed")
        if preset is None or name in given
    }
    if "steps" in given:
        chosen["epochs"] = None
    settings = dataclasses.replace(_base(preset), **chosen)
    for name in ("steps", "batch_size"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be positive")
    if (min_rate is not None or weighted) and acts is None:
        raise ConfigError("--min-rate and --weighted need to know how often latents fire", "--acts CACHE")
    widths: list[int | None] = [None] if latents is None else list(parse_counts(latents, "--latents"))
    ks = parse_counts(k, "--k") if preset is None or "k" in given else [settings.k]
    grid = [dataclasses.replace(settings, latents=width, k=one) for width in widths for one in ks]
    for name, several in (("latents", len(widths) > 1), ("k", len(ks) > 1)):
        if several and f"{{{name}}}" not in str(out):
            raise ConfigError(f"-o {out}: several --{name} need {{{name}}} in the name", "-o 'meta-{latents}-{k}.st'")
    if graph is not None:
        from saetool.commands.meta_graph import check_suffix

        check_suffix(graph)
        if len(grid) > 1:
            raise ConfigError(f"--graph {graph}: one graph, and {len(grid)} meta-SAEs", "export one at a time")

    from saetool.commands.meta_job import Job

    job = Job(console, settings, grid, saes, compare or [], acts, preset, controls, out)
    if dry_run:
        console.plan(job.dry())
        return
    job.go(
        device=resolve_device(device),
        log=log,
        graph=graph,
        overwrite=overwrite,
        resume=resume,
        checkpoint_every=checkpoint_every,
    )


def _base(preset: str | None) -> MetaConfig:
    """What options given explicitly are laid over."""
    if preset is None:
        return MetaConfig()
    if preset not in META_PRESETS:
        raise ConfigError(f"--preset {preset}: unknown", f"one of {', '.join(META_PRESETS)}")
    options: dict[str, Any] = META_PRESETS[preset].options
    return MetaConfig(**options)
