"""Metrics: limit cases, invariances, and the formulas written out."""

import pytest
import torch
from conftest import random_sae, sparse_data

from saetool.core.metrics import QualitySums, density_histogram


def measure(x: torch.Tensor, x_hat: torch.Tensor, z: torch.Tensor | None = None, batch: int = 64):  # type: ignore[no-untyped-def]
    z = torch.ones(len(x), 3) if z is None else z
    sums = QualitySums(x.shape[1], z.shape[1], x.double().mean(0))
    for a, b, c in zip(x.split(batch), z.split(batch), x_hat.split(batch), strict=True):
        sums.add(a, b, c)
    return sums.result()


def test_the_mean_predictor_scores_zero_and_a_perfect_one_one() -> None:
    x = sparse_data(500)
    mean = measure(x, x.double().mean(0).expand_as(x).clone())
    assert mean.explained_variance == pytest.approx(0, abs=1e-12)
    assert mean.explained_variance_legacy == pytest.approx(0, abs=1e-12)
    assert mean.frac_variance_explained == pytest.approx(0, abs=1e-12)
    perfect = measure(x, x)
    assert (perfect.explained_variance, perfect.fvu, perfect.mse) == (1.0, 0.0, 0.0)
    assert perfect.cossim == pytest.approx(1)
    assert perfect.l2_ratio == pytest.approx(1)


def test_adding_a_constant_to_all_data_changes_no_variance_explained() -> None:
    x = sparse_data(300).double()
    x_hat = x + 0.1 * sparse_data(300, seed=5).double()
    a, b = measure(x, x_hat), measure(x + 100, x_hat + 100)
    for name in ("explained_variance", "explained_variance_legacy", "frac_variance_explained", "mse"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-9), name


def test_batch_size_changes_nothing() -> None:
    sae, x = random_sae(), sparse_data(257)
    z = sae.encode(x)
    a, b = measure(x, sae.decode(z), z, batch=7), measure(x, sae.decode(z), z, batch=257)
    for name in a.__dataclass_fields__:
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-12), name


def test_every_formula_equals_the_one_written_out() -> None:
    sae, x = random_sae(), sparse_data(200)
    z = sae.encode(x)
    x_hat = sae.decode(z)
    q = measure(x, x_hat, z)
    x, x_hat = x.double(), x_hat.double()
    error, centred = x - x_hat, x - x.mean(0)
    assert q.mse == pytest.approx(float(error.square().sum(1).mean()))
    assert q.mse_mean == pytest.approx(float(error.square().mean()))
    assert q.explained_variance == pytest.approx(1 - float(error.square().sum() / centred.square().sum()))
    assert q.fvu == pytest.approx(1 - q.explained_variance)
    legacy = 1 - error.square().sum(1) / centred.square().sum(1)
    assert q.explained_variance_legacy == pytest.approx(float(legacy.mean()))
    expected = 1 - float(error.var(0, unbiased=False).sum() / x.var(0, unbiased=False).sum())
    assert q.frac_variance_explained == pytest.approx(expected)
    assert q.cossim == pytest.approx(float(torch.cosine_similarity(x, x_hat).mean()))
    assert q.l2_ratio == pytest.approx(float((x_hat.norm(dim=1) / x.norm(dim=1)).mean()))
    bias = float(x_hat.square().sum() / (x * x_hat).sum())
    assert q.relative_reconstruction_bias == pytest.approx(bias)
    assert q.l0 == pytest.approx(float((z > 0).sum(1).double().mean()))
    assert q.l1 == pytest.approx(float(z.double().sum(1).mean()))
    assert q.dead == int((z.sum(0) == 0).sum())
    assert q.frac_alive == pytest.approx(1 - q.dead / sae.d_sae)


def test_an_outlier_dimension_cannot_flatter_the_second_explained_variance() -> None:
    x = sparse_data(400, d=64)
    x[:, 5] *= 200
    x_hat = x.mean(0).expand_as(x).clone()
    x_hat[:, 5] = x[:, 5]  # only the outlier is reconstructed
    q = measure(x, x_hat)
    assert q.explained_variance > 0.95
    assert q.explained_variance_no_outliers == pytest.approx(0, abs=1e-6)


def test_the_density_histogram_counts_every_latent_that_fired() -> None:
    fired = torch.tensor([0, 1, 10, 100, 1000, 1000])
    edges, counts = density_histogram(fired, 1000)
    assert sum(counts) == 5
    assert edges[0] == -3.0
    assert edges[-1] == 0.0
    assert counts[-1] == 2
