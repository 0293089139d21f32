"""``saetool report``: the artifacts of a run → one HTML page."""

import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saetool.artifacts import container, writing
from saetool.artifacts import header as h
from saetool.config import ReportConfig
from saetool.console import Console
from saetool.errors import ArtifactError, ConfigError
from saetool.options import DebugFlag, DryRun, Json, Overwrite, Quiet, Seed

if TYPE_CHECKING:
    from saetool.report.collect import Found
    from saetool.report.render import Form
    from saetool.report.run import Look
    from saetool.report.sections import Page

PICKS = ("mixed", "top", "worst", "random")
THEMES = ("auto", "light", "dark")
LEAST_CARDS = 50
"""Cards that a page keeps although it passes its budget, unless their number was given."""
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def report(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Artifacts, and folders to look through (default: .); - reads paths from standard input."),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The page (- writes standard output).")] = Path(
        "report.html"
    ),
    title: Annotated[str, typer.Option(help="The page's title.")] = ReportConfig.title,
    features: Annotated[
        int | None,
        typer.Option(
            help="Latents shown as cards, over all explanations.",
            show_default=f"{ReportConfig.features}, fewer on a page that would pass {ReportConfig.budget}",
        ),
    ] = None,
    pick: Annotated[
        str, typer.Option(help="Which latents: mixed, top, worst, random, or @FILE with LATENT or SAE.st:LATENT lines.")
    ] = ReportConfig.pick,
    contexts: Annotated[int, typer.Option(help="Windows of text on a card.")] = ReportConfig.contexts,
    theme: Annotated[str, typer.Option(help="auto (as the reader's system), light or dark.")] = ReportConfig.theme,
    no_js: Annotated[bool, typer.Option("--no-js", help="Leave the script out: no search, sorting or values.")] = False,
    max_size: Annotated[
        str, typer.Option(help="Largest size of the page; above it there are fewer cards.")
    ] = ReportConfig.max_size,
    data: Annotated[
        Path | None, typer.Option(help="Also write every figure's data as CSV into this new folder.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 when the page carries a warning.")] = False,
    seed: Seed = ReportConfig.seed,
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
    from saetool.report.names import told_apart
    from saetool.report.provenance import inputs_of
    from saetool.report.run import Look

    if features is not None and features < 0:
        raise ConfigError(f"--features {features}: must not be negative")
    if not title.strip():
        raise ConfigError("--title: must not be empty")
    if contexts < 0:
        raise ConfigError(f"--contexts {contexts}: must not be negative")
    if theme not in THEMES:
        raise ConfigError(f"--theme {theme}: is none of {', '.join(THEMES)}")
    look = Look(ReportConfig.features if features is None else features, contexts, pick, _listed(pick), seed)
    form = render.Form(theme, not no_js)
    limit = _bytes(max_size)
    console = Console(quiet=quiet, as_json=json_)
    where = _paths(paths)
    if str(out) != "-":
        _check_output(out, where)
    found = collect(where, output=None if str(out) == "-" else out)
    found = dataclasses.replace(found, artifacts=told_apart(found.artifacts))
    warnings = sections.warnings_of(found)
    options = {
        "title": title, "features": features, "pick": pick, "listed": look.listed, "contexts": contexts,
        "theme": theme, "script": form.scripted, "max_size": limit, "warnings": warnings, "layout": render.LAYOUT,
    }  # fmt: skip
    if pick == "random":
        options["seed"] = seed
    plan = h.Plan("report", h.REPORT, options, inputs_of(found), [a.header for a in found.artifacts])
    for warning in warnings:
        console.say(f"warning: {warning}")
    if dry_run:
        kinds = {a.label: a.schema for a in found.artifacts}
        console.plan({**kinds, "ignored": found.ignored, "output": str(out)})
        return
    metrics = {"artifacts": len(found.artifacts), "ignored": found.ignored, "warnings": warnings}
    page_fresh = _up_to_date(out, plan, overwrite=overwrite)
    data_fresh = data is None or _data_up_to_date(data, plan, overwrite=overwrite)
    if page_fresh and data_fresh:
        console.emit(plan.header(), out, h.sha256_file(out), metrics, fresh=False)
    else:
        header = plan.header()
        budget, least = (limit, 0) if features is not None else (min(limit, _bytes(ReportConfig.budget)), LEAST_CARDS)
        page, content = _within(limit, max_size, found, title, look, header, form, budget, least)
        sha256 = writing.write_bytes(out, content)
        if data is not None and not data_fresh:
            _write_data(data, page, header)
        _say(console, page, found.ignored)
        console.emit(header, out, sha256, page.record() | {"bytes": len(content)})
    if strict and warnings:
        raise ArtifactError(f"{len(warnings)} warning{'s' * (len(warnings) > 1)}, and --strict was given", warnings[0])


