"""Figures of evaluation records: intervals, what the language model loses, where the error is, and recoverability."""

from typing import Any

from saetool.report.blocks import Column, Figure, Table, num, number, pct, quoted, words
from saetool.report.collect import Artifact, vocabulary_of
from saetool.report.pairs import NOVEL, RECONSTRUCTION
from saetool.report.run import Run
from saetool.report.scales import Scale, defined, linear
from saetool.report.svg import Key, Plot
from saetool.report.thinning import thinned

_MOST_POSITIONS = 256
_TOKENS = 20


def figures(run: Run, records: list[Artifact]) -> list[Figure]:
    """All that the records allow."""
    saes = [s for r in records for s in r.payload["saes"]]
    found = [_intervals(run, saes), _losses(saes), _bound(run, saes)]
    found += [_positions(run, r, i) for i, r in enumerate(records)]
    return [f for f in found if f]


def _short(sae: dict[str, Any]) -> str:
    return str(sae["name"]).removesuffix(".st")


def _rows(n: int, extra: int = 0) -> int:
    return 70 + 30 * n + extra


def _intervals(run: Run, saes: list[dict[str, Any]]) -> Figure | None:
    """Explained variance with its interval over documents."""
    known = [
        (s, s["metrics"]["explained_variance"], (s.get("intervals") or {}).get("explained_variance"))
        for s in saes
        if s["metrics"].get("explained_variance") is not None
    ]
    if not any(ends for _, _, ends in known):
        return None
    values = [v for _, value, ends in known for v in [value, *(ends or [])]]
    plot = Plot(
        linear(values, pad=0.25),
        Scale("linear", len(known) - 0.4, -0.6),
        "explained variance",
        "",
        y_names=[(i, _short(s)) for i, (s, _, _) in enumerate(known)],
        height=_rows(len(known)),
        left=150,
    )
    rows = []
    for i, (sae, value, ends) in enumerate(known):
        plot.mark(value, i, run.series(sae["name"], sae["sha256"]))
        if ends:
            plot.interval(i, *ends)
        plot.label(max([value, *(ends or [])]), i, number(value, 3))
        rows.append([words(sae["name"]), num(value), *(num(e) for e in ends or [None, None])])
    title = "Explained variance, with 95 % intervals"
    caption = (
        "Whiskers: 95 % of resamples of the documents. SAEs are evaluated on the same documents, so differences are "
        "surer than overlapping whiskers suggest."
    )
    columns = [Column("SAE", numeric=False), Column("EV"), Column("from"), Column("to")]
    return Figure("saes-ev", title, caption, plot.draw(title, caption), Table(title, columns, rows))


def _losses(saes: list[dict[str, Any]]) -> Figure | None:
    """What the model's predictions lose with each reconstruction in place of the activations."""
    known = [s for s in saes if (s.get("ce") or {}).get("ce_loss_with_sae") is not None]
    known = [s for s in known if s["ce"].get("ce_loss_without_sae") is not None]
    if not known:
        return None
    bars: list[tuple[float, float, int, str]] = []
    names, rows = [], []
    for i, sae in enumerate(known):
        ce = sae["ce"]
        lost, kl = ce["ce_loss_with_sae"] - ce["ce_loss_without_sae"], ce.get("kl_div_with_sae")
        names.append((i, _short(sae)))
        bars.append((i - (0.2 if kl is not None else 0), lost, RECONSTRUCTION, number(lost, 3)))
        if kl is not None:
            bars.append((i + 0.2, kl, NOVEL, number(kl, 3)))
        fields = ("ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_mean_ablation", "ce_loss_with_zero_ablation")
        rows.append(
            [words(sae["name"]), *(num(ce.get(f)) for f in fields), num(lost), num(kl), num(ce.get("n_tokens"))]
        )
    high = max(v for _, v, _, _ in bars)
    plot = Plot(
        Scale("linear", min(0.0, *(v for _, v, _, _ in bars)), 1.2 * high if high > 0 else 1.0),
        Scale("linear", len(known) - 0.4, -0.6),
        "nats per token",
        "",
        [Key("cross-entropy lost", RECONSTRUCTION, "bar")]
        + ([Key("KL divergence", NOVEL, "bar")] if len(bars) > len(known) else []),
        y_names=names,
        height=_rows(len(known), 8 * len(known)),
        left=150,
    )
    plot.horizontal_bars(bars, thick=12)
    ce = known[0]["ce"]
    title = "What the language model loses with x̂ in place of x"
    caption = (
        f"Cross-entropy with the reconstruction less that of the model itself ({number(ce['ce_loss_without_sae'])}), "
        f"on {number(ce.get('n_tokens'))} tokens. Shorter is better. For scale: the mean activation in its place gives "
        f"{number(ce.get('ce_loss_with_mean_ablation'))}, zeros {number(ce.get('ce_loss_with_zero_ablation'))}."
    )
    columns = [Column("SAE", numeric=False), Column("CE, model"), Column("CE, x̂"), Column("CE, mean")]
    columns += [Column("CE, zeros"), Column("lost"), Column("KL"), Column("tokens")]
    return Figure("saes-loss", title, caption, plot.draw(title, caption), Table(title, columns, rows))


