"""The Triton kernels against their definitions: on a CUDA device, and without one in Triton's interpreter on the CPU.

The interpreter is chosen when Triton is first imported, so a process of its own runs this file again with it.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ops import CASES, batch, same

from saetool.core import ops
from saetool.core.ops import blocked, reference
from saetool.core.ops.pairs import Pairs, from_dense
from saetool.errors import ConfigError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="about the choice of kernels without the interpreter")


@pytest.fixture
def kernels():
    """The module of kernels, where something can run them."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if DEVICE.type != "cuda" and not INTERPRETED:
        pytest.skip("no CUDA device; test_all_of_it_in_the_interpreter runs this on the CPU")
    from saetool.core.ops import triton

    return triton


@needs_triton
@not_interpreted
def test_all_of_it_in_the_interpreter():
    """Every test of this file that takes ``kernels``, on the CPU."""
    import numpy
    import triton

    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if release < (3, 7) and tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4):
        pytest.skip(f"the interpreter of Triton {triton.__version__} fails with numpy {numpy.__version__}")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 20, run.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (11, 131), (4, 5000), (1, 1), (0, 4), (4, 0)])
def test_compact_finds_what_nonzero_finds(kernels, dtype, shape):
    g = torch.Generator().manual_seed(1)
    product = torch.randn(shape, generator=g).to(DEVICE, dtype)
    floors = torch.randn(shape[0], generator=g).to(DEVICE, dtype)
    for floor in (-1.0, 0.0, 0.7, 2.0, 99.0, floors):
        least = floor[:, None] if isinstance(floor, torch.Tensor) else floor
        expected = ((product >= least) & (product > 0)).view(-1).nonzero().squeeze(1)
        assert kernels.compact(product, floor).equal(expected)


def test_compact_at_the_edges_of_numbers(kernels):
    inf, nan = float("inf"), float("nan")
    product = torch.tensor([[nan, inf, -inf, 0.0, -0.0, 1e-38, 1.0]], device=DEVICE)
    assert kernels.compact(product, 0.0).tolist() == [1, 5, 6]
    assert kernels.compact(product, 1.0).tolist() == [1, 6]
    # 1 + 2⁻⁹ is 1 in bfloat16: what ties with the rounded floor stays, as the screening bound needs it
    assert kernels.compact(product.bfloat16(), 1 + 2.0**-9).tolist() == [1, 6]


ROWS, LATENTS = 18, 20


def sparse() -> tuple[torch.Tensor, Pairs]:
    g = torch.Generator().manual_seed(3)
    z = torch.randn(ROWS, LATENTS, generator=g).relu() * (torch.rand(ROWS, LATENTS, generator=g) < 0.15)
    z[11] = 1.5  # a row and a latent with nearly all pairs: more than a program has in hand
    z[:, 13] = 0.5
    z[7] = 0  # a row and a latent without any
    z[:, 9] = 0
    return z.to(DEVICE), from_dense(z.to(DEVICE))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


@pytest.mark.parametrize("d", [1, 12, 576, 768])
def test_products_equal_the_definitions(kernels, d):
    _, pairs = sparse()
    w, rows, weights = normal(LATENTS, d), normal(ROWS, d), normal(len(pairs.rows))
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(kernels.decode(pairs, w), reference.decode(pairs, w), **close)
    torch.testing.assert_close(kernels.pair_dots(pairs, rows, w), reference.pair_dots(pairs, rows, w), **close)
    sums = kernels.pair_sums(pairs, weights, rows)
    torch.testing.assert_close(sums, reference.pair_sums(pairs, weights, rows), **close)
    assert sums[9].equal(torch.zeros_like(sums[9]))
    assert sums.equal(kernels.pair_sums(pairs, weights, rows))  # the same bits each time


def test_products_of_transposed_matrices(kernels):
    _, pairs = sparse()
    w, rows, weights = normal(24, LATENTS).T, normal(24, ROWS).T, normal(len(pairs.rows))
    torch.testing.assert_close(kernels.decode(pairs, w), reference.decode(pairs, w))
    torch.testing.assert_close(kernels.pair_dots(pairs, rows, w), reference.pair_dots(pairs, rows, w))
    torch.testing.assert_close(kernels.pair_sums(pairs, weights, rows), reference.pair_sums(pairs, weights, rows))


