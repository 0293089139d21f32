"""The activation caches: where the rows come from, how long they are, which dimensions and tokens stand out."""

from typing import Any

from saetool.artifacts import header as h
from saetool.report.blocks import (
    ABSENT,
    Column,
    Disclosure,
    Figure,
    Figures,
    Section,
    Table,
    num,
    number,
    pct,
    percent,
    quoted,
    words,
)
from saetool.report.collect import Artifact
from saetool.report.pairs import NOVEL, RECONSTRUCTION
from saetool.report.run import Run
from saetool.report.scales import Scale, linear
from saetool.report.svg import Plot

_COLUMNS = (
    Column("cache", numeric=False),
    Column("model", numeric=False),
    Column("site", numeric=False),
    Column("text", numeric=False),
    Column("d", "width of an activation"),
    Column("context", "tokens the model read at once"),
    Column("stored as", numeric=False),
    Column("bytes", "of all shards"),
    Column("rows, train"),
    Column("rows, held-out"),
    Column("documents"),
    Column("duplicates", "documents left out as copies of others"),
    Column("dropped by norm", "rows left out for their length"),
    Column("mean norm"),
    Column("median norm"),
    Column("largest norm"),
    Column("variance", "summed over dimensions"),
    Column("largest dimension", "its share of the variance"),
    Column("mean vector", "its share of the mean squared norm"),
    Column("outlier dimensions", "those whose |mean| is several times their standard deviation"),
    Column("different tokens"),
)


def activations(run: Run) -> Section | None:
    """Every cache in one table, then the figures of each."""
    caches = run.found.of(h.CACHE)
    if not caches:
        return None
    rows = [_row(c) for c in caches]
    used = [i for i in range(len(_COLUMNS)) if any(row[i].text != ABSENT for row in rows)]
    note = "Statistics are of the train split, after rows were dropped; columns without any value are left out."
    table = Table("Activation caches", [_COLUMNS[i] for i in used], [[r[i] for i in used] for r in rows], note)
    blocks: list[Any] = [table]
    for i, cache in enumerate(caches):
        if figures := [f for f in (_norms(cache, i), _dimensions(cache, i)) if f]:
            blocks.append(Figures(figures))
        if tokens := _tokens(cache):
            blocks.append(Disclosure(tokens.caption, [tokens]))
    return Section("activations", "Activations", "What the SAEs were trained and measured on.", blocks)


def _row(cache: Artifact) -> list[Any]:
    config, model, data = cache.header.config, cache.header.model, cache.payload
    splits, facts = data.get("splits") or {}, data.get("statistics") or {}
    sizes = [s["bytes"] for s in data.get("shards") or [] if s.get("bytes") is not None]
    documents = [s["documents"] for s in splits.values() if s.get("documents") is not None]
    return [
        words(cache.label, 40),
        words(model.get("id") or "–", 50),
        words(model.get("hook_name") or "–", 40),
        words(config.get("text") or "–", 50),
        num(config.get("d_in")),
        num(config.get("ctx_len")),
        words(config.get("storage") or config.get("dtype") or "–"),
        num(sum(sizes) if sizes else None),
        num((splits.get("train") or {}).get("rows")),
        num((splits.get("heldout") or {}).get("rows")),
        num(sum(documents) if documents else None),
        num(config.get("duplicates")),
        num(config.get("rows_dropped_by_norm")),
        *(num(facts.get(n)) for n in ("mean_norm", "median_norm", "largest_norm", "total_variance")),
        pct(facts.get("largest_dim_variance_share")),
        pct(facts.get("mean_vector_sq_norm_share")),
        num(facts.get("n_outlier_dims")),
        num((data.get("profile") or {}).get("distinct_tokens")),
    ]


def _norms(cache: Artifact, index: int) -> Figure | None:
    """Quantiles of the rows' norms."""
    found = [q for q in (cache.payload.get("profile") or {}).get("norm_quantiles") or [] if None not in q]
    if len(found) < 2:
        return None
    shares, norms = [s for s, _ in found], [n for _, n in found]
    facts = cache.payload.get("statistics") or {}
    limit = cache.header.config.get("norm_limit")
    marks = [v for v in (facts.get("mean_norm"), limit) if isinstance(v, int | float)]
    plot = Plot(
        linear(norms, pad=0.06, include=marks),
        Scale("linear", 0.0, 1.04),
        "norm of an activation",
        "share of rows that are shorter",
    )
    plot.line(norms, shares, RECONSTRUCTION)
    plot.remember(cache.name, norms, shares)
    if facts.get("mean_norm") is not None:
        plot.vertical(facts["mean_norm"], f"mean {number(facts['mean_norm'])}")
    if isinstance(limit, int | float):
        plot.vertical(limit, "dropped above", rule="rule2", row=1, before=True)
    title = f"How long the activations of {cache.label} are"
    n = (cache.payload.get("profile") or {}).get("sample_rows")
    caption = f"{len(found)} quantiles of {number(n)} rows of the train split. "
    caption += "A long tail to the right is a few rows, mostly of the same tokens, that hold much of the variance."
    rows = [[pct(s), num(v)] for s, v in found]
    table = Table(title, [Column("share of rows"), Column("norm below")], rows)
    return Figure(f"activations-{index}-norms", title, caption, plot.draw(title, caption), table, plot.hover())


def _dimensions(cache: Artifact, index: int) -> Figure | None:
    """The dimensions with the largest |mean| against their standard deviation."""
    found = [
        d
        for d in (cache.payload.get("profile") or {}).get("outlier_dims") or []
        if d.get("mean_over_std") is not None and d.get("dim") is not None
    ]
    if not found:
        return None
    top = max(d["mean_over_std"] for d in found)
    plot = Plot(
        Scale("linear", 0.0, 1.2 * top or 1),
        Scale("linear", len(found) - 0.4, -0.6),
        "|mean| over standard deviation",
        "",
        y_names=[(i, f"dimension {d['dim']:g}") for i, d in enumerate(found)],
        height=60 + 16 * len(found),
        left=118,
    )
    plot.horizontal_bars(
        [(i, d["mean_over_std"], NOVEL, number(d["mean_over_std"], 3)) for i, d in enumerate(found)], 10
    )
    title = f"Dimensions of {cache.label} that stand out"
    held = sum(d.get("variance_share") or 0.0 for d in found)
    caption = (
        f"The {len(found)} largest of {number(cache.header.config.get('d_in'))} dimensions; together they hold "
        f"{percent(held)} of the variance. One far from zero on every token looks like a direction and is a bias."
    )
    columns = [Column("dimension"), Column("|mean| / std"), Column("mean"), Column("share of the variance")]
    rows = [[num(d["dim"]), num(d["mean_over_std"]), num(d.get("mean")), pct(d.get("variance_share"))] for d in found]
    return Figure(f"activations-{index}-dims", title, caption, plot.draw(title, caption), Table(title, columns, rows))


def _tokens(cache: Artifact) -> Table | None:
    """The most frequent tokens."""
    found = (cache.payload.get("profile") or {}).get("top_tokens") or []
    if not found:
        return None
    total = ((cache.payload.get("splits") or {}).get("train") or {}).get("rows")
    rows = [[words(quoted(text)), num(i), num(n), pct(n / total if total else None)] for i, text, n in found]
    columns = [Column("token", numeric=False), Column("id"), Column("rows"), Column("share of rows")]
    return Table(f"The {len(rows)} most frequent tokens of {cache.label}", columns, rows, sortable=True)