def _bound(run: Run, saes: list[dict[str, Any]]) -> Figure | None:
    """K·ln(N/K) of each SAE beside the width of the activations."""
    known = [(s, s["recovery_bound"]) for s in saes if (s.get("recovery_bound") or {}).get("bound") is not None]
    if not known:
        return None
    widths = [b["bound"] * b["ratio"] for _, b in known if b.get("ratio") is not None]
    plot = Plot(
        Scale("linear", 0.0, 1.15 * max([*(b["bound"] for _, b in known), *widths])),
        Scale("linear", len(known) - 0.4, -0.6),
        "measurements",
        "",
        [Key("K·ln(N/K)", RECONSTRUCTION, "bar"), Key("d, width of the activations", 0, "rule")],
        y_names=[(i, _short(s)) for i, (s, _) in enumerate(known)],
        height=_rows(len(known)),
        left=150,
    )
    plot.horizontal_bars([(i, b["bound"], RECONSTRUCTION, number(b["bound"], 3)) for i, (_, b) in enumerate(known)], 15)
    for width in sorted({round(w) for w in widths}):
        plot.vertical(width, f"d = {width}", rule="rule2")
    title = "Are the codes sparse enough to be recovered?"
    caption = (
        "To recover K active of N latents takes about K·ln(N/K) measurements, up to a constant that is not known and "
        "taken as 1. Bars well below d leave room; K is the mean L0, N the latents alive."
    )
    columns = [Column("SAE", numeric=False), Column("K·ln(N/K)"), Column("d / bound")]
    rows = [[words(s["name"]), num(b["bound"]), num(b.get("ratio"))] for s, b in known]
    return Figure("saes-bound", title, caption, plot.draw(title, caption), Table(title, columns, rows))


def _positions(run: Run, record: Artifact, index: int) -> Figure | None:
    """Explained variance by position in the context, a line for each SAE."""
    known = []
    for sae in record.payload["saes"]:
        part = (sae.get("by") or {}).get("position") or {}
        if defined(part.get("explained_variance") or [])[1:]:
            known.append((sae, part))
    if not known:
        return None
    # A first position of few tokens or of attention sinks can lie far off: the axis covers the rest.
    values = sorted(v for _, part in known for v in defined(part["explained_variance"]))
    low = values[len(values) // 100]
    plot = Plot(
        linear([p for _, part in known for p in part["ids"]], pad=0.02),
        linear([low, values[-1]], pad=0.1),
        "position in the context",
        "explained variance",
        [Key(_short(s), run.series(s["name"], s["sha256"])) for s, _ in known],
    )
    off = 0
    for sae, part in known:
        series = run.series(sae["name"], sae["sha256"])
        at = thinned(list(range(len(part["ids"]))), _MOST_POSITIONS)
        ys = [part["explained_variance"][i] for i in at]
        off += sum(v is not None and v < plot.y.low for v in ys)
        plot.line([part["ids"][i] for i in at], [None if v is None or v < plot.y.low else v for v in ys], series)
        plot.remember(sae["name"], part["ids"], part["explained_variance"], most=_MOST_POSITIONS)
    n = known[0][1]["n"]
    title = "Where in the context the error is"
    caption = (
        f"{len(known[0][1]['ids'])} positions with {number(min(n))} to {number(max(n))} tokens each. A level line: the "
        "SAE reconstructs early and late tokens equally well."
    )
    if off:
        caption += f" {number(off)} points below the axis are not drawn."
    columns = [Column("SAE", numeric=False), Column("position"), Column("tokens"), Column("EV"), Column("MSE")]
    rows = [
        [
            words(s["name"]),
            num(part["ids"][i]),
            num(part["n"][i]),
            num(part["explained_variance"][i]),
            num((part.get("mse") or [None] * len(part["ids"]))[i]),
        ]
        for s, part in known
        for i in thinned(list(range(len(part["ids"]))), 17)
    ]
    table = Table(title, columns, rows, note="17 positions an SAE at most, evenly spaced.")
    fid = f"saes-position-{index}"
    return Figure(fid, title, caption, plot.draw(title, caption), table, plot.hover(), plot.data())


def tokens(run: Run, records: list[Artifact]) -> list[Table]:
    """The tokens that hold most of the squared error, for each SAE that was evaluated by token."""
    out = []
    for record in records:
        strings = vocabulary_of(run.found, {i["sha256"] for i in record.header.inputs}) or {}
        for sae in record.payload["saes"]:
            part = (sae.get("by") or {}).get("token") or {}
            if not part.get("mse"):
                continue
            held = [
                (n * m, i, n, m) for i, n, m in zip(part["ids"], part["n"], part["mse"], strict=True) if m is not None
            ]
            total = sum(e for e, _, _, _ in held)
            held.sort(key=lambda e: (-e[0], e[1]))
            rows = [
                [
                    words(quoted(strings[i]) if i in strings else "–"),
                    num(i),
                    num(n),
                    num(m),
                    pct(e / total if total else None),
                ]
                for e, i, n, m in held[:_TOKENS]
            ]
            columns = [Column("token", numeric=False), Column("id"), Column("rows"), Column("MSE")]
            columns.append(Column("share of all squared error"))
            note = f"{len(rows)} of {number(len(held))} different tokens."
            note += "" if strings else " Their text needs the activation cache given as well."
            out.append(Table(f"Tokens that hold most of {sae['name']}'s error", columns, rows, note, sortable=True))
    return out


def absent(records: list[Artifact]) -> str:
    """The parts that no record has, each with the command that makes it; '' if none is missing."""
    saes = [s for r in records for s in r.payload["saes"]]
    parts = []
    if not any(s.get("ce") for s in saes):
        parts.append("cross-entropy and KL (saetool eval --ce)")
    if not any((s.get("by") or {}).get("position") for s in saes):
        parts.append("quality by position (saetool eval --by position)")
    if not any((s.get("by") or {}).get("token") for s in saes):
        parts.append("quality by token (saetool eval --by token)")
    return f"Not measured: {'; '.join(parts)}." if parts else ""
