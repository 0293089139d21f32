"""``saetool stitch``: what a larger SAE knows that a smaller one does not, and the way from one to the other."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from saetool.artifacts import container, records, writing
from saetool.artifacts import header as h
from saetool.artifacts.cache import Cache, open_cache
from saetool.commands.checks import check_encodes, check_site, check_split
from saetool.commands.eval import ce_options, model_name
from saetool.commands.stitch_inputs import (
    Look,
    check_ladder,
    check_mergeable,
    check_options,
    check_plain,
    check_take,
    listed,
    look,
)
from saetool.commands.stitch_run import Settings, cross_entropies, jobs_of, measured, write_stitched
from saetool.commands.stitch_table import show, warn
from saetool.config import EvalConfig, StitchConfig
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
    Seed,
    parse_count,
    resolve_device,
)

_STDOUT = Path("-")


def stitch(
    saes: Annotated[
        list[Path], typer.Argument(help="Two or more SAEs, the smallest first (one may be - for standard input).")
    ],
    theta: Annotated[
        float, typer.Option(help="A latent is novel if its largest decoder cosine is below this (-1 to 1).")
    ] = StitchConfig.theta,
    acts: Annotated[
        Path | None, typer.Option(help="An activation cache: also measure every effect.", show_default="decoders only")
    ] = None,
    split: Annotated[str, typer.Option(help="heldout or train.")] = StitchConfig.split,
    tokens: Annotated[
        str | None, typer.Option(help="Use the first so many rows of the split.", show_default="all")
    ] = None,
    order: Annotated[
        Literal["random", "cosine", "effect", "index"],
        typer.Option(
            help="Order of adds and of swaps; cosine: the most novel first; effect: what lowers the MSE most first "
            "(reads the activations twice)."
        ),
    ] = StitchConfig.order,  # type: ignore[assignment]
    bias: Annotated[
        Literal["eq5", "small", "large"],
        typer.Option(help="Output bias of stitched SAEs: mixed by latent counts (equation 5), or one SAE's own."),
    ] = StitchConfig.bias,  # type: ignore[assignment]
    match: Annotated[
        bool | None,
        typer.Option(
            "--match/--no-match",
            help="Also match latents one to one, by decoder, encoder and both.",
            show_default=f"SAEs of one width up to {StitchConfig.match_up_to}",
        ),
    ] = None,
    ce: CrossEntropy = False,
    model: CEModel = None,
    ce_tokens: CETokens = str(EvalConfig.ce_tokens),
    dtype: CEDtype = EvalConfig.dtype,
    take: Annotated[
        str | None,
        typer.Option(
            help="Latents for -o FILE.st: small+novel, large, path:STEP, or @FILE with lines like 'small all', "
            "'large 3-9'.",
            show_default="small+novel",
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            help="FILE.json: the record. FILE.st: a stitched SAE (see --take).",
            show_default="the record, on standard output",
        ),
    ] = _STDOUT,
    overwrite: Overwrite = False,
    device: Device = "auto",
    seed: Seed = StitchConfig.seed,
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: DebugFlag = False,
) -> None:
    """Find the novel latents of a larger SAE, and replace the smaller SAE by it, group by group.

    With --acts, measure what adding each latent does to the reconstruction, and every step of the way.

    Example: saetool stitch small.st large.st --theta 0.7
    """
    console = Console(quiet=quiet, as_json=json_)
    limit = None if tokens is None else parse_count(tokens, "--tokens")
    check_options(saes, theta, out, take)
    inputs = [look(path) for path in saes]
    check_ladder(inputs, console)
    cache = None if acts is None else _checked_cache(acts, split, inputs, console)
    with_ce = ce or model is not None
    if cache is None and (with_ce or order == "effect"):
        raise ConfigError(f"{'--ce' if with_ce else '--order effect'} needs activations", "give --acts DIR")
    chosen = check_take(take or "small+novel") if out.suffix == ".st" else None
    if chosen and with_ce:
        raise ConfigError(f"--ce: measures points of the path, and -o {out} is one SAE", f"saetool eval {out} --ce")
    if chosen or with_ce:
        check_mergeable(inputs)
    options: dict[str, Any] = {"theta": theta, "order": order, "bias": bias, "split": split, "tokens": limit}
    options |= {"seed": seed, "match": match, "take": chosen}
    if with_ce and cache is not None:
        cache.check_text()
        options |= ce_options(ce_tokens, model, dtype)
    plan = _plan(inputs, cache, options)
    if dry_run:
        rows = None if cache is None else min(limit or cache.rows(split), cache.rows(split))
        facts = {"saes": [f"{i.name} ({i.d_sae})" for i in inputs], "theta": theta, "rows": rows, "take": chosen}
        console.plan({**facts, "output": out})
        return
    there = writing if chosen else records
    if there.up_to_date(out, plan, overwrite=overwrite):
        found = container.read_header(out)
        of_pairs = [] if chosen else container.read_json(out)[1]["pairs"]
        console.emit(found, out, h.sha256_file(out), _metrics(found, of_pairs), fresh=False)
        return
    if with_ce:
        options["model"] = model_name(cache, model)
    settings = Settings(split, limit, order, bias, seed, resolve_device(device))
    header, sha256, pairs = _made(console, out, plan, inputs, cache, options, settings)
    warn(console, theta, pairs)
    show(console, theta, pairs)
    if not chosen and str(out) != "-" and (beside := records.beside(out)).exists():
        console.say(f"its long lists: {beside}")
    console.emit(header, out, sha256, _metrics(header, pairs))


def _metrics(header: h.Header, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``--json`` says: the numbers of each pair, and how many latents of each a stitched SAE has."""
    from saetool.engines.stitch_record import summary

    made = header.config.get("stitched", {})
    taken = {name: made[name] for name in ("take", "n_small", "n_large") if name in made}
    return {**(summary(pairs) if pairs else {}), **taken}


