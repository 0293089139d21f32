"""``saetool autointerp``: what latents stand for, in words, and how well the words predict them."""

import collections
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.artifacts.cache import Cache, open_cache
from saetool.commands import autointerp_meta
from saetool.commands.autointerp_job import SPLITS, Job, check, parse_latents
from saetool.commands.checks import check_encodes, check_site
from saetool.config import AutointerpConfig
from saetool.console import Console
from saetool.errors import ArtifactError, ConfigError
from saetool.options import DebugFlag, Device, DryRun, Json, Overwrite, Quiet, Seed, resolve_device

if TYPE_CHECKING:
    from saetool.engines.autointerp import Explained, Scored

SAMPLING = (
    *("on", "window", "split", "min_firing", "max_density"),
    *("n_top", "n_random", "n_quantile", "score_top", "score_random", "score_quantile"),
)
"""Fields of the configuration that say which windows are drawn."""
EXPLAIN, SCORE, META = "Explaining", "Scoring", "Meta-SAEs"


def autointerp(
    sae: Annotated[Path, typer.Argument(help="The SAE, or a meta-SAE (with --labels).")],
    acts: Annotated[
        Path | None, typer.Option(help="The activation cache.", show_default="acts", rich_help_panel="Files")
    ] = None,
    latents: Annotated[
        str | None,
        typer.Option(
            help="So many random alive ones, all, a list (1,5,9; one alone: 7,) or @FILE with ids.",
            show_default=f"{AutointerpConfig.latents}; all of a meta-SAE",
        ),
    ] = None,
    on: Annotated[
        str, typer.Option(help="Rows to read: all, train, or heldout (which the SAE never saw).")
    ] = AutointerpConfig.on,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = AutointerpConfig.window,
    split: Annotated[
        float, typer.Option(help="Share of the documents for explaining; the others are for scoring.")
    ] = AutointerpConfig.split,
    min_firing: Annotated[
        int, typer.Option(help="Skip a latent with fewer windows that hold an activation.")
    ] = AutointerpConfig.min_firing,
    max_density: Annotated[
        float, typer.Option(help="Skip a latent that is active on a larger share of rows.")
    ] = AutointerpConfig.max_density,
    n_top: Annotated[
        int, typer.Option(help="Windows with the largest activations.", rich_help_panel=EXPLAIN)
    ] = AutointerpConfig.n_top,
    n_random: Annotated[
        int, typer.Option(help="Windows without any activation.", rich_help_panel=EXPLAIN)
    ] = AutointerpConfig.n_random,
    n_quantile: Annotated[
        int, typer.Option(help="Windows over the range of activations, one a quantile.", rich_help_panel=EXPLAIN)
    ] = AutointerpConfig.n_quantile,
    table_size: Annotated[
        int, typer.Option(help="Tokens, and pairs of tokens, in an explanation.", rich_help_panel=EXPLAIN)
    ] = AutointerpConfig.table_size,
    score_top: Annotated[int, typer.Option(help="As --n-top.", rich_help_panel=SCORE)] = AutointerpConfig.score_top,
    score_random: Annotated[
        int, typer.Option(help="As --n-random.", rich_help_panel=SCORE)
    ] = AutointerpConfig.score_random,
    score_quantile: Annotated[
        int, typer.Option(help="As --n-quantile.", rich_help_panel=SCORE)
    ] = AutointerpConfig.score_quantile,
    labels: Annotated[
        Path | None, typer.Option(help="Explanations of the parent's latents (.jsonl).", rich_help_panel=META)
    ] = None,
    parent: Annotated[
        Path | None,
        typer.Option(help="The SAE that the meta-SAE was made from.", show_default="beside it", rich_help_panel=META),
    ] = None,
    n_options: Annotated[
        int, typer.Option(help="Options per question of the multiple choice.", rich_help_panel=META)
    ] = AutointerpConfig.n_options,
    n_questions: Annotated[
        int, typer.Option(help="Questions of the multiple choice.", rich_help_panel=META)
    ] = AutointerpConfig.n_questions,
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            help="Explanations and scores; windows go beside them, as .windows.st.",
            rich_help_panel="Files",
        ),
    ] = Path("explanations.jsonl"),
    overwrite: Overwrite = False,
    seed: Seed = AutointerpConfig.seed,
    device: Device = "auto",
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: DebugFlag = False,
) -> None:
    """Explain latents by the tokens they fire on, and score that on documents the explanation was not made from.

    An explanation is a table of tokens and of pairs of tokens with strengths from 0 to 10. Its score is the
    correlation of predicted and true activations over all tokens of the scoring windows; another latent's table on
    the same windows is the control. No language model is needed.

    A meta-SAE's latents are labelled from the explanations of the latents they are active on, and tested by multiple
    choice: which latent is it, given its meta-latents?

    Example: saetool autointerp sae-threshold.st --acts acts --latents 200 -o explanations.jsonl
    """
    config = AutointerpConfig(
        on=on,
        n_top=n_top,
        n_random=n_random,
        n_quantile=n_quantile,
        score_top=score_top,
        score_random=score_random,
        score_quantile=score_quantile,
        window=window,
        split=split,
        min_firing=min_firing,
        max_density=max_density,
        table_size=table_size,
        n_options=n_options,
        n_questions=n_questions,
        seed=seed,
    )
    check(config, out)
    console = Console(quiet=quiet, as_json=json_)
    from saetool.artifacts import sae as sae_files

    file = sae_files.load(sae)
    check_encodes(file, "explain")
    is_meta = "decoder" in (file.header.config.get("hook"), file.header.model.get("hook_name"))
    wanted = parse_latents(latents or ("all" if is_meta else AutointerpConfig.latents), file.sae.d_sae)
    job = Job(console, file, wanted, config, out, overwrite=overwrite, dry_run=dry_run)
    if is_meta:
        if acts is not None:
            raise ConfigError(f"{sae}: is a meta-SAE, which reads decoder rows and no --acts", "leave --acts out")
        if labels is None:
            raise ConfigError(
                f"{sae}: is a meta-SAE: its labels are made from its parent's", "pass --labels BASE.jsonl"
            )
        autointerp_meta.run(job, labels, parent or sae.with_name(autointerp_meta.parent_input(file)["name"]))
        return
    for name, value in (("--labels", labels), ("--parent", parent)):
        if value is not None:
            raise ConfigError(f"{name}: {sae} is no meta-SAE", "they are made by: saetool meta")
    cache = open_cache(acts or Path("acts"))
    check_site(file, cache, console)
    _check_rows(cache, config)
    _run(job, cache, device)


