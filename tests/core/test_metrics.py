"""Metrics: limit cases, invariances, and the formulas written out."""

import math

import pytest
import torch
from conftest import random_sae, sparse_data

from saetool.core import sparse
from saetool.core.bootstrap import intervals, replicates
from saetool.core.metrics import (
    COLUMNS,
    Quality,
    QualitySums,
    decoder_cosine,
    density_histogram,
    frac_variance_explained,
    ratios,
    recovery_bound,
)
from saetool.core.sae import SAE, unit_rows
from saetool.core.statistics import moments, row_sums


def sums_of(
    x: torch.Tensor,
    x_hat: torch.Tensor,
    z: torch.Tensor | None = None,
    batch: int = 64,
    documents: torch.Tensor | None = None,
) -> QualitySums:
    z = torch.ones(len(x), 3) if z is None else z
    documents = torch.zeros(len(x), dtype=torch.int64) if documents is None else documents
    found = moments(row_sums(x), len(x))
    sums = QualitySums(z.shape[1], found, {"document": int(documents.max()) + 1})
    for a, b, c, d in zip(x.split(batch), z.split(batch), x_hat.split(batch), documents.split(batch), strict=True):
        sums.add(a, sparse.of_dense(b), c, {"document": d})
    return sums


def measure(x: torch.Tensor, x_hat: torch.Tensor, z: torch.Tensor | None = None, batch: int = 64) -> Quality:
    return sums_of(x, x_hat, z, batch).result()


def test_the_mean_predictor_scores_zero_and_a_perfect_one_one() -> None:
    x = sparse_data(500)
    for mean in (x.double().mean(0), x.double().mean(0).float()):
        scores = measure(x, mean.expand_as(x).clone())
        assert scores.explained_variance == 0
        assert scores.explained_variance_legacy == 0
        assert scores.frac_variance_explained == pytest.approx(0, abs=1e-12)
    perfect = measure(x, x)
    assert (perfect.explained_variance, perfect.fvu, perfect.mse) == (1.0, 0.0, 0.0)
    assert perfect.explained_variance_legacy == 1.0
    assert perfect.cossim == pytest.approx(1)
    assert perfect.l2_ratio == pytest.approx(1)
    assert perfect.relative_reconstruction_bias == pytest.approx(1)


def test_adding_a_constant_to_all_data_changes_no_variance_explained() -> None:
    x = sparse_data(300).double()
    x_hat = x + 0.1 * sparse_data(300, seed=5).double()
    for target in (x, x.mean(0).expand_as(x), x_hat):
        a, b = measure(x, target), measure(x + 100, target + 100)
        for name in ("explained_variance", "explained_variance_legacy", "frac_variance_explained", "mse"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-9), name


def test_a_large_common_mean_does_not_swallow_the_variance() -> None:
    x = sparse_data(300).double() + 1e5  # in float32 sums of squares the variance would be lost
    assert measure(x, x.mean(0).expand_as(x)).explained_variance == pytest.approx(0, abs=1e-9)


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
    assert q.l2_norm_in == pytest.approx(float(x.norm(dim=1).mean()))
    assert q.l2_norm_out == pytest.approx(float(x_hat.norm(dim=1).mean()))
    assert q.l2_ratio == pytest.approx(float((x_hat.norm(dim=1) / x.norm(dim=1)).mean()))
    bias = float(x_hat.square().sum() / (x * x_hat).sum())
    assert q.relative_reconstruction_bias == pytest.approx(bias)
    assert q.l0 == pytest.approx(float((z > 0).sum(1).double().mean()))
    assert q.l1 == pytest.approx(float(z.double().sum(1).mean()))
    assert q.dead == int((z.sum(0) == 0).sum())
    assert q.frac_alive == pytest.approx(1 - q.dead / sae.d_sae)


def test_no_variance_gives_undefined_numbers_not_infinite_ones() -> None:
    x = torch.full((10, 4), 0.5)
    q = measure(x, x + 1)
    assert math.isnan(q.explained_variance)
    assert math.isnan(q.fvu)
    assert q.mse == pytest.approx(4)


def test_an_outlier_dimension_cannot_flatter_the_second_explained_variance() -> None:
    x = sparse_data(400, d=64)
    x[:, 5] *= 200
    x_hat = x.mean(0).expand_as(x).clone()
    x_hat[:, 5] = x[:, 5]  # only the outlier is reconstructed
    q = measure(x, x_hat)
    assert q.explained_variance > 0.95
    assert q.explained_variance_no_outliers == pytest.approx(0, abs=1e-6)


