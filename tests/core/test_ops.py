"""The kernels: each implementation against the definition, on random, skewed and degenerate batches."""

import pytest
import torch

from saetool.core import ops
from saetool.core.ops import reference
from saetool.core.ops.pairs import Found, Pairs, from_dense
from saetool.errors import ConfigError

FAST = ("float32", "screened")


def batch(name: str, n: int = 96, d: int = 24, d_sae: int = 200) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    x, w = torch.randn(n, d, generator=g), torch.randn(d_sae, d, generator=g)
    b = 0.3 * torch.randn(d_sae, generator=g)
    match name:
        case "outlier dimension":  # one dimension with nearly all of the norm: the rounding bound is at its widest
            x[:, 3] += 300
            w[:, 3] *= 0.01
        case "unequal norms":
            x *= torch.logspace(-3, 3, n)[:, None]
            w *= torch.logspace(2, -2, d_sae)[:, None]
        case "near ties":  # latents that differ by less than bfloat16 can tell
            w[100:] = w[:100] * (1 + 1e-4 * torch.randn(100, 1, generator=g))
        case "mostly negative":
            b -= 12
        case "all negative":
            b -= 1000
        case "odd sizes":
            x, w, b = x[:37], w[:131], b[:131]
    return x, w, b


CASES = ("random", "outlier dimension", "unequal norms", "near ties", "mostly negative", "all negative", "odd sizes")


def same(a: Pairs, b: Pairs) -> None:
    """Same values to float32 rounding of the products' terms, same pairs but where that decides."""
    za, zb = a.dense(), b.dense()
    both, largest = (za > 0) & (zb > 0), float(zb.max())
    torch.testing.assert_close(za[both], zb[both], rtol=1e-4, atol=1e-5 * largest)
    assert int(((za > 0) != (zb > 0)).sum()) <= 0.001 * max(len(b.rows), 1)


def in_order(found: Found, p: torch.Tensor) -> Pairs:
    """``found`` in the order of latents."""
    order = torch.argsort(found.latents, stable=True)
    return Pairs(*(column[order] for column in found), *p.shape)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernels", FAST)
@pytest.mark.parametrize("hint", [0.0, 0.5, 2.5, 1e6])
def test_batch_topk_equals_ranking_everything(monkeypatch, name, kernels, hint):
    x, w, b = batch(name)
    expected, cut = reference.batch_topk(x, w, b, len(x) * 5)
    monkeypatch.setenv("SAETOOL_KERNELS", kernels)
    pairs, found = ops.batch_topk(x, w, b, len(x) * 5, hint)
    assert found == pytest.approx(cut, rel=1e-4, abs=1e-5)
    same(pairs, expected)
    assert len(pairs.rows) == len(expected.rows)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernels", FAST)
@pytest.mark.parametrize("k", [1, 5, 100])
def test_topk_equals_ranking_each_row(monkeypatch, name, kernels, k):
    x, w, b = batch(name)
    expected = reference.topk(x, w, b, k)
    monkeypatch.setenv("SAETOOL_KERNELS", kernels)
    pairs = ops.topk(x, w, b, k)
    same(pairs, expected)
    assert torch.bincount(pairs.rows, minlength=len(x)).equal(torch.bincount(expected.rows, minlength=len(x)))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernels", FAST)
