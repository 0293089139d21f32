"""Thresholds over batches of a cache, and what they give."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_sae, sparse_data, write_cache

from saetool.artifacts.cache import HELDOUT, TRAIN
from saetool.config import TrainConfig
from saetool.core.activations import batch_topk
from saetool.core.sae import SAE
from saetool.core.threshold import Estimate, Pool, mean_min, per_latent, target_l0, with_threshold
from saetool.engines import recipe
from saetool.engines import threshold as engine
from saetool.engines import train as trainer
from saetool.engines.reader import Reader
from saetool.engines.trainee import Trainee


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[SAE, Reader, Reader]:
    """A BatchTopK SAE (k = 8) after 100 steps, and readers of the train and held-out splits."""
    path = tmp_path_factory.mktemp("toy") / "acts"
    cache = write_cache(path, sparse_data(40_000, d=32, n_features=64, active=8), ctx_len=100)
    scale = (cache.d_in / cache.statistics["mean_sq_norm"]) ** 0.5
    config = recipe.resolve(TrainConfig(k=8, latents=256, tokens=100 * 256, batch_size=256), 32)
    member = Trainee(config, 32, cache.moments()["mean"], scale, "cpu")
    for _ in trainer.train([member], Reader(cache, TRAIN, scale=scale), log_every=10**6):
        pass
    return replace(member.sae(), threshold=None), Reader(cache, TRAIN, seed=5), Reader(cache, HELDOUT)


def estimate(sae: SAE, reader: Reader, method: str, k: float = 8, size: int = 256, n: int = 100) -> Estimate:
    minima = [b.minimum for b in engine.batch_minima(sae, reader, size, n, k)]
    if method == "mean-min":
        return mean_min(minima)
    *_, pool = engine.pool(sae, reader, size, minima)
    assert isinstance(pool, Pool)
    return target_l0(minima, pool, k, n * size) if method == "target-l0" else per_latent(minima, pool)


def theta(found: Estimate) -> torch.Tensor | float:
    return found.values if found.values is not None else found.value  # type: ignore[return-value]


@pytest.mark.parametrize("method", ["mean-min", "target-l0", "per-latent"])
@pytest.mark.parametrize("k", [8, 2.5])
def test_a_toy_sae_trained_100_steps_gets_the_l0_it_was_asked_for(
    toy: tuple[SAE, Reader, Reader], method: str, k: float
) -> None:
    sae, reader, heldout = toy
    found = estimate(sae, reader, method, k)
    with_theta = with_threshold(sae, theta(found))
    here = engine.check(with_theta, reader, 256, k, limit=100 * 256)
    assert here.l0 == pytest.approx(k, rel=0.02 if method == "mean-min" else 1e-4)
    assert engine.check(with_theta, heldout, 256, k).l0 == pytest.approx(k, rel=0.03)
    assert found.n_batches == 100
    assert 0 < found.relative_error < 0.02


def test_minima_are_the_smallest_positive_kept_values(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "acts")
    sae = replace(random_sae(threshold=None), arch="batchtopk", k=2)
    reader = Reader(cache, TRAIN, seed=3)
    minima = [b.minimum for b in engine.batch_minima(sae, reader, 50, 7, 2)]
    for step, minimum in enumerate(minima):
        z = sae.encode(reader.batch(step, 50), batch=True)
        assert minimum == pytest.approx(float(z[z > 0].min()))


def test_a_dead_sae_has_no_minima(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "acts")
    dead = replace(random_sae(threshold=None), arch="batchtopk", k=2)
    dead = replace(dead, b_enc=dead.b_enc - 1000)
    assert [b.minimum for b in engine.batch_minima(dead, Reader(cache, TRAIN), 50, 3, 2)] == [None] * 3


def test_the_pool_holds_what_selection_picks(toy: tuple[SAE, Reader, Reader]) -> None:
    sae, reader, _ = toy
    minima = [b.minimum for b in engine.batch_minima(sae, reader, 256, 10, 8)]
    *_, pool = engine.pool(sae, reader, 256, minima)
    assert isinstance(pool, Pool)
    picked = sum((batch_topk(sae.pre_activations(reader.batch(i, 256)), 8) > 0).sum(0) for i in range(10))
    assert torch.equal(pool.selected, picked)
    every = torch.cat([sae.pre_activations(reader.batch(i, 256)).flatten() for i in range(10)])
    assert torch.equal(pool.values.sort().values, every[every > pool.floor].sort().values)


def test_check_equals_the_formulas_written_out(toy: tuple[SAE, Reader, Reader]) -> None:
    sae, _, heldout = toy
    with_theta = with_threshold(sae, 0.4)
    found = engine.check(with_theta, heldout, 256, 8, limit=5 * 256)
    batches = [heldout.batch(step, 256) for step in range(5)]
    x = torch.cat(batches).double()
    variance = (x - x.mean(0)).square().sum()
    z = with_theta.encode(torch.cat(batches))
    assert found.n_tokens == 5 * 256
    assert found.l0 == pytest.approx(float((z > 0).sum(1).double().mean()))
    error = (x - with_theta.decode(z).double()).square().sum()
    assert found.explained_variance == pytest.approx(float(1 - error / variance), rel=1e-6)
    selected = torch.cat([sae.decode(sae.encode(b, batch=True)) for b in batches]).double()
    expected = float(1 - (x - selected).square().sum() / variance)
    assert found.explained_variance_batch == pytest.approx(expected, rel=1e-6)


def test_each_batch_is_encoded_once_by_check(toy: tuple[SAE, Reader, Reader], monkeypatch: pytest.MonkeyPatch) -> None:
    sae, reader, _ = toy
    calls, plain = [0], SAE.pre_activations

    def counted(self: SAE, x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return plain(self, x)

    monkeypatch.setattr(SAE, "pre_activations", counted)
    engine.check(with_threshold(sae, 0.4), reader, 256, 8, limit=3 * 256)
    assert calls == [3]
