"""The scores of ``saetool autointerp`` on standard error."""

from typing import Any

from saetool.console import Console

NAMES = {
    "simulate": "correlation",
    "detect": "balanced accuracy",
    "fuzz": "balanced accuracy",
    "intruder": "accuracy",
}


def latents(console: Console, counts: dict[str, Any], summary: dict[str, Any]) -> None:
    """Each score with its interval, its control and its floor."""

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    def within(interval: tuple[float, float] | None) -> str:
        return f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""

    skipped = [f"{n} {reason}" for reason, n in {**counts["skipped"], **counts["failed"]}.items() if n]
    rows = [
        [
            "latents asked, scored",
            f"{counts['requested']}, {counts['scored']} (left out: {', '.join(skipped) or 'none'})",
        ]
    ]
    for scorer, s in summary.items():
        what = f"{scorer}: {NAMES[scorer]}"
        rows += [
            [f"{what}, mean", shown(s["mean"]) + within(s["ci95"])],
            [f"{what}, median; 10% … 90%", f"{shown(s['median'])}; {shown(s['q10'])} … {shown(s['q90'])}"],
            ["  undefined", f"{s['n_null']}{_why(s)} (mean with these as 0: {shown(s['mean_null0'])})"],
        ]
        if s.get("mean_quantile") is not None:
            rows.append(
                ["  top windows, windows over the range", f"{shown(s['mean_top'])}, {shown(s['mean_quantile'])}"]
            )
        if s.get("control_n"):
            control = shown(s["control_mean"]) + within(s["control_ci95"])
            rows.append(["  control: another latent's", f"{control} (defined for {s['control_n']})"])
        if s.get("floor_mean") is not None:
            zero = f"defined for {s['floor_n']}; with the others as 0: {shown(s['floor_mean_null0'])}"
            rows.append(["  floor: the table of tokens", f"{shown(s['floor_mean'])} ({zero})"])
        if "chance" in s:
            rows.append(["  chance", shown(s["chance"])])
    console.table("scores on held-out windows", ["score", "value"], rows)


def _why(s: dict[str, Any]) -> str:
    reasons = ", ".join(f"{n} {reason}" for reason, n in s.get("null_reasons", {}).items())
    return f": {reasons}" if reasons else ""


def choice(console: Console, counts: dict[str, Any], summary: dict[str, Any], offline: bool) -> None:
    """The multiple choice on standard error."""

    def share(value: float | None, interval: tuple[float, float] | None) -> str:
        return "–" if value is None or interval is None else f"{value:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"

    skipped = (
        ", ".join(f"{n} {reason}" for reason, n in {**counts["skipped"], **counts["failed"]}.items() if n) or "none"
    )
    rows = [
        ["meta-latents asked, labelled", f"{counts['requested']}, {counts['explained']} (left out: {skipped})"],
        ["questions", f"{summary['n']} ({summary['unexplained']} latents have no meta-latent)"],
        ["right", share(summary["accuracy"], summary["wilson95"])],
        ["chance", f"{summary['chance']:.1%}"],
        ["control: another latent's meta-latents", share(summary["control_accuracy"], summary["control_wilson95"])],
    ]
    if offline:
        rows.append(["ties, and in the control", f"{summary['ties']}, {summary['control_ties']}"])
    else:
        floor = summary.get("floor_accuracy")
        rows.append(["floor: tables of tokens", "–" if floor is None else f"{floor:.1%}"])
        rows.append(["without an answer", str(summary["n_missing"])])
    console.table(f"multiple choice by {'token tables' if offline else 'a language model'}", ["score", "value"], rows)
