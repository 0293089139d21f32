"""The way from the small SAE to the large one: error and sparsity at every step, phase by phase (paper, fig. 5)."""

from dataclasses import dataclass
from typing import Any

from saetool.report.blocks import Column, Figure, Table, num, words
from saetool.report.pairs import NEUTRAL, NOVEL, RECONSTRUCTION, TABLE_ROWS, Pair
from saetool.report.scales import defined, linear
from saetool.report.svg import Key, Plot
from saetool.report.thinning import thinned, thinned_note

MAX_PHASE_POINTS = 250
"""Points drawn of one phase of a path."""

ADDING, EXCHANGING, LEAVING = "adding novel latents", "exchanging components", "unmatched small latents leave"


@dataclass(frozen=True)
class Phase:
    """Consecutive states of the path: what happens in them, its series, and the states' numbers."""

    name: str
    series: int
    states: range


def phases(pair: Pair) -> list[Phase]:
    """The path's phases. State 0 is the small SAE itself; each phase begins with the state the one before ends in."""
    path = pair["data"]["path"]
    last = len(path["mse"]) - 1
    added = min(path["n_add_steps"], last)
    swaps = path.get("n_swap_steps")
    exchanged = min(added + (pair["components"] if swaps is None else swaps), last)
    found = [
        Phase(ADDING, NOVEL, range(0, added + 1)),
        Phase(EXCHANGING, RECONSTRUCTION, range(added, exchanged + 1)),
        Phase(LEAVING, 2, range(exchanged, last + 1)),
    ]
    return [phase for phase in found if len(phase.states) > 1]


def _phase_keys(pair: Pair) -> list[Key]:
    # The series differ in dash and marker too, so that the phases are told apart without colour.
    return [Key(f"{i}. {phase.name}", phase.series) for i, phase in enumerate(phases(pair), 1)]


def path_error(pair: Pair, data: dict[str, Any], fid: str) -> Figure:
    path = data["path"]
    ends = defined([data.get("mse_small"), data.get("mse_large")])
    plot = Plot(
        linear(path["n_latents"], pad=0.03),
        linear(path["mse"], include=ends, pad=0.12),
        "latents in the stitched SAE",
        "MSE (summed over d)",
        _phase_keys(pair),
    )
    _draw_phases(plot, pair, path["n_latents"], path["mse"])
    if data.get("mse_small") is not None:
        plot.horizontal(data["mse_small"], pair["small"])
    if data.get("mse_large") is not None:
        plot.horizontal(data["mse_large"], pair["large"], below=True)
    title = f"Error on the way from {pair['small']} to {pair['large']}"
    caption = _path_caption(pair)
    return Figure(
        f"{fid}-path", title, caption, plot.draw(title, caption), _path_table(pair), plot.hover(), plot.data()
    )


def path_sparsity(pair: Pair, data: dict[str, Any], fid: str) -> Figure:
    path = data["path"]
    xs = defined([*path["l0"], data.get("l0_small"), data.get("l0_large")])
    ys = defined([*path["mse"], data.get("mse_small"), data.get("mse_large")])
    plot = Plot(
        linear(xs, pad=0.1),
        linear(ys, pad=0.12),
        "L0 (active latents per token)",
        "MSE (summed over d)",
        _phase_keys(pair),
    )
    known = {i for i, v in enumerate(path["l0"]) if v is not None}
    _draw_phases(plot, pair, path["l0"], path["mse"], known)
    for name, x, y in (
        (pair["small"], data.get("l0_small"), data.get("mse_small")),
        (pair["large"], data.get("l0_large"), data.get("mse_large")),
    ):
        if x is not None and y is not None:
            plot.mark(x, y, NEUTRAL, name)
    title = "Sparsity and error on the same way"
    caption = _path_caption(pair)
    return Figure(f"{fid}-l0", title, caption, plot.draw(title, caption), plot.sample(title), plot.hover(), plot.data())


def _draw_phases(plot: Plot, pair: Pair, xs: list[Any], ys: list[Any], known: set[int] | None = None) -> None:
    for phase in phases(pair):
        states = [i for i in phase.states if known is None or i in known]
        drawn = thinned(list(range(len(states))), MAX_PHASE_POINTS)
        if len(drawn) > 1:
            plot.line([xs[states[i]] for i in drawn], [ys[states[i]] for i in drawn], phase.series)
            px, py = [xs[i] for i in states], [ys[i] for i in states]
            plot.remember(phase.name, px, py, "step", states, most=100, drawn=drawn)


def _path_caption(pair: Pair) -> str:
    path = pair["data"]["path"]
    steps = {phase.name: len(phase.states) - 1 for phase in phases(pair)}
    text = f"{steps.get(ADDING, 0):,} novel latents are added, then {steps.get(EXCHANGING, 0):,} components exchanged"
    if steps.get(LEAVING):
        text += f", then {steps[LEAVING]:,} latents of the small SAE without partner leave"
    how = ", ".join(f"{n} {path[n]}" for n in ("order", "bias") if path.get(n) is not None)
    text += f" ({how})." if how else "."
    if max(steps.values(), default=0) >= MAX_PHASE_POINTS:
        text += f" Drawn: {MAX_PHASE_POINTS:,} points a phase, evenly spaced."
    gaps = sum(v is None for v in path["mse"])
    return text + (f" {gaps} undefined values are gaps." if gaps else "")


def _path_table(pair: Pair) -> Table:
    path = pair["data"]["path"]
    states = list(range(len(path["mse"])))
    name = {i: phase.name for phase in reversed(phases(pair)) for i in phase.states}
    rows = [
        [
            num(i),
            words("start" if i == 0 else name.get(i, "")),
            num(path["n_latents"][i]),
            num(path["l0"][i]),
            num(path["mse"][i]),
        ]
        for i in thinned(states, TABLE_ROWS)
    ]
    columns = [Column("step"), Column("phase", numeric=False), Column("latents"), Column("L0"), Column("MSE")]
    return Table("The path", columns, rows, note=thinned_note(len(states), TABLE_ROWS, ""))
