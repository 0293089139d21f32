"""A pair's main figures: how close its latents come, what each does to the error, and what whole groups do."""

from collections import Counter
from typing import Any

from saetool.report.blocks import Column, Figure, Table, num, number, pct, percent, words
from saetool.report.pairs import NOVEL, RECONSTRUCTION, Pair, histogram
from saetool.report.run import Run
from saetool.report.scales import Scale, defined, linear, symlog
from saetool.report.svg import Key, Plot
from saetool.report.thinning import thinned

MAX_POINTS = 1_500
"""Points drawn of a scatter plot; beyond it an even sample is drawn and the caption says so."""
_N_BINS = 40


def closeness(pair: Pair, theta: float, fid: str) -> Figure:
    values = defined(pair["max_cosine"]["values"])
    low = min(0.0, *values) if values else 0.0
    edges = [low + (1 - low) * i / _N_BINS for i in range(_N_BINS + 1)]
    # θ becomes an edge, so that no bar holds latents of both groups.
    nearest = min(range(1, _N_BINS), key=lambda i: abs(edges[i] - theta))
    edges[nearest] = theta
    counts = histogram(values, edges)
    plot = Plot(
        Scale("linear", low, 1.0),
        Scale("linear", 0, 1.25 * max(counts, default=1) or 1),
        f"largest cosine with a latent of {pair['small']}",
        f"latents of {pair['large']}",
        [Key("novel", NOVEL, "bar"), Key("reconstruction", RECONSTRUCTION, "bar"), Key("θ", 0, "rule")],
    )

    def say(i: int) -> str:
        return f"{edges[i]:.3f} to {edges[i + 1]:.3f}: {counts[i]} latents"

    split = [c if edges[i + 1] <= theta else 0 for i, c in enumerate(counts)]
    plot.bars(edges, split, NOVEL, say)
    plot.bars(edges, [c - s for c, s in zip(counts, split, strict=True)], RECONSTRUCTION, say)
    shares = (
        f"{percent(pair['novel_share'])} novel, {percent(pair['reconstruction_share'])} reconstruction at θ = {theta:g}"
    )
    plot.vertical(theta, f"θ = {theta:g}", rule="rule2")
    null = pair.get("null") or {}
    said = [f"{number(len(values))} latents; {shares}."]
    if (q99 := null.get("max_cosine_q99")) is not None:
        plot.vertical(q99, "99 % of random", row=1, before=q99 < theta)
        said.append(
            f"Random directions of the same shape: mean {number(null.get('max_cosine_mean'))}, "
            f"99 % below {number(q99)}."
        )
    if (shuffled := (pair.get("null_shuffled") or {}).get("max_cosine_mean")) is not None:
        said.append(f"Rows with shuffled coordinates: mean {number(shuffled)}.")
    title = f"How close each latent of {pair['large']} comes to one of {pair['small']}"
    caption = " ".join(said)
    rows = [[num(edges[i]), num(edges[i + 1]), num(c)] for i, c in enumerate(counts) if c]
    table = Table(title, [Column("cosine from"), Column("to"), Column("latents")], rows)
    return Figure(f"{fid}-cosine", title, caption, plot.draw(title, caption), table)


