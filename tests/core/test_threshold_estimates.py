"""Thresholds from pre-activations: each formula against brute force, and what folding must leave alone."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import generator, random_sae, sparse_data

from saetool.core import sparse
from saetool.core.activations import batch_topk, jumprelu
from saetool.core.sae import SAE, fold_decoder_norms, fold_scale
from saetool.core.threshold import (
    Pool,
    mean_min,
    per_latent,
    resampling_error,
    smallest_kept,
    target_l0,
    with_threshold,
    with_unit_rows,
)
from saetool.errors import ConfigError


def batches(n: int = 6, tokens: int = 40, d_sae: int = 30) -> list[torch.Tensor]:
    g = generator(2)
    return [torch.randn(tokens, d_sae, generator=g) + torch.linspace(-1, 1, d_sae) for _ in range(n)]


def pooled(parts: list[torch.Tensor], k: float) -> tuple[list[float | None], Pool]:
    minima: list[float | None] = [smallest_kept(p, k) for p in parts]
    floor = float(torch.nextafter(torch.tensor(min(minima)), torch.tensor(-math.inf)))
    codes = sparse.above(torch.cat(parts), torch.tensor(floor))
    kept = torch.stack([(p >= m).sum(0) for p, m in zip(parts, minima, strict=True)]).sum(0)
    return minima, Pool(codes.values, codes.latents, kept, floor)


@pytest.mark.parametrize("k", [1, 2, 7])
def test_the_smallest_kept_is_batch_topks_whatever_the_hint(k: int) -> None:
    p = batches(1)[0]
    kept = batch_topk(p, k)
    expected = float(kept[kept > 0].min())
    for hint in (0.0, 0.5 * expected, expected, 10.0):
        assert smallest_kept(p, k, hint) == expected


def test_a_fraction_of_k_keeps_that_many_pairs() -> None:
    p = batches(1)[0]
    for k in (0.5, 2.5, 3.25):
        assert int((p >= smallest_kept(p, k)).sum()) == round(k * len(p))
    assert smallest_kept(p, 3.0) == smallest_kept(p, 3)


def test_too_few_positives_gives_the_smallest_and_none_gives_zero() -> None:
    p = torch.tensor([[0.5, -1.0], [0.25, -2.0]])
    assert smallest_kept(p, 2) == 0.25
    assert smallest_kept(-p.abs(), 2) == 0.0


def test_a_batch_without_a_positive_value_is_left_out_not_averaged_in() -> None:
    found = mean_min([1.0, None, 3.0])
    assert (found.value, found.n_batches, found.minima) == (2.0, 2, [1.0, 3.0])
    with pytest.raises(ConfigError, match="dead"):
        mean_min([None, None])


def test_the_standard_error_is_sd_over_root_n() -> None:
    minima = [1.0, 2.0, 4.0, 5.0]
    expected = float(torch.tensor(minima, dtype=torch.float64).std() / 2)
    assert mean_min(list(minima)).standard_error == pytest.approx(expected)
    assert mean_min(list(minima)).relative_error == pytest.approx(expected / 3)
    assert math.isnan(mean_min([1.0]).standard_error)


def test_minima_are_averaged_in_float64() -> None:
    values = [1.0 + i * 1e-9 for i in range(1000)]  # all the same number in float32
    assert mean_min(list(values)).value == pytest.approx(sum(values) / 1000, rel=1e-15)
    assert mean_min(list(values)).standard_error > 0


@pytest.mark.parametrize("k", [2, 2.5, 3.1])
def test_target_l0_is_met_to_the_pair(k: float) -> None:
    parts = batches()
    p = torch.cat(parts)
    found = target_l0(*pooled(parts, k), k, len(p))
    assert int((p > found.value).sum()) == round(k * len(p))
    assert found.standard_error == mean_min(pooled(parts, k)[0]).standard_error


def test_target_l0_of_a_single_batch_keeps_its_smallest() -> None:
    parts = batches(1)
    found = target_l0(*pooled(parts, 3), 3, len(parts[0]))
    assert int((parts[0] > found.value).sum()) == 3 * len(parts[0])


def test_target_l0_with_too_few_positives_keeps_them_all() -> None:
    p = torch.tensor([[0.5, -1.0], [0.25, -2.0]])
    pool = Pool(torch.tensor([0.5, 0.25]), torch.tensor([0, 0]), torch.tensor([2, 0]), 0.0)
    assert target_l0([0.25], pool, 2, 2).value == 0.0
    assert int((p > 0).sum()) == 2


def test_per_latent_thresholds_fire_each_latent_as_often_as_selection_picks_it() -> None:
    parts = batches(12)
    for part in parts:
        part[:, 0] -= 4
    p = torch.cat(parts)
    minima, pool = pooled(parts, 3)
    found = per_latent(minima, pool)
    assert found.values is not None
    assert torch.equal((jumprelu(p, found.values) > 0).sum(0), pool.selected)
    never = pool.selected == 0
    assert never.any(), "the case of a latent that is never selected must be there"
    assert (found.values[never] >= mean_min(minima).value - 1e-6).all()
    assert found.standard_error == mean_min(minima).standard_error


def test_the_resampled_error_of_one_batch_is_that_of_repeated_draws() -> None:
    g = generator(0)
    cuts, said = [], []
    for i in range(60):
        p = torch.randn(300, 20, generator=g)
        cuts.append(smallest_kept(p, 2))
        pool = sparse.above(p, torch.tensor(0.5 * cuts[-1]))
        said.append(resampling_error(pool, 2, generator(i)))
    assert 0.7 < torch.tensor(said).median() / torch.tensor(cuts).std() < 1.4


# --- folding ---------------------------------------------------------------------------------------------------------


def uneven() -> SAE:
    """A BatchTopK SAE whose decoder rows have lengths from 1/8 to 8 (powers of two, so that folding is exact)."""
    sae = replace(random_sae(threshold=None), arch="batchtopk", k=3)
    lengths = 2.0 ** torch.randint(-3, 4, (sae.d_sae,), generator=generator(1))
    return replace(sae, W_dec=sae.W_dec * lengths[:, None])


def test_folding_decoder_norms_leaves_every_active_latent_as_it_is() -> None:
    sae, x = uneven(), sparse_data(400)
    theta = smallest_kept(sae.pre_activations(x), 3)
    plain = with_threshold(sae, theta)
    folded = with_unit_rows(plain)
    assert torch.allclose(folded.W_dec.norm(dim=1), torch.ones(sae.d_sae), atol=1e-6)
    assert torch.equal(plain.encode(x) > 0, folded.encode(x) > 0), "to the latent"
    assert int((plain.encode(x) > 0).sum()) == 3 * 400 - 1  # strictly above the smallest kept value
    assert torch.allclose(plain.decode(plain.encode(x)), folded.decode(folded.encode(x)), atol=1e-5)


def test_one_threshold_becomes_one_per_latent_and_unit_rows_stay_untouched() -> None:
    folded = with_unit_rows(with_threshold(uneven(), 0.5))
    assert torch.allclose(folded.threshold, 0.5 * uneven().W_dec.norm(dim=1))
    unit = with_threshold(random_sae(), 0.5)
    assert with_unit_rows(unit) is unit


def test_folding_the_input_scale_leaves_every_active_latent_as_it_is() -> None:
    sae, x = with_threshold(random_sae(), 0.25), sparse_data(400)
    folded = fold_scale(sae, 4.0)  # the SAE was trained on 4x; a power of two keeps it exact
    assert torch.equal(sae.encode(4 * x) > 0, folded.encode(x) > 0)
    both = fold_decoder_norms(fold_scale(with_threshold(uneven(), 0.25), 4.0))
    assert torch.equal(with_threshold(uneven(), 0.25).encode(4 * x) > 0, both.encode(x) > 0)


def test_two_and_three_dimensional_inputs_agree() -> None:
    """A batch of contexts is as many rows as it has tokens: n·k counts tokens, never contexts."""
    p = batches(1)[0]
    contexts = p.view(8, 5, -1)
    assert smallest_kept(contexts.flatten(0, 1), 3) == smallest_kept(p, 3)
    with pytest.raises(Exception, match=r"(?i)shape|type"):
        smallest_kept(contexts, 3)  # refused, not selected by another count