def _check_rows(cache: Cache, config: AutointerpConfig) -> None:
    if not sum(cache.rows(s) for s in SPLITS[config.on]):
        raise ArtifactError(f"{cache.path}: has no rows in {config.on}", "cache more text, or use another --on")
    longest = int(cache.header.config["ctx_len"])
    if config.window > longest:
        raise ConfigError(f"--window {config.window}: longer than the cache's contexts of {longest} tokens")


def _run(job: Job, cache: Cache, device: str) -> None:
    """Explain and score the latents of an SAE."""
    console, file, config = job.console, job.file, job.config
    options = {
        "explainer": "ngram",
        "scorer": "simulate",
        "latents": str(job.wanted),
        "table_size": config.table_size,
        "seed": config.seed,
        **{name: getattr(config, name) for name in SAMPLING},
    }
    plan = h.Plan(
        "autointerp",
        h.EXPLANATIONS,
        options,
        [file.as_input("sae"), cache.as_input()],
        [file.header, cache.header],
    )
    splits = [s for s in SPLITS[config.on] if cache.rows(s)]
    n_rows = sum(cache.rows(s) for s in splits)
    windows_plan = dataclasses.replace(plan, schema=h.WINDOWS)
    if job.dry_run:
        drawn = {"explaining": [config.n_top, config.n_quantile, config.n_random]}
        drawn |= {"scoring": [config.score_top, config.score_quantile, config.score_random]}
        windows = f"{config.window} tokens, top + quantile + random a latent: {drawn}"
        shown = {"sae": file.name, "latents": str(job.wanted), "rows": n_rows, "windows": windows}
        console.plan({**shown, "outputs": [str(job.out), str(job.windows_path)]})
        return
    if job.up_to_date(plan, windows_plan):
        return
    _ = cache.vocabulary  # missing: better said now than after the work
    found = _explain(job, cache, splits, n_rows, resolve_device(device))
    scored = _score(console, found, config)
    _write(job, plan, cache, found, scored, n_rows)


