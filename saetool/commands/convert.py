"""``saetool convert``: another library's SAE → ours, and ours → another library's; proved both ways."""

from pathlib import Path
from typing import Annotated, Any

import typer

from saetool.artifacts import container, writing
from saetool.artifacts import header as h
from saetool.artifacts.kinds import is_foreign
from saetool.config import SAE_FORMATS, SAE_TARGETS
from saetool.console import Console
from saetool.errors import ConfigError
from saetool.options import DebugFlag, DryRun, Json, Overwrite, Quiet

_MISSING = "What the files do not say"


def convert(
    src: Annotated[
        Path,
        typer.Argument(help="A folder or file of another library, hf://owner/repo@rev/path, or a .st."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The .st file; with --to, the folder.")],
    to: Annotated[str | None, typer.Option("--to", help=f"Write for: {', '.join(SAE_TARGETS)}.")] = None,
    from_: Annotated[
        str | None,
        typer.Option("--from", help=f"Read as: {', '.join(SAE_FORMATS)}.", show_default="what it looks like"),
    ] = None,
    hook: Annotated[
        str | None, typer.Option("--hook", help="Site it was trained on.", rich_help_panel=_MISSING)
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Model's id.", rich_help_panel=_MISSING)] = None,
    arch: Annotated[
        str | None, typer.Option("--arch", help="relu, topk or batchtopk.", rich_help_panel=_MISSING)
    ] = None,
    k: Annotated[int | None, typer.Option("--k", help="Active latents per token.", rich_help_panel=_MISSING)] = None,
    subtract_b_dec: Annotated[
        bool | None,
        typer.Option(
            "--subtract-b-dec/--no-subtract-b-dec",
            help="Whether b_dec is subtracted before the encoder.",
            rich_help_panel=_MISSING,
        ),
    ] = None,
    normalization: Annotated[
        str | None,
        typer.Option("--normalization", help="none, or per_token: each token standardised.", rich_help_panel=_MISSING),
    ] = None,
    input_scale: Annotated[
        float | None,
        typer.Option("--input-scale", help="Constant its inputs were multiplied by.", rich_help_panel=_MISSING),
    ] = None,
    transposed: Annotated[
        bool | None,
        typer.Option(
            "--transposed/--no-transposed",
            help="Square weights stored the other way round than documented.",
            rich_help_panel=_MISSING,
        ),
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: DebugFlag = False,
) -> None:
    """Read another library's SAE into a .st file; with --to, write any SAE as another library's folder.

    Each way is proved: on a fixed probe, that library's own formula and ours give the same activations and
    reconstructions; the largest difference is in the header. What the files do not say is asked for.

    Example: saetool convert sae_lens_folder -o sae.st
    """
    _check(to, from_, arch, normalization, k, input_scale)
    console = Console(quiet=quiet, as_json=json_)
    from saetool.artifacts.foreign.imported import Asked

    asked = Asked(
        format=from_,
        arch=arch,
        k=k,
        hook=hook,
        model=model,
        subtract_b_dec=subtract_b_dec,
        normalization=normalization,
        input_scale=input_scale,
        transposed=transposed,
    )
    if to is not None:
        _export(console, src, asked, out, to, overwrite, dry_run)
    else:
        _import(console, src, asked, out, overwrite, dry_run)


def _check(
    to: str | None, from_: str | None, arch: str | None, normalization: str | None, k: int | None, scale: float | None
) -> None:
    for option, value, allowed in (
        ("--to", to, SAE_TARGETS),
        ("--from", from_, SAE_FORMATS),
        ("--arch", arch, ("relu", "topk", "batchtopk")),
        ("--normalization", normalization, ("none", "per_token")),
    ):
        if value is not None and value not in allowed:
            raise ConfigError(f"{option} {value}: unknown", f"one of {', '.join(allowed)}")
    if k is not None and k < 1:
        raise ConfigError(f"--k {k}: must be positive")
    if scale is not None and not 0 < scale < float("inf"):
        raise ConfigError(f"--input-scale {scale}: must be positive")


def _import(console: Console, src: Path, asked: Any, out: Path, overwrite: bool, dry_run: bool) -> None:
    from saetool.artifacts import sae as sae_files

    if not is_foreign(src):
        container.read_header(src)  # a missing or damaged file says so first
        raise ConfigError(f"{src}: is saetool's own already", f"--to {'|'.join(SAE_TARGETS)} writes another library's")
    read, plan = sae_files.read_foreign(src, asked)
    imported, proof = read.imported, read.proof
    if imported.hook_name is None:
        raise ConfigError(
            f"{src}: does not say which site of the model it was trained on",
            "say it: --hook blocks.8.hook_resid_post",
        )
    sae = imported.sae
    facts = {
        "format": read.format,
        "arch": sae.arch,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "hook": imported.hook_name,
        "max_difference_z": proof.max_difference_z,
        "max_difference_x_hat": proof.max_difference_x_hat,
    }
    if dry_run:
        console.plan({"input": str(src), **facts, "output": str(out)})
        return
    if writing.up_to_date(out, plan, overwrite=overwrite):
        console.emit(container.read_header(out), out, h.sha256_file(out), facts, fresh=False)
        return
    header = sae_files.converted_header(read, plan)
    sha256 = sae_files.save(out, sae, header)
    console.say(_sentence(f"{read.format} {sae.arch}, {sae.d_sae} latents of width {sae.d_in}", vars(proof)))
    _notes(console, sae, imported)
    console.emit(header, out, sha256, facts)


def _notes(console: Console, sae: Any, imported: Any) -> None:
    if sae.inference == "batchtopk":
        console.say("note: its threshold was never set; saetool threshold estimates it, and then it encodes tokens")
    if sae.normalization != "none":
        console.say(
            f"note: {sae.normalization} normalisation cannot be folded into weights; it is done in encode and decode"
        )


def _export(console: Console, src: Path, asked: Any, out: Path, to: str, overwrite: bool, dry_run: bool) -> None:
    from saetool.artifacts import sae as sae_files
    from saetool.artifacts.foreign import export

    loaded = sae_files.load(src, asked)
    plan = h.Plan("convert", h.EXPORT, {"to": to}, [loaded.as_input("sae")], [loaded.header])
    if dry_run:
        console.plan({"input": str(src), "arch": loaded.sae.arch, "to": to, "output": str(out)})
        return
    done = export.up_to_date(out, plan, overwrite=overwrite)
    fresh = done is None
    if done is None:
        done = export.write(out, loaded.sae, loaded.header, plan, to)
        console.say(_sentence(f"written for {to}", done.proof))
    facts = {"to": to, **{name: done.proof[name] for name in ("max_difference_z", "max_difference_x_hat")}}
    console.emit(done.header, out, done.sha256, facts, fresh=fresh)


def _sentence(what: str, proof: dict[str, Any]) -> str:
    z, x_hat = proof["max_difference_z"], proof["max_difference_x_hat"]
    return (
        f"{what}; proved on {proof['rows']} probe rows with {proof['active']:.1f} active latents each: "
        f"largest difference {z:.2g} in activations, {x_hat:.2g} in reconstructions"
    )