def _paths(paths: list[Path] | None) -> list[Path]:
    """The paths to look through; ``-`` stands for those on standard input, one a line or ended by NUL."""
    out: list[Path] = []
    for path in paths or [Path()]:
        if str(path) != "-":
            out.append(path)
            continue
        text = sys.stdin.read()
        out += [Path(line) for line in (text.split("\0") if "\0" in text else text.splitlines()) if line]
    if not out:
        raise ConfigError("-: no path came on standard input", "for example: find . -name '*.json' | saetool report -")
    return out


def _listed(pick: str) -> tuple[tuple[str, int], ...] | None:
    """The latents that ``@FILE`` names; None for a way to choose them."""
    if pick in PICKS:
        return None
    if not pick.startswith("@"):
        raise ConfigError(f"--pick {pick}: is none of {', '.join(PICKS)}, @FILE")
    try:
        words = re.split(r"[\s,]+", Path(pick[1:]).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"--pick {pick}: cannot be read ({said})") from None
    out = []
    for word in filter(None, words):
        name, _, latent = word.rpartition(":")
        if not latent.isdecimal():
            raise ConfigError(f"--pick {pick}: {word!r} is no latent", "one a line: 12, or sae-1152.st:12")
        out.append((name, int(latent)))
    if not out:
        raise ConfigError(f"--pick {pick}: names no latent")
    return tuple(dict.fromkeys(out))


def _bytes(size: str) -> int:
    """A size as bytes: 10MB, 800 kB, 3000000. Raises ``ConfigError``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B)?", size.strip().upper())
    if found is None or not (value := int(float(found[1]) * _UNITS[found[2] or "B"])):
        raise ConfigError(f"--max-size {size}: is no size", "for example 3MB or 800KB")
    return value


def _within(
    limit: int,
    said: str,
    found: "Found",
    title: str,
    look: "Look",
    header: h.Header,
    form: "Form",
    budget: int,
    least: int,
) -> "tuple[Page, bytes]":
    """The page and its bytes, with as many of the cards asked for as keep it near or below ``budget``, but ``least``.

    Raises ``ArtifactError`` where no card at all keeps it below ``limit``.
    """
    from dataclasses import replace

    from saetool.report import render, sections

    def made(n: int) -> "tuple[Page, bytes]":
        page = sections.page(
            found, title, replace(look, features=n, asked=look.features if n < look.features else None)
        )
        return page, render.render(page, header, form)

    best = made(look.features)
    if len(best[1]) <= budget or not look.features:
        n = look.features
    else:
        empty = made(0)
        each = (len(best[1]) - len(empty[1])) / look.features
        n = look.features
        while len(best[1]) > budget and n > least:  # cards differ in size: the first guess may be some too many
            guess = int((budget - len(empty[1])) / each) if n == look.features and each else 0
            n = max(least, min(guess or int(0.9 * n), n - 1))
            best = made(n) if n else empty
    while len(best[1]) > limit and n:
        n = int(0.8 * n)
        best = made(n)
    if len(best[1]) > limit:
        raise ArtifactError(
            f"the page without any card has {len(best[1]):,} bytes, more than --max-size {said}",
            "give fewer artifacts, or a larger --max-size",
        )
    return best


def _check_output(out: Path, paths: list[Path]) -> None:
    """Raise ``ArtifactError`` if ``out`` cannot be written, or is a file the page would be made from."""
    from saetool.report.collect import is_artifact

    writing.check_target(out)
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
    raise writing.another(out, plan, found)


def _data_up_to_date(folder: Path, plan: h.Plan, *, overwrite: bool) -> bool:
    """Whether ``folder`` holds this page's data. Refuses to write into a folder that holds something else."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: is a file, where --data expects a folder")
    record = folder / "report.json"
    if record.exists() and not overwrite and container.read_header(record).key == plan.key:
        return True
    if not overwrite and any(folder.iterdir()):
        raise ArtifactError(f"{folder}: exists and holds other data", "pass --overwrite, or another folder to --data")
    return False


def _write_data(folder: Path, page: "Page", header: h.Header) -> None:
    """A CSV file of every figure, and at the end the page's record, which names them."""
    from saetool.report.figure_data import csv_of, figures_of

    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be made ({error.strerror})") from None
    titles = {}
    for figure in figures_of(page):
        titles[f"{figure.id}.csv"] = figure.title
        writing.write_bytes(folder / f"{figure.id}.csv", csv_of(figure))
    writing.write_json(folder / "report.json", header, page.record() | {"figures": titles})


def _say(console: Console, page: "Page", ignored: int) -> None:
    console.say(f"found {', '.join(page.found)}; {ignored} other files ignored")
    for missing in page.missing:
        console.say(f"not in this report: {missing.title} ({missing.command})")