def test_groups_are_the_metrics_of_their_own_tokens_about_the_common_mean() -> None:
    sae, x = random_sae(), sparse_data(200)
    z = sae.encode(x)
    documents = torch.arange(200) % 7
    sums = sums_of(x, sae.decode(z), z, documents=documents)
    found = ratios(sums.by["document"], x.shape[1])
    for document in range(7):
        mine = documents == document
        error = (x - sae.decode(z)).double()[mine].square().sum()
        centred = (x.double() - x.double().mean(0))[mine].square().sum()
        assert float(found.explained_variance[document]) == pytest.approx(float(1 - error / centred), rel=1e-6)
        assert float(found.l0[document]) == pytest.approx(float((z[mine] > 0).sum(1).double().mean()))
    assert torch.allclose(sums.by["document"].sum(0), sums.totals)


def test_the_density_histogram_counts_every_latent_that_fired() -> None:
    fired = torch.tensor([0, 1, 10, 100, 1000, 1000])
    edges, counts = density_histogram(fired, 1000)
    assert sum(counts) == 5
    assert edges[0] == -3.0
    assert edges[-1] == 0.0
    assert counts[-1] == 2


# --- the dictionary --------------------------------------------------------------------------------------------------


def with_rows(rows: torch.Tensor) -> SAE:
    n, d = rows.shape
    return SAE(rows.T.contiguous(), torch.zeros(n), rows, torch.zeros(d), None, "relu", None)


def test_c_dec_is_the_mean_absolute_cosine_of_all_pairs() -> None:
    rows = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)) * 3
    cosines = unit_rows(rows) @ unit_rows(rows).T
    pairs = torch.triu_indices(40, 40, offset=1)
    found = decoder_cosine(with_rows(rows), chunk=7)
    assert found.c_dec == pytest.approx(float(cosines[pairs[0], pairs[1]].abs().mean()), rel=1e-5)
    assert found.rows == 40


def test_c_dec_of_orthogonal_rows_is_0_of_copies_1_and_zero_rows_do_not_count() -> None:
    assert decoder_cosine(with_rows(torch.eye(8))).c_dec == 0
    copies = torch.cat([torch.ones(3, 8), -torch.ones(3, 8), torch.zeros(5, 8)])
    assert decoder_cosine(with_rows(copies)).c_dec == pytest.approx(1)
    assert math.isnan(decoder_cosine(with_rows(torch.zeros(4, 8))).c_dec)


def test_c_dec_of_a_large_dictionary_is_close_from_part_of_its_rows() -> None:
    rows = torch.randn(1500, 16, generator=torch.Generator().manual_seed(0))
    every, part = decoder_cosine(with_rows(rows)), decoder_cosine(with_rows(rows), most_rows=300)
    assert (every.rows, part.rows) == (1500, 300)
    assert part.c_dec == pytest.approx(every.c_dec, rel=0.02)


def test_the_recovery_bound_of_the_papers_saes() -> None:
    large, meta = recovery_bound(768, 43.0, 49152), recovery_bound(768, 4.0, 2304)
    assert (round(large.bound), round(meta.bound)) == (303, 25)
    assert large.ratio == pytest.approx(768 / 302.7, rel=1e-3)
    assert math.isnan(recovery_bound(768, 0.0, 100).bound)
    assert math.isnan(recovery_bound(768, 100.0, 100).ratio), "no sparse code, no bound"


# --- intervals -------------------------------------------------------------------------------------------------------


def test_intervals_equal_a_plain_bootstrap_over_documents() -> None:
    sae, x = random_sae(), sparse_data(600)
    z = sae.encode(x)
    documents = torch.arange(600) // 20
    sums = sums_of(x, sae.decode(z), z, documents=documents).by["document"]
    found = intervals(sums, lambda s: ratios(s, 16)._asdict(), torch.Generator().manual_seed(3), n=50)
    generator = torch.Generator().manual_seed(3)
    by_hand = []
    for drawn in torch.randint(30, (50, 30), generator=generator):
        rows = torch.cat([(documents == d).nonzero().squeeze(1) for d in drawn])
        error = (x - sae.decode(z)).double()[rows].square().sum()
        by_hand.append(float(1 - error / (x.double() - x.double().mean(0))[rows].square().sum()))
    low, high = torch.quantile(torch.tensor(by_hand, dtype=torch.float64), torch.tensor([0.025, 0.975]).double())
    assert found["explained_variance"] == pytest.approx((float(low), float(high)), rel=1e-6)


