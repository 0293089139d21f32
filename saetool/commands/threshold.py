"""``saetool threshold``: an SAE that selects over batches → the JumpReLU SAE that encodes single tokens."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saetool.artifacts import container, writing
from saetool.artifacts import header as h
from saetool.artifacts.cache import HELDOUT, TRAIN, Cache, open_cache
from saetool.commands.checks import check_site
from saetool.config import ThresholdConfig
from saetool.console import Console
from saetool.errors import ArtifactError, ConfigError
from saetool.options import DebugFlag, Device, DryRun, Json, Overwrite, Quiet, Seed, resolve_device

if TYPE_CHECKING:
    from saetool.artifacts.sae import SAEFile
    from saetool.core.sae import SAE
    from saetool.core.threshold import Estimate
    from saetool.engines.threshold import Check

METHODS = ("mean-min", "target-l0", "per-latent")


def threshold(
    sae: Annotated[Path, typer.Argument(help="An SAE, most often BatchTopK or TopK (- reads standard input).")],
    acts: Annotated[Path, typer.Argument(help="The activation cache.")] = Path("acts"),
    method: Annotated[
        str,
        typer.Option(help="mean-min (eq. 8), target-l0 (the exact quantile), per-latent (each latent's own rate)."),
    ] = ThresholdConfig.method,
    l0: Annotated[
        float | None, typer.Option("--l0", help="Active latents per token to aim for.", show_default="the SAE's k")
    ] = None,
    batches: Annotated[int, typer.Option(help="Batches of the train split to use.")] = ThresholdConfig.batches,
    batch_size: Annotated[
        int | None, typer.Option(help="Tokens per batch.", show_default="as in training")
    ] = ThresholdConfig.batch_size,
    precision: Annotated[
        float, typer.Option(help="Largest standard error of the threshold, as a share of it.")
    ] = ThresholdConfig.precision,
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
    """Estimate the inference threshold, by default the mean over batches of the smallest positive kept activation.

    Says what L0 was asked for and achieved on held-out data, and what explained variance the threshold costs against
    selection over batches; refuses where the data do not determine the threshold as closely as --precision asks.
    With --l0 it also gives a new threshold to an SAE whose own is missing or wrong.

    Example: saetool threshold sae.st acts -o sae-threshold.st
    """
    from saetool.artifacts import sae as sae_files
    from saetool.core.threshold import with_unit_rows

    if batches < 2 or (batch_size is not None and batch_size < 1):
        raise ConfigError("--batches must be at least 2, and --batch-size positive")
    if method not in METHODS:
        raise ConfigError(f"--method {method}: unknown", f"one of {', '.join(METHODS)}")
    if not precision > 0:
        raise ConfigError(f"--precision {precision}: must be positive")
    console = Console(quiet=quiet, as_json=json_)
    loaded = sae_files.load(sae)
    cache = open_cache(acts)
    k = _asked(loaded, l0)
    check_site(loaded, cache, console)
    size = _batch_size(loaded, batch_size, cache, console)
    n_batches = _batches(cache, size, batches, console)
    target = out or (Path("-") if str(sae) == "-" else sae_files.beside(sae, "threshold"))
    options = {"method": method, "l0": k, "batches": n_batches, "batch_size": size, "seed": seed}
    plan = h.Plan(
        "threshold",
        h.SAE,
        options,
        [loaded.as_input("sae"), cache.as_input()],
        [loaded.header, cache.header],
    )
    if dry_run:
        tokens = {"tokens": n_batches * size, "tokens_heldout": cache.rows(HELDOUT)}
        console.plan({"input": str(sae), **options, **tokens, "precision": precision, "output": str(target)})
        return
    if writing.up_to_date(target, plan, overwrite=overwrite):
        header = container.read_header(target)
        console.emit(header, target, h.sha256_file(target), header.config["threshold"], fresh=False)
        return
    where = resolve_device(device)
    estimate = _estimate(console, loaded, cache, options, where)
    if not estimate.relative_error <= precision:
        raise _too_few(loaded.name, estimate, precision, n_batches, size, cache.rows(TRAIN))
    result, checks = _checked(loaded.sae, estimate, cache, options, where)
    folded = with_unit_rows(result)
    facts = _facts(estimate, checks, options, folded=folded is not result)
    config = {**loaded.header.config, **sae_files.config_of(folded), "threshold": facts}
    header = plan.header(config=config, model=loaded.header.model, seed=seed, dtype="float32")
    sha256 = sae_files.save(target, folded, header)
    _table(console, estimate, checks, k, size)
    console.emit(header, target, sha256, {name: value for name, value in facts.items() if name != "minima"})


def _asked(loaded: "SAEFile", l0: float | None) -> float:
    """The L0 to aim for: ``--l0``, else the SAE's k."""
    if l0 is not None:
        if not 0 < l0 <= loaded.sae.d_sae:
            raise ConfigError(f"--l0 {l0}: not between 0 and the {loaded.sae.d_sae} latents")
        return l0
    k = loaded.sae.k or loaded.header.config.get("k")
    if not k:
        raise ConfigError(
            f"{loaded.name}: a {loaded.sae.arch} SAE encodes as it is, and states no k to estimate a threshold for",
            "to give it one all the same: --l0 N, the active latents per token to aim for",
        )
    return float(k)


