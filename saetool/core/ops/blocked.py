"""The kernels in blocks: the n × d_sae matrix never exists whole, memory is a block plus the pairs.

**Selection.** A block of latents is multiplied out, compared with a floor (last batch's cut, a little lowered) and
compacted to its survivors. If at least as many survive as are wanted, the answer is among them; else the floor sinks
and the pass repeats. So the result is that of ranking everything, whatever the floor. TopK takes blocks of rows; its
floor is the row's k-th largest *maximum of a group of latents*, which k latents of k groups reach.

**Screening.** The product runs in bfloat16 on rows lengthened by a bound of its own rounding error:

    x·w − x̂·ŵ = δx·w + x̂·δw  ≤  ‖δx‖‖w‖ + ‖x̂‖‖δw‖            x̂, ŵ the bfloat16 values, δ what rounding took

    (x̂, ‖δx‖, ‖x̂‖, 1, 1) · (ŵ, ‖w‖, ‖δw‖ + γ‖w‖, b_high, b_low)  ≥  x·w + b

with γ for the float32 sums and every appended number rounded up. Rounding the product to bfloat16 is monotone, so
comparing it with the rounded floor loses no pair; those above it are multiplied again in float32, and only float32
values are ranked and returned.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetool.core.ops.pairs import Pairs

BLOCK = 2**23
"""Values in a block, about: 16 MB in bfloat16, 32 MB in float32. Smaller ones slow the product down."""
CUDA_BLOCK = 2**27
"""The same on a CUDA device: a block costs the host some ten launches and a wait, the device must outlast them."""
ROUND_UP = 1 + 2.0**-7
"""A positive float32 times this, rounded to bfloat16, is not below what it was (unit roundoff 2⁻⁸)."""


@contextmanager
def _float32_sums() -> Iterator[None]:
    """CUDA's bfloat16 products keep their partial sums in float32, as γ assumes; unasked, they may round them."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_bf16_reduced_precision_reduction
    split = getattr(matmul, "allow_bf16_reduced_precision_reduction_split_k", None)  # not every torch tells them apart
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = allowed if split is None else (allowed, split)


def _block(device: torch.device) -> int:
    return CUDA_BLOCK if device.type == "cuda" else BLOCK


@_float32_sums()
def batch_topk(
    x: Float[Tensor, "n d"],
    encoder: Float[Tensor, "d_sae d"],
    bias: Float[Tensor, " d_sae"],
    wanted: int,
    hint: float = 0.0,
    gather: Callable[[Tensor], Tensor] | None = None,
    kernels: str = "float32",
) -> tuple[Pairs, float]:
    """See ``ops.batch_topk``; ``kernels`` as there."""
    floor = hint if hint > 0 else 0.9 * _sampled_cut(x, encoder, bias, wanted, gather)
    while True:
        pairs = _above(x, encoder, bias, floor, wanted, kernels)
        values = gather(pairs.values) if gather else pairs.values
        if values.numel() >= wanted:
            cut = values.kthvalue(values.numel() - wanted + 1).values
            return pairs.subset(pairs.values >= cut), float(cut)
        if floor == 0:
            return pairs, 0.0
        floor = 0.5 * floor if floor == hint else 0.0


