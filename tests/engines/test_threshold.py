"""Equation 8: the threshold as the mean of batch minima."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_sae, sparse_data, write_cache

from saetool.artifacts.cache import TRAIN
from saetool.config import TrainConfig
from saetool.engines import threshold as engine
from saetool.engines import recipe
from saetool.engines import train as trainer
from saetool.engines.trainee import Trainee
from saetool.engines.reader import Reader
from saetool.errors import ConfigError


def toy(path: Path, steps: int, k: int = 8) -> tuple[Trainee, Reader]:
    cache = write_cache(path, sparse_data(40_000, d=32, n_features=64, active=8), ctx_len=100)
    scale = (cache.d_in / cache.statistics["mean_sq_norm"]) ** 0.5
    config = recipe.resolve(TrainConfig(k=k, latents=256, tokens=steps * 256, batch_size=256), 32)
    member = Trainee(config, 32, cache.moments()["mean"], scale, "cpu")
    for _ in trainer.train([member], Reader(cache, TRAIN, scale=scale), log_every=10**6):
        pass
    return member, Reader(cache, TRAIN, seed=5)


def test_a_toy_sae_trained_100_steps_gets_the_l0_it_was_asked_for(tmp_path: Path) -> None:
    member, reader = toy(tmp_path / "acts", steps=100)
    sae = member.sae()
    estimate = engine.mean_min([b.minimum for b in engine.batch_minima(sae, reader, 256, 100)])
    result = engine.check(engine.with_threshold(sae, estimate.value), reader, 256, limit=100 * 256)
    assert result.l0 == pytest.approx(8, rel=0.02)
    assert estimate.n_batches == 100
    assert 0 < estimate.standard_error < 0.02 * estimate.value


def test_minima_are_the_smallest_positive_kept_values(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "acts")
    sae = replace(random_sae(threshold=None), arch="batchtopk", k=2)
    reader = Reader(cache, TRAIN, seed=3)
    minima = [b.minimum for b in engine.batch_minima(sae, reader, 50, 7)]
    for step, minimum in enumerate(minima):
        z = sae.encode(reader.batch(step, 50), batch=True)
        assert minimum == pytest.approx(float(z[z > 0].min()))


def test_a_batch_without_a_positive_value_is_left_out_not_averaged_in(tmp_path: Path) -> None:
    assert engine.mean_min([1.0, None, 3.0]).value == 2.0
    assert engine.mean_min([1.0, None, 3.0]).n_batches == 2
    cache = write_cache(tmp_path / "acts")
    dead = replace(random_sae(threshold=None), arch="batchtopk", k=2)
    dead = replace(dead, b_enc=dead.b_enc - 1000)
    minima = [b.minimum for b in engine.batch_minima(dead, Reader(cache, TRAIN), 50, 3)]
    assert minima == [None] * 3
    with pytest.raises(ConfigError, match="dead"):
        engine.mean_min(minima)


def test_fewer_positives_than_n_k_gives_the_smallest_positive(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "acts")
    sae = replace(random_sae(threshold=None), arch="batchtopk", k=20)
    reader = Reader(cache, TRAIN)
    sae = replace(sae, b_enc=sae.b_enc - 1.0)
    p = sae.pre_activations(reader.batch(0, 40))
    assert (p > 0).sum() < 40 * 20
    found = next(engine.batch_minima(sae, reader, 40, 1)).minimum
    assert found == pytest.approx(float(p[p > 0].min()))


def test_the_standard_error_is_sd_over_root_n() -> None:
    minima = [1.0, 2.0, 4.0, 5.0]
    expected = float(torch.tensor(minima, dtype=torch.float64).std() / 2)
    assert engine.mean_min(list(minima)).standard_error == pytest.approx(expected)
