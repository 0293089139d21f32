"""The trainer: exact, resumable, one stream for many SAEs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import sparse_data, write_cache

from saetool.artifacts.cache import TRAIN
from saetool.config import TrainConfig
from saetool.core.sae import SAE
from saetool.engines import recipe
from saetool.engines import train as engine
from saetool.engines.reader import Reader
from saetool.engines.trainee import Trainee
from saetool.errors import ConfigError, SaetoolError

CONFIG = TrainConfig(k=3, latents=24, tokens=30 * 64, batch_size=64, dead_after=400)


def stream(path: Path, seed: int = 0) -> tuple[Reader, torch.Tensor, float]:
    cache = write_cache(path)
    scale = (cache.d_in / cache.statistics["mean_sq_norm"]) ** 0.5
    return Reader(cache, TRAIN, seed=seed, scale=scale), cache.moments()["mean"], scale


def trainee(config: TrainConfig, mean: torch.Tensor, scale: float) -> Trainee:
    return Trainee(recipe.resolve(config, len(mean)), len(mean), mean, scale, "cpu")


def run(trainees: list[Trainee], reader: Reader, until: int = 10**9, log_every: int = 10) -> list[engine.Step]:
    steps = []
    for event in engine.train(trainees, reader, log_every=log_every):
        if isinstance(event, engine.Step):
            steps.append(event)
        elif event.step >= until:
            break
    return steps


def same(a: SAE, b: SAE) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in ((getattr(a, n), getattr(b, n)) for n in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"))
        if x is not None or y is not None
    )


@pytest.mark.parametrize("arch", ["batchtopk", "topk", "relu", "jumprelu"])
def test_training_reduces_the_error(arch: str, tmp_path: Path) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    steps = run([trainee(replace(CONFIG, arch=arch, tokens=300 * 64, l1=0.3, l0=0.3), mean, scale)], reader, 300, 1)
    assert steps[-1].explained_variance > max(steps[0].explained_variance, 0.5)


@pytest.mark.parametrize("arch", ["batchtopk", "relu", "jumprelu"])
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(arch: str, tmp_path: Path) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    config = replace(CONFIG, arch=arch)
    whole = trainee(config, mean, scale)
    run([whole], reader)
    first = trainee(config, mean, scale)
    run([first], reader, until=13)
    state = {name: t.clone() for name, t in first.state().items()}
    second = trainee(config, mean, scale)
    second.restore(state)
    assert second.steps_done == 13
    run([second], reader)
    assert same(whole.sae(), second.sae())


def test_a_ladder_equals_single_runs_bit_for_bit(tmp_path: Path) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    configs = [replace(CONFIG, latents=width) for width in (8, 24, 40)]
    ladder = [trainee(c, mean, scale) for c in configs]
    run(ladder, reader)
    for config, member in zip(configs, ladder, strict=True):
        alone = trainee(config, mean, scale)
        run([alone], reader)
        assert same(member.sae(), alone.sae())


def test_logging_never_changes_training(tmp_path: Path) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    often, never = trainee(CONFIG, mean, scale), trainee(CONFIG, mean, scale)
    run([often], reader, log_every=1)
    run([never], reader, log_every=10**6)
    assert same(often.sae(), never.sae())


def test_the_saved_sae_reconstructs_as_in_training(tmp_path: Path) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    for arch in ("topk", "relu", "jumprelu"):
        member = trainee(replace(CONFIG, arch=arch), mean, scale)
        run([member], reader)
        x = sparse_data(100, seed=9)
        p = {name: t.detach() for name, t in member.parameters.named().items()}
        threshold = p["log_threshold"].exp() if "log_threshold" in p else None
        trained = SAE(p["encoder"].T, p["b_enc"], p["W_dec"], p["b_dec"], threshold, arch, 3)
        saved = member.sae()
        expected = trained.decode(trained.encode(x * scale)) / scale
        assert torch.allclose(saved.decode(saved.encode(x)), expected, atol=1e-5)
        assert torch.allclose(saved.W_dec.norm(dim=1), torch.ones(24), atol=1e-5)


def test_the_decoder_stays_at_unit_norm_where_the_recipe_says_so(tmp_path: Path) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    members = {arch: trainee(replace(CONFIG, arch=arch), mean, scale) for arch in ("batchtopk", "relu")}
    for member in members.values():
        run([member], reader)
    norms = {arch: m.parameters.W_dec.detach().norm(dim=1) for arch, m in members.items()}
    assert torch.allclose(norms["batchtopk"], torch.ones(24), atol=1e-6)
    assert not torch.allclose(norms["relu"], torch.ones(24), atol=1e-3)


def test_dead_latents_are_counted_in_tokens_and_revived_by_aux(tmp_path: Path) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    dead = {}
    for alpha in (0.0, 0.25):
        member = trainee(replace(CONFIG, latents=48, tokens=400 * 64, aux_alpha=alpha, lr=1e-2), mean, scale)
        with torch.no_grad():
            member.parameters.b_enc[24:] = -2.0  # positive at times, selected never: only AuxK's gradient gets there
        dead[alpha] = run([member], reader, log_every=50)[-1].dead
    assert dead[0.25] < 0.7 * dead[0.0]
    member = trainee(CONFIG, mean, scale)
    member.since_fired += 399
    assert not member.dead().any()
    member.since_fired += 1
    assert member.dead().all()


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    saes = []
    for seed in (0, 0, 1):
        reader, mean, scale = stream(tmp_path / f"acts{len(saes)}", seed=seed)
        member = trainee(replace(CONFIG, seed=seed), mean, scale)
        run([member], reader)
        saes.append(member.sae())
    assert same(saes[0], saes[1])
    assert not same(saes[0], saes[2])


def test_a_diverging_run_stops_with_one_line(tmp_path: Path) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    member = trainee(replace(CONFIG, arch="relu", lr=1e30), mean, scale)
    with pytest.raises(SaetoolError, match=r"step \d+: a loss of (nan|inf) of the SAE with 24 latents"):
        run([member], reader, log_every=1)


@pytest.mark.parametrize(
    "change", [{"k": 25}, {"k": 0}, {"batch_size": 0}, {"lr": -1.0}, {"l1": float("nan"), "arch": "relu"}]
)
def test_impossible_settings_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        recipe.resolve(replace(CONFIG, **change), 16)


def test_derived_settings_are_filled_in() -> None:
    config = recipe.resolve(TrainConfig(latents=16384, tokens=10**9), 768)
    assert (config.lr, config.k_aux, config.dead_after) == (2e-4, 512, 10_000_000)


@pytest.mark.parametrize(("arch", "option"), [("jumprelu", "l0"), ("relu", "l1")])
def test_a_larger_penalty_gives_fewer_active_latents(arch: str, option: str, tmp_path: Path) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    active = []
    for weight in (0.1, 1.0, 4.0):
        member = trainee(replace(CONFIG, arch=arch, tokens=300 * 64, **{option: weight}), mean, scale)
        active.append(run([member], reader, log_every=100)[-1].l0)
    assert active[0] > 1.2 * active[1] > 1.44 * active[2]
