"""``saetool eval``: how good SAEs are, from a cache and, if asked, with the language model."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saetool.artifacts import container, writing
from saetool.artifacts import header as h
from saetool.artifacts.cache import Cache, open_cache
from saetool.commands.checks import check_encodes, check_one_stdin, check_site, check_split
from saetool.config import DTYPES, EvalConfig
from saetool.console import Console
from saetool.errors import ConfigError
from saetool.options import (
    CEDtype,
    CEModel,
    CETokens,
    CrossEntropy,
    DebugFlag,
    Device,
    DryRun,
    Json,
    Overwrite,
    Quiet,
    parse_count,
    resolve_device,
)

if TYPE_CHECKING:
    from saetool.artifacts.sae import SAEFile
    from saetool.core.bootstrap import Interval
    from saetool.engines.evaluate import Reconstruction
    from saetool.engines.loss_recovered import Measured

FEW_DOCUMENTS = 20
"""Below so many documents a bootstrap interval is too narrow to be believed."""
BREAKDOWNS = ("position", "token")


def eval_(
    saes: Annotated[list[Path], typer.Argument(help="One or more SAEs (one may be - for standard input).")],
    acts: Annotated[Path, typer.Option(help="The activation cache.")] = Path("acts"),
    split: Annotated[str, typer.Option(help="heldout or train.")] = EvalConfig.split,
    tokens: Annotated[
        str | None, typer.Option(help="Use the first so many rows of the split.", show_default="all")
    ] = None,
    by: Annotated[
        list[str] | None, typer.Option(help="Also by position in the context, or by token: position, token.")
    ] = None,
    ce: CrossEntropy = False,
    model: CEModel = None,
    ce_tokens: CETokens = str(EvalConfig.ce_tokens),
    batch_size: Annotated[int, typer.Option(help="Tokens per batch; changes no result.")] = EvalConfig.batch_size,
    dtype: CEDtype = EvalConfig.dtype,
    out: Annotated[Path, typer.Option("-o", "--out", help="The JSON record.", show_default="standard output")] = Path(
        "-"
    ),
    overwrite: Overwrite = False,
    device: Device = "auto",
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: DebugFlag = False,
) -> None:
    """Measure reconstruction, sparsity and, with --ce, the loss the model recovers; 95% intervals by document.

    Example: saetool eval sae-768.st sae-1536.st --acts acts --ce -o eval.json
    """
    from saetool.artifacts import sae as sae_files

    console = Console(quiet=quiet, as_json=json_)
    check_one_stdin(saes)
    cache = open_cache(acts)
    check_split(cache, split)
    files = [sae_files.load(path) for path in saes]
    for file in files:
        check_site(file, cache, console)
        check_encodes(file, "evaluate")
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size}: must be positive")
    breakdowns = sorted(set(by or []))
    if unknown := set(breakdowns) - set(BREAKDOWNS):
        raise ConfigError(f"--by {', '.join(sorted(unknown))}: unknown", f"one of {', '.join(BREAKDOWNS)}")
    limit = None if tokens is None else parse_count(tokens, "--tokens")
    with_ce = ce or model is not None
    options: dict[str, Any] = {"split": split, "tokens": limit, "by": breakdowns}
    if with_ce or "token" in breakdowns:
        cache.check_text()
    if with_ce:
        options |= ce_options(ce_tokens, model, dtype)
    plan = h.Plan(
        "eval",
        h.EVAL,
        options,
        [*(f.as_input("sae") for f in files), cache.as_input()],
        [*(f.header for f in files), cache.header],
    )
    n_rows = min(limit or cache.rows(split), cache.rows(split))
    if dry_run:
        facts = {"saes": [f.name for f in files], "split": split, "rows": n_rows, "by": breakdowns, "ce": with_ce}
        console.plan({**facts, "ce_tokens": options.get("ce_tokens"), "output": str(out)})
        return
    if writing.up_to_date(out, plan, overwrite=overwrite):
        console.emit(container.read_header(out), out, h.sha256_file(out), {}, fresh=False)
        return
    where = resolve_device(device)
    moved = [f.sae.map(lambda t: t.to(where)) for f in files]
    found = _reconstructions(console, cache, moved, options, batch_size, n_rows, where)
    measured = _losses(console, cache, moved, options, where) if with_ce else [None] * len(files)
    entries = [_entry(*parts) for parts in zip(files, found, measured, strict=True)]
    payload = {"split": split, "n_tokens": found[0].n_tokens, "n_documents": found[0].n_documents, "saes": entries}
    header = plan.header(model=cache.header.model, dtype="float32")
    sha256 = writing.write_json(out, header, payload)
    _table(console, payload)
    _warnings(console, cache, payload)
    console.emit(header, out, sha256, {"saes": len(files), "n_tokens": payload["n_tokens"]})


def ce_options(ce_tokens: str, model: str | None, dtype: str) -> dict[str, Any]:
    """The options of --ce, as they go into a plan. Raises ``ConfigError`` for those that mean nothing."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: unknown", f"one of {', '.join(DTYPES)}")
    return {"ce_tokens": parse_count(ce_tokens, "--ce-tokens"), "model": model, "dtype": DTYPES[dtype]}


