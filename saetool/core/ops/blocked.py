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

from saetool.core.ops.pairs import Found, Pairs, sorted_by

BLOCK = 2**23
"""Values in a block, about: 16 MB in bfloat16, 32 MB in float32. Smaller ones slow the product down."""
CUDA_BLOCK = 2**27
"""The same on a CUDA device: a block costs the host some ten launches and a wait, the device must outlast them."""
CACHED_ROWS = 256
"""Rows that are rounded and measured at once."""
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


def _above(x: Tensor, encoder: Tensor, bias: Tensor, floor: float, wanted: int, kernels: str) -> Pairs:
    """All pairs with p ≥ ``floor`` and p > 0, or the ``wanted`` largest of them and some more."""
    n, d_sae = len(x), len(encoder)
    screened = kernels != "float32"
    left = _lengthen_rows(x) if screened else x
    step = min(max(_block(x.device) // n, 1), d_sae)
    product = torch.empty(step, n, dtype=left.dtype, device=x.device)
    lengthened = left.new_empty(step, left.shape[1]) if screened else None
    mask = torch.empty(step, n, dtype=torch.bool, device=x.device)
    found: list[Tensor] = []
    values: list[Tensor] = []
    total = 0
    for start in range(0, d_sae, step):
        block, b = encoder[start : start + step], bias[start : start + step]
        out = product[: len(block)]
        if lengthened is not None:
            _lengthen_latents(block, b, lengthened[: len(block)])
            torch.mm(lengthened[: len(block)], left.T, out=out)
            at = _compact(out, floor, kernels, mask[: len(block)])
            p = _dots(x, at % n, block, at // n, kernels) + b[at // n]
        else:
            # Adding the bias to every product costs as much as comparing it: lower the floor instead, and a little.
            torch.mm(block, left.T, out=out)
            level = (floor - b - 1e-6 * (abs(floor) + b.abs()))[:, None]
            at = _positions(torch.ge(out, level, out=mask[: len(block)]).view(-1))
            p = out.view(-1)[at] + b[at // n]
        keep = (p >= floor) & (p > 0)
        found.append(at[keep] + start * n)
        values.append(p[keep])
        total += len(values[-1])
        if total > 4 * wanted:  # the floor was far too low: forget what cannot be among the wanted
            at, p = torch.cat(found), torch.cat(values)
            floor = float(p.kthvalue(len(p) - wanted + 1).values)
            keep = p >= floor
            found, values = [at[keep]], [p[keep]]
            total = len(values[0])
    at = torch.cat(found)
    return Pairs(at % n, at // n, torch.cat(values), n, d_sae)


class Above:
    """See ``ops.above``. What depends on the latents alone is computed once, and memory serves every batch again."""

    def __init__(
        self,
        encoder: Float[Tensor, "d_sae d"],
        bias: Float[Tensor, " d_sae"],
        floors: Float[Tensor, " d_sae"],
        kernels: str = "float32",
    ) -> None:
        self._encoder, self._bias, self._floors, self._kernels = encoder, bias, floors.clamp_min(0), kernels
        if kernels == "float32":
            # Adding the bias to every product costs as much as comparing it: lower the floors instead, and a little.
            self._right = encoder
            self._levels = self._floors - bias - 1e-6 * (self._floors + bias.abs())
        else:  # floors are taken off the biases, so that the products are compared with 0
            self._right = _lengthen_latents(encoder, bias - self._floors)
        self._left = self._product = self._right.new_empty(0)
        self._mask = torch.empty(0, dtype=torch.bool, device=encoder.device)

    @_float32_sums()
    def __call__(self, x: Float[Tensor, "n d"]) -> Found:
        n, d_sae = len(x), len(self._encoder)
        # A quarter of a block: one row after the other meets few latents, which stay in the cache meanwhile.
        step = min(max(_block(x.device) // 4 // max(n, 1), 1), d_sae)
        if self._product.numel() < n * step:
            self._product, self._mask = self._product.new_empty(n * step), self._mask.new_empty(n * step)
        left = x if self._kernels == "float32" else self._lengthened_rows(x)
        found = [self._of_block(x, left, start, min(start + step, d_sae)) for start in range(0, d_sae, step)]
        if len(found) == 1:
            return found[0]
        whole = Found(*map(torch.cat, zip(*found, strict=True)))
        order = sorted_by(whole.rows, n)
        return Found(*(column[order] for column in whole))

    def _lengthened_rows(self, x: Tensor) -> Tensor:
        if len(self._left) < len(x):
            self._left = self._right.new_empty(len(x), self._right.shape[1])
        return _lengthen_rows(x, self._left[: len(x)])

    def _of_block(self, x: Tensor, left: Tensor, start: int, stop: int) -> Found:
        """What the latents ``start`` to ``stop`` find."""
        n, m = len(x), stop - start
        out, mask = self._product[: n * m].view(n, m), self._mask[: n * m].view(n, m)
        torch.mm(left, self._right[start:stop].T, out=out)
        if self._kernels == "float32":
            at = _positions(torch.ge(out, self._levels[start:stop], out=mask).view(-1))
        else:
            at = _compact(out, 0.0, self._kernels, mask)
        rows, latents = at // m, at % m + start
        if self._kernels == "float32":
            values = out.view(-1)[at] + self._bias[latents]
        else:
            values = _dots(x, rows, self._encoder, latents, self._kernels) + self._bias[latents]
        keep = _positions(values > self._floors[latents])
        return Found(rows[keep], latents[keep], values[keep])


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


def _lengthened(d: int) -> int:
    """Columns of the screening product's factors: d and four more, in whole tiles of 32."""
    return -(-(d + 4) // 32) * 32


def _lengthen_rows(x: Float[Tensor, "n d"], wide: Float[Tensor, "n wide"] | None = None) -> Float[Tensor, "n wide"]:
    """(x̂, ‖δx‖, ‖x̂‖, 1, 1, 0 …): the left factor of the screening product, bfloat16, written to ``wide``."""
    n, d = x.shape
    if wide is None:
        wide = x.new_empty(n, _lengthened(d), dtype=torch.bfloat16)
    for rows, target in _cached(x, wide):
        target[:, :d] = rows
        rounded = target[:, :d].float()
        target[:, d + 1] = rounded.norm(dim=1) * ROUND_UP
        target[:, d] = rounded.sub_(rows).norm(dim=1) * ROUND_UP
    wide[:, d + 2 : d + 4] = 1
    wide[:, d + 4 :] = 0
    return wide


def _cached(rows: Tensor, wide: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in pieces whose passes fit a processor's cache; whole on other devices."""
    size = CACHED_ROWS if rows.device.type == "cpu" else max(len(rows), 1)
    return zip(rows.split(size), wide.split(size), strict=True)


def _lengthen_latents(
    w: Float[Tensor, "m d"], bias: Float[Tensor, " m"], wide: Float[Tensor, "m wide"] | None = None
) -> Float[Tensor, "m wide"]:
    """(ŵ, ‖w‖, ‖δw‖ + γ‖w‖, b_high, b_low, 0 …): the right factor of the screening product, written to ``wide``."""
    m, d = w.shape
    if wide is None:
        wide = w.new_empty(m, _lengthened(d), dtype=torch.bfloat16)
    gamma = 4 * wide.shape[1] * 2.0**-24  # the float32 sums of this product and of the exact one, twice over
    for rows, target in _cached(w, wide):
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
        right = _lengthen_latents(encoder, bias)
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