def _sampled_cut(
    x: Tensor, encoder: Tensor, bias: Tensor, wanted: int, gather: Callable[[Tensor], Tensor] | None
) -> float:
    """The cut of some 64 rows at the same share of kept values; of several processes' cuts, the smallest."""
    sample = x[:: max(len(x) // 64, 1)]
    p = torch.addmm(bias, sample, encoder.T)
    values = p[p > 0]
    share = 1 if gather is None else len(gather(p.new_zeros(1)))
    keep = max(wanted * len(sample) // (len(x) * share), 1)
    cut = values.kthvalue(values.numel() - keep + 1).values if values.numel() >= keep else p.new_zeros(())
    return float(cut if gather is None else gather(cut.reshape(1)).min())


class _Blocks:
    """The products of all rows with a block of latents at a time, and what of them may lie above a floor."""

    def __init__(self, x: Tensor, encoder: Tensor, bias: Tensor, kernels: str) -> None:
        self._x, self._encoder, self._bias, self._kernels = x, encoder, bias, kernels
        n, d_sae = len(x), len(encoder)
        self._left = x if kernels == "float32" else _lengthen_rows(x)
        self._step = min(max(_block(x.device) // n, 1), d_sae)
        self._product = self._left.new_empty(self._step, n)
        self._lengthened = self._left.new_empty(self._step, self._left.shape[1]) if kernels != "float32" else None
        self._mask = torch.empty(self._step, n, dtype=torch.bool, device=x.device)

    def ranges(self) -> Iterator[slice]:
        """The latents of each block."""
        for start in range(0, len(self._encoder), self._step):
            yield slice(start, min(start + self._step, len(self._encoder)))

    def candidates(self, part: slice, floor: float | Tensor) -> tuple[Tensor, Tensor]:
        """Flat places (latent of the block, row) and values in float32 of all pairs that are not below ``floor``, one
        for all or one for each of the block's latents, and of some that are."""
        block, b, n = self._encoder[part], self._bias[part], len(self._x)
        out, mask = self._product[: len(block)], self._mask[: len(block)]
        if self._lengthened is not None:
            # Floors of their own are taken off the biases, so that the block is compared with 0.
            shift, level = (b - floor, 0.0) if isinstance(floor, Tensor) else (b, floor)
            _lengthen_latents(block, shift, self._lengthened[: len(block)])
            torch.mm(self._lengthened[: len(block)], self._left.T, out=out)
            at = _compact(out, level, self._kernels, mask)
            return at, _dots(self._x, at % n, block, at // n, self._kernels) + b[at // n]
        # Adding the bias to every product costs as much as comparing it: lower the floor instead, and a little.
        torch.mm(block, self._left.T, out=out)
        size = floor.abs() if isinstance(floor, Tensor) else abs(floor)
        at = _positions(torch.ge(out, (floor - b - 1e-6 * (size + b.abs()))[:, None], out=mask).view(-1))
        return at, out.view(-1)[at] + b[at // n]


def _above(x: Tensor, encoder: Tensor, bias: Tensor, floor: float, wanted: int, kernels: str) -> Pairs:
    """All pairs with p ≥ ``floor`` and p > 0, or the ``wanted`` largest of them and some more."""
    n, blocks = len(x), _Blocks(x, encoder, bias, kernels)
    found: list[Tensor] = []
    values: list[Tensor] = []
    total = 0
    for part in blocks.ranges():
        at, p = blocks.candidates(part, floor)
        keep = (p >= floor) & (p > 0)
        found.append(at[keep] + part.start * n)
        values.append(p[keep])
        total += len(values[-1])
        if total > 4 * wanted:  # the floor was far too low: forget what cannot be among the wanted
            at, p = torch.cat(found), torch.cat(values)
            floor = float(p.kthvalue(len(p) - wanted + 1).values)
            keep = p >= floor
            found, values = [at[keep]], [p[keep]]
            total = len(values[0])
    at = torch.cat(found)
    return Pairs(at % n, at // n, torch.cat(values), n, len(encoder))


@_float32_sums()
def above(
    x: Float[Tensor, "n d"],
    encoder: Float[Tensor, "d_sae d"],
    bias: Float[Tensor, " d_sae"],
    floors: Float[Tensor, " d_sae"],
    kernels: str = "float32",
) -> Pairs:
    """See ``ops.above``."""
    n, blocks = len(x), _Blocks(x, encoder, bias, kernels)
    floors = floors.clamp_min(0)
    found, values = [], []
    for part in blocks.ranges():
        at, p = blocks.candidates(part, floors[part])
        keep = p > floors[part][at // n]
        found.append(at[keep] + part.start * n)
        values.append(p[keep])
    at = torch.cat(found)
    return Pairs(at % n, at // n, torch.cat(values), n, len(encoder))


def _compact(
    product: Float[Tensor, "a b"], floor: float | Float[Tensor, " a"], kernels: str, mask: Tensor | None = None
) -> Int[Tensor, " survivors"]:
    """Flat positions, ascending, where ``product`` ≥ ``floor`` and > 0; the floor may differ by row.

    With one floor the product is bfloat16; ``mask`` is then scratch memory of its shape.
    """
    if kernels == "triton":
        from saetool.core.ops import triton

        return triton.compact(product, floor)
    if isinstance(floor, Tensor):
        return _positions(((product >= floor[:, None]) & (product > 0)).view(-1))
    # The order of positive bfloat16 numbers is that of their bits, which compare faster; 1 is the smallest of them.
    bits = int(torch.tensor(floor, dtype=torch.bfloat16).view(torch.int16))
    return _positions(torch.ge(product.view(torch.int16), max(bits, 1), out=mask).view(-1))


def _positions(mask: Tensor) -> Int[Tensor, " set"]:
    if mask.device.type == "cpu":  # a fifth of torch's time
        return torch.from_numpy(mask.numpy().nonzero()[0])
    return mask.nonzero().squeeze(1)


def _lengthen_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n wide"]:
    """(x̂, ‖δx‖, ‖x̂‖, 1, 1, 0 …): the left factor of the screening product, bfloat16, in whole tiles of 32 columns."""
    n, d = x.shape
    wide = torch.zeros(n, -(-(d + 4) // 32) * 32, dtype=torch.bfloat16, device=x.device)
    wide[:, :d] = x
    rounded = wide[:, :d].float()
    wide[:, d] = (x - rounded).norm(dim=1) * ROUND_UP
    wide[:, d + 1] = rounded.norm(dim=1) * ROUND_UP
    wide[:, d + 2 : d + 4] = 1
    return wide


def _lengthen_latents(
    w: Float[Tensor, "m d"], bias: Float[Tensor, " m"], wide: Float[Tensor, "m wide"]
) -> Float[Tensor, "m wide"]:
    """(ŵ, ‖w‖, ‖δw‖ + γ‖w‖, b_high, b_low, 0 …): the right factor of the screening product, written to ``wide``."""
    d = w.shape[1]
    gamma = 4 * wide.shape[1] * 2.0**-24  # the float32 sums of this product and of the exact one, twice over
    for rows, target in zip(w.split(512), wide.split(512), strict=True):  # what fits a core's cache
        target[:, :d] = rows
        norm = rows.norm(dim=1)
        target[:, d] = norm * ROUND_UP
        target[:, d + 1] = ((rows - target[:, :d]).norm(dim=1) + gamma * norm) * ROUND_UP
    high = bias.bfloat16()
    low = bias - high.float() + gamma * bias.abs()
    wide[:, d + 2] = high
    wide[:, d + 3] = low + low.abs() * 2.0**-7
    wide[:, d + 4 :] = 0
    return wide


@_float32_sums()
def topk(
    x: Float[Tensor, "n d"],
    encoder: Float[Tensor, "d_sae d"],
    bias: Float[Tensor, " d_sae"],
    k: int,
    kernels: str = "float32",
) -> Pairs:
    """See ``ops.topk``; ``kernels`` as there."""
    screened = kernels != "float32"
    n, d_sae = len(x), len(encoder)
    if screened:
        left = _lengthen_rows(x)
        right = _lengthen_latents(encoder, bias, left.new_empty(d_sae, left.shape[1]))
        # What a screened value can exceed the true one by: the bound of its error, twice.
        d = x.shape[1]
        bounds = left[:, d : d + 2].float() @ right[:, d : d + 2].float().amax(0)
        slack = 2 * bounds + 2.0**-13 * bias.abs().max()
    step = max(_block(x.device) // d_sae, 512)
    parts = []
    for start in range(0, n, step):
        rows = x[start : start + step]
        if screened:
            product = left[start : start + step] @ right.T
            floor = _kth_group_maximum(product, k).float()
            floor = (floor * (1 - 2.0**-7) - slack[start : start + step]).clamp_min(0).bfloat16()
        else:
            product = torch.addmm(bias, rows, encoder.T)
            floor = _kth_group_maximum(product, k).clamp_min(0)
        at = _compact(product, floor, kernels)
        row, latent = at // d_sae, at % d_sae
        p = product.view(-1)[at] if not screened else _dots(rows, row, encoder, latent, kernels) + bias[latent]
        keep = _largest_of_rows(row, p, len(rows), k)
        parts.append((row[keep] + start, latent[keep], p[keep]))
    row, latent, value = (torch.cat(part) for part in zip(*parts, strict=True))
    order = torch.argsort(latent, stable=True)
    return Pairs(row[order], latent[order], value[order], n, d_sae)


def _kth_group_maximum(p: Float[Tensor, "n d_sae"], k: int) -> Float[Tensor, " n"]:
    """A lower bound of each row's k-th largest value: the k-th largest of maxima over disjoint groups of latents."""
    d_sae = p.shape[1]
    size = max(min(32, d_sae // (4 * k)), 1)
    groups = d_sae // size  # a remainder of latents is in no group: the bound only gets lower
    maxima = p[:, : groups * size].unflatten(1, (size, groups)).amax(1)
    return maxima.topk(k, dim=1).values[:, -1]


def _largest_of_rows(row: Tensor, p: Tensor, n: int, k: int) -> Tensor:
    """Which of the pairs, sorted by ``row``, are among the ``k`` largest positive of their row."""
    counts = torch.bincount(row, minlength=n)
    starts = counts.cumsum(0) - counts
    column = torch.arange(len(row), device=row.device) - starts[row]
    table = p.new_full((n, max(int(counts.max()), k) if n else k), -torch.inf)
    table[row, column] = p
    chosen = torch.zeros_like(table, dtype=torch.bool).scatter_(1, table.topk(k, dim=1).indices, True)
    return chosen[row, column] & (p > 0)


def _dots(x: Tensor, rows: Tensor, directions: Tensor, latents: Tensor, kernels: str = "auto") -> Tensor:
    """x[row] · directions[latent] for each pair, without the two gathered matrices."""
    if kernels == "triton":
        from saetool.core.ops import triton

        return triton.dots(x, rows, directions, latents)
    if not len(rows):
        return x.new_zeros(0)
    starts = rows.new_zeros(0)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(x, directions, latents, starts, rows, 0)


def decode(pairs: Pairs, decoder: Float[Tensor, "d_sae d"]) -> Float[Tensor, "n d"]:
    """See ``ops.decode``."""
    return _weighted_sums(decoder, pairs.latents_by_row, pairs.row_starts, pairs.values[pairs.by_row])


def pair_dots(
    pairs: Pairs, rows: Float[Tensor, "n d"], directions: Float[Tensor, "d_sae d"]
) -> Float[Tensor, " pairs"]:
    """See ``ops.pair_dots``."""
    order = pairs.by_row  # one row after the other stays in the cache: a third of the time of the other order
    dots = torch.empty_like(pairs.values)
    dots[order] = _dots(rows, pairs.rows[order], directions, pairs.latents_by_row)
    return dots


def pair_sums(pairs: Pairs, weights: Float[Tensor, " pairs"], rows: Float[Tensor, "n d"]) -> Float[Tensor, "d_sae d"]:
    """See ``ops.pair_sums``. One sum after the other, in the order of the rows: no atomics, the same bits each time."""
    return _weighted_sums(rows, pairs.rows, pairs.latent_starts, weights)


def _weighted_sums(matrix: Tensor, indices: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Σ weight · matrix[index] over each bag of consecutive pairs."""
    if not len(indices):
        return matrix.new_zeros(len(starts), matrix.shape[1])
    return torch.nn.functional.embedding_bag(
        indices, matrix, starts, mode="sum", per_sample_weights=weights.to(matrix.dtype)
    )
