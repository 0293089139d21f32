"""Sums, moments and the geometric median of activations."""

import math

import numpy as np
import pytest
import torch

from saetool.core.statistics import geometric_median, moments, quantile, row_sums


def rows(n: int, d: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 3 + torch.arange(d)


def test_moments_are_those_of_the_rows_however_they_are_cut() -> None:
    x = rows(1000)
    for size in (1, 64, 999):
        parts = [row_sums(part) for part in x.split(size)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        found, exact = moments(total, len(x)), x.double()
        torch.testing.assert_close(found.mean, exact.mean(0))
        torch.testing.assert_close(found.variance, exact.var(0, correction=0))
        assert abs(found.mean_sq_norm / float(exact.square().sum(1).mean()) - 1) < 1e-12
        assert found.largest_norm == float(exact.norm(dim=1).max())
    torch.testing.assert_close(found.outlier_ratio, exact.mean(0).abs() / exact.std(0, correction=0))


def test_constant_dimensions_have_an_infinite_or_no_outlier_ratio() -> None:
    x = torch.stack([torch.full((8,), 2.0), torch.zeros(8), torch.arange(8.0)], dim=1)
    assert moments(row_sums(x), 8).outlier_ratio[:2].tolist() == [float("inf"), 0.0]


def test_what_is_not_finite_is_seen() -> None:
    x = rows(100)
    assert row_sums(x).finite
    x[57, 3] = float("inf")
    assert not row_sums(x).finite
    assert row_sums(x[:0]).finite


def test_geometric_median_of_a_line_is_its_median_and_far_rows_hardly_move_it() -> None:
    line = torch.tensor([0.0, 1.0, 2.0, 3.0, 1000.0])[:, None] * torch.tensor([[1.0, -2.0]])
    torch.testing.assert_close(geometric_median(line), torch.tensor([2.0, -4.0]).double(), rtol=1e-2, atol=1e-2)
    x = rows(500)
    spoiled = torch.cat([x, torch.full((20, 9), 1e4)])
    moved = (geometric_median(spoiled) - geometric_median(x)).norm()
    assert moved < 1 < (spoiled.mean(0) - x.mean(0)).norm()


def test_geometric_median_has_the_smallest_sum_of_distances() -> None:
    x = rows(300) ** 2
    best = geometric_median(x)

    def total(point: torch.Tensor) -> float:
        return float((x.double() - point).norm(dim=1).sum())

    for direction in torch.eye(9, dtype=torch.float64):
        assert total(best) < min(total(best + 0.1 * direction), total(best - 0.1 * direction))


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_quantiles_are_those_of_numpy(n: int) -> None:
    values = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    for q in (0.0, 0.25, 0.5, 0.99, 1.0):
        assert quantile(values, q) == pytest.approx(np.quantile(values.numpy(), q), rel=1e-12)
    assert math.isnan(quantile(values[:0], 0.5))