def _reconstructions(
    console: Console,
    cache: Cache,
    moved: list[Any],
    options: dict[str, Any],
    batch_size: int,
    n_rows: int,
    where: str,
) -> list["Reconstruction"]:
    from saetool.engines.evaluate import Read, reconstruct

    results: list[Reconstruction] = []
    with console.progress("eval", n_rows, "tokens") as advance:
        for event in reconstruct(
            moved, cache, options["split"], batch_size, limit=options["tokens"], device=where, by=options["by"]
        ):
            if isinstance(event, Read):
                advance(event.n)
            else:
                results = event
    return results


def _losses(console: Console, cache: Cache, moved: list[Any], options: dict[str, Any], where: str) -> list["Measured"]:
    from saetool.engines.evaluate import Read
    from saetool.engines.loss_recovered import contexts, measure
    from saetool.engines.model import load_model
    from saetool.engines.source import find_site

    data = contexts(cache, options["split"], options["ce_tokens"])
    lm = load_model(model_name(cache, options["model"]), device=where, dtype=options["dtype"])
    site = find_site(lm.model, cache.header.model["hook_name"])
    results: list[Measured] = []
    passes = int(data.cached[:, :-1].sum()) * (len(moved) + 2)
    with console.progress("eval --ce", passes, "token passes") as advance:
        for event in measure(lm, site, moved, data, cache.moments()["mean"], EvalConfig.ce_contexts):
            if isinstance(event, Read):
                advance(event.n)
            else:
                results = event
    return results


def _entry(file: "SAEFile", found: "Reconstruction", measured: "Measured | None") -> dict[str, Any]:
    """One SAE's part of the record."""
    metrics = {**dataclasses.asdict(found.quality), "c_dec": found.decoder.c_dec}
    ce = dataclasses.asdict(measured.values) if measured else None
    ends: dict[str, Interval] = {**found.intervals, **(measured.intervals if measured else {})}
    return {
        "name": file.name,
        "sha256": file.sha256,
        "arch": file.sae.arch,
        "inference": file.sae.inference,
        "k": file.sae.k,
        "d_sae": file.sae.d_sae,
        "seed": file.header.seed,
        "metrics": metrics,
        "intervals": {name: list(interval) for name, interval in ends.items()},
        "density": {"log10_edges": found.density_edges, "counts": found.density_counts},
        "decoder": dataclasses.asdict(found.decoder),
        "recovery_bound": {**dataclasses.asdict(found.bound), "constant": 1},
        "ce": ce,
        "by": {name: {"ids": part.ids, "n": part.n, **part.metrics} for name, part in found.breakdowns.items()},
        "saelens": _saelens_groups(metrics, ce, found.n_tokens),
    }


