"""The SAEs side by side: a section made from evaluation records."""

from typing import Any

from saetool.artifacts import header as h
from saetool.report.blocks import (
    ABSENT,
    Cell,
    Column,
    Disclosure,
    Figure,
    Figures,
    Section,
    Table,
    Text,
    num,
    number,
    pct,
    words,
)
from saetool.report.collect import Artifact
from saetool.report.evaluation import absent, figures, tokens
from saetool.report.run import Run, mean, score
from saetool.report.scales import Scale, defined, linear
from saetool.report.svg import Key, Plot

_COLUMNS = (
    Column("SAE", numeric=False),
    Column("arch", "architecture it was trained as", numeric=False),
    Column("width", "number of latents"),
    Column("k", "active latents per token asked for"),
    Column("θ", "inference threshold, as the SAE's header states it"),
    Column("L0", "active latents per token, mean"),
    Column("MSE", "squared error summed over dimensions, mean over tokens"),
    Column("EV", "explained_variance = 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖²"),
    Column("EV, 95%", "95% interval of EV, by resampling documents", numeric=False),
    Column("EV, no outliers", "the same over the dimensions whose variance is no outlier"),
    Column("EV, legacy", "explained_variance_legacy = mean over tokens of 1 − ‖x − x̂‖² / ‖x − x̄‖²"),
    Column("FVU", "fraction of variance unexplained = 1 − EV"),
    Column("CE clean", "cross-entropy of the language model, nats per token"),
    Column("CE spliced", "with the SAE's reconstruction in place of the activations"),
    Column("CE zero", "with zeros in their place"),
    Column("CE mean", "with their mean in their place"),
    Column("CE recovered (zero)", "share of the loss that zeros cost which the SAE keeps"),
    Column("CE recovered (mean)", "share of the loss that the mean costs which the SAE keeps"),
    Column("KL", "KL divergence of the model's predictions with the reconstruction from its own, nats per token"),
    Column("dead", "latents that never fired on the evaluated tokens"),
    Column("c_dec", "mean |cosine| of pairs of decoder rows"),
    Column("K·ln(N/K)", "recovery bound: K the mean L0, N the latents alive, constant 1"),
    Column("d / bound", "width of the activations over the recovery bound: above 1 is above the bound"),
    Column("autointerp r", "mean correlation of predicted and true activations over the explained latents"),
)


def quality(run: Run) -> Section | None:
    """Every evaluated SAE in one table, and the frontier of sparsity against error."""
    records = run.found.of(h.EVAL)
    if not records:
        return None
    rows = [_row(run, sae) for record in records for sae in record.payload["saes"]]
    used = [i for i in range(len(_COLUMNS)) if any(row[i].text != ABSENT for row in rows)]
    split = "; ".join(sorted({f"{r.payload['split']} split, {number(r.payload['n_tokens'])} tokens" for r in records}))
    table = Table(
        f"All evaluated SAEs ({split})",
        [_COLUMNS[i] for i in used],
        [[row[i] for i in used] for row in rows],
        note="The glossary has the formulas. Columns without any value are left out; – is not measured or undefined.",
        sortable=True,
    )
    blocks: list[Any] = [table]
    drawn = [f for f in (_frontier(run, records), _densities(run, records)) if f] + figures(run, records)
    if drawn:
        blocks.append(Figures(drawn))
    blocks += [Disclosure(table.caption, [table]) for table in tokens(run, records)]
    if said := absent(records):
        blocks.append(Text(said))
    return Section("saes", "SAEs compared", "How well each SAE reconstructs, and how sparsely.", blocks)


def _row(run: Run, sae: dict[str, Any]) -> list[Cell]:
    m, ce, bound = sae["metrics"], sae.get("ce") or {}, sae.get("recovery_bound") or {}
    artifact = run.found.by_sha.get(sae["sha256"])
    config = artifact.header.config if artifact else {}
    theta = (config.get("threshold") or {}).get("value") if isinstance(config.get("threshold"), dict) else None
    return [
        words(sae["name"], 40),
        words(config.get("arch") or sae["arch"]),
        num(sae["d_sae"]),
        num(sae.get("k")),
        num(theta),
        num(m.get("l0")),
        num(m.get("mse")),
        num(m.get("explained_variance")),
        _interval(sae, "explained_variance"),
        num(m.get("explained_variance_no_outliers")),
        num(m.get("explained_variance_legacy")),
        num(m.get("fvu")),
        num(ce.get("ce_loss_without_sae")),
        num(ce.get("ce_loss_with_sae")),
        num(ce.get("ce_loss_with_zero_ablation")),
        num(ce.get("ce_loss_with_mean_ablation")),
        num(ce.get("ce_loss_score_zero")),
        num(ce.get("ce_loss_score_mean")),
        num(ce.get("kl_div_with_sae")),
        num(m.get("dead")),
        num(m.get("c_dec")),
        num(bound.get("bound")),
        num(bound.get("ratio")),
        num(autointerp_mean(run, sae["sha256"])),
    ]


