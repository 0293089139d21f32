"""What ``saetool stitch`` found, for people."""

from typing import Any

from saetool.console import Console

GIANT = 0.2
"""Share of all latents in components from which one component is called giant, if it has enough members."""
ENOUGH = 20
SHOWN = 2
"""Of the sweep's cut-offs every second is shown; all are in the record."""


def warn(console: Console, theta: float, pairs: list[dict[str, Any]]) -> None:
    """A line for each pair of which one component holds much of all: its swap says nothing about latents."""
    for p in pairs:
        small, large = p["largest_components"][0] if p["largest_components"] else (0, 0)
        if p["largest_component_share"] > GIANT and small + large >= ENOUGH:
            console.say(
                f"warning: {p['small']} → {p['large']}: one component holds {small} small and {large} large latents, "
                f"{_percent(p['largest_component_share'])} of all in components; {theta} may be too low"
            )


def show(console: Console, theta: float, pairs: list[dict[str, Any]]) -> None:
    """A table on standard error: a column for each pair of the record."""
    rows: list[list[str]] = []

    def row(name: str, *cells: str) -> None:
        rows.append([name, *cells])

    data = [p["data"] for p in pairs]
    row("latents", *(f"{p['n_small']} → {p['n_large']}" for p in pairs))
    row("novel", *(f"{p['novel']} ({_percent(p['novel_share'])})" for p in pairs))
    row("reconstruction", *(f"{p['reconstruction']} ({_percent(p['reconstruction_share'])})" for p in pairs))
    if data[0] is not None:
        row(
            "novel, of those that fire", *(f"{d['alive']['novel']} ({_share(d['alive']['novel_share'])})" for d in data)
        )
    row(f"novel share at theta {_thetas(pairs)}", *(_sweep(p["sweep"]) for p in pairs))
    row("reconstruction share of random directions", *(_percent(p["null"]["reconstruction_share"]) for p in pairs))
    row("  of shuffled coordinates", *(_percent(p["null_shuffled"]["reconstruction_share"]) for p in pairs))
    row("unmatched small latents", *(str(p["unmatched_small"]) for p in pairs))
    row("components", *(str(p["components"]) for p in pairs))
    row("most common shapes", *(_shapes(p["component_shapes"]) for p in pairs))
    row("largest component", *(_largest(p["largest_components"]) for p in pairs))
    row("max cosine: mean, median, sd", *(_summary(p["max_cosine"]) for p in pairs))
    if any(p["matching"] for p in pairs):
        row("shared one to one: decoder, encoder, both", *(_matching(p["matching"]) for p in pairs))
        row("mean decoder cosine of matched", *(_mean_matched(p["matching"]) for p in pairs))
    if data[0] is not None:
        row("mse", *(f"{d['mse_small']:.4g} → {d['mse_large']:.4g}" for d in data))
        row("L0", *(f"{d['l0_small']:.1f} → {d['l0_large']:.1f}" for d in data))
        row("dead latents", *(f"{d['dead_small']} → {d['dead_large']}" for d in data))
        row("AUC of max cosine", *(_number(d["auc"]) for d in data))
        row("best theta", *(_number(d["best_theta"]) for d in data))
        here = [next(g for g in d["groups"] if g["theta"] == theta) for d in data]
        row("mse with all novel latents", *(f"{100 * g['novel_delta']:+.1f}%" for g in here))
        row("mse with all reconstruction latents", *(f"{100 * g['reconstruction_delta']:+.1f}%" for g in here))
        row("mse by a swap, median", *(_signed(d["swaps"]["median_mse"]) for d in data))
        row("L0 by a swap, median", *(_signed(d["swaps"]["median_l0"]) for d in data))
        row("error scale (β) of novel, reconstruction", *(_scales(d["latent_scaling"]) for d in data))
        row("mse where novel latents fire / elsewhere: small", *(_where(d["firing_errors"], "small") for d in data))
        row("  the same: large", *(_where(d["firing_errors"], "large") for d in data))
        row("R² of activation and decoder cosine", *(_number(d["activation_cosine"]["r2"]) for d in data))
        if data[0]["ce"]:
            row("CE on the way", *(", ".join(f"{c['ce_loss_with_sae']:.3f}" for c in d["ce"]) for d in data))
        for name, values in (("mse", [d["path"]["mse"] for d in data]), ("L0", [d["path"]["l0"] for d in data])):
            ends = [(v[0], v[d["path"]["n_add_steps"]], max(v), v[-1]) for v, d in zip(values, data, strict=True)]
            row(f"{name} on the way: start, all added, peak, end", *(", ".join(f"{x:.4g}" for x in e) for e in ends))
    title = f"theta {theta}" + (f", {data[0]['n_tokens']:,} {data[0]['split']} tokens" if data[0] else "")
    console.table(title, ["", *(f"{p['small']} → {p['large']}" for p in pairs)], rows)


def _shapes(shapes: list[list[int]]) -> str:
    """1→1 ×605, …: the three most common."""
    return ", ".join(f"{a}→{b} ×{n}" for a, b, n in shapes[:3]) or "none"


def _largest(sizes: list[list[int]]) -> str:
    """Small and large members of the largest component."""
    return f"{sizes[0][0]}→{sizes[0][1]}" if sizes else "none"


def _summary(found: dict[str, Any]) -> str:
    return ", ".join(f"{found[name]:.3f}" for name in ("mean", "median", "sd"))


def _thetas(pairs: list[dict[str, Any]]) -> str:
    return ", ".join(str(entry["theta"]) for entry in pairs[0]["sweep"][::SHOWN])


def _sweep(sweep: list[dict[str, Any]]) -> str:
    return ", ".join(_percent(entry["novel_share"]) for entry in sweep[::SHOWN])


def _share(value: float | None) -> str:
    return "–" if value is None else _percent(value)


def _matching(found: dict[str, Any] | None) -> str:
    return ", ".join(_percent(found[by]["shared"]) for by in ("decoder", "encoder", "both")) if found else "–"


def _mean_matched(found: dict[str, Any] | None) -> str:
    return _number(found["decoder"]["decoder_cosine_mean"]) if found else "–"


def _scales(found: dict[str, Any]) -> str:
    return ", ".join(_number(found[f"median_of_{group}"]["error"]) for group in ("novel", "reconstruction"))


def _where(found: dict[str, Any], which: str) -> str:
    means = found["mean_of_novel"]
    return " / ".join(_number(means[f"{which}_{place}"]) for place in ("where_fires", "elsewhere"))


def _signed(share: float) -> str:
    return "–" if share != share else f"{100 * share:+.3f}%"


def _percent(share: float) -> str:
    return "–" if share != share else f"{100 * share:.1f}%"


def _number(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.4g}"
