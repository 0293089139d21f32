"""One evaluator for the SAEs of all trainers: plain torch, none of saetool's own code."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quality:
    """One trained SAE as the evaluator sees it."""

    explained_variance: float
    """Held-out split."""
    l0: float
    """Active latents per token, held-out split."""
    dead: float
    """Share of latents that never fired on the train rows shown."""


@torch.no_grad()
def evaluate(
    weights: Mapping[str, Tensor],
    selection: str,
    k: int,
    held: Iterable[Tensor],
    shown: Iterable[Tensor],
) -> Quality:
    """``selection``: topk (k of each row) or batchtopk (n·k of each batch of n rows of ``held`` or ``shown``)."""
    held = list(held)
    n = sum(len(x) for x in held)
    mean = torch.stack([x.double().sum(0) for x in held]).sum(0) / n
    error = total = active = 0.0
    for x in held:
        z = encode(weights, x, selection, k)
        error += float((x - z @ weights["W_dec"] - weights["b_dec"]).double().square().sum())
        total += float((x.double() - mean).square().sum())
        active += int((z > 0).sum())
    fired = torch.zeros(len(weights["b_enc"]), dtype=torch.bool)
    for x in shown:
        fired |= (encode(weights, x, selection, k) > 0).any(0)
    return Quality(1 - error / total, active / n, float((~fired).float().mean()))


def encode(weights: Mapping[str, Tensor], x: Tensor, selection: str, k: int) -> Tensor:
    """Activations by plain `topk`, of rows or of the flattened batch; negative ones are 0."""
    positive = ((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()
    flat = positive if selection == "topk" else positive.reshape(1, -1)
    values, indices = flat.topk(k if selection == "topk" else k * len(x), dim=1, sorted=False)
    return torch.zeros_like(flat).scatter(1, indices, values).reshape(positive.shape)