def _interval(sae: dict[str, Any], name: str) -> Cell:
    ends = (sae.get("intervals") or {}).get(name)
    return words(f"{number(ends[0])} to {number(ends[1])}" if ends else ABSENT)


def autointerp_mean(run: Run, sha256: str) -> float | None:
    """The mean simulation correlation of an SAE's latents: as its explanations state it, else over their records."""
    for explained in run.explanations:
        if run.identity(explained.sae_sha256) == run.identity(sha256):
            stated = explained.summary("simulate").get("mean")
            if stated is not None:
                return stated
            found = mean(score(r, "simulate", "correlation") for r in explained.records)
            if found is not None:
                return found
    return None


def _frontier(run: Run, records: list[Artifact]) -> Figure | None:
    """L0 against MSE, one mark an SAE."""
    saes = [s for r in records for s in r.payload["saes"]]
    known = [s for s in saes if defined([s["metrics"].get("l0"), s["metrics"].get("mse")])[1:]]
    if len(known) < 2:
        return None
    xs = [s["metrics"]["l0"] for s in known]
    ys = [s["metrics"]["mse"] for s in known]
    middle = sum(xs) / len(xs)  # at least a tenth either way, or equal L0s would look far apart
    plot = Plot(
        linear([*xs, 0.9 * middle, 1.1 * middle], pad=0.1),
        linear(ys, pad=0.15),
        "L0 (active latents per token)",
        "MSE (summed over d)",
    )
    for sae, x, y in zip(known, xs, ys, strict=True):
        plot.mark(x, y, run.series(sae["name"], sae["sha256"]), f"{sae['name'].removesuffix('.st')}")
        plot.remember(sae["name"], [x], [y])
    title = "Error against sparsity, one mark an SAE"
    caption = f"{len(known)} SAEs. Lower is a better reconstruction, further left a sparser one."
    rows = [[words(s["name"]), num(s["d_sae"]), num(x), num(y)] for s, x, y in zip(known, xs, ys, strict=True)]
    columns = [Column("SAE", numeric=False), Column("width"), Column("L0"), Column("MSE")]
    return Figure(
        "saes-frontier",
        title,
        caption,
        plot.draw(title, caption),
        Table(title, columns, rows),
        plot.hover(),
        plot.data(),
    )


def _densities(run: Run, records: list[Artifact]) -> Figure | None:
    """How often latents fire: one outline an SAE, as a share of its latents."""
    saes = [s for r in records for s in r.payload["saes"] if (s.get("density") or {}).get("counts")]
    if not saes:
        return None
    shares = [[c / s["d_sae"] for c in s["density"]["counts"]] for s in saes]
    low = min(s["density"]["log10_edges"][0] for s in saes)
    high = max(s["density"]["log10_edges"][-1] for s in saes)
    top = max(max(share) for share in shares)
    plot = Plot(
        Scale("linear", low, high),
        Scale("linear", 0, 1.12 * top or 1),
        "log₁₀ of the share of tokens a latent fires on",
        "share of the SAE's latents",
        [Key(s["name"].removesuffix(".st"), run.series(s["name"], s["sha256"])) for s in saes],
    )
    for sae, share in zip(saes, shares, strict=True):
        plot.steps(sae["density"]["log10_edges"], share, run.series(sae["name"], sae["sha256"]))
    title = "How often the latents fire"
    dead = ", ".join(f"{s['name']} {number(s['metrics'].get('dead'))}" for s in saes)
    caption = f"One outline an SAE; latents that never fired are not in it (dead: {dead})."
    columns = [Column("SAE", numeric=False), Column("log₁₀ from"), Column("to"), Column("latents"), Column("share")]
    rows = [
        [words(s["name"]), num(s["density"]["log10_edges"][i]), num(s["density"]["log10_edges"][i + 1]), num(c), pct(p)]
        for s, share in zip(saes, shares, strict=True)
        for i, (c, p) in enumerate(zip(s["density"]["counts"], share, strict=True))
        if c
    ]
    return Figure("saes-density", title, caption, plot.draw(title, caption), Table(title, columns, rows))
