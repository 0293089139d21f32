"""``saetool report``: the artifacts of a run → one HTML page."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.config import ReportConfig
from saetool.console import Console
from saetool.errors import ArtifactError, ConfigError
from saetool.options import DebugFlag, DryRun, Json, Overwrite, Quiet

if TYPE_CHECKING:
    from saetool.report.sections import Page


def report(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Artifacts, and folders to look through (default: .).")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The page (- writes standard output).")] = Path(
        "report.html"
    ),
    title: Annotated[str, typer.Option(help="The page's title.")] = ReportConfig.title,
    features: Annotated[
        int, typer.Option(help="Latents shown as cards, over all explanations.")
    ] = ReportConfig.features,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 when the page carries a warning.")] = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: DebugFlag = False,
) -> None:
    """Make one self-contained HTML page of a run: every number, figure and latent, with its provenance.

    Artifacts are recognised by their header. Damaged files and changed inputs are warnings on the page.

    Example: saetool report . -o report.html
    """
    from saetool.report import render, sections
    from saetool.report.collect import collect
    from saetool.report.provenance import inputs_of

    if features < 0:
        raise ConfigError(f"--features {features}: must not be negative")
    console = Console(quiet=quiet, as_json=json_)
    where = paths or [Path()]
    if str(out) != "-":
        _check_output(out, where)
    found = collect(where, output=None if str(out) == "-" else out)
    warnings = sections.warnings_of(found)
    options = {"title": title, "features": features, "warnings": warnings, "layout": render.LAYOUT}
    plan = h.Plan("report", h.REPORT, options, inputs_of(found), [a.header for a in found.artifacts])
    for warning in warnings:
        console.say(f"warning: {warning}")
    if dry_run:
        kinds = {a.label: a.schema for a in found.artifacts}
        console.plan({**kinds, "ignored": found.ignored, "output": str(out)})
        return
    metrics = {"artifacts": len(found.artifacts), "ignored": found.ignored, "warnings": warnings}
    if _up_to_date(out, plan, overwrite=overwrite):
        console.emit(plan.header(), out, h.sha256_file(out), metrics, fresh=False)
    else:
        page = sections.page(found, title, features)
        header = plan.header()
        data = render.render(page, header)
        sha256 = container.write_bytes(out, data)
        shown = {"sections": [s.id for s in page.sections], "missing": [m.title for m in page.missing]}
        _say(console, page, len(data), found.ignored)
        console.emit(header, out, sha256, {**metrics, **shown, "bytes": len(data)})
    if strict and warnings:
        raise ArtifactError(f"{len(warnings)} warning{'s' * (len(warnings) > 1)}, and --strict was given", warnings[0])


def _check_output(out: Path, paths: list[Path]) -> None:
    """Raise ``ArtifactError`` if ``out`` cannot be written, or is a file the page would be made from."""
    from saetool.report.collect import is_artifact

    container.check_target(out)
    real = out.resolve()
    for path in paths:
        inside = path.is_dir() and path.resolve() in real.parents
        if real == path.resolve() or (inside and real.exists() and is_artifact(real)):
            raise ArtifactError(f"{out}: is one of the inputs", "choose another output with -o")


def _up_to_date(out: Path, plan: h.Plan, *, overwrite: bool) -> bool:
    """Whether ``out`` is this very page (the key in its header block says so). Refuses to replace anything else."""
    from saetool.report import render

    if str(out) == "-" or overwrite or not out.exists():
        return False
    try:
        found = render.read_header(out.read_bytes(), str(out))
    except ArtifactError as error:
        raise ArtifactError(
            f"{error.message}: exists, will not be replaced", "pass --overwrite to replace it"
        ) from None
    except OSError as error:
        raise ArtifactError(f"{out}: cannot be read ({error.strerror})") from None
    if found.key == plan.key:
        os.utime(out)
        return True
    raise ArtifactError(
        f"{out}: exists and is not what was asked for ({plan.difference(found)})",
        "pass --overwrite to replace it, or choose another output with -o",
    )


def _say(console: Console, page: "Page", size: int, ignored: int) -> None:
    from saetool.report import render

    console.say(f"found {', '.join(page.found)}; {ignored} other files ignored")
    for missing in page.missing:
        console.say(f"not in this report: {missing.title} ({missing.command})")
    if size > render.MAX_BYTES:
        console.say(f"warning: the page has {size / 1e6:.1f} MB; fewer artifacts or --features make it smaller")