def test_values_above_their_floors_are_those_of_the_dense_product(monkeypatch, name, kernels):
    x, w, b = batch(name)
    p = torch.addmm(b, x, w.T)
    floors = p.quantile(0.9, dim=0) - 0.1
    expected = reference.above(x, w, b, floors)
    monkeypatch.setenv("SAETOOL_KERNELS", kernels)
    for block in (2**23, 4 * 7 * len(x)):
        monkeypatch.setattr(ops.blocked, "BLOCK", block)
        find = ops.above(w, b, floors)
        find(x[: len(x) // 2])  # its memory serves again
        found = find(x)
        assert (found.rows * len(w) + found.latents).diff().gt(0).all()  # in order
        same(in_order(found, p), in_order(expected, p))


@pytest.mark.parametrize("kernels", FAST)
def test_many_blocks_equal_one(monkeypatch, kernels):
    x, w, b = batch("random")
    monkeypatch.setenv("SAETOOL_KERNELS", kernels)
    whole, cut = ops.batch_topk(x, w, b, 300), ops.topk(x, w, b, 4)
    monkeypatch.setattr(ops.blocked, "BLOCK", 7 * len(x))
    pieces = ops.batch_topk(x, w, b, 300), ops.topk(x, w, b, 4)
    same(whole[0], pieces[0][0])
    same(cut, pieces[1])


@pytest.mark.parametrize("kernels", FAST)
def test_selection_among_processes_is_that_of_the_joint_batch(monkeypatch, kernels):
    """Two halves, each with the other's values joined in, keep what the whole batch keeps."""
    x, w, b = batch("unequal norms")
    monkeypatch.setenv("SAETOOL_KERNELS", kernels)
    whole, cut = ops.batch_topk(x, w, b, 400, 0.1)
    values: dict[int, torch.Tensor] = {}
    halves = (x[:40], x[40:])
    for i, half in enumerate(halves):
        values[i] = ops.blocked._above(half, w, b, 0.1, 400, kernels).values
    for i, half in enumerate(halves):
        pairs, found = ops.batch_topk(half, w, b, 400, 0.1, lambda mine, i=i: torch.cat([mine, values[1 - i]]))
        assert found == pytest.approx(cut, rel=1e-5)
        rows = (whole.rows < 40) if i == 0 else (whole.rows >= 40)
        assert len(pairs.rows) == int(rows.sum())


def test_screening_bound_holds_for_every_pair():
    """The lengthened bfloat16 product is nowhere below the float64 one, nor far above it."""
    for name in CASES:
        x, w, b = batch(name)
        exact = x.double() @ w.double().T + b.double()
        left = ops.blocked._lengthen_rows(x)
        right = ops.blocked._lengthen_latents(w, b, left.new_empty(len(w), left.shape[1]))
        bound = (left @ right.T).double()
        assert bool((bound >= exact.bfloat16().double()).all()), name
        scale = x.norm(dim=1)[:, None] * w.norm(dim=1) + b.abs()
        assert bool((bound - exact <= 0.03 * scale).all()), name


def test_pairwise_products_equal_the_dense_ones():
    g = torch.Generator().manual_seed(3)
    z = torch.randn(50, 70, generator=g).relu() * (torch.rand(50, 70, generator=g) < 0.1)
    z[7] = 0  # a row and a latent without pairs
    z[:, 9] = 0
    pairs = from_dense(z)
    w, rows, weights = torch.randn(70, 12), torch.randn(50, 12), torch.randn(len(pairs.rows))
    assert pairs.dense().equal(z)
    for fast, slow in (
        (ops.decode(pairs, w), z @ w),
        (ops.pair_dots(pairs, rows, w), (rows @ w.T)[pairs.rows, pairs.latents]),
        (ops.pair_sums(pairs, weights, rows), reference.pair_sums(pairs, weights, rows)),
        (ops.pair_sums(pairs, pairs.values, rows), z.T @ rows),
    ):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reference.decode(pairs, w), z @ w)
    torch.testing.assert_close(reference.pair_dots(pairs, rows, w), (rows @ w.T)[pairs.rows, pairs.latents])


@pytest.mark.parametrize("n_rows", [2**15, 2**15 + 1, 2**17])
def test_pairs_by_row(n_rows):
    rows = torch.tensor([n_rows - 1, 3, n_rows - 1, 0, 3])
    pairs = Pairs(rows, torch.arange(5), torch.ones(5), n_rows, 5)
    assert pairs.by_row.tolist() == [3, 1, 4, 0, 2]
    assert pairs.latents_by_row.tolist() == [3, 1, 4, 0, 2]
    assert pairs.row_starts[[0, 1, 3, 4, n_rows - 1]].tolist() == [0, 1, 1, 3, 3]


def test_no_pairs_at_all():
    pairs = from_dense(torch.zeros(4, 6))
    assert ops.decode(pairs, torch.ones(6, 3)).equal(torch.zeros(4, 3))
    assert ops.pair_sums(pairs, pairs.values, torch.ones(4, 3)).equal(torch.zeros(6, 3))
    assert len(ops.pair_dots(pairs, torch.ones(4, 3), torch.ones(6, 3))) == 0


def test_unknown_kernels_are_named(monkeypatch):
    monkeypatch.setenv("SAETOOL_KERNELS", "cuda")
    with pytest.raises(ConfigError, match="SAETOOL_KERNELS=cuda"):
        ops.topk(*batch("random"), 2)