def _checked_cache(acts: Path, split: str, inputs: list[Look], console: Console) -> Cache:
    """The cache, if the SAEs can be applied to it."""
    cache = open_cache(acts)
    check_split(cache, split)
    for i in inputs:
        check_site(i, cache, console)
        check_encodes(i, "stitch")
        check_plain(i, "what its latents do to another SAE's error cannot be measured")
    return cache


def _made(
    console: Console,
    out: Path,
    plan: h.Plan,
    inputs: list[Look],
    cache: Cache | None,
    options: dict[str, Any],
    settings: Settings,
) -> tuple[h.Header, str, list[dict[str, Any]]]:
    """Do it: header and hash of what was written to ``out``, and the pairs as in a record."""
    from saetool.engines.stitch import compare
    from saetool.engines.stitch_measured import data_entry
    from saetool.engines.stitch_record import bias_entry, pair_entry, sae_entry

    files = [i.load() for i in inputs]
    theta, seed, take, match = options["theta"], settings.seed, options["take"], options["match"]
    compared = [
        compare(a, b, theta, StitchConfig.sweep, seed, settings.device, matched=_matched(a.d_sae, b.d_sae, match))
        for a, b in pairwise([f.sae for f in files])
    ]
    jobs = jobs_of(console, files, compared, cache, settings)
    if take is not None:
        pairs = [pair_entry(*files, compared[0], None)]
        return *write_stitched(out, plan, files, compared[0], jobs[0], take, settings), pairs
    payload: dict[str, Any] = {"theta": theta, "saes": [sae_entry(f) for f in files]}
    data: list[dict[str, Any] | None] = [None] * len(compared)
    if cache is not None:
        losses: list[Any] = [None] * len(compared)
        if "ce_tokens" in options:  # first: a model that cannot be had is said at once
            losses = cross_entropies(console, files, jobs, cache, settings, options)
        found = measured(console, files, jobs, cache, settings)
        data = [
            data_entry(m, c, j, settings.split, settings.order, settings.bias) | {"ce": ce}
            for m, c, j, ce in zip(found.pairs, compared, jobs, losses, strict=True)
        ]
        payload["bias_exchange"] = bias_entry(files, found.bias_exchange)
    pairs = [pair_entry(files[k], files[k + 1], c, d) for k, (c, d) in enumerate(zip(compared, data, strict=True))]
    header = plan.header(model=inputs[0].header.model, seed=seed, dtype="float64")
    return header, records.write(out, plan, header, {**payload, "pairs": pairs}), pairs


def _matched(n_small: int, n_large: int, asked: bool | None) -> bool:
    """Whether to match one to one: as asked, else for two seeds of one width that is not too large."""
    from saetool.core.matching import MAX_CELLS

    if asked and n_small * n_large > MAX_CELLS:
        raise ConfigError(
            f"--match: {n_small} and {n_large} latents are too many to match one to one",
            "it costs the cube of the width",
        )
    return asked if asked is not None else n_small == n_large <= StitchConfig.match_up_to


def _plan(inputs: list[Look], cache: Cache | None, options: dict[str, Any]) -> h.Plan:
    """What will be made: only the options and inputs that its bytes depend on."""
    take = options["take"]
    on_path = take is not None and take.startswith("path:")
    measured = cache is not None and (take is None or (on_path and options["order"] == "effect"))
    names = ["theta"]
    names += ["bias", "take"] if take else ["seed", "match"]
    names += ["order", "seed"] if on_path else []
    names += ["order", "bias", "split", "tokens"] if measured else []
    names += [name for name in ("ce_tokens", "model", "dtype") if name in options and not take]
    made_of = [h.Input("sae", i.name, i.sha256, i.header.schema) for i in inputs]
    parents = [i.header for i in inputs]
    if take is not None and take.startswith("@"):
        made_of.append(listed(Path(take[1:])))
    if measured and cache is not None:
        made_of.append(cache.as_input())
        parents.append(cache.header)
    schema = h.SAE if take else h.STITCH
    return h.Plan("stitch", schema, {name: options[name] for name in names}, made_of, parents)
