"""Cards of single latents: description, scores, contexts with highlighted tokens, relatives in other SAEs."""

import math
from dataclasses import dataclass
from typing import Any

from saetool.artifacts import header as h
from saetool.report.blocks import (
    Card,
    Cards,
    Column,
    Context,
    Section,
    Table,
    Token,
    barred,
    num,
    number,
    words,
)
from saetool.report.collect import Artifact, Windows, strings_of
from saetool.report.pairs import pairs_of
from saetool.report.quality import thinned
from saetool.report.run import Explained, Run, score, stated

MAX_CONTEXTS = 6
"""Contexts on a card, the strongest first."""
MAX_LINKS = 5
"""Relatives listed per other SAE."""
_LEVELS = 10
_ROLES = ("explain_top", "explain_quantile", "explain_random", "score_top", "score_quantile", "score_random")
"""Names of the numbers in ``windows@1``, where its header does not give them."""


@dataclass(frozen=True)
class _Links:
    """What stitching and meta records say of single latents, by (hash of the SAE, latent)."""

    nearest: dict[tuple[str, int], list[tuple[str, list[tuple[int, float, str | None]]]]]
    parts: dict[tuple[str, int], list[tuple[int, float, str | None]]]


def latents(run: Run) -> Section | None:
    """Cards of some latents of every explanations file: the best, the worst, and others evenly by number."""
    files = [e for e in run.explanations if e.records]
    if not files or run.n_cards < 1:
        return None
    links = _links(run)
    blocks = []
    per_file = [run.n_cards // len(files) + (i < run.n_cards % len(files)) for i in range(len(files))]
    for i, (explained, n) in enumerate(zip(files, per_file, strict=True)):
        chosen = choose(explained, n)
        if not chosen:
            continue
        strings = strings_of(run.found, explained.windows) if explained.windows else None
        cards = [_card(run, explained, record, links, strings, f"latent-{i}") for record in chosen]
        note = f"Latents of {explained.sae_name}: {number(len(cards))} of {number(len(explained.records))}"
        note += (
            ", a third of them the best explained, a third the worst." if len(cards) < len(explained.records) else "."
        )
        if explained.windows is None and not any(record.get("members") for record in chosen):
            note += " Contexts need the windows file written beside the explanations."
        elif explained.windows is not None and strings is None:
            note += " Tokens are shown by number: their text needs the activation cache given as well."
        blocks.append(Cards(f"cards-{i}", note, cards))
    intro = "Token highlights grow with the activation, from 1 to 10 tenths of the latent's largest in its windows."
    return Section("latents", "Latents", intro, blocks) if blocks else None


def choose(explained: Explained, n: int) -> list[dict[str, Any]]:
    """``n`` records: a third the best scored, a third the worst, the rest evenly by number; in order of latent."""
    records = sorted(explained.records, key=lambda r: r["latent"])
    if len(records) <= n:
        return records
    scored = [(r, s) for r in records if (s := score(r, "simulate", "correlation")) is not None]
    ranked = [r for r, _ in sorted(scored, key=lambda p: (-p[1], p[0]["latent"]))]
    third = min(n // 3, len(ranked) // 2)
    chosen = {r["latent"]: r for r in ranked[:third] + ranked[len(ranked) - third :]}
    rest = [r for r in records if r["latent"] not in chosen and (r.get("description") or r.get("windows"))]
    for record in thinned(rest, max(n - len(chosen), 2)):
        if len(chosen) < n:
            chosen[record["latent"]] = record
    return [chosen[latent] for latent in sorted(chosen)]


def _card(
    run: Run, explained: Explained, record: dict[str, Any], links: _Links, strings: dict[int, str] | None, prefix: str
) -> Card:
    latent = record["latent"]
    key = (run.identity(explained.sae_sha256), latent)
    facts = [
        (label, num(value))
        for label, value in (
            ("correlation", score(record, "simulate", "correlation")),
            ("rank correlation", score(record, "simulate", "spearman")),
            ("shuffled control", score(record, "simulate", "shuffled")),
            ("n-gram floor", score(record, "simulate", "ngram")),
            ("balanced accuracy (detection)", score(record, "detect", "balanced_accuracy")),
            ("balanced accuracy (fuzzing)", score(record, "fuzz", "balanced_accuracy")),
            ("density", record.get("density")),
            ("largest activation", record.get("max_act")),
        )
        if value is not None
    ]
    if record.get("reason"):
        facts.append(("no score because", words(f"{record['status']}: {record['reason']}")))
    contexts, n_contexts = _contexts(explained.windows, record, strings)
    tables = [_relatives(name, found) for name, found in links.nearest.get(key, [])]
    if parts := links.parts.get(key):
        tables.append(_table("Its meta-latents", "meta-latent", "weight", parts))
    if members := record.get("members"):
        parent = _parent(run, explained)
        found = [(int(m), float(w), run.description(parent, int(m))) for m, w in members[: 2 * MAX_LINKS]]
        tables.append(_table("Latents it is part of", "latent", "weight", found))
    return Card(
        f"{prefix}-{latent}",
        f"{explained.sae_name} · latent {latent}",
        record.get("description"),
        "" if (r := score(record, "simulate", "correlation")) is None else number(r, 3),
        facts,
        contexts,
        n_contexts,
        tables,
    )


def _parent(run: Run, explained: Explained) -> str:
    """The hash of the SAE whose latents a meta-SAE's latents are made for."""
    for artifact in run.found.of(h.META):
        if run.identity(run.meta_sha256(artifact)) == run.identity(explained.sae_sha256):
            return artifact.payload["parent"]["sha256"]
    return ""


def _relatives(name: str, found: list[tuple[int, float, str | None]]) -> Table:
    return _table(f"Nearest in {name}", "latent", "cosine", found[:MAX_LINKS])


def _table(caption: str, what: str, value: str, found: list[tuple[int, float, str | None]]) -> Table:
    top = max((v for _, v, _ in found), default=1.0) if value == "weight" else 1.0
    rows = [[num(i), barred(v, top), words(d or "–", 80)] for i, v, d in found]
    return Table(caption, [Column(what), Column(value), Column("description", numeric=False)], rows)


def _links(run: Run) -> _Links:
    """Nearest latents from stitching records (both ways), meta-latents from meta records."""
    nearest: dict[tuple[str, int], list[tuple[str, list[tuple[int, float, str | None]]]]] = {}
    for _, pair in pairs_of(run):
        small, large = run.identity(pair["small_sha256"]), run.identity(pair["large_sha256"])
        to_large: dict[int, list[tuple[int, float]]] = {}
        to_small: dict[int, list[tuple[int, float]]] = {}
        for a, b, cosine in pair.get("edges") or []:
            to_large.setdefault(a, []).append((b, cosine))
            to_small.setdefault(b, []).append((a, cosine))
        closest = zip(pair.get("nearest") or [], pair["max_cosine"]["values"], strict=False)
        for b, (a, cosine) in enumerate(closest):
            if b not in to_small and a is not None and cosine is not None:
                to_small[b] = [(a, cosine)]
        for mine, other, name, table in (
            (small, large, pair["large"], to_large),
            (large, small, pair["small"], to_small),
        ):
            for latent, found in table.items():
                ranked = sorted(found, key=lambda p: (-p[1], p[0]))[:MAX_LINKS]
                said = [(i, c, run.description(other, i)) for i, c in ranked]
                nearest.setdefault((mine, latent), []).append((name, said))
    parts: dict[tuple[str, int], list[tuple[int, float, str | None]]] = {}
    for artifact in run.found.of(h.META):
        found = artifact.payload.get("decompositions")
        if not found:
            continue
        parent, meta = run.identity(artifact.payload["parent"]["sha256"]), run.meta_sha256(artifact)
        for latent, indices, weights in zip(found["latents"], found["indices"], found["weights"], strict=True):
            pairs = sorted(zip(indices, weights, strict=True), key=lambda p: (-p[1], p[0]))
            parts[parent, latent] = [(i, w, run.description(meta, i)) for i, w in pairs]
    return _Links(nearest, parts)


def _contexts(
    windows: Artifact | None, record: dict[str, Any], strings: dict[int, str] | None
) -> tuple[list[Context], int]:
    """The latent's strongest windows, and how many of its windows hold an activation."""
    if windows is None:
        return [], 0
    data: Windows = windows.payload
    rows = (data.latent == record["latent"]).nonzero()[0].tolist()
    peaks = {row: float(data.acts[row].max(initial=0.0)) for row in rows}
    active = sorted((r for r in rows if peaks[r] > 0), key=lambda r: (-peaks[r], r))
    top = max([*peaks.values(), 1e-30])
    names = stated(windows, "roles")
    roles = names if isinstance(names, list) and all(isinstance(n, str) for n in names) else _ROLES
    out = []
    for row in active[:MAX_CONTEXTS]:
        length = max(0, min(int(data.length[row]), data.tokens.shape[1]))
        ids, acts = data.tokens[row][:length].tolist(), data.acts[row][:length].tolist()
        tokens = [Token(_text(i, strings), *_shade(a, top)) for i, a in zip(ids, acts, strict=True)]
        role = int(data.role[row])
        out.append(Context(roles[role].replace("_", " ") if 0 <= role < len(roles) else str(role), peaks[row], tokens))
    return out, len(active)


def _text(token: int, strings: dict[int, str] | None) -> str:
    return strings[token] if strings and token in strings else f"⟨{token}⟩"


def _shade(activation: float, top: float) -> tuple[int, str]:
    """Highlight level 0 … 10, and what hovering says."""
    if not math.isfinite(activation) or activation <= 0:
        return 0, ""
    return max(1, min(_LEVELS, math.ceil(_LEVELS * activation / top))), number(activation, 3)
