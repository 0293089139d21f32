"""Explanations: how well descriptions predict activations, in tables, file by file."""

import math
from typing import Any

from saetool.artifacts import header as h
from saetool.report.blocks import Column, Figures, Group, Section, Table, Text, linked, num, number, pct, words
from saetool.report.run import Explained, Run, mean, stated
from saetool.report.score_figures import (
    against_floor,
    by_density,
    choice_figure,
    ecdf,
    first_of,
    score_histogram,
    scored,
)

OFFLINE = "table of tokens, offline"
_EXTREMES = 8
"""Best and worst latents listed."""


def autointerp(run: Run) -> Section | None:
    """Every explanations file on its own, and multiple choice in one table."""
    files = [e for e in run.explanations if any(r.get("scores") for r in e.records) or e.records]
    if not files:
        return None
    blocks: list[Any] = [_summary(files), *_others(files)]
    blocks += [*_choices(files), *_costs(run, files)]
    blocks += [group for i, e in enumerate(files) if (group := _file(run, e, i)).blocks]
    intro = (
        "A description is good if activations predicted from it correlate with the true ones on text that was not "
        "used to write it. The control scores each latent with another latent's description."
    )
    return Section("autointerp", "Descriptions and their scores", intro, blocks)


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
                num(first_of(summary.get("mean"), mean(values))),
                num(summary.get("mean_null0")),
                num(first_of(summary.get("median"), _median(values))),
                words(interval),
                num(first_of(summary.get("control_mean"), mean(v for _, v in scored(e, "shuffled")))),
                num(first_of(summary.get("floor_mean"), mean(v for _, v in scored(e, "ngram")))),
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


def _costs(run: Run, files: list[Explained]) -> list[Any]:
    """What the language model's calls cost, from the run logs; how to keep one where there is none."""
    usages = [record for log in run.found.of(h.RUN_LOG) for record in log.payload]
    asked = [e for e in files if _judge(e) != OFFLINE]
    rows = []
    for e in asked:
        used = [u for u in usages if u["of"] == e.artifact.header.key]
        if used:
            total = [sum(u.get(n) or 0 for u in used) for n in ("calls", "kept", "prompt_tokens", "output_tokens")]
            money = [u["cost"] for u in used if u.get("cost") is not None]
            failed = sum(sum((u.get("failures") or {}).values()) for u in used)
            rows.append(
                [
                    words(e.artifact.label, 50),
                    words(_judge(e)),
                    *map(num, total),
                    num(failed),
                    num(sum(money) if money else None),
                    num(total[2] / max(len(e.records), 1), 3),
                ]
            )
    if not asked:
        return []
    if not rows:
        return [Text("What the calls cost is in the run's log: saetool autointerp --log calls.jsonl.")]
    columns = [
        Column("explanations", numeric=False),
        Column("language model", numeric=False),
        Column("calls", "over all sessions of the log"),
        Column("kept answers", "taken from earlier calls, for nothing"),
        Column("tokens sent"),
        Column("tokens received"),
        Column("failed calls"),
        Column("cost", "at the prices given (--price-in, --price-out)"),
        Column("tokens sent a latent"),
    ]
    return [Table("What the calls cost", columns, rows, note="From the run logs; a resumed run has several sessions.")]


def _judge(e: Explained) -> str:
    """What predicted: the language model that the header names, or the table of tokens."""
    backend = stated(e.artifact, "backend")
    if not isinstance(backend, dict) or backend.get("kind") in (None, "offline"):
        return OFFLINE
    return " ".join(str(backend[k]) for k in ("kind", "model") if backend.get(k))


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
    accuracy, chance, n = (
        first_of(summary.get("accuracy"), summary.get("mean")),
        summary.get("chance"),
        summary.get("n"),
    )
    if accuracy is None or chance is None or not n:
        return None
    out = {"accuracy": accuracy, "chance": chance, "n": n}
    control = first_of(summary.get("control_accuracy"), summary.get("control_mean"))
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
    return [Figures([choice_figure(found)]), Table("Multiple choice", columns, rows, note=note)]


def _file(run: Run, e: Explained, index: int) -> Group:
    blocks: list[Any] = []
    values = scored(e)
    if values:
        drawn = [score_histogram(e, index), ecdf(e, index), by_density(run, e, index), against_floor(run, e, index)]
        blocks.append(Figures([f for f in drawn if f]))
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
