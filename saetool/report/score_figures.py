"""Figures of explanations: how scores are distributed, what they depend on, and how far above chance and floor."""

from typing import Any

from saetool.report.blocks import Column, Figure, Table, num, number, percent
from saetool.report.pairs import NEUTRAL, NOVEL, RECONSTRUCTION, histogram
from saetool.report.run import Explained, Run, mean, score
from saetool.report.scales import Scale, log
from saetool.report.svg import Key, Plot
from saetool.report.thinning import thinned

MAX_POINTS = 1_000
_BINS = [round(-1 + i * 0.1, 1) for i in range(21)]


def scored(explained: Explained, field: str = "correlation") -> list[tuple[dict[str, Any], float]]:
    """(record, value) of every latent whose simulation score ``field`` is defined."""
    found = [(r, score(r, "simulate", field)) for r in explained.records]
    return [(r, v) for r, v in found if v is not None]


def first_of(*values: float | None) -> float | None:
    """The first that is known."""
    return next((v for v in values if v is not None), None)


def score_histogram(e: Explained, index: int) -> Figure:
    """Histogram of correlations, the shuffled control's as an outline over it."""
    values = [v for _, v in scored(e)]
    control = [v for _, v in scored(e, "shuffled")]
    counts, control_counts = histogram(values, _BINS), histogram(control, _BINS)
    low = min(i for i, (a, b) in enumerate(zip(counts, control_counts, strict=True)) if a or b)
    edges, counts, control_counts = _BINS[low:], counts[low:], control_counts[low:]
    top = max(*counts, *control_counts)
    keys = [Key("descriptions", RECONSTRUCTION, "bar")] + ([Key("shuffled control", NOVEL)] if control else [])
    plot = Plot(
        Scale("linear", edges[0], 1.0),
        Scale("linear", 0, 1.2 * top),
        "correlation of predicted and true activations",
        "latents",
        keys,
    )
    plot.bars(edges, counts, RECONSTRUCTION, lambda i: f"{edges[i]:.1f} to {edges[i + 1]:.1f}: {counts[i]} latents")
    if control:
        plot.steps(edges, control_counts, NOVEL)
    average = first_of(e.summary("simulate").get("mean"), mean(values))
    if average is not None:
        plot.vertical(average, f"mean {number(average, 3)}")
    title = f"Simulation scores of {e.artifact.label}"
    missing = len(e.records) - len(values)
    caption = f"{number(len(values))} latents with a score" + (f", {number(missing)} without." if missing else ".")
    if control:
        said = first_of(e.summary("simulate").get("control_mean"), mean(control))
        caption += f" Shuffled control: mean {number(said, 2)} over {number(len(control))}."
    rows = [
        [num(edges[i]), num(edges[i + 1]), num(c), num(control_counts[i])]
        for i, c in enumerate(counts)
        if c or control_counts[i]
    ]
    columns = [Column("r from"), Column("to"), Column("latents"), Column("shuffled control")]
    return Figure(f"explained-{index}-scores", title, caption, plot.draw(title, caption), Table(title, columns, rows))


def ecdf(e: Explained, index: int) -> Figure | None:
    """Share of latents that score less: descriptions, the floor and the shuffled control over each other."""
    curves = [
        (name, sorted(v for _, v in scored(e, field)), series)
        for name, field, series in (
            ("descriptions", "correlation", RECONSTRUCTION),
            ("floor: table of tokens", "ngram", 2),
            ("shuffled control", "shuffled", NOVEL),
        )
    ]
    curves = [(name, values, series) for name, values, series in curves if len(values) > 1]
    if not curves:
        return None
    low = min(values[0] for _, values, _ in curves)
    plot = Plot(
        Scale("linear", min(low, 0.0), 1.0),
        Scale("linear", 0.0, 1.04),
        "correlation of predicted and true activations",
        "share of latents that score less",
        [Key(name, series) for name, _, series in curves],
    )
    for name, values, series in curves:
        ys = [(i + 1) / len(values) for i in range(len(values))]
        at = thinned(list(range(len(values))), 200)
        plot.line([values[i] for i in at], [ys[i] for i in at], series)
        plot.remember(name, values, ys, most=200)
    title = f"Distribution of the scores of {e.artifact.label}"
    medians = ", ".join(f"{name} {number(v[len(v) // 2], 3)} (n = {number(len(v))})" for name, v, _ in curves)
    caption = f"Medians: {medians}. The further right of the control a curve lies, the more the descriptions say."
    fid = f"explained-{index}-ecdf"
    return Figure(fid, title, caption, plot.draw(title, caption), plot.sample(title), plot.hover(), plot.data())


