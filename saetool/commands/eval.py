"""``saetool eval``: how good SAEs are, from a cache and, if asked, with the language model."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.artifacts.cache import Cache, open_cache
from saetool.commands.checks import check_encodes, check_one_stdin, check_site, check_split
from saetool.config import DTYPES, EvalConfig
from saetool.console import Console
from saetool.errors import ConfigError
from saetool.options import DebugFlag, Device, DryRun, Json, Overwrite, Quiet, parse_count, resolve_device

if TYPE_CHECKING:
    from saetool.artifacts.sae import SAEFile


def eval_(
    saes: Annotated[list[Path], typer.Argument(help="One or more SAEs (one may be - for standard input).")],
    acts: Annotated[Path, typer.Option(help="The activation cache.")] = Path("acts"),
    split: Annotated[str, typer.Option(help="heldout or train.")] = EvalConfig.split,
    tokens: Annotated[
        str | None, typer.Option(help="Use the first so many rows of the split.", show_default="all")
    ] = None,
    ce: Annotated[
        bool, typer.Option("--ce", help="Also cross-entropy with x̂ in the model's place (runs the model).")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="The model for --ce; implies it.", show_default="the one the cache was made with"),
    ] = None,
    ce_tokens: Annotated[str, typer.Option(help="Tokens for the cross-entropies.")] = str(EvalConfig.ce_tokens),
    batch_size: Annotated[int, typer.Option(help="Tokens per batch; changes no result.")] = EvalConfig.batch_size,
    dtype: Annotated[str, typer.Option(help="Of the model in --ce: bf16 or fp32.")] = EvalConfig.dtype,
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
    """Measure reconstruction, sparsity and, with --ce, the loss the model recovers.

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
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: unknown", f"one of {', '.join(DTYPES)}")
    limit = None if tokens is None else parse_count(tokens, "--tokens")
    with_ce = ce or model is not None
    options = {"split": split, "tokens": limit}
    if with_ce:
        options |= {"ce_tokens": parse_count(ce_tokens, "--ce-tokens"), "model": model, "dtype": DTYPES[dtype]}
    plan = h.Plan(
        "eval",
        h.EVAL,
        options,
        [*(f.as_input("sae") for f in files), cache.as_input()],
        [*(f.header for f in files), cache.header],
    )
    if dry_run:
        console.plan({"saes": [f.name for f in files], "rows": limit or cache.rows(split), "ce": with_ce})
        return
    if container.up_to_date(out, plan, overwrite=overwrite):
        console.emit(container.read_header(out), out, h.sha256_file(out), {}, fresh=False)
        return
    where = resolve_device(device)
    moved = [f.sae.map(lambda t: t.to(where)) for f in files]
    payload = _reconstructions(console, cache, files, moved, split, limit, batch_size, where)
    if with_ce:
        results = _cross_entropies(console, cache, moved, split, options, where)
        for entry, result in zip(payload["saes"], results, strict=True):
            entry["ce"] = dataclasses.asdict(result)
    header = plan.header(model=cache.header.model, dtype="float32")
    sha256 = container.write_json(out, header, payload)
    _table(console, payload)
    console.emit(header, out, sha256, {"saes": len(files), "n_tokens": payload["n_tokens"]})


def _reconstructions(
    console: Console,
    cache: Cache,
    files: list["SAEFile"],
    moved: list[Any],
    split: str,
    limit: int | None,
    batch_size: int,
    where: str,
) -> dict[str, Any]:
    from saetool.engines.evaluate import Read, Reconstruction, reconstruct
    from saetool.engines.reader import Reader

    reader = Reader(cache, split, device=where)
    results: list[Reconstruction] = []
    with console.progress("eval", min(limit or reader.n_rows, reader.n_rows), "tokens") as advance:
        for event in reconstruct(moved, reader, batch_size, limit):
            if isinstance(event, Read):
                advance(event.n)
            else:
                results = event
    entries = []
    for file, result in zip(files, results, strict=True):
        entries.append(
            {
                "name": file.name,
                "sha256": file.sha256,
                "arch": file.sae.arch,
                "inference": file.sae.inference,
                "k": file.sae.k,
                "d_sae": file.sae.d_sae,
                "seed": file.header.seed,
                "metrics": dataclasses.asdict(result.quality),
                "density": {"log10_edges": result.density_edges, "counts": result.density_counts},
                "ce": None,
            }
        )
    return {"split": split, "n_tokens": results[0].n_tokens, "saes": entries}


def _cross_entropies(
    console: Console, cache: Cache, moved: list[Any], split: str, options: dict[str, Any], where: str
) -> list[Any]:
    from saetool.engines.evaluate import Read, contexts, cross_entropy
    from saetool.engines.model import load_model
    from saetool.engines.source import find_site

    data = contexts(cache, split, options["ce_tokens"])
    lm = load_model(model_name(cache, options["model"]), device=where, dtype=options["dtype"])
    site = find_site(lm.model, cache.header.model["hook_name"])
    results: list[Any] = []
    with console.progress("eval --ce", int(data.cached[:, :-1].sum()), "tokens") as advance:
        for event in cross_entropy(lm, site, moved, data, cache.moments()["mean"], EvalConfig.ce_contexts):
            if isinstance(event, Read):
                advance(event.n)
            else:
                results = event
    return results


def model_name(cache: Cache, given: str | None) -> str | None:
    """What to load for ``--ce``: the name given, else the one the cache records (None: the embedded model)."""
    if given is not None:
        return given
    from saetool.engines.model import EMBEDDED_REQUIREMENT

    recorded = cache.header.model.get("id")
    embedded = EMBEDDED_REQUIREMENT.partition("==")[0]
    return None if recorded is None or str(recorded).startswith(embedded) else str(recorded)


def _table(console: Console, payload: dict[str, Any]) -> None:
    columns = ["SAE", "latents", "L0", "mse", "explained_variance", "fvu", "dead"]
    rows = []
    with_ce = payload["saes"][0]["ce"] is not None
    for entry in payload["saes"]:
        m = entry["metrics"]
        row = [entry["name"], str(entry["d_sae"]), f"{m['l0']:.2f}", f"{m['mse']:.4g}"]
        row += [f"{m['explained_variance']:.4f}", f"{m['fvu']:.4f}", str(m["dead"])]
        if with_ce:
            c = entry["ce"]
            row += [f"{c['ce_loss_without_sae']:.4f}", f"{c['ce_loss_with_sae']:.4f}"]
            row += [f"{c['ce_loss_score_zero']:.4f}", f"{c['ce_loss_score_mean']:.4f}"]
        rows.append(row)
    if with_ce:
        columns += ["CE clean", "CE spliced", "recovered (zero)", "recovered (mean)"]
    console.table(f"{payload['n_tokens']:,} {payload['split']} tokens", columns, rows)