def _batch_size(loaded: "SAEFile", given: int | None, cache: Cache, console: Console) -> int:
    stated = loaded.header.config.get("batch_size")
    size = given or stated or ThresholdConfig.fallback_batch_size
    if given is None and not stated:
        console.say(
            f"note: {loaded.name} does not say its training batch size; batches of {size} tokens (--batch-size)"
        )
    rows = cache.rows(TRAIN)
    if 2 * size > rows:
        raise ArtifactError(
            f"{cache.path}: its train split has {rows:,} rows, and two batches of {size:,} tokens are the least from "
            "which a threshold and its standard error can be estimated",
            f"cache more text, or --batch-size {max(rows // 20, 1)}",
        )
    return int(size)


def _batches(cache: Cache, size: int, asked: int, console: Console) -> int:
    """As many batches as asked for, or as there are without using a row twice."""
    there = cache.rows(TRAIN) // size
    if there < asked:
        console.say(f"note: {there} batches of {size} tokens, all that the train split holds, instead of {asked}")
    return min(asked, there)


def _estimate(console: Console, loaded: "SAEFile", cache: Cache, options: dict[str, Any], where: str) -> "Estimate":
    from saetool.core.threshold import Pool, mean_min, per_latent, target_l0
    from saetool.engines import threshold as engine
    from saetool.engines.reader import Reader

    k, size, n_batches, method = (options[name] for name in ("l0", "batch_size", "batches", "method"))
    model = dataclasses.replace(loaded.sae, threshold=None).map(lambda t: t.to(where))
    reader = Reader(cache, TRAIN, seed=options["seed"], device=where)
    minima: list[float | None] = []
    passes = n_batches * (1 if method == "mean-min" else 2)
    with console.progress(f"threshold {loaded.name}", passes, "batches") as advance:
        for batch in engine.batch_minima(model, reader, size, n_batches, k):
            minima.append(batch.minimum)
            advance()
        estimate = mean_min(minima)
        if method == "mean-min":
            return estimate
        for event in engine.pool(model, reader, size, minima):
            if not isinstance(event, Pool):
                advance()
                continue
            if method == "target-l0":
                return target_l0(minima, event, k, n_batches * size)
            return per_latent(minima, event)
    raise AssertionError("a pool ends with its result")


def _checked(
    sae: "SAE", estimate: "Estimate", cache: Cache, options: dict[str, Any], where: str
) -> tuple["SAE", dict[str, "Check"]]:
    """The SAE with its threshold, and what that gives on the batches used and on held-out data (where there is any)."""
    from saetool.core.threshold import with_threshold
    from saetool.engines import threshold as engine
    from saetool.engines.reader import Reader

    k, size, seed = (options[name] for name in ("l0", "batch_size", "seed"))
    result = with_threshold(sae, estimate.value if estimate.values is None else estimate.values)
    moved = result.map(lambda t: t.to(where))
    train = Reader(cache, TRAIN, seed=seed, device=where)
    checks = {"estimation": engine.check(moved, train, size, k, limit=options["batches"] * size)}
    if cache.rows(HELDOUT):
        checks["heldout"] = engine.check(moved, Reader(cache, HELDOUT, device=where), size, k)
    return result, checks


