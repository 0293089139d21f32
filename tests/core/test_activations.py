"""Activation functions against their definitions."""

import itertools

import pytest
import torch
from conftest import generator
from hypothesis import given
from hypothesis import strategies as st

from saetool.core import activations


def flat_topk(p: torch.Tensor, k: int) -> torch.Tensor:
    """BatchTopK as its paper writes it: rank everything."""
    flat = p.relu().flatten()
    values, indices = flat.topk(min(len(p) * k, flat.numel()))
    return torch.zeros_like(flat).scatter(0, indices, values).reshape(p.shape)


@given(st.integers(1, 20), st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000), st.floats(0, 3))
def test_batch_topk_equals_the_flat_top_k_whatever_the_hint(n: int, width: int, k: int, seed: int, hint: float) -> None:
    p = torch.randn(n, width, generator=generator(seed))
    k = min(k, width)
    assert torch.equal(activations.batch_topk(p, k, hint), flat_topk(p, k))


def test_batch_topk_keeps_all_positives_where_they_are_fewer_than_n_k() -> None:
    p = torch.tensor([[1.0, -1.0, -2.0], [-1.0, -3.0, 0.0]])
    assert torch.equal(activations.batch_topk(p, 2), torch.tensor([[1.0, 0, 0], [0, 0, 0]]))


def test_batch_topk_counts_n_k_over_the_batch_not_per_row() -> None:
    z = activations.batch_topk(torch.tensor([[3.0, 2.0, 2.5], [1.0, 0.5, 0.1]]), 1)
    assert (z > 0).sum(1).tolist() == [2, 0]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_topk_keeps_the_k_largest_positive_values_of_each_row(width: int, k: int, seed: int) -> None:
    p = torch.randn(7, width, generator=generator(seed))
    k = min(k, width)
    expected = torch.stack([flat_topk(row[None], k)[0] for row in p])
    assert torch.equal(activations.topk(p, k), expected)


def test_jumprelu_is_strict() -> None:
    p, theta = torch.tensor([[0.5, 0.6, -1.0]]), torch.tensor([0.5, 0.5, -2.0])
    assert activations.jumprelu(p, theta).tolist() == [[0.0, pytest.approx(0.6), 0.0]]


def test_straight_through_gradients_are_the_papers_rectangle_kernel() -> None:
    p = torch.tensor([[1.02, 0.5, 3.0], [0.97, 1.5, -1.0]], dtype=torch.float64, requires_grad=True)
    theta = torch.tensor([1.0, 0.52, 2.0], dtype=torch.float64, requires_grad=True)
    eps = 0.1
    z = activations.jumprelu_ste(p, theta, eps)
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    (z * weight).sum().backward()
    near = ((p - theta).abs() < eps / 2) & (p > 0)
    assert torch.allclose(theta.grad, -(theta / eps) * (near * weight).sum(0))
    assert torch.equal(p.grad, weight * (p > theta))
    theta.grad = None
    activations.step_ste(p, theta, eps).sum().backward()
    assert torch.allclose(theta.grad, -near.sum(0).double() / eps)


def test_groupmax_keeps_the_largest_of_each_group() -> None:
    p = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    z = activations.groupmax(p, 3)
    for row, out in zip(p.tolist(), z.tolist(), strict=True):
        for group in range(3):
            part, kept = row[4 * group : 4 * group + 4], out[4 * group : 4 * group + 4]
            best = max(range(4), key=part.__getitem__)
            assert kept == pytest.approx([max(v, 0) if i == best else 0 for i, v in enumerate(part)])


def test_matching_pursuit_finds_orthogonal_parts_exactly_and_stops() -> None:
    rows = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1))).Q
    wanted = torch.zeros(3, 8)
    wanted[0, [1, 4]] = torch.tensor([2.0, 0.5])
    wanted[1, 7] = 1.0
    pursuit = activations.Pursuit(max_iterations=8, residual_threshold=1e-3, stop_on_duplicate_support=True)
    assert torch.allclose(activations.matching_pursuit(wanted @ rows, rows, pursuit), wanted, atol=1e-5)
    once = activations.Pursuit(max_iterations=1, residual_threshold=0.0, stop_on_duplicate_support=False)
    first = activations.matching_pursuit(wanted @ rows, rows, once)
    assert (first != 0).sum(1).tolist() == [1, 1, 0] and first[0, 1] == pytest.approx(2.0, abs=1e-5)


def test_matching_pursuit_never_fits_worse_with_another_step() -> None:
    g = torch.Generator().manual_seed(2)
    rows = torch.nn.functional.normalize(torch.randn(30, 8, generator=g), dim=1)
    x = torch.randn(16, 8, generator=g)
    errors = []
    for steps in range(1, 7):
        z = activations.matching_pursuit(x, rows, activations.Pursuit(steps, 0.0, False))
        assert (z >= 0).all()
        errors.append((x - z @ rows).square().sum(1))
    assert all((later <= earlier + 1e-6).all() for earlier, later in itertools.pairwise(errors))
