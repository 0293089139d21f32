"""Explanations: how well descriptions predict activations, and cards of single latents with their contexts."""

import math
from typing import Any

from saetool.report.blocks import (
    Column,
    Figure,
    Figures,
    Group,
    Section,
    Table,
    linked,
    num,
    number,
    pct,
    percent,
    words,
)
from saetool.report.pairs import NEUTRAL, NOVEL, RECONSTRUCTION, histogram
from saetool.report.run import Explained, Run, mean, score, stated
from saetool.report.scales import Scale
from saetool.report.svg import Key, Plot

_EXTREMES = 8
"""Best and worst latents listed."""
_BINS = [round(-1 + i * 0.1, 1) for i in range(21)]


def autointerp(run: Run) -> Section | None:
    """Every explanations file on its own, and multiple choice in one table."""
    files = [e for e in run.explanations if any(r.get("scores") for r in e.records) or e.records]
    if not files:
        return None
    blocks: list[Any] = [_summary(files), *_others(files)]
    blocks += _choices(files)
    blocks += [group for i, e in enumerate(files) if (group := _file(run, e, i)).blocks]
    intro = (
        "A description is good if activations predicted from it correlate with the true ones on text that was not "
        "used to write it. The control scores each latent with another latent's description."
    )
    return Section("autointerp", "Descriptions and their scores", intro, blocks)


def scored(explained: Explained, field: str = "correlation") -> list[tuple[dict[str, Any], float]]:
    """(record, value) of every latent whose simulation score ``field`` is defined."""
    found = [(r, score(r, "simulate", field)) for r in explained.records]
    return [(r, v) for r, v in found if v is not None]


def _summary(files: list[Explained]) -> Table:
    columns = [
        Column("explanations", numeric=False),
        Column("of SAE", numeric=False),
        Column("judged by", "what wrote the descriptions and predicted from them", numeric=False),
        Column("latents", "asked for"),
        Column("described"),
        Column("scored", "with a defined correlation"),
        Column("mean r", "mean correlation over scored latents"),
        Column("mean r, undefined = 0", "so that dropping failures cannot raise the mean"),
        Column("median r"),
        Column("95 % interval", "bootstrap over latents", numeric=False),
        Column("shuffled", "mean correlation with another latent's description"),
        Column("n-gram floor", "mean correlation of the token-table baseline"),
    ]
    rows = []
    for e in files:
        values = sorted(v for _, v in scored(e))
        summary = e.summary("simulate")
        ci = summary.get("ci95")
        interval = f"{number(ci[0], 3)} to {number(ci[1], 3)}" if isinstance(ci, list) and len(ci) == 2 else "–"
        rows.append(
            [
                words(e.artifact.label, 50),
                words(e.sae_name, 40),
                words(_judge(e), 40),
                num(len(e.records)),
                num(sum(1 for r in e.records if r.get("description"))),
                num(len(values)),
                num(_first(summary.get("mean"), mean(values))),
                num(summary.get("mean_null0")),
                num(_first(summary.get("median"), _median(values))),
                words(interval),
                num(_first(summary.get("control_mean"), mean(v for _, v in scored(e, "shuffled")))),
                num(_first(summary.get("floor_mean"), mean(v for _, v in scored(e, "ngram")))),
            ]
        )
    return Table("Simulation scores", columns, rows, sortable=True)


_OTHERS = {
    "detect": ("detection", "does the latent fire in this window? balanced accuracy"),
    "fuzz": ("fuzzing", "are the marked tokens those it fires on? balanced accuracy"),
    "intruder": ("intruder", "which of several windows is not one of the latent's? accuracy; needs no description"),
}


def _others(files: list[Explained]) -> list[Any]:
    """Scores other than simulation, each beside chance, its control and its floor."""
    rows = []
    for e in files:
        for name, (title, _) in _OTHERS.items():
            s = e.summary(name)
            if s.get("mean") is None:
                continue
            ci = s.get("ci95")
            interval = f"{number(ci[0], 3)} to {number(ci[1], 3)}" if isinstance(ci, list) and len(ci) == 2 else "–"
            numbers = [num(s.get(f)) for f in ("chance", "control_mean", "floor_mean", "n", "n_null")]
            said = [words(e.sae_name, 40), words(title), words(_judge(e))]
            rows.append([*said, num(s["mean"]), num(s.get("median")), words(interval), *numbers])
    if not rows:
        return []
    columns = [
        Column("of SAE", numeric=False),
        Column("score", numeric=False),
        Column("judged by", numeric=False),
        Column("mean"),
        Column("median"),
        Column("95 % interval", "bootstrap over latents", numeric=False),
        Column("chance", "what guessing gives"),
        Column("control", "mean with another latent's description"),
        Column("floor", "mean of the table of tokens in place of a language model"),
        Column("latents", "with a defined score"),
        Column("undefined", "latents asked about whose score is undefined"),
    ]
    note = " ".join(f"{title.capitalize()}: {what}." for title, what in _OTHERS.values())
    return [Table("Other scores", columns, rows, note=note)]


def _judge(e: Explained) -> str:
    """What predicted: the language model that the header names, or the table of tokens."""
    backend = stated(e.artifact, "backend")
    if not isinstance(backend, dict) or backend.get("kind") in (None, "offline"):
        return "table of tokens, offline"
    return " ".join(str(backend[k]) for k in ("kind", "model") if backend.get(k))


