"""The benchmark's own parts, without peers: its evaluator, its table, and one subject in its own process."""

from pathlib import Path

import numpy as np
import pytest
import torch
from bench_train import Run, quality_line, sparse_rows, speed_table
from safetensors.torch import load_file
from train_evaluator import Quality, encode, evaluate
from train_subjects import FLOORS, SAETOOL, SPEED, Child, available

from saetool.config import TrainConfig
from saetool.engines.train import Trainee, resolve


def planted(d: int = 8, n: int = 64) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """An SAE whose latents are the ± axes, and rows that are one axis each; the last two latents never fire."""
    axes = torch.cat([torch.eye(d), -torch.eye(d)])
    which = torch.arange(n) % (2 * d - 2)
    x = axes[which] * (1 + torch.arange(n)[:, None] / n)
    weights = {"W_enc": axes.T.clone(), "b_enc": torch.zeros(2 * d), "W_dec": axes, "b_dec": torch.zeros(d)}
    return weights, x


@pytest.mark.parametrize("selection", ["topk", "batchtopk"])
def test_the_evaluator_knows_a_perfect_sae_its_l0_and_its_dead_latents(selection):
    weights, x = planted()
    assert evaluate(weights, selection, 1, x.split(16), x.split(16)) == Quality(1.0, 1.0, 2 / 16)


def test_predicting_the_mean_explains_nothing():
    weights, x = planted()
    silent = weights | {"W_dec": torch.zeros(16, 8), "b_dec": x.mean(0)}
    assert evaluate(silent, "topk", 1, [x], [x]).explained_variance == pytest.approx(0, abs=1e-6)


def test_batch_selection_keeps_the_largest_of_the_batch():
    weights, x = planted()
    z = encode(weights, torch.cat([3 * x[:1] + 2 * x[1:2], 0.1 * x[2:3]]), "batchtopk", 1)
    assert (z > 0).sum(1).tolist() == [2, 0]
    assert (encode(weights, torch.cat([3 * x[:1] + 2 * x[1:2], 0.1 * x[2:3]]), "topk", 1) > 0).sum(1).tolist() == [1, 1]


def test_the_speed_table_says_how_many_times_faster():
    lines = speed_table({"peer": [1.0, 3.0, 2.0], "ours": [0.25, 0.25, 9.0]}, {"peer": 2**20}, 100, ["peer"])
    peer, ours = (line.split() for line in lines[-2:])
    assert peer[1:] == ["2,000.0", "1,000.0", "50", "1", "1.00"]
    assert ours[1:] == ["250.0", "250.0", "400", "8.00"]


def test_the_quality_line_averages_seeds_and_shows_each():
    runs = [Run(Quality(ev, 30.0, 0.5), 7.0, {}) for ev in (0.5, 0.75)]
    assert quality_line("name", runs).split() == ["name", "0.6250", "30.00", "50.00%", "7", "0.5000", "0.7500"]


def test_inputs_are_the_same_for_a_seed_and_scaled():
    rows = sparse_rows(256, 16, seed=0)
    assert np.array_equal(rows, sparse_rows(256, 16, seed=0))
    assert np.square(rows).sum(1).mean() == pytest.approx(16, rel=1e-5)


def test_without_the_peers_only_saetool_and_the_floors_run(tmp_path, capsys):
    for peers in (None, tmp_path):
        chosen = available(SPEED, peers, only=None)
        assert chosen == [*FLOORS, *SAETOOL]
        assert "sae-lens topk: no environment sae-lens; see peers.sh" in capsys.readouterr().err
    assert [row.name for row in available(SPEED, None, only="float32,topk")][:2] == [
        "x @ W_enc float32",
        SAETOOL[0].name,
    ]


def setting(rows: Path) -> dict[str, object]:
    """A run of four small steps on the rows of a file."""
    return {
        "d_in": 16, "latents": 32, "k": 2, "batch": 16, "steps": 4, "lr": 1e-2, "warmup": 1, "decay": 1,
        "dead_after": None, "seed": 3, "device": "cpu", "threads": 1, "rows": str(rows), "order": None,
    }  # fmt: skip


def test_a_subject_in_its_process_trains_as_in_this_one(tmp_path):
    rows = sparse_rows(64, 16, seed=1)
    np.save(tmp_path / "rows.npy", rows)
    with Child(SAETOOL[0], setting(tmp_path / "rows.npy"), None) as child:
        assert set(child.about()["versions"]) == {"saetool", "torch"}
        answer = child.ask({"steps": 3})
        child.ask({"save": str(tmp_path / "sae.safetensors")})
    assert len(answer["seconds"]) == 3 and all(seconds > 0 for seconds in answer["seconds"])
    config = TrainConfig(
        arch="batchtopk", k=2, latents=32, tokens=64, batch_size=16, lr=1e-2, warmup=0.25, decay=0.25, seed=3,
        normalize=False,
    )  # fmt: skip
    here = Trainee(resolve(config, 16), 16, torch.from_numpy(rows.mean(0, dtype=np.float64)), 1.0, "cpu")
    for start in (0, 16, 32):
        here.step(torch.from_numpy(rows[start : start + 16]))
    saved = load_file(tmp_path / "sae.safetensors")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(saved[name], getattr(here.sae(), name), rtol=1e-5, atol=1e-6)


def test_a_subject_that_dies_ends_the_benchmark_with_its_last_words(tmp_path):
    with (
        pytest.raises(SystemExit, match=r"(?s)saetool batchtopk failed:.*no-such-rows"),
        Child(SAETOOL[0], setting(tmp_path / "no-such-rows.npy"), None) as child,
    ):
        child.about()
