"""Figures measured on activations, against equation 5 rebuilt from scratch, on random SAEs of many kinds."""

from dataclasses import replace

import pytest
import torch
from conftest import generator, sparse_data
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stitch import KINDS, pair, reconstruction, run
from torch import Tensor

from saetool.core import sparse
from saetool.core.effects import N_POINTS, group_rank
from saetool.core.matching import match
from saetool.core.prediction import predict, roc
from saetool.core.sae import SAE, unit_rows
from saetool.core.stitch import BIASES, ORDERS, included_at, stitched

N = 120


def x_hat(sae: SAE, x: Tensor, latents: Tensor | None = None) -> Tensor:
    z = sae.encode(x).double()
    z = z if latents is None else z * latents
    return z @ sae.W_dec.double() + sae.b_dec.double()


def drawn(seed: int, kind: str) -> tuple[SAE, SAE, Tensor]:
    """A pair of ``kind`` with other biases, thresholds and norms for every latent, and rows."""
    small, large = pair(kind, seed)
    g = generator(seed + 7)

    def vary(sae: SAE) -> SAE:
        scale = 0.5 + torch.rand(sae.d_sae, generator=g) if "topk" not in kind else torch.ones(sae.d_sae)
        threshold = None if sae.threshold is None else 0.4 * torch.rand(sae.d_sae, generator=g)
        return replace(
            sae,
            W_dec=sae.W_dec * scale[:, None],
            threshold=threshold,
            subtract_b_dec=bool(torch.rand(1, generator=g) < 0.5),
        )

    return vary(small), vary(large), sparse_data(N, seed=seed)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(0, 10_000),
    st.sampled_from(KINDS),
    st.sampled_from(ORDERS),
    st.sampled_from(BIASES),
    st.floats(0.1, 0.8),
)
def test_all_figures_equal_brute_force(seed, kind, order, bias, theta):
    small, large, x = drawn(seed, kind)
    [(comparison, j, found)] = run([small, large], x, theta, order, bias, seed)
    parts, exact = comparison.parts, {"rel": 1e-9, "abs": 1e-9}
    everything, nothing = torch.ones(12, dtype=torch.bool), torch.zeros(20, dtype=torch.bool)
    base, base_l0 = reconstruction(small, large, x, everything, nothing, 1.0)

    for t in range(j.path.n_steps + 1):
        included = included_at(j.path, t)
        alpha = {"eq5": included.alpha, "small": 1.0, "large": 0.0}[bias]
        mse, l0 = reconstruction(small, large, x, included.small, included.large, alpha)
        assert float(found.curve.mse[t]) == pytest.approx(mse, **exact)
        assert float(found.curve.l0[t]) == pytest.approx(l0, **exact)
    for n in range(parts.n_components):
        mse, l0 = reconstruction(small, large, x, parts.component_of_small != n, parts.component_of_large == n, 1.0)
        assert float(found.swaps.mse[n]) == pytest.approx(mse - base, **exact)
        assert float(found.swaps.l0[n]) == pytest.approx(l0 - base_l0, **exact)
    for i in range(12):
        mse, _ = reconstruction(small, large, x, torch.arange(12) != i, nothing, 1.0)
        assert float(found.deltas.removed[i]) == pytest.approx(mse - base, **exact)
    for i in range(20):
        mse, _ = reconstruction(small, large, x, everything, torch.arange(20) == i, 1.0)
        assert float(found.deltas.added[i]) == pytest.approx(mse - base, **exact)
    _check_each_latent(small, large, x, comparison.found.nearest, found)
    _check_cumulative(small, large, x, parts, found, j, base)


def _check_each_latent(small: SAE, large: SAE, x: Tensor, nearest: Tensor, found) -> None:
    z0, z1 = small.encode(x).double(), large.encode(x).double()
    errors = [(x.double() - x_hat(sae, x)) for sae in (small, large)]
    for i in range(20):
        wrote = z1[:, i, None] * large.W_dec[i].double()
        fires = z1[:, i] > 0
        if not fires.any():
            assert found.scaling.error[i].isnan() and found.activation_cosine[i].isnan()
            continue
        for y, beta in (
            (errors[0], found.scaling.error),
            (x_hat(small, x) - small.b_dec, found.scaling.reconstruction),
        ):
            best = torch.linalg.lstsq(wrote.reshape(-1, 1), y.double().reshape(-1, 1)).solution
            assert float(beta[i]) == pytest.approx(float(best), rel=1e-8, abs=1e-9)
        partner = z0[:, nearest[i]]
        if partner.any():
            cosine = torch.nn.functional.cosine_similarity(z1[:, i], partner, dim=0)
            assert float(found.activation_cosine[i]) == pytest.approx(float(cosine), abs=1e-9)
        for k, error in enumerate(errors):
            squares = error.square().sum(1)
            assert float(found.firing_errors[2 * k, i]) == pytest.approx(float(squares[fires].mean()), rel=1e-9)
            if not fires.all():
                assert float(found.firing_errors[2 * k + 1, i]) == pytest.approx(
                    float(squares[~fires].mean()), rel=1e-9
                )
    assert torch.equal(found.deltas.added < 0, found.scaling.error > 0.5)


