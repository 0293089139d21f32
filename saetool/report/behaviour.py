"""What activations say of a pair beyond the effects of single latents (the paper's figures 8, 11 and 13 to 15)."""

from typing import Any

from saetool.report.blocks import Column, Figure, Table, num, number, pct, percent, words
from saetool.report.pairs import NEUTRAL, NOVEL, RECONSTRUCTION, Pair, histogram
from saetool.report.scales import Scale, Values, defined, linear, symlog
from saetool.report.svg import Key, Plot
from saetool.report.thinning import thinned

MAX_POINTS = 1_000
"""Points drawn of one of these scatter plots; beyond it an even sample is drawn and the caption says so."""
_GROUPS = (("novel", NOVEL), ("reconstruction", RECONSTRUCTION))


def predictor(pair: Pair, data: dict[str, Any], fid: str) -> Figure | None:
    """ROC of max cosine as predictor of the effect's sign (Fig. 13)."""
    roc = data.get("roc") or {}
    xs, ys = roc.get("false_positive") or [], roc.get("true_positive") or []
    if len(defined(xs)) < 2 or len(xs) != len(ys):
        return None
    plot = Plot(
        Scale("linear", 0.0, 1.0),
        Scale("linear", 0.0, 1.0),
        "share of the helpful latents at or above the cut-off",
        "share of the harmful ones",
        [Key("max cosine", RECONSTRUCTION), Key("chance", NEUTRAL)],
    )
    plot.line([0.0, 1.0], [0.0, 1.0], NEUTRAL, markers=False)
    plot.line(xs, ys, RECONSTRUCTION, markers=False)
    cuts = roc.get("theta") or []
    labels = [f"{number(c, 3)}" if c is not None else "∞" for c in cuts]
    plot.remember("max cosine", xs, ys, most=60)
    title = f"Does max cosine tell which latents of {pair['large']} harm?"
    caption = (
        f"{len(xs)} cut-offs from {labels[0] if labels else '–'} up. The further above the diagonal, the better the "
        f"cosine tells latents that raise the error of {pair['small']} from those that lower it: "
        f"AUC {number(data.get('auc'))}, 0.5 is chance."
    )
    if data.get("best_theta") is not None:
        caption += (
            f" Best balanced accuracy {number(data.get('best_balanced_accuracy'), 3)} at θ = "
            f"{number(data['best_theta'], 3)}."
        )
    return Figure(
        f"{fid}-roc", title, caption, plot.draw(title, caption), plot.sample(title), plot.hover(), plot.data()
    )


def cumulative(pair: Pair, data: dict[str, Any], fid: str) -> Figure | None:
    """The error as a group is added latent by latent in random orders (Fig. 15)."""
    found = data.get("cumulative") or {}
    curves = {}
    for name, series in _GROUPS:
        at, rows = found.get(f"n_{name}") or [], [r for r in found.get(name) or [] if defined(r)]
        if len(at) > 1 and rows and all(len(r) == len(at) for r in rows):
            curves[name] = (series, at, rows)
    if not curves:
        return None
    values = [100 * v for _, _, rows in curves.values() for row in rows for v in defined(row)]
    wide = max(values) - min(values) > 60 and min(values) < 0
    scale = symlog([*values, 1.0]) if wide else linear(values, include=[0])
    plot = Plot(
        linear([n for _, at, _ in curves.values() for n in at], pad=0.02),
        scale,
        "latents added to the small SAE",
        "change of MSE in %" + (" (symlog axis)" if wide else ""),
        [Key(f"{name} latents, mean of orders", series) for name, (series, _, _) in curves.items()],
    )
    plot.horizontal(0.0, rule="zero")
    rows_ = []
    for name, (series, at, rows) in curves.items():
        middle = [100 * sum(defined(c)) / len(defined(c)) if defined(c) else None for c in zip(*rows, strict=True)]
        for row in rows if len(rows) > 1 else []:
            few = thinned(list(range(len(at))), 35)
            plot.faint([at[i] for i in few], [None if row[i] is None else 100 * row[i] for i in few], series)
        plot.line(at, middle, series)
        plot.remember(name, at, middle, most=50)
        known = [(n, m) for n, m in zip(at, middle, strict=True) if m is not None]
        least = min(known, key=lambda p: p[1])
        changes = (pct(v / 100, signed=True) for v in (known[-1][1], least[1]))
        rows_.append([words(name), num(len(rows)), num(at[-1]), *changes, num(least[0])])
    title = "Adding latents one after the other, in random orders"
    n_orders = max(len(rows) for _, _, rows in curves.values())
    caption = (
        f"{n_orders} random orders of each group (thin lines: single orders). Below 0 the latents together improve "
        f"{pair['small']}; a curve that turns up has added more than the error could take."
    )
    caption += f" Linear within ±{number(scale.linear, 1)} %." if wide else ""
    columns = [Column("latents", numeric=False), Column("orders"), Column("added"), Column("change at the end")]
    columns += [Column("least"), Column("at so many")]
    table = Table(title, columns, rows_)
    return Figure(f"{fid}-cumulative", title, caption, plot.draw(title, caption), table, plot.hover(), plot.data())