def test_sums_are_not_in_the_precision_of_bfloat16_values(kernels):
    """4096 ones and a weight each: bfloat16 sums would stop at 256."""
    z = torch.ones(4096, 1, device=DEVICE)
    ones = torch.ones(4096, 3, dtype=torch.bfloat16, device=DEVICE)
    pairs = from_dense(z)
    assert kernels.pair_sums(pairs, pairs.values, ones).tolist() == [[4096.0] * 3]
    assert kernels.dots(ones.T, pairs.rows[:1], ones.T, pairs.rows[:1]).tolist() == [4096.0]


def test_float64_stays_float64(kernels):
    z, _ = sparse()
    pairs = from_dense(z.double())
    w, rows = normal(LATENTS, 5).double(), normal(ROWS, 5).double()
    for fast, slow in (
        (kernels.decode(pairs, w), z.double() @ w),
        (kernels.pair_sums(pairs, pairs.values, rows), z.double().T @ rows),
        (kernels.pair_dots(pairs, rows, w), (rows @ w.T)[pairs.rows, pairs.latents]),
    ):
        torch.testing.assert_close(fast, slow, rtol=1e-13, atol=1e-13)


def test_no_pairs_at_all(kernels):
    pairs = from_dense(torch.zeros(4, 6, device=DEVICE))
    w, rows = normal(6, 3), normal(4, 3)
    assert kernels.decode(pairs, w).equal(torch.zeros_like(rows))
    assert kernels.pair_sums(pairs, pairs.values, rows).equal(torch.zeros_like(w))
    assert len(kernels.pair_dots(pairs, rows, w)) == 0


def free_gib(wanted: int) -> None:
    if torch.cuda.mem_get_info()[0] < wanted * 2**30:
        pytest.skip(f"less than {wanted} GiB free on the device")


@needs_cuda
def test_rows_beyond_the_reach_of_32_bits(kernels):
    """The last row of a matrix of more than 2³¹ values."""
    free_gib(6)
    d, row = 512, 2**22
    matrix = torch.zeros(row + 1, d, dtype=torch.bfloat16, device=DEVICE)
    matrix[row] = 2
    index = torch.tensor([row], device=DEVICE)
    assert kernels.dots(matrix, index, matrix, index).tolist() == [4.0 * d]
    pairs = Pairs(index, torch.zeros_like(index), torch.ones(1, device=DEVICE), row + 1, 1)
    assert kernels.pair_sums(pairs, pairs.values, matrix).equal(matrix[row:])


@needs_cuda
def test_positions_beyond_the_reach_of_32_bits(kernels):
    free_gib(6)
    product = torch.zeros(2**16 + 1, 2**15, dtype=torch.bfloat16, device=DEVICE)
    product[-1, -1] = product[3, 4] = 1
    assert kernels.compact(product, 0.5).tolist() == [3 * 2**15 + 4, product.numel() - 1]


@pytest.mark.parametrize("name", CASES)
def test_selection_by_these_kernels(kernels, monkeypatch, name):
    x, w, b = (t.to(DEVICE) for t in batch(name))
    x, w, b = x[::3], w[::5], b[::5]  # the interpreter takes milliseconds for each row of a program
    expected, cut = reference.batch_topk(x, w, b, len(x) * 5)
    by_row = reference.topk(x, w, b, 3)
    monkeypatch.setenv("SAETOOL_KERNELS", "triton")
    pairs, found = ops.batch_topk(x, w, b, len(x) * 5, 0.5)
    assert found == pytest.approx(cut, rel=1e-4, abs=1e-5)
    same(pairs, expected)
    same(ops.topk(x, w, b, 3), by_row)


def test_products_by_these_kernels(kernels, monkeypatch):
    _, pairs = sparse()
    w, rows = normal(LATENTS, 8), normal(ROWS, 8)
    used = []
    for name in ("decode", "pair_dots", "pair_sums"):
        original = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, name=name, original=original: (used.append(name), original(*a))[1]
        )
    monkeypatch.setenv("SAETOOL_KERNELS", "triton")
    torch.testing.assert_close(ops.decode(pairs, w), reference.decode(pairs, w))
    torch.testing.assert_close(ops.pair_dots(pairs, rows, w), reference.pair_dots(pairs, rows, w))
    torch.testing.assert_close(ops.pair_sums(pairs, pairs.values, rows), reference.pair_sums(pairs, pairs.values, rows))
    assert used == ["decode", "pair_dots", "pair_sums"]


