"""Steps of the kernels in Triton, for CUDA devices: compare and compact, gathered dots, weighted sums of rows.

``reference`` and ``blocked`` say what each computes. Here no program waits for another and nothing is added
atomically: the order of every sum and of every survivor is fixed by the shapes, so the bits are the same each time.
Sums are float32 (float64 for float64), products are single multiply-adds and never TF32. Positions are int64: a batch
may have more than 2³¹ pairs. ``TRITON_INTERPRET=1``, set before Triton is first imported, runs all of it on a CPU.

Block sizes are reasoned, not tuned: a thread holds 16 to 32 values, so that loads are 128 bits wide and many programs
share a multiprocessor; the programs are short chains of dependent loads, and their number is what hides the waiting.
"""

from typing import Any, no_type_check  # a kernel's arguments are Triton's: jaxtyping must leave them alone

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saetool.core.ops.pairs import Pairs

CHUNK = 2048
"""Values that a program of ``compact`` compares."""
PAIRS, COLUMNS = 16, 128
"""Pairs and columns that a program of the products has in hand: 16 is about what a latent gets of a batch."""


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    # On the device of the first tensor. Fusion is what Triton did by default until it warned that it would not.
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants, enable_fp_fusion=True)


@triton.jit
@no_type_check
def _survivors(product, floors, floor_stride, columns, chunks, CHUNK: tl.constexpr):
    """This program's chunk of a row: where the row begins, the columns, and which of them survive."""
    row = tl.program_id(0).to(tl.int64) // chunks
    begin = row * columns
    column = (tl.program_id(0) % chunks) * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(product + begin + column, mask=column < columns, other=0.0).to(tl.float32)
    floor = tl.load(floors + row * floor_stride).to(tl.float32)
    return begin, column, (value >= floor) & (value > 0.0)


@triton.jit
@no_type_check
def _count(product, floors, floor_stride, columns, chunks, counts, CHUNK: tl.constexpr):
    _, _, kept = _survivors(product, floors, floor_stride, columns, chunks, CHUNK)
    tl.store(counts + tl.program_id(0), tl.sum(kept.to(tl.int32), axis=0))


@triton.jit
@no_type_check
def _write(product, floors, floor_stride, columns, chunks, ends, found, CHUNK: tl.constexpr):
    begin, column, kept = _survivors(product, floors, floor_stride, columns, chunks, CHUNK)
    place = tl.cumsum(kept.to(tl.int32), axis=0)
    end = tl.load(ends + tl.program_id(0))
    tl.store(found + (end - tl.sum(kept.to(tl.int32), axis=0) - 1) + place, begin + column, mask=kept)


def compact(product: Float[Tensor, "a b"], floor: float | Float[Tensor, " a"]) -> Int[Tensor, " survivors"]:
    """Flat positions, ascending, where ``product`` (contiguous) ≥ ``floor`` and > 0; the floor may differ by row.

    Survivors are counted, and written in a second pass behind those counted before them: neither a sort nor a race.
    """
    assert product.is_contiguous()
    rows, columns = product.shape
    if not product.numel():
        return product.new_zeros(0, dtype=torch.int64)
    chunk = min(CHUNK, max(triton.next_power_of_2(columns), 16))
    chunks = triton.cdiv(columns, chunk)
    # Rounded to the product's precision, in which it is compared, and filled on the device: a copy would be waited for.
    floors = floor.contiguous() if isinstance(floor, Tensor) else product.new_full((1,), floor)
    shared = (product, floors, int(isinstance(floor, Tensor)), columns, chunks)
    counts = product.new_empty(rows * chunks, dtype=torch.int32)
    _launch(_count, (len(counts),), *shared, counts, CHUNK=chunk)
    ends = counts.cumsum(0, dtype=torch.int64)
    found = product.new_empty(int(ends[-1]), dtype=torch.int64)
    if len(found):
        _launch(_write, (len(counts),), *shared, ends, found, CHUNK=chunk)
    return found


