"""What the page says, in sentences with numbers, each only if its artifact is there. No sentence is a verdict."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from saetool.artifacts import header as h
from saetool.report.blocks import number, percent
from saetool.report.collect import Artifact
from saetool.report.explained import choice_of
from saetool.report.pairs import Pair, group_at, is_control, pairs_of
from saetool.report.quality import autointerp_mean
from saetool.report.run import Run, mean
from saetool.report.score_figures import scored
from saetool.report.splits import fates

SIMILAR_L0 = 0.15
"""SAEs whose L0 differ by less than this share of the smallest are compared by width."""
_MOST = 4  # numbers of one kind in one sentence


def findings(run: Run) -> list[str]:
    """The sentences, in the order of the page's sections."""
    return [s for part in (_stitching(run), _meta(run), _explained(run), _quality(run)) for s in part]


def _joined(parts: Sequence[str]) -> str:
    shown = list(parts[:_MOST])
    return "; ".join(shown) + (f"; and {len(parts) - _MOST} more" if len(parts) > _MOST else "")


def _quality(run: Run) -> Iterable[str]:
    records = run.found.of(h.EVAL)
    for artifact in records:
        saes = artifact.payload["saes"]
        where = f" ({artifact.label})" if len(records) > 1 else ""
        yield from _widths(saes)
        recovered = [s["ce"]["ce_loss_score_zero"] for s in saes if (s.get("ce") or {}).get("ce_loss_score_zero")]
        if recovered:
            low, high = min(recovered), max(recovered)
            share = percent(low) if low == high else f"{percent(low)} to {percent(high)}"
            kept = f"the language model keeps {share} of the cross-entropy that zeros would cost"
            yield f"With x̂ in place of x {kept}{where}."
        dead = [s for s in saes if s["metrics"].get("dead")]
        if dead:
            parts = [f"{s['name']} {number(s['metrics']['dead'])} of {number(s['d_sae'])}" for s in dead]
            yield f"Latents that never fired on the evaluated tokens: {_joined(parts)}."


def _widths(saes: list[dict[str, Any]]) -> Iterable[str]:
    """Does MSE fall with width? Within each architecture, one SAE a width (the first evaluated)."""
    by_arch: dict[str, dict[int, dict[str, Any]]] = {}
    for sae in sorted(saes, key=lambda s: s["d_sae"]):
        if sae["metrics"].get("mse") is not None and sae["metrics"].get("l0") is not None:
            by_arch.setdefault(f"{sae['arch']}", {}).setdefault(sae["d_sae"], sae)
    for arch, by_width in sorted(by_arch.items()):
        ladder = list(by_width.values())
        if len(ladder) < 2:
            continue
        mse = [s["metrics"]["mse"] for s in ladder]
        l0 = [s["metrics"]["l0"] for s in ladder]
        similar = max(l0) - min(l0) <= SIMILAR_L0 * min(l0)
        falls = all(b < a for a, b in pairwise(mse))
        steps = ", ".join(
            f"{number(m)} at {number(s['d_sae'])} latents (L0 {number(x, 3)})"
            for s, m, x in zip(ladder, mse, l0, strict=True)
        )
        verb = "falls" if falls else "does not fall at every step"
        yield f"MSE {verb} with width at {'similar' if similar else 'different'} L0 ({arch}): {steps}."


def _stitching(run: Run) -> Iterable[str]:
    pairs = pairs_of(run)
    wide = [(a, p) for a, p in pairs if not is_control(p)]
    by_pair: dict[tuple[str, str], list[tuple[float, Pair]]] = {}
    for artifact, pair in wide:
        by_pair.setdefault((pair["small_sha256"], pair["large_sha256"]), []).append((artifact.payload["theta"], pair))
    # Pairs that were measured on activations first: they are the steps of the ladder.
    compared = sorted(by_pair.values(), key=lambda at: not any(p.get("data") for _, p in at))
    yield from (_splits(at) for at in compared[:_MOST])
    yield from _seeds(pairs)
    aucs = [
        f"{_pair(pair)} {number(auc, 3)}"
        for _, pair in (at[0] for at in compared)
        if (auc := (pair.get("data") or {}).get("auc")) is not None
    ]
    if aucs:
        yield f"AUC of max cosine as predictor of the effect's sign: {_joined(aucs)} (0.5 is chance)."
    yield from [text for at in compared if (text := _groups(at))][:_MOST]
    if len(compared) > _MOST:
        more = len(compared) - _MOST
        yield f"{number(more)} more pair{'s' * (more > 1)} of SAEs {'are' if more > 1 else 'is'} compared below."
    ends = [d for _, p in pairs if p.get("data") and (d := end_difference(p)) is not None]
    if ends:
        many = "Path ends equal" if len(ends) > 1 else "The path's ends equal"
        close = max(ends) < 1e-3
        verb = many if close else "Path ends DIFFER from"
        yield f"{verb} the SAEs' own numbers (largest relative difference of MSE {number(max(ends), 2)})."