def _too_few(
    name: str, estimate: "Estimate", precision: float, n_batches: int, size: int, rows: int
) -> ConfigError | ArtifactError:
    """Why the threshold is not known closely enough, and what would help."""
    known = f"{estimate.relative_error:.1%}" if math.isfinite(estimate.relative_error) else "nothing"
    message = (
        f"{name}: from {n_batches} batches of {size} tokens the threshold is known to {known} (standard error), "
        f"and --precision asks for {precision:.2g} of it"
    )
    if not math.isfinite(estimate.relative_error):
        return ArtifactError(message, "the SAE is silent on these activations: are they from its hook?")
    needed = math.ceil(n_batches * (estimate.relative_error / precision) ** 2 * 1.1)
    if needed * size <= rows:
        return ConfigError(message, f"--batches {needed}, or a larger --precision")
    return ArtifactError(message, f"cache about {needed * size:,} tokens, or pass a larger --precision")


def _facts(
    estimate: "Estimate", checks: dict[str, "Check"], options: dict[str, Any], *, folded: bool
) -> dict[str, Any]:
    """What the SAE's header says of its threshold."""
    here, held = checks["estimation"], checks.get("heldout")
    facts: dict[str, Any] = {
        "method": estimate.method,
        "value": estimate.value,
        "standard_error": estimate.standard_error,
        "relative_error": estimate.relative_error,
        "n_batches": estimate.n_batches,
        "n_tokens": here.n_tokens,
        "batch_size": options["batch_size"],
        "asked_l0": options["l0"],
        "l0_estimation": here.l0,
        "l0_estimation_standard_error": here.l0_standard_error,
        "explained_variance_estimation": here.explained_variance,
        "explained_variance_estimation_batch_selection": here.explained_variance_batch,
        "l0_heldout": held.l0 if held else None,
        "l0_heldout_standard_error": held.l0_standard_error if held else None,
        "n_tokens_heldout": held.n_tokens if held else 0,
        "explained_variance_heldout": held.explained_variance if held else None,
        "explained_variance_heldout_batch_selection": held.explained_variance_batch if held else None,
        "minima": estimate.minima,
    }
    if folded:  # the stored threshold is then value · ‖d‖ of each latent
        facts["decoder_norms_folded"] = True
    if estimate.values is not None:
        ends = [estimate.values.min(), estimate.values.median(), estimate.values.max()]
        facts["values"] = dict(zip(("min", "median", "max"), (float(v) for v in ends), strict=True))
    return facts


def _error(standard_error: float) -> str:
    """Nothing where there is none: of a single batch."""
    return "" if math.isnan(standard_error) else f" ± {standard_error:.2g}"


def _table(console: Console, estimate: "Estimate", checks: dict[str, "Check"], k: float, size: int) -> None:
    rows = [
        [
            name,
            f"{c.n_tokens:,}",
            f"{k:g}",
            f"{c.l0:.3f}{_error(c.l0_standard_error)}",
            f"{c.l0 / k - 1:+.2%}",
            f"{c.explained_variance_batch:.4f}",
            f"{c.explained_variance:.4f}",
            f"{c.explained_variance_batch - c.explained_variance:+.1g}",
        ]
        for name, c in checks.items()
    ]
    theta = (
        f"theta {estimate.value:.6g}{_error(estimate.standard_error)}"
        if estimate.value is not None
        else f"one theta per latent, each ± {estimate.relative_error:.2%}"
    )
    columns = ["tokens of", "n", "L0 asked", "L0 achieved", "off", "EV batch selection", "EV threshold", "EV lost"]
    console.table(f"{theta}: {estimate.method}, {estimate.n_batches} batches of {size} tokens", columns, rows)