def by_density(run: Run, e: Explained, index: int) -> Figure | None:
    """Score against how often the latent fires."""
    known = [(r["latent"], r["density"], v) for r, v in scored(e) if (r.get("density") or 0) > 0]
    if len(known) < 2:
        return None
    drawn = thinned(known, MAX_POINTS)
    plot = Plot(
        log([d for _, d, _ in known]),
        Scale("linear", min(0.0, *(v for _, _, v in known)), 1.04),
        "share of tokens the latent fires on (log scale)",
        "correlation",
    )
    plot.points([d for _, d, _ in drawn], [v for _, _, v in drawn], RECONSTRUCTION)
    _remember(plot, run, e, known)
    title = f"Are rare latents harder to describe? ({e.artifact.label})"
    caption = f"{number(len(known))} latents with a score."
    half = sorted(known, key=lambda k: k[1])
    halves = half[: len(half) // 2], half[len(half) // 2 :]
    rare, often = (mean(v for _, _, v in part) for part in halves)
    caption += f" Mean of the rarer half {number(rare, 3)}, of the other {number(often, 3)}."
    if len(drawn) < len(known):
        caption += f" Drawn: {number(len(drawn))} of them, evenly spaced."
    fid = f"explained-{index}-density"
    return Figure(fid, title, caption, plot.draw(title, caption), plot.sample(title), plot.hover(), plot.data())


def _remember(plot: Plot, run: Run, e: Explained, known: list[tuple[int, float, float]]) -> None:
    """All (latent, x, y) as the figure's data; hovering knows those that are drawn."""
    ids, xs, ys = ([k[a] for k in known] for a in range(3))
    drawn = thinned(list(range(len(known))), MAX_POINTS)
    plot.remember("latent", xs, ys, "number", ids, run.prefix(e.sae_sha256), drawn=drawn)


def against_floor(run: Run, e: Explained, index: int) -> Figure | None:
    """A language model's scores against those of the table of tokens, latent by latent."""
    known = [(r["latent"], f, v) for r, v in scored(e) if (f := score(r, "simulate", "ngram")) is not None]
    if len(known) < 2:
        return None
    drawn = thinned(known, MAX_POINTS)
    low = min(0.0, *(min(f, v) for _, f, v in known))
    plot = Plot(
        Scale("linear", low, 1.04),
        Scale("linear", low, 1.04),
        "correlation of the table of tokens",
        "correlation of the language model",
    )
    plot.line([low, 1.0], [low, 1.0], NEUTRAL, markers=False)
    plot.points([f for _, f, _ in drawn], [v for _, _, v in drawn], RECONSTRUCTION)
    _remember(plot, run, e, known)
    title = f"Does the language model say more than the tokens? ({e.artifact.label})"
    above = sum(v > f for _, f, v in known)
    caption = f"{number(len(known))} latents; {percent(above / len(known))} lie above the diagonal, where it does."
    if len(drawn) < len(known):
        caption += f" Drawn: {number(len(drawn))} of them, evenly spaced."
    fid = f"explained-{index}-floor"
    return Figure(fid, title, caption, plot.draw(title, caption), plot.sample(title), plot.hover(), plot.data())


def choice_figure(found: list[tuple[Explained, dict[str, float]]]) -> Figure:
    bars: list[tuple[str, float, int, tuple[float, float] | None]] = [
        (e.sae_name, c["accuracy"], RECONSTRUCTION, (c["low"], c["high"])) for e, c in found
    ]
    for e, c in found:
        if "control" in c:
            interval = (c["control_low"], c["control_high"]) if "control_low" in c else None
            bars.append((f"control: {e.sae_name}", c["control"], NEUTRAL, interval))
    plot = Plot(
        Scale("linear", 0.0, 1.0),
        Scale("linear", len(bars) - 0.4, -0.6),
        "share of questions answered right",
        "",
        [Key("chance", 0, "rule")],
        y_names=[(i, name) for i, (name, _, _, _) in enumerate(bars)],
        height=80 + 40 * len(bars),
        left=170,
    )
    plot.horizontal_bars([(i, v, series, "") for i, (_, v, series, _) in enumerate(bars)], thick=18)
    for i, (_, value, _, interval) in enumerate(bars):
        if interval:
            plot.interval(i, *interval)
        plot.label(max(value, interval[1] if interval else value), i, percent(value))
    for chance in sorted({c["chance"] for _, c in found}):
        plot.vertical(chance, rule="rule2")
    title = "Multiple choice: is the right latent found from its meta-latents?"
    n = ", ".join(f"{e.sae_name} {number(int(c['n']))} questions" for e, c in found)
    caption = f"{n}; whiskers: 95 % interval; dashed: chance. The control is shown another latent's meta-latents."
    return Figure("choice", title, caption, plot.draw(title, caption))