def _saelens_groups(metrics: dict[str, Any], ce: dict[str, Any] | None, n_tokens: int) -> dict[str, dict[str, Any]]:
    """The same numbers under SAELens' names and groups; its ablation is to zero."""
    groups = {
        "reconstruction_quality": ("explained_variance", "explained_variance_legacy", "mse", "cossim"),
        "shrinkage": ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"),
        "sparsity": ("l0", "l1"),
    }
    found: dict[str, dict[str, Any]] = {group: {n: metrics[n] for n in names} for group, names in groups.items()}
    found["token_stats"] = {"total_tokens_eval_sparsity_variance": n_tokens}
    if ce is not None:
        found["model_behavior_preservation"] = {
            "kl_div_score": ce["kl_div_score_zero"],
            "kl_div_with_ablation": ce["kl_div_with_zero_ablation"],
            "kl_div_with_sae": ce["kl_div_with_sae"],
        }
        found["model_performance_preservation"] = {
            "ce_loss_score": ce["ce_loss_score_zero"],
            "ce_loss_with_ablation": ce["ce_loss_with_zero_ablation"],
            "ce_loss_with_sae": ce["ce_loss_with_sae"],
            "ce_loss_without_sae": ce["ce_loss_without_sae"],
        }
        found["token_stats"]["total_tokens_eval_reconstruction"] = ce["n_tokens"]
    return found


def model_name(cache: Cache, given: str | None) -> str | None:
    """What to load for ``--ce``: the name given, else the one the cache records (None: the embedded model)."""
    if given is not None:
        return given
    from saetool.engines.model import EMBEDDED_REQUIREMENT

    recorded = cache.header.model.get("id")
    embedded = EMBEDDED_REQUIREMENT.partition("==")[0]
    return None if recorded is None or str(recorded).startswith(embedded) else str(recorded)


def _warnings(console: Console, cache: Cache, payload: dict[str, Any]) -> None:
    for entry in payload["saes"]:
        explained = entry["metrics"]["explained_variance"]
        if explained < 0:
            hook = cache.header.model.get("hook_name") or "this cache's hook"
            console.say(
                f"warning: {entry['name']}: explained variance {explained:.3f} is negative: these activations "
                f"({hook}) are probably not from the hook this SAE was trained on"
            )
    if payload["n_documents"] < FEW_DOCUMENTS:
        n = payload["n_documents"]
        console.say(
            f"warning: the intervals come from {n} documents, and are too narrow"
            if n > 1
            else "warning: one document only, so there are no intervals"
        )


def _table(console: Console, payload: dict[str, Any]) -> None:
    columns = ["SAE", "latents", "L0", "mse", "explained_variance", "95%", "dead", "c_dec", "d / K·ln(N/K)"]
    rows = []
    with_ce = payload["saes"][0]["ce"] is not None
    for entry in payload["saes"]:
        m = entry["metrics"]
        row = [entry["name"], str(entry["d_sae"]), f"{m['l0']:.2f}", f"{m['mse']:.4g}"]
        row += [f"{m['explained_variance']:.4f}", _range(entry, "explained_variance"), str(m["dead"])]
        row += [f"{m['c_dec']:.4f}", f"{entry['recovery_bound']['ratio']:.3g}"]
        if with_ce:
            c = entry["ce"]
            row += [f"{c['ce_loss_without_sae']:.4f}", f"{c['ce_loss_with_sae']:.4f}", f"{c['kl_div_with_sae']:.4f}"]
            row += [f"{c['ce_loss_score_zero']:.4f}", f"{c['ce_loss_score_mean']:.4f}"]
            row += [_range(entry, "ce_loss_score_mean")]
        rows.append(row)
    if with_ce:
        columns += ["CE clean", "CE spliced", "KL", "recovered (zero)", "recovered (mean)", "95%"]
    title = f"{payload['n_tokens']:,} {payload['split']} tokens of {payload['n_documents']:,} documents"
    console.table(title, columns, rows)


def _range(entry: dict[str, Any], name: str) -> str:
    ends = entry["intervals"].get(name)
    return f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else "–"