@needs_cuda
@pytest.mark.parametrize("d", [576, 768, 2304])
def test_screening_bound_holds_for_cuda_products(d):
    """The device's matrix units sum otherwise than a CPU: nowhere may the lengthened product be below the true one."""
    g = torch.Generator().manual_seed(d)
    x, w, b = torch.randn(1024, d, generator=g), torch.randn(4096, d, generator=g), torch.randn(4096, generator=g)
    x[:, 3] += 300
    w[:, 3] *= 0.01
    x, w, b = x.to(DEVICE), w.to(DEVICE), b.to(DEVICE)
    with blocked._float32_sums():
        bound = blocked._lengthen_rows(x) @ blocked._lengthen_latents(w, b).T
    exact = x.double() @ w.double().T + b.double()
    assert bool((bound.double() >= exact.bfloat16().double()).all())


@needs_triton
@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_devices_that_are_not_here(capability, monkeypatch, tmp_path):
    """The interpreter runs what the compiler would refuse; the compiler needs no device."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from saetool.core.ops import triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 3):
        pytest.skip(f"Triton {triton.__version__} describes a kernel's source otherwise")
    whole = {"floor_stride", "columns", "chunks", "pairs", "bags", "d", "x_row", "w_row", "matrix_row"}
    pointers = {"product": "bf16", "floors": "bf16", "counts": "i32"}
    pointers |= dict.fromkeys(("ends", "found", "rows", "latents", "indices", "starts"), "i64")
    sums = {"SUM": tl.float32, "PAIRS": kernels.PAIRS, "COLUMNS": kernels.COLUMNS}
    for kernel, constants in (
        (kernels._count, {"CHUNK": kernels.CHUNK}),
        (kernels._write, {"CHUNK": kernels.CHUNK}),
        (kernels._dot, {"x_column": 1, "w_column": 1, **sums}),
        (kernels._sum_bags, {"matrix_column": 1, **sums}),
    ):
        signature = {
            name: "constexpr" if name in constants else "i32" if name in whole else f"*{pointers.get(name, 'fp32')}"
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): value for n, value in constants.items()})
        options = {"enable_fp_fusion": True}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert compiled.asm["cubin"]


@not_interpreted
def test_triton_is_never_chosen_for_a_cpu_and_says_why_not(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("SAETOOL_KERNELS", raising=False)
    monkeypatch.setattr(ops, "_has_triton", lambda: True)
    assert ops.kernels(cpu) in ("screened", "float32")
    monkeypatch.setenv("SAETOOL_KERNELS", "triton")
    with pytest.raises(ConfigError, match="not on cpu"):
        ops.kernels(cpu)
    monkeypatch.setattr(ops, "_has_triton", lambda: False)
    with pytest.raises(ConfigError, match="not installed"):
        ops.kernels(cpu)


@pytest.mark.parametrize(
    ("capability", "has_triton", "chosen"),
    [((9, 0), True, "triton"), ((8, 0), False, "screened"), ((7, 5), True, "float32")],
)
def test_choice_on_a_cuda_device(monkeypatch, capability, has_triton, chosen):
    monkeypatch.delenv("SAETOOL_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(ops, "_has_triton", lambda: has_triton)
    assert ops.kernels(torch.device("cuda")) == chosen


@pytest.mark.parametrize("allowed", [True, False])
def test_bfloat16_sums_are_float32_in_a_selection_and_as_before_after(monkeypatch, allowed):
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    seen = []

    def look(x):
        seen.append(matmul.allow_bf16_reduced_precision_reduction)
        raise ZeroDivisionError

    monkeypatch.setattr(blocked, "_lengthen_rows", look)
    try:
        matmul.allow_bf16_reduced_precision_reduction = allowed
        x, w, b = batch("random")
        for select in (blocked.batch_topk, blocked.topk):
            with pytest.raises(ZeroDivisionError):
                select(x, w, b, 3, kernels="screened")
            assert matmul.allow_bf16_reduced_precision_reduction is allowed
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
    assert seen == [False, False]
