"""A pair's tables: other values of theta, shapes of components, one-to-one matching, exchanged biases."""

from typing import Any

from saetool.report.blocks import Cell, Column, Table, num, number, pct, words
from saetool.report.pairs import TABLE_ROWS, Pair, group_at


def sweep(pair: Pair, data: dict[str, Any] | None, theta: float) -> Table | None:
    """Counts and group effects for other values of theta."""
    found = [s for s in pair.get("sweep") or [] if s.get("theta") is not None]
    if not found:
        return None
    columns = [
        Column("θ"),
        Column("novel"),
        Column("novel share"),
        Column("components"),
        Column("largest", "latents in the largest component"),
        Column("unmatched", "small latents without partner"),
        Column("+ novel", "change of MSE when all novel latents are added"),
        Column("+ reconstruction", "change of MSE when all reconstruction latents are added"),
    ]
    rows: list[list[Cell]] = []
    for s in sorted(found, key=lambda s: s["theta"]):
        group = group_at({"data": data}, s["theta"])
        rows.append(
            [
                Cell(number(s["theta"]), s["theta"], mark="strong" if abs(s["theta"] - theta) < 1e-9 else ""),
                num(s.get("novel")),
                pct(s.get("novel_share")),
                num(s.get("components")),
                num(s.get("largest_component")),
                num(s.get("unmatched_small")),
                pct(group.get("novel_delta"), signed=True),
                pct(group.get("reconstruction_delta"), signed=True),
            ]
        )
    return Table(f"How the answer depends on θ (bold: θ = {theta:g}, used here)", columns, rows)


def shapes(pair: Pair) -> Table:
    """How many components there are of each shape."""
    found = sorted(pair["component_shapes"], key=lambda s: (-s[2], s[0] + s[1], s[0]))
    shown = found[:TABLE_ROWS]
    rows = [[words(f"{a} → {b}"), num(a), num(b), num(n)] for a, b, n in shown]
    columns = [Column("shape", numeric=False), Column("small latents"), Column("large latents"), Column("components")]
    note = f"The {len(shown)} most frequent of {len(found)} shapes." if len(found) > len(shown) else ""
    return Table("Shapes of the components: small → large latents", columns, rows, note=note, sortable=True)


def matching(pair: Pair, theta: float) -> Table | None:
    """Latents matched one to one, by three similarities: how many of the matched pairs are the same thing."""
    found = pair.get("matching")
    if not found:
        return None
    rows = []
    for name, said in (("decoder", "decoder rows"), ("encoder", "encoder columns"), ("both", "the sum of both")):
        part = found.get(name) or {}
        fields = ("shared", "decoder_cosine_mean", "encoder_cosine_mean")
        rows.append([words(said), pct(part.get(fields[0])), num(part.get(fields[1])), num(part.get(fields[2]))])
    columns = [
        Column("matched by the cosine of", numeric=False),
        Column("shared", f"share of the matched pairs whose cosine is at least θ = {theta:g}"),
        Column("mean decoder cosine", "over the matched pairs"),
        Column("mean encoder cosine", "over the matched pairs"),
    ]
    note = "Hungarian matching: each latent has one partner, and the sum of cosines is the largest there is."
    if found.get("same_partner") is not None:
        note += f" By decoder and by encoder, {number(100 * found['same_partner'], 3)} % get the same partner."
    return Table("Matched one to one", columns, rows, note=note)


def biases(payload: dict[str, Any]) -> Table | None:
    """The MSE of each SAE with the output bias of each other, relative to its own (the paper's figure 17)."""
    found = payload.get("bias_exchange")
    if not found or len(found["saes"]) < 2:
        return None
    columns = [
        Column("MSE of", numeric=False),
        Column("with its own bias"),
        *(Column(f"bias of {name}") for name in found["saes"]),
        *(Column(f"cosine with {name}'s") for name in found["saes"]),
    ]
    rows = []
    for i, name in enumerate(found["saes"]):
        own = found["mse"][i][i]
        changes = [None if m is None or not own else m / own - 1 for m in found["mse"][i]]
        cosines = [num(c, 5) for c in found["b_dec_cosine"][i]]
        rows.append([words(name), num(own), *(pct(c, signed=True) for c in changes), *cosines])
    note = (
        "Change of MSE against the SAE's own bias; what its encoder subtracts stays its own. Cosines are of the biases."
    )
    return Table("Output biases exchanged", columns, rows, note=note)
