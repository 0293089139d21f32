"""How the SAEs were trained: curves of every training log, and where each run ended."""

from dataclasses import dataclass
from typing import Any

from saetool.artifacts import header as h
from saetool.report.blocks import ABSENT, Column, Figure, Figures, Group, Section, Table, num, words
from saetool.report.collect import Artifact
from saetool.report.run import Run
from saetool.report.scales import Scale, defined, linear, log
from saetool.report.svg import Key, Plot
from saetool.report.thinning import thinned, thinned_note
from saetool.report.thresholds import thresholds


@dataclass(frozen=True)
class _Quantity:
    """One logged quantity: its field, the figure's title, the axis' name, and what a reader should look for."""

    name: str
    title: str
    label: str
    reading: str
    logarithmic: bool = False
    from_zero: bool = False


_QUANTITIES = (
    _Quantity(
        "loss", "Training loss", "loss minimised", "Architectures minimise different losses: compare within one.", True
    ),
    _Quantity(
        "mse",
        "Reconstruction error while training",
        "MSE, summed over d",
        "Flat at the end: trained long enough.",
        True,
    ),
    _Quantity(
        "explained_variance", "Explained variance while training", "explained variance of the batch", "1 is perfect."
    ),
    _Quantity(
        "l0", "Active latents while training", "L0 (per token)", "BatchTopK fixes it; other architectures find it."
    ),
    _Quantity(
        "dead",
        "Dead latents while training",
        "dead latents",
        "Silent for the trainer's dead-after tokens.",
        from_zero=True,
    ),
    _Quantity(
        "aux", "Auxiliary loss", "auxiliary loss", "It revives dead latents: 0 while there are none.", from_zero=True
    ),
    _Quantity("lr", "Learning rate", "learning rate", "Warm-up and decay as they were.", from_zero=True),
)
_MOST_POINTS = 100
"""Points drawn of one curve."""
_TABLE_ROWS = 12


def training(run: Run) -> Section | None:
    """Curves of every training log, where each run ended, and the inference thresholds."""
    blocks: list[Any] = []
    for i, artifact in enumerate(run.found.of(h.TRAIN_LOG)):
        logs = series_of(artifact)
        figures = [f for quantity in _QUANTITIES if (f := _curve(run, logs, i, quantity))]
        if figures:
            blocks.append(Group(f"training-{i}", f"Training log {artifact.label}", [_ends(logs), Figures(figures)]))
    if estimated := thresholds(run):
        blocks.append(estimated)
    if not blocks:
        return None
    return Section("training", "Training", "How the SAEs got there.", blocks)


_Logs = dict[str, list[dict[str, Any]]]


def _ends(logs: _Logs) -> Table:
    """The last record of every SAE of a log."""
    columns = [
        Column("SAE", numeric=False),
        Column("latents"),
        Column("steps"),
        Column("tokens"),
        Column("loss", "what was minimised, on scaled inputs"),
        Column("MSE", "of the last batch, summed over d"),
        Column("EV", "explained variance of the last batch, about its own mean"),
        Column("L0"),
        Column("dead"),
        Column("auxiliary loss"),
        Column("seconds", "wall time since the log began, on the machine that trained"),
    ]
    names = ("latents", "step", "tokens", "loss", "mse", "explained_variance", "l0", "dead", "aux", "time")
    rows = [[words(n, 40), *(num(records[-1].get(name)) for name in names)] for n, records in logs.items()]
    used = [i for i in range(len(columns)) if any(row[i].text != ABSENT for row in rows)]
    note = "The last logged step of each SAE. Its own selection is at work here; SAEs compared has inference."
    return Table(
        "Where training ended",
        [columns[i] for i in used],
        [[row[i] for i in used] for row in rows],
        note,
        sortable=True,
    )


def series_of(artifact: Artifact) -> dict[str, list[dict[str, Any]]]:
    """The records of each SAE of a log by step; where a step was logged twice (a resumed run) the later one counts."""
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for record in artifact.payload:
        by_name.setdefault(record["sae"], {})[record["step"]] = record
    return {name: [steps[s] for s in sorted(steps)] for name, steps in sorted(by_name.items())}


def _curve(run: Run, logs: _Logs, index: int, quantity: _Quantity) -> Figure | None:
    name, title = quantity.name, quantity.title
    known = {n: [r for r in records if name in r] for n, records in logs.items()}
    known = {n: r for n, r in known.items() if defined([x[name] for x in r])}
    logs = dict(sorted(known.items(), key=lambda pair: run.series(pair[0])))
    values = [r[name] for records in logs.values() for r in records if r[name] is not None]
    if not logs or (name == "aux" and not any(values)):
        return None
    logarithmic = quantity.logarithmic and min(defined(values)) > 0
    plot = Plot(
        linear([r["step"] for records in logs.values() for r in records], pad=0, include=[0]),
        _scale(quantity, values, logarithmic=logarithmic),
        "training step",
        quantity.label + (" (log scale)" if logarithmic else ""),
        [Key(n.removesuffix(".st"), run.series(n)) for n in logs],
    )
    for n, records in logs.items():
        drawn = thinned(records, _MOST_POINTS)
        plot.line([r["step"] for r in drawn], [r[name] for r in drawn], run.series(n))
        plot.remember(n, [r["step"] for r in records], [r[name] for r in records], most=_MOST_POINTS // 2)
    longest = max(len(r) for r in logs.values())
    said = [f"{len(values):,} logged values. {quantity.reading}"]
    if longest > _MOST_POINTS:
        said.append(f"Drawn: {_MOST_POINTS} points a curve, evenly spaced.")
    if gaps := sum(len(r) for r in logs.values()) - len(values):
        said.append(f"{gaps} undefined values are gaps.")
    caption = " ".join(said)
    columns = [Column("SAE", numeric=False), Column("step"), Column("tokens"), Column(quantity.label)]
    rows = [
        [words(n), num(r["step"]), num(r.get("tokens")), num(r[name])]
        for n, records in logs.items()
        for r in thinned(records, _TABLE_ROWS)
    ]
    table = Table(title, columns, rows, note=thinned_note(longest, _TABLE_ROWS, "an SAE"))
    fid = f"training-{index}-{name.replace('_', '-')}"
    return Figure(fid, title, caption, plot.draw(title, caption), table, plot.hover(), plot.data())


def _scale(quantity: _Quantity, values: list[float], *, logarithmic: bool) -> Scale:
    if quantity.from_zero:
        top = max([*values, 1 if quantity.name == "dead" else 1e-12])
        return Scale("linear", -0.03 * top, 1.08 * top)
    return log(values) if logarithmic else linear([*values, *_around(values)])


def _around(values: list[float]) -> list[float]:
    """A tenth either side of the mean, so that noise about a constant looks like that."""
    middle = sum(values) / len(values)
    return [0.9 * middle, 1.1 * middle]
