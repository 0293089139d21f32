"""``saetool stitch``: what a larger SAE knows that a smaller one does not, and the way from one to the other."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.artifacts.cache import Cache, open_cache
from saetool.commands.checks import check_encodes, check_one_stdin, check_site, check_split
from saetool.commands.stitch_table import show
from saetool.config import StitchConfig
from saetool.console import Console
from saetool.errors import ArtifactError, ConfigError
from saetool.options import DebugFlag, Device, DryRun, Json, Overwrite, Quiet, Seed, parse_count, resolve_device

if TYPE_CHECKING:
    from saetool.artifacts.sae import SAEFile
    from saetool.engines.stitch import Comparison, Job, Measured

_STDOUT = Path("-")


def stitch(
    saes: Annotated[
        list[Path], typer.Argument(help="Two or more SAEs, the smallest first (one may be - for standard input).")
    ],
    theta: Annotated[
        float, typer.Option(help="A latent is novel if its largest decoder cosine is below this (0 to 1).")
    ] = StitchConfig.theta,
    acts: Annotated[
        Path | None, typer.Option(help="An activation cache: also measure every effect.", show_default="decoders only")
    ] = None,
    split: Annotated[str, typer.Option(help="heldout or train.")] = StitchConfig.split,
    tokens: Annotated[
        str | None, typer.Option(help="Use the first so many rows of the split.", show_default="all")
    ] = None,
    order: Annotated[
        Literal["random", "cosine", "index"],
        typer.Option(help="Order of adds and of swaps; cosine: the most novel first."),
    ] = StitchConfig.order,  # type: ignore[assignment]
    bias: Annotated[
        Literal["eq5", "small", "large"],
        typer.Option(help="Output bias of stitched SAEs: mixed by latent counts (equation 5), or one SAE's own."),
    ] = StitchConfig.bias,  # type: ignore[assignment]
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            help="FILE.json: the record. FILE.st: the small SAE with the novel latents, as an SAE.",
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
    _check_options(saes, theta, out)
    inputs = [_look(path) for path in saes]
    _check_ladder(inputs, console)
    cache = None if acts is None else open_cache(acts)
    if cache is not None:
        check_split(cache, split)
        for i in inputs:
            check_site(i, cache, console)
            check_encodes(i, "stitch")
    merged = out.suffix == ".st"
    if merged:
        _check_mergeable(inputs)
    plan = _plan(inputs, cache, merged, theta=theta, order=order, bias=bias, split=split, tokens=limit, seed=seed)
    if dry_run:
        rows = None if cache is None else min(limit or cache.rows(split), cache.rows(split))
        console.plan({"saes": [f"{i.name} ({i.d_sae})" for i in inputs], "theta": theta, "rows": rows, "output": out})
        return
    if container.up_to_date(out, plan, overwrite=overwrite):
        console.emit(container.read_header(out), out, h.sha256_file(out), {}, fresh=False)
        return

    from saetool.engines.stitch import compare, job
    from saetool.engines.stitch_record import data_entry, pair_entry, sae_entry, summary

    files = [i.load() for i in inputs]
    where = resolve_device(device)
    compared = [compare(a.sae, b.sae, theta, StitchConfig.sweep, seed, where) for a, b in pairwise(files)]
    data: list[dict[str, Any] | None] = [None] * len(compared)
    if cache is not None:
        jobs = [job(k, k + 1, comparison, order, seed) for k, comparison in enumerate(compared)]
        measured = _measure(console, files, jobs, cache, theta, split, limit, bias, where)
        data = [data_entry(m, c, j, split, order, bias) for m, c, j in zip(measured, compared, jobs, strict=True)]
    pairs = [pair_entry(files[k], files[k + 1], c, d) for k, (c, d) in enumerate(zip(compared, data, strict=True))]
    if merged:
        header, sha256 = _write_merged(out, plan, files, compared[0], bias)
    else:
        header = plan.header(model=inputs[0].header.model, seed=seed, dtype="float64")
        sha256 = container.write_json(
            out, header, {"theta": theta, "saes": [sae_entry(f) for f in files], "pairs": pairs}
        )
    show(console, theta, pairs)
    console.emit(header, out, sha256, summary(pairs))


@dataclass(frozen=True)
class _Look:
    """An SAE file of which only the header was read (standard input and other libraries' files are read whole)."""

    path: Path
    name: str
    header: h.Header
    d_in: int
    d_sae: int
    inference: str
    sha256: str
    file: "SAEFile | None"

    def load(self) -> "SAEFile":
        from saetool.artifacts import sae as sae_files

        return self.file or sae_files.load(self.path)


def _look(path: Path) -> _Look:
    if str(path) == "-" or container.is_foreign(path):
        from saetool.artifacts import sae as sae_files

        file = sae_files.load(path)
        sae = file.sae
        return _Look(path, file.name or "-", file.header, sae.d_in, sae.d_sae, sae.inference, file.sha256, file)
    hint = "SAEs are made by: saetool train, threshold, stitch, meta"
    header = h.expect(container.read_header(path), h.SAE, str(path), hint)
    tensors = container.read_contents(path).tensors
    if "W_dec" not in tensors or len(tensors["W_dec"].shape) != 2:
        raise ArtifactError(f"{path}: lacks the tensor W_dec", "make or copy it again")
    d_sae, d_in = tensors["W_dec"].shape
    inference = "jumprelu" if "threshold" in tensors else str(header.config.get("arch"))
    return _Look(path, path.name, header, d_in, d_sae, inference, h.sha256_file(path), None)


def _check_options(saes: list[Path], theta: float, out: Path) -> None:
    if len(saes) < 2:
        raise ConfigError(
            "one SAE given, two or more are compared", "example: saetool stitch small.st large.st --theta 0.7"
        )
    check_one_stdin(saes)
    if not 0 <= theta <= 1:
        raise ConfigError(f"--theta {theta}: outside 0 to 1", "it is a cosine; the paper uses 0.7 for GPT-2")
    if str(out) != "-" and out.suffix not in (".json", ".st"):
        raise ConfigError(f"-o {out}: neither .json nor .st", "FILE.json for the record, FILE.st for the stitched SAE")
    if out.suffix == ".st" and len(saes) != 2:
        raise ConfigError(
            f"-o {out}: a stitched SAE is made of two SAEs, and {len(saes)} were given",
            "give two SAEs, or -o FILE.json for the record of all pairs",
        )


def _check_ladder(inputs: list[_Look], console: Console) -> None:
    """Raise unless the SAEs read the same width and get no narrower; warn if their hooks differ."""
    first = inputs[0]
    for other in inputs[1:]:
        if other.d_in != first.d_in:
            raise ArtifactError(
                f"{other.name}: made for activations of width {other.d_in}, and {first.name} for width {first.d_in}",
                "stitch SAEs of the same model and layer",
            )
        there, here = (i.header.model.get("hook_name") for i in (other, first))
        if here and there and here != there:
            console.say(f"warning: {other.name} was trained on {there}, and {first.name} on {here}")
    for small, large in pairwise(inputs):
        if small.d_sae > large.d_sae:
            raise ConfigError(
                f"{small.name} has {small.d_sae} latents and comes before {large.name} with {large.d_sae}",
                "give the smaller SAE first",
            )


def _check_mergeable(inputs: list[_Look]) -> None:
    from saetool.core.sae import RANKED

    for i in inputs:
        if i.inference in RANKED:
            raise ConfigError(
                f"{i.name}: latents of a {i.inference} SAE without a threshold cannot be put into another SAE",
                f"saetool threshold {i.name} -o WITH-THRESHOLD.st, and stitch that",
            )


def _plan(inputs: list[_Look], cache: Cache | None, merged: bool, **options: Any) -> h.Plan:
    """What will be made: only the options and inputs that its bytes depend on."""
    names = ["theta", "bias"] if merged else ["theta", "seed"]
    measured = cache is not None and not merged
    if measured:
        names += ["order", "bias", "split", "tokens"]
    made_of = [h.Input("sae", i.name, i.sha256, i.header.schema) for i in inputs]
    parents = [i.header for i in inputs]
    if measured and cache is not None:
        made_of.append(cache.as_input())
        parents.append(cache.header)
    schema = h.SAE if merged else h.STITCH
    return h.Plan("stitch", schema, {name: options[name] for name in names}, made_of, parents)


def _measure(
    console: Console,
    files: list["SAEFile"],
    jobs: list["Job"],
    cache: Cache,
    theta: float,
    split: str,
    limit: int | None,
    bias: str,
    where: str,
) -> list["Measured"]:
    from saetool.engines.reader import Reader
    from saetool.engines.stitch import Read, measure

    reader = Reader(cache, split, device=where)
    saes = [f.sae.map(lambda t: t.to(where)) for f in files]
    thetas = sorted({*StitchConfig.sweep, theta})
    result: list[Measured] = []
    with console.progress("stitch", min(limit or reader.n_rows, reader.n_rows), "tokens") as advance:
        for event in measure(saes, jobs, reader, bias=bias, thetas=thetas, limit=limit):
            if isinstance(event, Read):
                advance(event.n)
            else:
                result = event
    return result


def _write_merged(
    out: Path, plan: h.Plan, files: list["SAEFile"], comparison: "Comparison", bias: str
) -> tuple[h.Header, str]:
    """Write the small SAE with the novel latents of the large one; its config says which they are."""
    from saetool.artifacts import sae as sae_files
    from saetool.core.stitch import stitched

    small, large = files
    novel = comparison.parts.novel
    sae = stitched(small.sae, large.sae, novel, bias)
    made = {
        "theta": comparison.parts.theta,
        "bias": bias,
        "n_small": small.sae.d_sae,
        "n_novel": int(novel.sum()),
        "large_latents": novel.nonzero().squeeze(1).tolist(),
    }
    header = plan.header(
        config=sae_files.config_of(sae) | {"stitched": made}, model=small.header.model, dtype="float32"
    )
    return header, sae_files.save(out, sae, header)
