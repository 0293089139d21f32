"""Activation functions against their definitions."""

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
