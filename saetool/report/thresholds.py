"""Inference thresholds: how each was estimated, how well it is known, and what it achieves."""

from typing import Any

from saetool.artifacts import header as h
from saetool.report.blocks import ABSENT, Column, Figure, Figures, Group, Table, num, number, pct, percent, words
from saetool.report.collect import Artifact
from saetool.report.run import Run
from saetool.report.scales import defined, linear
from saetool.report.svg import Plot
from saetool.report.thinning import thinned, thinned_note

_TABLE_ROWS = 12
_COLUMNS = (
    Column("SAE", numeric=False),
    Column("method", numeric=False),
    Column("θ", "one value for all latents"),
    Column("standard error", "of θ, from its spread over batches"),
    Column("relative", "standard error over θ"),
    Column("θ, least", "where every latent has its own"),
    Column("θ, median"),
    Column("θ, largest"),
    Column("batches"),
    Column("tokens a batch"),
    Column("L0 asked"),
    Column("L0, estimation", "on the batches that θ came from"),
    Column("L0, held-out", "on tokens that neither training nor θ saw"),
    Column("± (standard error)", "of the held-out L0"),
    Column("off", "held-out L0 against the one asked for"),
    Column("EV, batch selection", "held-out explained variance when each batch keeps its largest activations"),
    Column("EV, threshold", "held-out explained variance with θ: single tokens, no batch"),
)


def thresholds(run: Run) -> Group | None:
    """Every SAE whose header says how its threshold was found, and the batches behind each estimate."""
    stated = [a for a in run.found.of(h.SAE) if isinstance(a.header.config.get("threshold"), dict)]
    if not stated:
        return None
    rows = [_row(a, a.header.config["threshold"]) for a in stated]
    used = [i for i in range(len(_COLUMNS)) if any(row[i].text != ABSENT for row in rows)]
    table = Table(
        "Inference thresholds",
        [_COLUMNS[i] for i in used],
        [[row[i] for i in used] for row in rows],
        note="A threshold turns the selection among a batch into one for single tokens: held-out L0 near the one asked "
        "for, and little explained variance lost, is what it must achieve.",
        sortable=True,
    )
    figures = [_minima(run, a, i) for i, a in enumerate(stated) if a.header.config["threshold"].get("minima")]
    blocks: list[Any] = [table, *([Figures(figures)] if figures else [])]
    return Group("thresholds", "Inference thresholds", blocks)


def _row(artifact: Artifact, facts: dict[str, Any]) -> list[Any]:
    ends = facts["values"] if isinstance(facts.get("values"), dict) else {}
    asked, got = facts.get("asked_l0"), facts.get("l0_heldout")
    off = got / asked - 1 if asked and got is not None else None
    return [
        words(artifact.label, 40),
        words(facts.get("method") or "–", 40),
        num(facts.get("value")),
        num(facts.get("standard_error"), 2),
        pct(facts.get("relative_error")),
        *(num(ends.get(name)) for name in ("min", "median", "max")),
        num(facts.get("n_batches")),
        num(facts.get("batch_size")),
        num(asked),
        num(facts.get("l0_estimation")),
        num(got),
        num(facts.get("l0_heldout_standard_error"), 2),
        pct(off, signed=True),
        num(facts.get("explained_variance_heldout_batch_selection")),
        num(facts.get("explained_variance_heldout")),
    ]


def _minima(run: Run, artifact: Artifact, index: int) -> Figure:
    facts = artifact.header.config["threshold"]
    minima = facts["minima"]
    value = facts.get("value")
    plot = Plot(
        linear([0, len(minima) - 1], pad=0.02),
        linear(minima, include=[value] if value is not None else []),
        "batch",
        "smallest positive kept activation",
    )
    n = run.series(artifact.name, artifact.sha256)
    plot.points([i for i, v in enumerate(minima) if v is not None], defined(minima), n)
    plot.remember(artifact.name, list(range(len(minima))), minima, "batch", list(range(len(minima))))
    if value is not None:
        mean_ = " = mean" if facts.get("method", "mean-min") == "mean-min" else ""
        plot.horizontal(value, f"θ{mean_} = {number(value)}", rule="rule2")
    title = f"Threshold estimate of {artifact.name}"
    said = [
        f"{len(defined(minima))} batches of {number(facts.get('batch_size'))} tokens. With no trend and a narrow "
        "band θ is well determined."
    ]
    if facts.get("standard_error") is not None:
        said.append(f"Standard error of θ: {number(facts['standard_error'], 2)}.")
    if facts.get("l0_heldout") is not None:
        asked, got = facts.get("asked_l0"), facts["l0_heldout"]
        off = f" ({percent(got / asked - 1, signed=True)})" if asked else ""
        said.append(f"Asked L0 {number(asked)}, on held-out tokens {number(got)}{off}.")
    caption = " ".join(said)
    rows = [[num(i), num(v)] for i, v in thinned(list(enumerate(minima)), _TABLE_ROWS)]
    note = thinned_note(len(minima), _TABLE_ROWS, "")
    table = Table(title, [Column("batch"), Column("smallest kept activation")], rows, note=note)
    return Figure(f"threshold-{index}", title, caption, plot.draw(title, caption), table, plot.hover(), plot.data())
