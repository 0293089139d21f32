"""The definitions of the kernels: shortest correct torch, dense, for tests and for reading."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from saetool.core import activations
from saetool.core.ops.pairs import Found, Pairs, from_dense


def batch_topk(
    x: Float[Tensor, "n d"],
    encoder: Float[Tensor, "d_sae d"],
    bias: Float[Tensor, " d_sae"],
    wanted: int,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Pairs, float]:
    """See ``ops.batch_topk``."""
    p = torch.addmm(bias, x, encoder.T)
    values = p[p > 0]
    values = gather(values) if gather else values
    cut = values.kthvalue(values.numel() - wanted + 1).values if values.numel() >= wanted else torch.zeros_like(p[0, 0])
    return from_dense(activations.keep_at_least(p, cut)), float(cut)


def topk(x: Float[Tensor, "n d"], encoder: Float[Tensor, "d_sae d"], bias: Float[Tensor, " d_sae"], k: int) -> Pairs:
    """See ``ops.topk``."""
    return from_dense(activations.topk(torch.addmm(bias, x, encoder.T), k))


def above(
    x: Float[Tensor, "n d"],
    encoder: Float[Tensor, "d_sae d"],
    bias: Float[Tensor, " d_sae"],
    floors: Float[Tensor, " d_sae"],
) -> Found:
    """What the function that ``ops.above`` gives does."""
    z = activations.jumprelu(torch.addmm(bias, x, encoder.T), floors)
    rows, latents = z.nonzero(as_tuple=True)
    return Found(rows, latents, z[rows, latents])


def decode(pairs: Pairs, decoder: Float[Tensor, "d_sae d"]) -> Float[Tensor, "n d"]:
    """See ``ops.decode``."""
    return pairs.dense() @ decoder


def pair_dots(
    pairs: Pairs, rows: Float[Tensor, "n d"], directions: Float[Tensor, "d_sae d"]
) -> Float[Tensor, " pairs"]:
    """See ``ops.pair_dots``."""
    return (rows @ directions.T)[pairs.rows, pairs.latents]


def pair_sums(pairs: Pairs, weights: Float[Tensor, " pairs"], rows: Float[Tensor, "n d"]) -> Float[Tensor, "d_sae d"]:
    """See ``ops.pair_sums``."""
    matrix = torch.zeros(pairs.n_latents, pairs.n_rows, dtype=rows.dtype, device=rows.device)
    matrix[pairs.latents, pairs.rows] = weights
    return matrix @ rows
