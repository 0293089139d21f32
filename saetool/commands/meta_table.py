"""What ``saetool meta`` says of its records."""

from collections.abc import Mapping, Sequence
from typing import Any

from saetool.console import Console


def summary(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a record that ``--json`` prints."""
    names = ("d_sae", "k", "variance_explained", "mse_mean", "mean_active", "dead", "unexplained_rows", "threshold")
    found = {name: payload[name] for name in (*names, "controls", "bars")}
    found["max_cosine"] = {name: panel["mean"] for name, panel in payload["max_cosine"].items()}
    found["shared_edges"] = payload["compare"]["shared_edges"]
    return found


def show(console: Console, payload: Mapping[str, Any]) -> None:
    """Tables of one record: what is explained by what, and how close directions come."""
    explained = payload["variance_explained"]
    lines = [
        ["meta-SAE, threshold", _number(explained["threshold_mode"]), f"{payload['mean_active']:.2f}"],
        ["meta-SAE, batch selection", _number(explained["train_mode"]), str(payload["k"])],
    ]
    for parent in payload["parents"] if len(payload["parents"]) > 1 else []:
        lines.append([f"of {parent['name']}", _number(parent["variance_explained"]), f"{parent['mean_active']:.2f}"])
    for control in payload["controls"]:
        name = f"control: {control['name']}"
        lines.append([name, _number(control["variance_explained"]), f"{control['mean_active']:.2f}"])
    for bar in payload["bars"][1:]:
        lines.append([bar["name"], _number(bar["variance_explained"]), f"{bar['mean_active']:.2f}"])
    title = f"{payload['d_sae']} meta-latents on {payload['n_rows']} rows, {payload['dead']} dead"
    console.table(title, ["rows explained by", "variance explained", "mean active"], lines)
    panels = [[name, _number(p["mean"]), _number(p["median"])] for name, p in payload["max_cosine"].items()]
    console.table("largest cosine", ["of each", "mean", "median"], panels)
    if edges := payload["compare"]["shared_edges"]:
        console.say(
            f"{100 * edges['overlap']:.1f}% of the {edges['edges']} pairs that share a meta-latent share a neighbour "
            f"in {payload['compare']['comparable']} (cosine ≥ {edges['tau']:.3f}); chance {100 * edges['chance']:.1f}%"
        )


def sweep(console: Console, payloads: Sequence[Mapping[str, Any]]) -> None:
    """One line a meta-SAE."""
    nulls = [control["name"] for control in payloads[0]["controls"]]
    rows = []
    for payload in sorted(payloads, key=lambda p: (p["d_sae"], p["k"])):
        explained = payload["variance_explained"]
        controls = [_number(control["variance_explained"]) for control in payload["controls"]]
        rows.append(
            [
                *(str(payload["d_sae"]), str(payload["k"])),
                *(_number(explained["threshold_mode"]), _number(explained["train_mode"])),
                *controls,
                *(f"{payload['mean_active']:.2f}", str(payload["dead"])),
            ]
        )
    columns = ["meta-latents", "k", "variance explained", "batch selection", *nulls, "mean active", "dead"]
    console.table(f"{payloads[0]['n_rows']} rows", columns, rows)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