def effects(run: Run, pair: Pair, data: dict[str, Any], theta: float, fid: str) -> Figure | None:
    """Max cosine against the change of MSE when that latent alone is added to the small SAE."""
    effects = (data.get("effects") or {}).get("delta_mse") or []
    known = [
        (i, c, e)
        for i, (c, e) in enumerate(zip(pair["max_cosine"]["values"], effects, strict=False))
        if c is not None and e is not None
    ]
    if not known:
        return None
    drawn = thinned(known, MAX_POINTS)
    scale = symlog([e for _, _, e in known])
    plot = Plot(
        linear([c for _, c, _ in known], pad=0.03, include=[theta, 1.0]),
        scale,
        f"largest cosine with a latent of {pair['small']}",
        "change of MSE (symlog axis)",
        [Key("novel", NOVEL, "mark"), Key("reconstruction", RECONSTRUCTION, "mark"), Key("θ", 0, "rule")],
    )
    quadrants: Counter[tuple[str, str]] = Counter()
    for name, series in (("reconstruction", RECONSTRUCTION), ("novel", NOVEL)):
        mine = [p for p in drawn if (p[1] < theta) == (name == "novel")]
        plot.points([c for _, c, _ in mine], [e for _, _, e in mine], series, square=name == "novel")
        every, seen = [p for p in known if (p[1] < theta) == (name == "novel")], {p[0] for p in mine}
        ids, xs, ys = ([p[a] for p in every] for a in range(3))
        shown = [i for i, p in enumerate(every) if p[0] in seen]
        plot.remember(name, xs, ys, "latent", ids, run.prefix(pair["large_sha256"]), drawn=shown)
    for _, c, e in known:
        quadrants["novel" if c < theta else "reconstruction", _sign(e)] += 1
    plot.horizontal(0.0, rule="zero")
    plot.vertical(theta, rule="rule2")
    title = "What adding one latent does to the small SAE's error"
    said = [
        f"{number(len(known))} latents of {pair['large']}, each added alone to {pair['small']} "
        f"(MSE {number(data.get('mse_small'))}); below 0 it helps. Linear within ±{number(scale.linear, 1)}."
    ]
    if len(drawn) < len(known):
        said.append(f"Drawn: {number(len(drawn))} of them, evenly spaced.")
    if missing := len(effects) - len(known):
        said.append(f"{number(missing)} latents without a defined effect are not in it.")
    if data.get("auc") is not None:
        said.append(f"AUC of max cosine as predictor of the sign: {number(data['auc'])}.")
    caption = " ".join(said)
    signs = ("lowers the error", "no change", "raises the error")
    columns = [Column("latents", numeric=False), *(Column(s) for s in signs)]
    rows = [[words(g), *(num(quadrants[g, s]) for s in signs)] for g in ("novel", "reconstruction")]
    table = Table("Effects by group and sign", columns, rows)
    return Figure(f"{fid}-effects", title, caption, plot.draw(title, caption), table, plot.hover(), plot.data())


def _sign(effect: float) -> str:
    return "no change" if effect == 0 else "lowers the error" if effect < 0 else "raises the error"


def group_effects(pair: Pair, data: dict[str, Any], theta: float, fid: str) -> Figure | None:
    """The change of MSE when a whole group is added, over theta."""
    groups = sorted((g for g in data.get("groups") or [] if g.get("theta") is not None), key=lambda g: g["theta"])
    names = (("novel", "novel_delta", NOVEL), ("reconstruction", "reconstruction_delta", RECONSTRUCTION))
    values = [100 * g[f] for g in groups for _, f, _ in names if g.get(f) is not None]
    if len(groups) < 2 or not values:
        return None
    thetas = [g["theta"] for g in groups]
    wide = max(abs(v) for v in values) > 60
    # Linear as far as the novel latents reach: what they do is the smaller effect and the one in question.
    novel = [100 * g["novel_delta"] for g in groups if g.get("novel_delta")]
    scale = symlog([*values, 1.0], linear_for=novel) if wide else linear(values, include=[0])
    plot = Plot(
        linear(thetas),
        scale,
        "θ",
        "change of MSE in %" + (" (symlog axis)" if wide else ""),
        [Key(f"all {n} latents added", s) for n, _, s in names],
    )
    for name, field, series in names:
        ys = [None if g.get(field) is None else 100 * g[field] for g in groups]
        plot.line(thetas, ys, series)
        plot.remember(name, thetas, ys)
    plot.horizontal(0.0, rule="zero")
    plot.vertical(theta, f"θ = {theta:g}", rule="rule2")
    title = "Adding a whole group of latents to the small SAE"
    caption = f"{len(groups)} values of θ. Below 0 the group improves the small SAE, above it harms."
    caption += f" Linear within ±{number(scale.linear, 1)} %." if wide else ""
    columns = [Column("θ"), Column("novel"), Column("reconstruction")]
    rows = [
        [num(g["theta"]), *(pct(g.get(f), signed=True) for f in ("novel_delta", "reconstruction_delta"))]
        for g in groups
    ]
    return Figure(
        f"{fid}-groups",
        title,
        caption,
        plot.draw(title, caption),
        Table(title, columns, rows),
        plot.hover(),
        plot.data(),
    )