def _splits(at: Sequence[tuple[float, Pair]]) -> str:
    """Who splits into whom at each θ: what becomes of the smaller SAE's latents, how many of the larger's are new."""
    parts = []
    for theta, pair in at:
        found = fates(pair)
        said = [
            text.format(number(found[key][0]), number(found[key][1]))
            for key, text in (
                ("one", "{} live on as one"),
                ("split", "{} split into {}"),
                ("merge", "{} merge into {}"),
                ("family", "{} share families with {}"),
                ("alone", "{} have no partner"),
            )
            if found[key][0]
        ]
        said.append(f"{percent(pair['novel_share'])} of the {number(pair['n_large'])} are new")
        parts.append(f"at θ = {theta:g}, of {number(pair['n_small'])} latents {', '.join(said)}")
    return f"{_pair(at[0][1])}: {'; '.join(parts)}."


def _groups(at: Sequence[tuple[float, Pair]]) -> str:
    """What adding all novel, and all reconstruction, latents does, at each θ and at the best; '' if not measured."""
    pair = next((p for _, p in at if p.get("data")), at[0][1])
    best = (pair.get("data") or {}).get("best_theta")
    asked = [(f"at θ = {theta:g}", group_at(p, theta)) for theta, p in at]
    asked += [(f"at the θ that tells harm best, {best:.3g}", group_at(pair, best))] if best is not None else []
    known = [(w, g) for w, g in asked if None not in (g.get("novel_delta"), g.get("reconstruction_delta"))]
    if not known:
        return ""
    novel = ", ".join(f"{percent(g['novel_delta'], signed=True)} {where}" for where, g in known)
    rest = ", ".join(percent(g["reconstruction_delta"], signed=True) for _, g in known)
    return (
        f"Adding all novel latents of {pair['large']} to {pair['small']} changes its MSE by {novel}; adding the "
        f"reconstruction latents instead by {rest}."
    )


def _pair(pair: Pair) -> str:
    return f"{pair['small']} → {pair['large']}"


def _seeds(pairs: Sequence[tuple[Artifact, Pair]]) -> Iterable[str]:
    """What two seeds of one width already differ by, against novelty between widths."""
    controls = [(a, p) for a, p in pairs if is_control(p) and p["reconstruction_share"] is not None]
    wide = [(a, p) for a, p in pairs if not is_control(p) and p["novel_share"] is not None]
    for artifact, control in controls[:_MOST]:
        theta = artifact.payload["theta"]
        text = (
            f"Two seeds of width {number(control['n_small'])} share {percent(control['reconstruction_share'])} at "
            f"θ = {theta:g}, so {percent(control['novel_share'])} are “new” from one seed to the other"
        )
        up = [(a, p) for a, p in wide if a.payload["theta"] == theta and p["small_sha256"] == control["small_sha256"]]
        if up:
            text += f", against {percent(up[0][1]['novel_share'])} new in the wider one ({_pair(up[0][1])})"
        yield f"{text}."


def end_difference(pair: Pair) -> float | None:
    """The larger relative difference between the path's ends and the SAEs' own MSE; None if there is no path."""
    data = pair.get("data") or {}
    if (stated := data.get("path_end_error")) is not None:  # null where the bias chosen makes that end differ
        return max((v for v in stated.values() if v is not None), default=None)
    mse = (data.get("path") or {}).get("mse")
    if not mse:
        return None
    ends = [(mse[0], data.get("mse_small")), (mse[-1], data.get("mse_large"))]
    return max((abs(a - b) / abs(b) for a, b in ends if a is not None and b), default=None)


def _meta(run: Run) -> Iterable[str]:
    for artifact in run.found.of(h.META):
        payload = artifact.payload
        explained = payload["variance_explained"]["threshold_mode"]
        if explained is None:
            continue
        names = {"random_directions": "random directions", "shuffled_coordinates": "rows with shuffled coordinates"}
        controls = [
            f"{percent(c['variance_explained'])} for {names.get(c['name'], c['name'])}"
            for c in payload.get("controls") or []
            if c["variance_explained"] is not None
        ]
        text = (
            f"The meta-SAE ({number(payload['d_sae'])} meta-latents, k = {number(payload['k'])}) explains "
            f"{percent(explained)} of the variance of {payload['parent']['name']}'s decoder rows"
        )
        yield f"{text}, against {' and '.join(controls)}." if controls else f"{text} (no control was trained)."


def _explained(run: Run) -> Iterable[str]:
    for explained in run.explanations:
        name = explained.sae_name
        values = scored(explained)
        average = autointerp_mean(run, explained.sae_sha256) if values else None
        if average is not None:
            text = (
                f"Descriptions of {name} predict activations with a mean correlation of "
                f"{number(average, 3)} over {number(len(values))} latents"
            )
            control = explained.summary("simulate").get("control_mean")
            if control is None:
                control = mean(v for _, v in scored(explained, "shuffled"))
            yield f"{text}; shuffled descriptions: {number(control, 2)}." if control is not None else f"{text}."
        if choice := choice_of(explained):
            yield (
                f"Multiple choice over {name}: {percent(choice['accuracy'])} of "
                f"{number(int(choice['n']))} questions right (95 % interval {percent(choice['low'])} to "
                f"{percent(choice['high'])}), chance {percent(choice['chance'])}."
            )