def swaps(pair: Pair, data: dict[str, Any], fid: str) -> Figure | None:
    """Each component exchanged alone: change of L0 against change of MSE (Fig. 14)."""
    found = data.get("swaps") or {}
    pairs = zip(found.get("delta_l0") or [], found.get("delta_mse") or [], strict=False)
    known = [(i, x, y) for i, (x, y) in enumerate(pairs) if x is not None and y is not None]
    if not known:
        return None
    drawn = thinned(known, MAX_POINTS)
    plot = Plot(
        symlog([x for _, x, _ in known]),
        symlog([y for _, _, y in known]),
        "change of L0 (symlog axis)",
        "change of MSE (symlog axis)",
    )
    plot.points([x for _, x, _ in drawn], [y for _, _, y in drawn], RECONSTRUCTION)
    ids, xs, ys = ([k[a] for k in known] for a in range(3))
    plot.remember("component", xs, ys, "number", ids, most=500, drawn=thinned(list(range(len(known))), MAX_POINTS))
    plot.horizontal(0.0, rule="zero")
    plot.vertical(0.0, rule="zero")
    title = "Exchanging one component alone"
    caption = (
        f"{number(len(known))} components, each put into the intact {pair['small']} in place of its small latents. "
        f"Median change: MSE {percent(found.get('median_mse'), signed=True)}, "
        f"L0 {percent(found.get('median_l0'), signed=True)}; {percent(found.get('raise_mse'))} raise the MSE, "
        f"{percent(found.get('lower_l0'))} lower L0."
    )
    if len(drawn) < len(known):
        caption += f" Drawn: {number(len(drawn))} of them, evenly spaced."
    signs = [("falls", lambda v: v < 0), ("stays", lambda v: v == 0), ("rises", lambda v: v > 0)]
    rows = [
        [words(f"MSE {name}"), *(num(sum(test(y) and other(x) for _, x, y in known)) for _, other in signs)]
        for name, test in signs
    ]
    columns = [Column("components", numeric=False), *(Column(f"L0 {name}") for name, _ in signs)]
    table = Table("Components by what their exchange does", columns, rows)
    return Figure(f"{fid}-swaps", title, caption, plot.draw(title, caption), table, plot.hover(), plot.data())