def _explain(job: Job, cache: Cache, splits: list[str], n_rows: int, device: str) -> "list[Explained]":
    from saetool.engines import autointerp as engine
    from saetool.engines import firings

    console, sae, config, wanted = job.console, job.file.sae, job.config, job.wanted
    with console.progress("firings", n_rows, "tokens") as advance:
        counts = firings.count(sae, cache, splits, device, advance, wanted.ids)
    alive = int((counts > 0).sum())
    if wanted.ids is not None:
        latents = list(wanted.ids)
    elif wanted.number is not None:
        latents = engine.choose(counts, wanted.number, config.seed)
        counts = counts[latents]
        if alive < wanted.number:
            console.say(f"only {alive} of {sae.d_sae} latents fire on these {n_rows:,} rows: all of them are taken")
    else:
        latents = list(range(sae.d_sae))
    total = n_rows * engine.n_passes(counts, n_rows, config.max_density)
    with console.progress("windows", total, "tokens") as advance:
        found = list(engine.explain(sae, cache, splits, latents, counts, config, device, advance))
    reasons = collections.Counter(e.reason for e in found if e.reason)
    if len(found) == sum(reasons.values()):
        said = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items())) or f"all {sae.d_sae} dead"
        raise ArtifactError(
            f"{job.file.name}: no latent could be explained on {n_rows:,} rows ({said})",
            "cache more text, or change --latents, --min-firing, --max-density",
        )
    return found


def _score(console: Console, found: "list[Explained]", config: AutointerpConfig) -> "list[Scored]":
    from saetool.engines import autointerp as engine

    scored = []
    with console.progress("score", sum(e.reason is None for e in found), "latents") as advance:
        for one in engine.score(found, config.seed):
            scored.append(one)
            advance()
    return scored


def _write(job: Job, plan: h.Plan, cache: Cache, found: "list[Explained]", scored: "list[Scored]", n_rows: int) -> None:
    """Write the windows, then the explanations: they are the mark that all is there."""
    from saetool.core.scoring import SCORE_DEFINITION
    from saetool.engines import explanations as records

    console, config = job.console, job.config
    strings = records.Strings(cache.vocabulary, str(cache.path / "vocabulary.json"))
    tensors = records.window_tensors(scored)
    payload = records.latent_records(found, scored, strings, n_rows)
    counts = records.counts(found)
    summary = {"simulate": records.simulation_summary(scored, config.seed)}
    model = cache.header.model
    sha256 = None
    if str(job.out) != "-":
        shown = {"roles": list(records.ROLES), "strings": strings.of(tensors["tokens"].unique().tolist())}
        windows_plan = dataclasses.replace(plan, schema=h.WINDOWS)
        header = windows_plan.header(config=shown, model=model, seed=config.seed, dtype="float32")
        sha256 = container.write_tensors(job.windows_path, tensors, header)
    header = plan.header(
        config={
            "explainer": {"kind": "ngram", "table_size": config.table_size},
            "backend": {"kind": "offline"},
            "sampling": {**{name: getattr(config, name) for name in SAMPLING}, "n_rows": n_rows},
            "score_definition": SCORE_DEFINITION,
            "counts": counts,
            "summary": summary,
            "strings": strings.of(records.table_tokens(scored)),
            "windows_sha256": sha256,
            "complete": True,
        },
        model=model,
        seed=config.seed,
        dtype="float32",
    )
    written = container.write_jsonl(job.out, header, payload)
    _table(console, counts, summary["simulate"])
    console.emit(header, job.out, written, {"counts": counts, "summary": summary})


def _table(console: Console, counts: dict[str, Any], summary: dict[str, Any]) -> None:
    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    skipped = ", ".join(f"{n} {reason}" for reason, n in counts["skipped"].items() if n) or "none"
    interval = summary["ci95"]
    rows = [
        ["latents asked, scored", f"{counts['requested']}, {counts['scored']} (skipped: {skipped})"],
        [
            "correlation, mean",
            shown(summary["mean"]) + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""),
        ],
        ["correlation, median", shown(summary["median"])],
        ["correlation, 10% … 90%", f"{shown(summary['q10'])} … {shown(summary['q90'])}"],
        ["undefined", f"{summary['n_null']} (mean with these as 0: {shown(summary['mean_null0'])})"],
        ["control: another latent's table", f"{shown(summary['control_mean'])} (defined for {summary['control_n']})"],
    ]
    console.table("held-out simulation by token tables", ["score", "value"], rows)