def test_residuals_by_document_give_frac_variance_explained_of_any_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = random_sae(), sparse_data(600)
    x_hat, documents = sae.decode(sae.encode(x)).double(), torch.arange(600) // 20
    sums = sums_of(x, x_hat, documents=documents)
    picked = torch.tensor([3, 3, 7, 20])
    rows = torch.cat([(documents == d).nonzero().squeeze(1) for d in picked])
    error, centred = (x.double() - x_hat)[rows], (x.double() - x.double().mean(0))[rows]
    expected = 1 - (error - error.mean(0)).square().sum() / centred.square().sum()
    found = frac_variance_explained(sums.by["document"][picked].sum(0), sums.residuals[picked].sum(0))
    assert float(found) == pytest.approx(float(expected), rel=1e-9)
    monkeypatch.setattr("saetool.core.metrics.RESIDUALS", 100)
    bounded = sums_of(x, x_hat, documents=documents)
    assert len(bounded.residuals) == 1 and bounded.result() == sums.result()


def test_keeping_the_mean_of_all_documents_hardly_changes_an_interval() -> None:
    sae, x = random_sae(), sparse_data(3000)
    z = sae.encode(x)
    documents = torch.arange(3000) // 30
    sums = sums_of(x, sae.decode(z), z, documents=documents).by["document"]
    low, high = intervals(sums, lambda s: ratios(s, 16)._asdict(), torch.Generator().manual_seed(0))["mse"]
    drawn = torch.randint(100, (300, 100), generator=torch.Generator().manual_seed(0))
    exact, fixed = [], []
    for documents_drawn in drawn:
        rows = (documents_drawn[:, None] * 30 + torch.arange(30)).flatten()
        error = (x - sae.decode(z)).double()[rows].square().sum()
        exact.append(1 - error / (x.double()[rows] - x.double()[rows].mean(0)).square().sum())
        fixed.append(1 - error / (x.double()[rows] - x.double().mean(0)).square().sum())
    spread = torch.stack(exact).std()
    assert float((torch.stack(exact) - torch.stack(fixed)).abs().max()) < 0.3 * float(spread)
    assert low < float(sums[:, COLUMNS.index("error")].sum() / 3000) < high


def test_a_95_percent_interval_holds_the_truth_about_95_times_in_100() -> None:
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(200):
        values = torch.randn(60, 1, generator=generator, dtype=torch.float64).exp()
        sums = torch.cat([torch.ones(60, 1, dtype=torch.float64), values], dim=1)
        found = intervals(sums, lambda s: {"mean": s[:, 1] / s[:, 0]}, generator, n=400)["mean"]
        held += found.low < math.exp(0.5) < found.high
    assert 172 <= held <= 199  # a skewed distribution: somewhat under 190 is usual


def test_documents_that_are_alike_inside_give_a_wider_interval_than_tokens_would() -> None:
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(50, 1, generator=generator, dtype=torch.float64).repeat_interleave(100, 0)
    tokens = level + 0.1 * torch.randn(5000, 1, generator=generator, dtype=torch.float64)
    ones = torch.ones(5000, 1, dtype=torch.float64)
    table = torch.cat([ones, tokens], dim=1)
    by_document = table.view(50, 100, 2).sum(1)

    def width(sums: torch.Tensor) -> float:
        found = intervals(sums, lambda s: {"mean": s[:, 1] / s[:, 0]}, torch.Generator().manual_seed(1), n=300)
        return found["mean"].high - found["mean"].low

    assert width(by_document) > 5 * width(table)


def test_one_document_has_no_interval() -> None:
    assert intervals(torch.ones(1, 2), lambda s: {"a": s[:, 0]}, torch.Generator()) == {}


def test_replicates_draw_as_many_documents_as_there_are() -> None:
    drawn = replicates(torch.ones(37, 1), torch.Generator().manual_seed(0), n=20)
    assert torch.equal(drawn, torch.full((20, 1), 37.0, dtype=torch.float64))