def scaling(pair: Pair, data: dict[str, Any], theta: float, fid: str) -> Figure | None:
    """How much of each large latent's contribution is missing in the small SAE, novel and reconstruction apart."""
    found = data.get("latent_scaling") or {}
    by_group: dict[str, list[float]] = {name: [] for name, _ in _GROUPS}
    for cosine, beta in zip(pair["max_cosine"]["values"], found.get("error") or [], strict=False):
        if cosine is not None and beta is not None:
            by_group["novel" if cosine < theta else "reconstruction"].append(beta)
    values = [v for group in by_group.values() for v in group]
    if not values:
        return None
    low, high, n = -0.5, 1.5, 40
    edges = [low + (high - low) * i / n for i in range(n + 1)]
    counts = {name: histogram([min(max(v, low), high) for v in group], edges) for name, group in by_group.items()}
    outside = sum(not low <= v <= high for v in values)
    top = max(max(c) for c in counts.values())
    plot = Plot(
        Scale("linear", low, high),
        Scale("linear", 0, 1.25 * top or 1),
        "β of the small SAE's error",
        f"latents of {pair['large']}",
        [Key(name, series) for name, series in _GROUPS],
    )
    for name, series in _GROUPS:
        if by_group[name]:
            plot.steps(edges, counts[name], series)
    plot.vertical(0.5, "adding it pays →", rule="rule2")
    title = "How much of each latent the small SAE lacks"
    medians = ", ".join(
        f"{name} {number((found.get(f'median_of_{name}') or {}).get('error'), 3)}" for name, _ in _GROUPS
    )
    caption = (
        f"{number(len(values))} latents of {pair['large']}. β = 1: {pair['small']}'s error holds the latent's whole "
        f"contribution; 0: nothing of it is missing; adding the latent lowers the MSE exactly above ½. "
        f"Medians: {medians}."
    )
    if outside:
        caption += f" {number(outside)} beyond the axis are counted in its end bars."
    rows = [
        [num(edges[i]), num(edges[i + 1]), *(num(counts[name][i]) for name, _ in _GROUPS)]
        for i in range(n)
        if any(counts[name][i] for name, _ in _GROUPS)
    ]
    table = Table(title, [Column("β from"), Column("to"), Column("novel"), Column("reconstruction")], rows)
    return Figure(f"{fid}-scaling", title, caption, plot.draw(title, caption), table)


def agreement(pair: Pair, data: dict[str, Any], theta: float, fid: str) -> Figure | None:
    """Decoder cosine against activation cosine of each latent and the nearest small one (Fig. 8)."""
    found = data.get("activation_cosine") or {}
    both = zip(pair["max_cosine"]["values"], found.get("values") or [], strict=False)
    known = [(i, x, y) for i, (x, y) in enumerate(both) if x is not None and y is not None]
    if not known:
        return None
    drawn = thinned(known, MAX_POINTS)
    plot = Plot(
        linear([x for _, x, _ in known], pad=0.03, include=[1.0]),
        linear([y for _, _, y in known], pad=0.03, include=[0.0, 1.0]),
        "cosine of the decoder rows",
        "cosine of the activations",
        [Key(name, series, "mark") for name, series in _GROUPS],
    )
    for name, series in reversed(_GROUPS):
        mine = [p for p in drawn if (p[1] < theta) == (name == "novel")]
        plot.points([x for _, x, _ in mine], [y for _, _, y in mine], series, square=name == "novel")
        every, seen = [p for p in known if (p[1] < theta) == (name == "novel")], {p[0] for p in mine}
        shown = [i for i, p in enumerate(every) if p[0] in seen]
        ids, xs, ys = ([p[a] for p in every] for a in range(3))
        plot.remember(name, xs, ys, "latent", ids, most=300, drawn=shown)
    above, r2 = found.get("decoder_cosine_above"), found.get("r2")
    title = "Do latents with like directions fire alike?"
    caption = (
        f"{number(len(known))} latents of {pair['large']}, each with the nearest one of {pair['small']}; at the upper "
        f"right both agree."
    )
    if r2 is not None:
        caption += f" R² = {number(r2, 3)} over the {number(found.get('n'))} with a decoder cosine above {above}."
    if len(drawn) < len(known):
        caption += f" Drawn: {number(len(drawn))} of them, evenly spaced."
    return Figure(
        f"{fid}-agreement", title, caption, plot.draw(title, caption), plot.sample(title), plot.hover(), plot.data()
    )