def _first(*values: float | None) -> float | None:
    return next((v for v in values if v is not None), None)


def _median(values: list[float]) -> float | None:
    n = len(values)
    return None if not n else (values[(n - 1) // 2] + values[n // 2]) / 2


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share seen in ``n`` questions."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def choice_of(explained: Explained) -> dict[str, float] | None:
    """Multiple choice as a file's summary states it: accuracy, chance, n, interval, and the control's if it has one."""
    summary = explained.summary("choice")
    accuracy, chance, n = _first(summary.get("accuracy"), summary.get("mean")), summary.get("chance"), summary.get("n")
    if accuracy is None or chance is None or not n:
        return None
    out = {"accuracy": accuracy, "chance": chance, "n": n}
    control = _first(summary.get("control_accuracy"), summary.get("control_mean"))
    if control is not None:
        out["control"] = control
    for prefix in ("", "control_"):
        ends = summary.get(f"{prefix}wilson95")
        if isinstance(ends, list) and len(ends) == 2:
            out |= {f"{prefix}low": ends[0], f"{prefix}high": ends[1]}
    if "low" not in out:
        out["low"], out["high"] = wilson(accuracy, int(n))
    return out


def _choices(files: list[Explained]) -> list[Any]:
    """Multiple choice of every file that has one: a drawing with chance and intervals, and a table."""
    found = [(e, c) for e in files if (c := choice_of(e))]
    if not found:
        return []
    columns = [
        Column("explanations", numeric=False),
        Column("questions"),
        Column("right", "share answered right"),
        Column("interval from", "Wilson, 95 %"),
        Column("to"),
        Column("chance"),
        Column("control", "the meta-latents of another latent shown instead"),
    ]
    rows = [
        [
            words(e.artifact.label, 50),
            num(c["n"]),
            pct(c["accuracy"]),
            pct(c["low"]),
            pct(c["high"]),
            pct(c["chance"]),
            pct(c.get("control")),
        ]
        for e, c in found
    ]
    note = "Which of several latents is meant, given only the descriptions of its meta-latents?"
    return [Figures([_choice_figure(found)]), Table("Multiple choice", columns, rows, note=note)]


def _choice_figure(found: list[tuple[Explained, dict[str, float]]]) -> Figure:
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


def _file(run: Run, e: Explained, index: int) -> Group:
    blocks: list[Any] = []
    values = scored(e)
    if values:
        blocks.append(Figures([_scores(e, index)]))
        blocks.append(_extremes(run, e, values))
    reasons: dict[str, int] = {}
    for record in e.records:
        if record["status"] not in ("scored", "explained"):
            name = f"{record['status']}: {record.get('reason') or 'no reason given'}"
            reasons[name] = reasons.get(name, 0) + 1
    for record in e.records:
        reason = ((record.get("scores") or {}).get("simulate") or {}).get("null_reason")
        if reason:
            name = f"correlation undefined: {reason}"
            reasons[name] = reasons.get(name, 0) + 1
    if reasons:
        rows = [[words(name), num(n)] for name, n in sorted(reasons.items())]
        blocks.append(Table("Latents without a score", [Column("why", numeric=False), Column("latents")], rows))
    return Group(f"explained-{index}", f"{e.artifact.label}, latents of {e.sae_name}", blocks)


def _scores(e: Explained, index: int) -> Figure:
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
    average = _first(e.summary("simulate").get("mean"), mean(values))
    if average is not None:
        plot.vertical(average, f"mean {number(average, 3)}")
    title = f"Simulation scores of {e.artifact.label}"
    missing = len(e.records) - len(values)
    caption = f"{number(len(values))} latents with a score" + (f", {number(missing)} without." if missing else ".")
    if control:
        said = _first(e.summary("simulate").get("control_mean"), mean(control))
        caption += f" Shuffled control: mean {number(said, 2)} over {number(len(control))}."
    rows = [
        [num(edges[i]), num(edges[i + 1]), num(c), num(control_counts[i])]
        for i, c in enumerate(counts)
        if c or control_counts[i]
    ]
    columns = [Column("r from"), Column("to"), Column("latents"), Column("shuffled control")]
    return Figure(f"explained-{index}-scores", title, caption, plot.draw(title, caption), Table(title, columns, rows))


def _extremes(run: Run, e: Explained, values: list[tuple[dict[str, Any], float]]) -> Table:
    ranked = sorted(values, key=lambda pair: (-pair[1], pair[0]["latent"]))
    half = min(_EXTREMES, (len(ranked) + 1) // 2)
    best, worst = ranked[:half], ranked[half:][-_EXTREMES:][::-1]
    rows = [
        [
            words(rank),
            linked(r["latent"], run.link(e.sae_sha256, r["latent"])),
            words(r.get("description") or "–", 120),
            num(v),
            num(r.get("density")),
        ]
        for rank, group in (("best", best), ("worst", worst))
        for r, v in group
    ]
    columns = [
        Column("rank", numeric=False),
        Column("latent"),
        Column("description", numeric=False),
        Column("r", "correlation of predicted and true activations"),
        Column("density", "share of tokens it fires on"),
    ]
    return Table("Best and worst explained latents", columns, rows)