def _check_cumulative(small: SAE, large: SAE, x: Tensor, parts, found, j, base: float) -> None:
    everything = torch.ones(12, dtype=torch.bool)
    curves = found.cumulative
    assert curves.novel.shape == (len(j.ranks) - 1, int(parts.novel.sum()) + 1)
    assert curves.n_reconstruction.tolist() == list(range(int(parts.reconstruction.sum()) + 1))
    for rank, novel, rest in zip(j.ranks[1:], curves.novel, curves.reconstruction, strict=True):
        sequence = rank.argsort()
        for n in curves.n_novel.tolist():
            some = torch.zeros(20, dtype=torch.bool)
            some[sequence[:n]] = True
            assert not (some & ~parts.novel).any()
            mse, _ = reconstruction(small, large, x, everything, some, 1.0)
            assert float(novel[n]) == pytest.approx(mse / base - 1, abs=1e-9)
        for n in curves.n_reconstruction.tolist():
            some = torch.zeros(20, dtype=torch.bool)
            some[sequence[20 - n :]] = True
            mse, _ = reconstruction(small, large, x, everything, some, 1.0)
            assert float(rest[n]) == pytest.approx(mse / base - 1, abs=1e-9)


def test_long_cumulative_curves_are_thinned_to_their_ends():
    from saetool.core.effects import _spaced

    assert _spaced(3).tolist() == [0, 1, 2, 3]
    assert len(_spaced(5000)) == N_POINTS
    assert (_spaced(5000)[0], _spaced(5000)[-1]) == (0, 5000)


def test_orders_of_the_groups_differ_by_seed_and_keep_the_groups_apart():
    small, large = pair("jumprelu", 0)
    [(comparison, _, _)] = run([small, large], sparse_data(50))
    one, two = (group_rank(comparison.parts, generator(s)) for s in (0, 1))
    assert not torch.equal(one, two)
    assert one.sort().values.tolist() == list(range(20))
    assert int(one[comparison.parts.novel].max()) < int(one[comparison.parts.reconstruction].min())


@pytest.mark.parametrize("kind", KINDS)
def test_the_bias_of_another_sae_is_measured_on_intact_latents(kind):
    from saetool.core.effects import with_bias
    from saetool.core.interpolation import LatentSums, firings

    small, large = pair(kind, 3)
    x = sparse_data(N, seed=3)
    reference = small.b_dec.double()
    for sae, other in ((small, large), (large, small), (small, small)):
        sums = LatentSums(sae, reference)
        sums.add(firings(sparse.encode(sae, x)), x.double() - reference)
        truth = (x.double() - (x_hat(sae, x) - sae.b_dec.double() + other.b_dec.double())).square().sum(1).mean()
        assert with_bias(sums, other.b_dec.double(), N) == pytest.approx(float(truth), rel=1e-11)


@pytest.mark.parametrize("n_points", [200, 10])
def test_the_roc_curve_has_the_area_and_runs_between_its_corners(n_points):
    g = generator(4)
    cosine = torch.rand(150, generator=g, dtype=torch.float64)
    delta = cosine - 0.5 + 0.3 * torch.randn(150, generator=g, dtype=torch.float64)
    usable = torch.ones(150, dtype=torch.bool)
    curve = roc(cosine, delta, usable, n_points)
    ends = (curve.false_positive[[0, -1]].tolist(), curve.true_positive[[0, -1]].tolist())
    assert ends == ([1, 0], [1, 0])
    assert len(curve.theta) <= n_points
    area = -float(torch.trapezoid(curve.true_positive, curve.false_positive))
    assert area == pytest.approx(predict(cosine, delta, usable).auc, abs=1e-12 if n_points == 200 else 0.03)
    assert not len(roc(cosine, delta.abs(), usable).theta)


def test_matching_finds_a_planted_permutation_in_decoder_encoder_and_both():
    small, _ = pair("jumprelu", 1)
    order = torch.randperm(12, generator=generator(2))
    noisy = unit_rows(small.W_dec[order] + 0.05 * torch.randn(12, 16, generator=generator(3)))
    large = replace(small, W_dec=noisy, W_enc=small.W_enc[:, order])
    found = match(small, large)
    assert found.same_partner() == 1
    for matching in (found.by_decoder, found.by_encoder, found.by_both):
        assert torch.equal(order[matching.large], matching.small)
    cosines = torch.nn.functional.cosine_similarity(small.W_dec.double()[order], noisy.double())
    assert float(found.by_decoder.decoder.mean()) == pytest.approx(float(cosines.mean()), abs=1e-6)


def test_matching_is_one_to_one_and_best_in_sum():
    import itertools

    small, large = pair("jumprelu", 2)
    small, large = (
        replace(s, W_enc=s.W_enc[:, :5], b_enc=s.b_enc[:5], W_dec=s.W_dec[:5], threshold=s.threshold[:5])
        for s in (small, large)
    )
    cosines = unit_rows(small.W_dec.double()) @ unit_rows(large.W_dec.double()).T
    best = max(sum(float(cosines[i, p]) for i, p in enumerate(ps)) for ps in itertools.permutations(range(5)))
    found = match(small, large).by_decoder
    assert sorted(found.large.tolist()) == list(range(5))
    assert float(found.decoder.sum()) == pytest.approx(best)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from(KINDS[:2]), st.sampled_from(ORDERS), st.sampled_from(BIASES))
def test_the_sae_of_every_step_has_the_numbers_of_the_path(seed, kind, order, bias):
    small, large, x = drawn(seed, kind)
    [(_, j, found)] = run([small, large], x, 0.4, order, bias, seed)
    for t in range(j.path.n_steps + 1):
        sae = stitched(small, large, included_at(j.path, t), bias)
        z = sae.encode(x)
        assert float((x - sae.decode(z)).square().sum(1).mean()) == pytest.approx(float(found.curve.mse[t]), rel=1e-4)
        assert float((z > 0).sum()) / N == pytest.approx(float(found.curve.l0[t]), abs=0.02)
