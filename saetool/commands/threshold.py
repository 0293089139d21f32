"""``saetool threshold``: a BatchTopK SAE → the JumpReLU SAE that encodes single tokens."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.artifacts.cache import HELDOUT, TRAIN, open_cache
from saetool.commands.checks import check_site
from saetool.config import ThresholdConfig
from saetool.console import Console
from saetool.errors import ConfigError
from saetool.options import DebugFlag, Device, DryRun, Json, Overwrite, Quiet, Seed, resolve_device


def threshold(
    sae: Annotated[Path, typer.Argument(help="A BatchTopK or TopK SAE (- reads standard input).")],
    acts: Annotated[Path, typer.Argument(help="The activation cache.")] = Path("acts"),
    batches: Annotated[int, typer.Option(help="Batches of the train split to average over.")] = ThresholdConfig.batches,
    batch_size: Annotated[
        int | None, typer.Option(help="Tokens per batch.", show_default="as in training")
    ] = ThresholdConfig.batch_size,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The SAE with its threshold.", show_default="SAE-threshold.st"),
    ] = None,
    overwrite: Overwrite = False,
    seed: Seed = ThresholdConfig.seed,
    device: Device = "auto",
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: DebugFlag = False,
) -> None:
    """Estimate the inference threshold: the mean over batches of the smallest positive kept activation (eq. 8).

    Prints asked and achieved L0 on held-out data, and writes a JumpReLU SAE.

    Example: saetool threshold sae.st acts -o sae-threshold.st
    """
    from saetool.artifacts import sae as sae_files

    if batches < 1 or (batch_size is not None and batch_size < 1):
        raise ConfigError("--batches and --batch-size must be positive")
    console = Console(quiet=quiet, as_json=json_)
    loaded = sae_files.load(sae)
    cache = open_cache(acts)
    if loaded.sae.arch not in ("batchtopk", "topk") or loaded.sae.k is None:
        raise ConfigError(f"{sae}: a {loaded.sae.arch} SAE has no threshold to estimate", "it encodes as it is")
    check_site(loaded, cache, console)
    size = batch_size or int(loaded.header.config.get("batch_size", ThresholdConfig.fallback_batch_size))
    size = min(size, cache.rows(TRAIN))
    target = out or (Path("-") if str(sae) == "-" else sae_files.beside(sae, "threshold"))
    plan = h.Plan(
        "threshold",
        h.SAE,
        {"method": "mean-min", "batches": batches, "batch_size": size, "seed": seed},
        [loaded.as_input("sae"), cache.as_input()],
        [loaded.header, cache.header],
    )
    if dry_run:
        console.plan({"input": str(sae), "batches": batches, "batch_size": size, "output": str(target)})
        return
    if container.up_to_date(target, plan, overwrite=overwrite):
        header = container.read_header(target)
        console.emit(header, target, h.sha256_file(target), header.config["threshold"], fresh=False)
        return

    from saetool.engines import threshold as engine
    from saetool.engines.reader import Reader

    where = resolve_device(device)
    model = dataclasses.replace(loaded.sae, threshold=None).map(lambda t: t.to(where))
    reader = Reader(cache, TRAIN, seed=seed, device=where)
    minima: list[float | None] = []
    with console.progress(f"threshold {loaded.name}", batches, "batches") as advance:
        for batch in engine.batch_minima(model, reader, size, batches):
            minima.append(batch.minimum)
            advance()
    estimate = engine.mean_min(minima)
    result = engine.with_threshold(loaded.sae, estimate.value)
    moved = result.map(lambda t: t.to(where))
    here = engine.check(moved, reader, size, limit=batches * size)
    held = engine.check(moved, Reader(cache, HELDOUT, device=where), size) if cache.rows(HELDOUT) else None
    facts = {
        "method": "mean-min",
        "value": estimate.value,
        "standard_error": estimate.standard_error,
        "n_batches": estimate.n_batches,
        "batch_size": size,
        "asked_l0": loaded.sae.k,
        "l0_estimation": here.l0,
        "l0_heldout": held.l0 if held else None,
        "n_tokens_heldout": held.n_tokens if held else 0,
        "explained_variance_heldout": held.explained_variance if held else None,
        "explained_variance_heldout_batch_selection": held.explained_variance_batch if held else None,
        "minima": estimate.minima,
    }
    config = {**loaded.header.config, **sae_files.config_of(result), "threshold": facts}
    header = plan.header(config=config, model=loaded.header.model, seed=seed, dtype="float32")
    sha256 = sae_files.save(target, result, header)
    achieved = here.l0 if held is None else held.l0
    console.say(
        f"theta {estimate.value:.6g} ± {estimate.standard_error:.2g} (mean of the minima of {estimate.n_batches} "
        f"batches of {size}); L0 asked {loaded.sae.k}, on {'held-out' if held else 'these'} tokens {achieved:.2f} "
        f"({achieved / loaded.sae.k - 1:+.1%})"
    )
    console.emit(header, target, sha256, {name: value for name, value in facts.items() if name != "minima"})