def firing(pair: Pair, data: dict[str, Any], fid: str) -> Figure | None:
    """The error of both SAEs on the tokens where a large latent fires, and on the others (Fig. 11)."""
    found = data.get("firing_errors") or {}
    bars: list[tuple[str, str, float, int]] = []
    for group, series in _GROUPS:
        means = found.get(f"mean_of_{group}") or {}
        for which in ("small", "large"):
            for place, said in (("where_fires", "where they fire"), ("elsewhere", "elsewhere")):
                value = means.get(f"{which}_{place}")
                if value is not None:
                    name = f"{pair[which].removesuffix('.st')}, {said}"
                    bars.append((group, name, value, series if place == "where_fires" else NEUTRAL))
    if not bars:
        return None
    legend = (("novel latents", NOVEL), ("reconstruction latents", RECONSTRUCTION), ("on other tokens", NEUTRAL))
    plot = Plot(
        Scale("linear", 0.0, 1.2 * max(v for _, _, v, _ in bars)),
        Scale("linear", len(bars) - 0.4, -0.6),
        "MSE (summed over d), mean over latents",
        "",
        [Key(name, s, "bar") for name, s in legend],
        y_names=[(i, name) for i, (_, name, _, _) in enumerate(bars)],
        height=90 + 27 * len(bars),
        left=200,
    )
    plot.horizontal_bars([(i, v, series, number(v)) for i, (_, _, v, series) in enumerate(bars)], thick=17)
    title = "Error on the tokens where the large SAE's latents fire"
    caption = (
        f"Means over the latents of {pair['large']} that fire on the {number(data.get('n_tokens'))} tokens, of the "
        "novel ones above, of the reconstruction ones below. The more the smaller SAE's error rises where they fire, "
        "against the larger's, the more the latents stand for something it lacks."
    )
    rows = [[words(group), words(name), num(v)] for group, name, v, _ in bars]
    table = Table(title, [Column("latents", numeric=False), Column("SAE, tokens", numeric=False), Column("MSE")], rows)
    return Figure(f"{fid}-firing", title, caption, plot.draw(title, caption), table)


def losses(pair: Pair, data: dict[str, Any], fid: str) -> Figure | None:
    """Cross-entropy of the language model at points of the path."""
    path = data.get("path") or {}
    found = [c for c in data.get("ce") or [] if c.get("ce_loss_with_sae") is not None and c.get("step") is not None]
    at: Values = [path["n_latents"][int(c["step"])] for c in found] if path else []
    if len(found) < 2 or not at:
        return None
    ys = [c["ce_loss_with_sae"] for c in found]
    clean = found[0].get("ce_loss_without_sae")
    plot = Plot(
        linear(at, pad=0.05),
        linear([*ys, *([clean] if clean is not None else [])], pad=0.12),
        "latents in the stitched SAE",
        "cross-entropy (nats per token)",
    )
    plot.line([n for n in at if n is not None], ys, RECONSTRUCTION)
    plot.remember("stitched SAE", [n for n in at if n is not None], ys, "step", [int(c["step"]) for c in found])
    if clean is not None:
        plot.horizontal(clean, "the model itself")
    title = "What the language model loses on the way"
    caption = (
        f"{len(found)} SAEs on the path, each in the model's place on {number(found[0].get('n_tokens'))} tokens: from "
        f"{pair['small']}, over all novel latents added, to {pair['large']}. Lower is better."
    )
    columns = [Column("step"), Column("latents"), Column("CE"), Column("KL"), Column("CE recovered (zero)")]
    fields = ("ce_loss_with_sae", "kl_div_with_sae", "ce_loss_score_zero")
    rows = [[num(int(c["step"])), num(n), *(num(c.get(f)) for f in fields)] for c, n in zip(found, at, strict=True)]
    return Figure(
        f"{fid}-ce", title, caption, plot.draw(title, caption), Table(title, columns, rows), plot.hover(), plot.data()
    )