@triton.jit
@no_type_check
def _dot(
    x, x_row, x_column, rows, w, w_row, w_column, latents, dots, pairs, d,
    SUM: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    there = pair < pairs
    row = tl.load(rows + pair, mask=there, other=0)[:, None] * x_row
    latent = tl.load(latents + pair, mask=there, other=0)[:, None] * w_row
    total = tl.zeros((PAIRS, COLUMNS), dtype=SUM)
    for first in range(0, d, COLUMNS):
        column = (first + tl.arange(0, COLUMNS))[None, :].to(tl.int64)
        inside = there[:, None] & (column < d)
        left = tl.load(x + row + column * x_column, mask=inside, other=0.0)
        right = tl.load(w + latent + column * w_column, mask=inside, other=0.0)
        total += left.to(SUM) * right.to(SUM)
    tl.store(dots + pair, tl.sum(total, axis=1), mask=there)


def dots(
    x: Float[Tensor, "n d"],
    rows: Int[Tensor, " pairs"],
    directions: Float[Tensor, "d_sae d"],
    latents: Int[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """x[row] · directions[latent] for each pair, in ``x``'s precision.

    Pairs come sorted by latent: a direction is read once for all its rows, and a batch's rows fit the device's cache,
    which the directions need not.
    """
    found = x.new_empty(len(rows))
    if len(rows):
        grid = (triton.cdiv(len(rows), PAIRS),)
        _launch(
            _dot, grid, x, *x.stride(), rows.contiguous(), directions, *directions.stride(), latents.contiguous(),
            found, len(rows), x.shape[1], SUM=_sum_dtype(x), PAIRS=PAIRS, COLUMNS=COLUMNS,
        )  # fmt: skip
    return found


@triton.jit
@no_type_check
def _sum_bags(
    matrix, matrix_row, matrix_column, indices, weights, starts, sums, bags, pairs, d,
    SUM: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    begin = tl.load(starts + bag)
    end = tl.load(starts + bag + 1, mask=bag + 1 < bags, other=pairs)
    total = tl.zeros((PAIRS, COLUMNS), dtype=SUM)
    for first in range(begin, end, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        there = pair < end
        index = tl.load(indices + pair, mask=there, other=0)
        weight = tl.load(weights + pair, mask=there, other=0.0)
        at = index[:, None] * matrix_row + column[None, :] * matrix_column
        row = tl.load(matrix + at, mask=there[:, None] & (column < d)[None, :], other=0.0)
        total += weight.to(SUM)[:, None] * row.to(SUM)
    tl.store(sums + bag * d + column, tl.sum(total, axis=0), mask=column < d)


def _weighted_sums(
    matrix: Float[Tensor, "m d"],
    indices: Int[Tensor, " pairs"],
    starts: Int[Tensor, " bags"],
    weights: Float[Tensor, " pairs"],
) -> Float[Tensor, "bags d"]:
    """Σ weight · matrix[index] over each bag of consecutive pairs; bags begin at ``starts``."""
    d = matrix.shape[1]
    sums = matrix.new_empty(len(starts), d)
    if sums.numel():
        # Bags run fastest: the device goes through all of them with the same columns, a part of the matrix that its
        # cache holds where it does not hold the whole.
        grid = (len(starts), triton.cdiv(d, COLUMNS))
        _launch(
            _sum_bags, grid, matrix, *matrix.stride(), indices.contiguous(), weights.contiguous(), starts.contiguous(),
            sums, len(starts), len(indices), d, SUM=_sum_dtype(matrix), PAIRS=PAIRS, COLUMNS=COLUMNS,
        )  # fmt: skip
    return sums


def decode(pairs: Pairs, decoder: Float[Tensor, "d_sae d"]) -> Float[Tensor, "n d"]:
    """See ``ops.decode``."""
    return _weighted_sums(decoder, pairs.latents_by_row, pairs.row_starts, pairs.values[pairs.by_row])


def pair_dots(
    pairs: Pairs, rows: Float[Tensor, "n d"], directions: Float[Tensor, "d_sae d"]
) -> Float[Tensor, " pairs"]:
    """See ``ops.pair_dots``."""
    return dots(rows, pairs.rows, directions, pairs.latents)


def pair_sums(pairs: Pairs, weights: Float[Tensor, " pairs"], rows: Float[Tensor, "n d"]) -> Float[Tensor, "d_sae d"]:
    """See ``ops.pair_sums``."""
    return _weighted_sums(rows, pairs.rows, pairs.latent_starts, weights)


def _sum_dtype(values: Tensor) -> tl.dtype:
    return tl.float64 if values.dtype == torch.float64 else tl.float32
