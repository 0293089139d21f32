"""The trainer: exact, resumable, one stream for many SAEs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import save_sae, sparse_data, write_cache

from saetool.artifacts.cache import TRAIN
from saetool.artifacts.sae import load
from saetool.config import ARCHITECTURES, RECIPES, SPARSE, TrainConfig
from saetool.core.losses import losses
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


@pytest.mark.parametrize("arch", ["batchtopk", "topk", "relu", "jumprelu", "gated"])
def test_training_reduces_the_error(arch: str, tmp_path: Path) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    steps = run([trainee(replace(CONFIG, arch=arch, tokens=300 * 64, l1=0.3, l0=0.3), mean, scale)], reader, 300, 1)
    assert steps[-1].explained_variance > max(steps[0].explained_variance, 0.5)


@pytest.mark.parametrize("arch", ["batchtopk", "relu", "jumprelu", "gated", "matryoshka"])
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(arch: str, tmp_path: Path) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    config = replace(CONFIG, arch=arch, prefixes=(8, 24) if arch == "matryoshka" else (), resample=640)
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


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("arch", "decoder_norm"),
    [*((arch, "unit") for arch in ARCHITECTURES), *((arch, "free") for arch in ARCHITECTURES if arch not in SPARSE)],
)
def test_the_file_reconstructs_as_the_trainer_did(
    arch: str, normalize: bool, decoder_norm: str, tmp_path: Path
) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    reader.scale = scale = scale if normalize else 1.0
    prefixes = (8, 24) if arch == "matryoshka" else ()
    member = trainee(replace(CONFIG, arch=arch, prefixes=prefixes, decoder_norm=decoder_norm), mean, scale)
    run([member], reader)
    x = sparse_data(100, seed=9)
    file = save_sae(tmp_path / "sae.st", member.sae())
    saved = load(file).sae
    selecting = replace(saved, arch="batchtopk", threshold=None) if arch == "matryoshka" else saved
    z = selecting.encode(x, batch=selecting.arch == "batchtopk")
    mine = (x - saved.decode(z)).square().sum(1).mean() * scale**2
    trained = losses(member.parameters, x * scale, member.objective)
    assert float(mine) == pytest.approx(float(trained.mse.detach()), rel=1e-4)
    assert int((z > 0).sum()) == int(trained.active)
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


def test_a_gated_sae_is_saved_as_the_jumprelu_it_equals(tmp_path: Path) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    member = trainee(replace(CONFIG, arch="gated", l1=0.3, tokens=100 * 64), mean, scale)
    run([member], reader)
    p = {name: t.detach() for name, t in member.parameters.named().items()}
    assert float(p["r_mag"].abs().max()) > 0
    x = sparse_data(200, seed=9)
    u = (x * scale - p["b_dec"]) @ p["encoder"].T
    z = (u + p["b_enc"] > 0) * (u * p["r_mag"].exp() + p["b_mag"]).relu()
    saved = member.sae()
    assert (saved.arch, saved.inference) == ("gated", "jumprelu")
    assert torch.allclose(saved.decode(saved.encode(x)), (z @ p["W_dec"] + p["b_dec"]) / scale, atol=1e-4)
    assert torch.equal(saved.encode(x) > 0, z > 0)
    assert 0 < float((z > 0).float().mean()) < 1


def test_the_prefixes_of_a_matryoshka_fire_as_in_the_whole(tmp_path: Path) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    config = replace(CONFIG, arch="matryoshka", prefixes=(6, 12, 24), tokens=200 * 64)
    member = trainee(config, mean, scale)
    steps = run([member], reader, log_every=1)
    x = sparse_data(500, seed=9)
    whole, small = member.sae(), member.sae(6)
    assert torch.equal(small.encode(x), whole.encode(x)[:, :6])
    assert (whole.k, small.k, small.d_sae) == (3, None, 6)
    cuts = [s.l0 for s in steps]
    assert cuts[-1] == pytest.approx(3.0)
    # Its threshold is the running mean of training's cuts: near k active latents on other data.
    assert float((whole.encode(x) > 0).sum(1).float().mean()) == pytest.approx(3.0, rel=0.25)
    plain = trainee(replace(CONFIG, tokens=200 * 64), mean, scale)
    run([plain], reader)

    def error(sae: SAE) -> float:
        cut = replace(sae, W_enc=sae.W_enc[:, :6], b_enc=sae.b_enc[:6], W_dec=sae.W_dec[:6], threshold=None)
        return float((x - cut.decode(cut.encode(x, batch=True))).square().sum())

    assert error(replace(whole, arch="batchtopk")) < error(plain.sae()), "nested training makes the first ones general"


@pytest.mark.parametrize("penalty", ["l0", "tanh"])
def test_the_jumprelu_threshold_moves_in_bfloat16_too(tmp_path: Path, penalty: str) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    moved = {}
    for dtype in ("fp32", "bf16"):
        config = replace(CONFIG, arch="jumprelu", dtype=dtype, penalty=penalty, tokens=200 * 64, l0=0.5)
        member = trainee(config, mean, scale)
        before = member.parameters.log_threshold.detach().clone()
        run([member], reader)
        moved[dtype] = member.parameters.log_threshold.detach() - before
        assert member.parameters.log_threshold.dtype == torch.float32
    assert float(moved["bf16"].abs().mean()) > 0.5 * float(moved["fp32"].abs().mean()) > 1e-4


def test_a_frozen_decoder_stays_where_it_started(tmp_path: Path) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    for arch in ("batchtopk", "relu"):
        member = trainee(replace(CONFIG, arch=arch, freeze_decoder=True), mean, scale)
        before = {name: t.detach().clone() for name, t in member.parameters.named().items()}
        run([member], reader)
        assert torch.equal(member.parameters.W_dec, before["W_dec"])
        assert not torch.equal(member.parameters.encoder, before["encoder"])
        again = trainee(replace(CONFIG, arch=arch, freeze_decoder=True), mean, scale)
        again.restore({name: t.clone() for name, t in member.state().items()})
        assert torch.equal(again.parameters.encoder, member.parameters.encoder)


def test_resampling_points_dead_latents_at_badly_reconstructed_rows(tmp_path: Path) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    member = trainee(replace(CONFIG, arch="relu", dead_after=400), mean, scale)
    run([member], reader, until=5)
    member.since_fired[:] = 0
    member.since_fired[[3, 8]] = 400
    before = member.parameters.W_dec.detach().clone()
    x = reader.batch(7, 64)
    assert member.resample(x) == 2
    W_dec, encoder = member.parameters.W_dec.detach(), member.parameters.encoder.detach()
    rows = x - member.parameters.b_dec.detach()
    rows = rows / rows.norm(dim=1, keepdim=True)
    for i in (3, 8):
        assert float((rows @ W_dec[i]).max()) == pytest.approx(1.0, abs=1e-5)
        alive = torch.ones(24, dtype=torch.bool)
        alive[[3, 8]] = False
        assert float(encoder[i].norm()) == pytest.approx(0.2 * float(encoder[alive].norm(dim=1).mean()), rel=1e-4)
        assert float(member.adam.state[member.parameters.W_dec]["exp_avg"][i].abs().max()) == 0
    others = [i for i in range(24) if i not in (3, 8)]
    assert torch.equal(W_dec[others], before[others])
    assert member.resample(x) == 0


def test_resampling_revives_latents_in_a_run(tmp_path: Path) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    dead = {}
    for resample in (0, 20 * 64):
        config = replace(CONFIG, arch="relu", tokens=90 * 64, resample=resample, l1=0.1)
        member = trainee(config, mean, scale)
        with torch.no_grad():
            member.parameters.b_enc[12:] = -50.0  # never fire, and relu has no gradient that would change it
        dead[resample] = run([member], reader, log_every=1)[-1].dead
    assert dead[0] >= 12 > dead[20 * 64]


def test_gradients_are_clipped_to_the_norm_asked_for(tmp_path: Path) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    member = trainee(replace(CONFIG, clip=0.01), mean, scale)
    member.step(reader.batch(0, 64))
    grads = [t.grad for t in member.parameters.named().values()]
    assert float(torch.stack([g.norm() for g in grads]).norm()) == pytest.approx(0.01, rel=1e-4)


def test_a_share_of_the_steps_or_their_number() -> None:
    assert recipe.steps_of(0.05, 2000) == recipe.steps_of(100, 2000) == 100
    assert recipe.steps_of(1.0, 2000) == 2000


def test_like_derives_again_what_was_derived() -> None:
    first = recipe.resolve(TrainConfig(latents=4096, tokens=10**6, l0=3.0, arch="jumprelu"), 64)
    wider = replace(recipe.like(recipe.options_of(first), 64), latents=16384)
    assert recipe.resolve(wider, 64).lr == 2e-4
    assert (wider.l0, wider.arch) == (3.0, "jumprelu")
    fixed = recipe.resolve(TrainConfig(latents=4096, lr=1e-3), 64)
    assert replace(recipe.like(recipe.options_of(fixed), 64), latents=16384).lr == 1e-3


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_can_be_trained(name: str, tmp_path: Path) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    options = dict(RECIPES[name].options) | {"latents": 40, "tokens": 12 * 64, "batch_size": 64, "k": 3}
    member = trainee(TrainConfig(**options), mean, scale)
    steps = run([member], reader, log_every=1)
    assert steps[-1].mse < steps[0].mse


def test_diverged_parameters_are_noticed(tmp_path: Path) -> None:
    reader, mean, scale = stream(tmp_path / "acts")
    member = trainee(replace(CONFIG, tokens=400 * 64, arch="relu"), mean, scale)
    run([member], reader, until=150)
    assert member.is_finite()
    with torch.no_grad():
        member.parameters.W_dec.mul_(1e4)
    with pytest.raises(SaetoolError, match="100 times its input"):
        run([member], reader)
    with torch.no_grad():
        member.parameters.W_dec[0, 0] = float("inf")
    assert not member.is_finite()
