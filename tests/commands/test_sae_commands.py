"""``threshold``, ``eval`` and ``meta`` as a user meets them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import generator, random_sae, save_sae, write_cache
from typer.testing import CliRunner

from saetool.artifacts import container
from saetool.artifacts import sae as sae_files
from saetool.cli import app
from saetool.core.sae import unit_rows

runner = CliRunner()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a cache, a trained BatchTopK SAE ``raw.st`` and a JumpReLU SAE ``jump.st``."""
    monkeypatch.chdir(tmp_path)
    write_cache(tmp_path / "acts")
    args = ["--k", "3", "--latents", "24", "--tokens", "20000", "--batch-size", "64", "-o", "raw.st"]
    assert runner.invoke(app, ["train", "acts", *args]).exit_code == 0
    save_sae(tmp_path / "jump.st", random_sae())
    return tmp_path


def test_threshold_makes_a_jumprelu_sae_and_says_how_good_it_is(here: Path) -> None:
    result = runner.invoke(app, ["threshold", "raw.st", "acts", "-o", "t.st", "--json"])
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)["metrics"]
    loaded = sae_files.load(Path("t.st"))
    assert loaded.sae.inference == "jumprelu"
    facts = loaded.header.config["threshold"]
    assert (facts["n_batches"], facts["n_tokens"], facts["batch_size"]) == (16, 1024, 64)  # no row twice
    assert len(facts["minima"]) == 16
    assert "note: 16 batches of 64 tokens, all that the train split holds" in result.stderr
    assert torch.equal(loaded.sae.threshold, torch.full((24,), metrics["value"]))
    assert torch.equal(loaded.sae.W_enc, sae_files.load(Path("raw.st")).sae.W_enc)
    assert metrics["asked_l0"] == 3
    assert metrics["l0_heldout"] == pytest.approx(3, rel=0.1)
    assert metrics["standard_error"] > 0
    assert [e["verb"] for e in loaded.header.history] == ["cache", "train", "threshold"]


def test_threshold_reads_from_a_pipe_and_writes_to_one(here: Path) -> None:
    command = [sys.executable, "-m", "saetool", "threshold", "-", "acts", "--quiet"]
    done = subprocess.run(command, input=Path("raw.st").read_bytes(), capture_output=True)
    assert done.returncode == 0, done.stderr
    Path("piped.st").write_bytes(done.stdout)
    runner.invoke(app, ["threshold", "raw.st", "acts", "-o", "t.st"])
    assert torch.equal(sae_files.load(Path("piped.st")).sae.threshold, sae_files.load(Path("t.st")).sae.threshold)


def test_threshold_again_is_up_to_date(here: Path) -> None:
    first = runner.invoke(app, ["threshold", "raw.st"])
    again = runner.invoke(app, ["threshold", "raw.st"])
    assert first.stdout == again.stdout == "raw-threshold.st\n"
    assert "up to date" in again.stderr


def test_eval_prints_its_record_and_agrees_with_a_plain_computation(here: Path) -> None:
    from saetool.artifacts.cache import HELDOUT, open_cache

    runner.invoke(app, ["threshold", "raw.st", "-o", "t.st"])
    result = runner.invoke(app, ["eval", "t.st", "jump.st"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["saetool"]["schema"] == "saetool/eval@1"
    x = torch.cat([part["acts"] for part in open_cache(Path("acts")).iter_split(HELDOUT)])
    for entry in record["saes"]:
        sae = sae_files.load(Path(entry["name"])).sae
        z = sae.encode(x)
        error = (x - sae.decode(z)).double()
        assert entry["metrics"]["mse"] == pytest.approx(float(error.square().sum(1).mean()))
        assert entry["metrics"]["l0"] == pytest.approx(float((z > 0).sum(1).double().mean()))
        assert entry["ce"] is None


def test_eval_does_not_depend_on_the_batch_size(here: Path) -> None:
    records = [
        json.loads(runner.invoke(app, ["eval", "jump.st", "--batch-size", size]).stdout)["saes"][0]["metrics"]
        for size in ("10", "4096")
    ]
    for name, value in records[0].items():
        assert value == pytest.approx(records[1][name], rel=1e-9), name


@pytest.mark.parametrize("method", ["target-l0", "per-latent"])
def test_other_methods_meet_the_l0_on_the_data_they_saw(here: Path, method: str) -> None:
    result = runner.invoke(app, ["threshold", "raw.st", "--method", method, "--l0", "2.5", "-o", "t.st", "--json"])
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)["metrics"]
    assert metrics["asked_l0"] == 2.5
    assert metrics["l0_estimation"] == pytest.approx(2.5, abs=1 / 64)
    assert (metrics["value"] is None) == (method == "per-latent")
    assert sae_files.load(Path("t.st")).sae.inference == "jumprelu"


def test_threshold_repairs_an_sae_that_has_a_wrong_one_or_none(here: Path) -> None:
    save_sae(here / "wrong.st", random_sae(threshold=5.0))
    save_sae(here / "none.st", random_sae(threshold=None))
    for name in ("wrong.st", "none.st"):
        result = runner.invoke(app, ["threshold", name, "--l0", "4", "--batch-size", "64", "-o", "t.st", "--overwrite"])
        assert result.exit_code == 0, result.output
        facts = sae_files.load(Path("t.st")).header.config["threshold"]
        assert facts["l0_heldout"] == pytest.approx(4, rel=0.1)


def test_threshold_folds_decoder_rows_that_are_not_unit(here: Path) -> None:
    from saetool.artifacts.cache import HELDOUT, open_cache

    sae = random_sae(threshold=None)
    long = replace(sae, W_dec=sae.W_dec * torch.linspace(0.5, 2, 24)[:, None])
    save_sae(here / "long.st", long)
    args = ["threshold", "long.st", "--l0", "4", "--batch-size", "64", "-o", "t.st"]
    assert runner.invoke(app, args).exit_code == 0
    folded = sae_files.load(Path("t.st"))
    facts = folded.header.config["threshold"]
    assert facts["decoder_norms_folded"]
    x = torch.cat([part["acts"] for part in open_cache(Path("acts")).iter_split(HELDOUT)])
    active = long.pre_activations(x) > facts["value"]
    assert torch.equal(folded.sae.encode(x) > 0, active)
    assert torch.allclose(folded.sae.threshold, facts["value"] * long.W_dec.norm(dim=1))


def test_threshold_refuses_what_the_data_do_not_determine(here: Path) -> None:
    few = runner.invoke(app, ["threshold", "raw.st", "--batches", "4", "--precision", "0.01", "-o", "t.st"])
    assert few.exit_code == 2 or few.exit_code == 1
    assert "the threshold is known to" in few.stderr
    assert "and --precision asks for 0.01 of it" in few.stderr
    assert "hint: " in few.stderr
    assert not Path("t.st").exists()


def test_threshold_says_when_the_batch_size_is_not_known(here: Path) -> None:
    save_sae(here / "foreign.st", replace(random_sae(threshold=None), arch="batchtopk", k=3))
    result = runner.invoke(app, ["threshold", "foreign.st", "-o", "t.st"])
    assert result.exit_code == 1
    assert "foreign.st does not say its training batch size; batches of 4096 tokens" in result.stderr
    assert "two batches of 4,096 tokens are the least" in result.stderr


def test_threshold_dry_run_writes_nothing(here: Path) -> None:
    before = sorted(Path().rglob("*"))
    result = runner.invoke(app, ["threshold", "raw.st", "--dry-run"])
    assert result.exit_code == 0
    assert "batch_size: 64" in result.stdout
    assert sorted(Path().rglob("*")) == before


def test_activations_of_another_hook_are_warned_of(here: Path) -> None:
    stray = random_sae()
    save_sae(here / "stray.st", replace(stray, b_dec=stray.b_dec + 20, subtract_b_dec=False))
    runner.invoke(app, ["threshold", "raw.st", "-o", "t.st"])
    result = runner.invoke(app, ["eval", "stray.st", "t.st"])
    assert result.exit_code == 0
    warnings = [line for line in result.stderr.splitlines() if "is negative" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: stray.st: explained variance -")
    assert "probably not from the hook this SAE was trained on" in warnings[0]


def test_eval_gives_intervals_the_bound_and_groups(here: Path) -> None:
    import math

    result = runner.invoke(app, ["eval", "jump.st", "--by", "position", "--by", "token"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    entry, metrics = record["saes"][0], record["saes"][0]["metrics"]
    assert record["n_documents"] == 8
    for name in ("l0", "mse", "explained_variance", "frac_variance_explained", "cossim"):
        low, high = entry["intervals"][name]
        assert low < metrics[name] < high, name
    alive = 24 - metrics["dead"]
    assert entry["recovery_bound"]["bound"] == pytest.approx(metrics["l0"] * math.log(alive / metrics["l0"]))
    assert entry["recovery_bound"]["ratio"] == pytest.approx(16 / entry["recovery_bound"]["bound"])
    assert entry["recovery_bound"]["constant"] == 1
    assert entry["saelens"]["sparsity"]["l0"] == metrics["l0"]
    for grouping in ("position", "token"):
        part = entry["by"][grouping]
        assert sum(part["n"]) == record["n_tokens"]
        mean = sum(n * v for n, v in zip(part["n"], part["mse"], strict=True)) / record["n_tokens"]
        assert mean == pytest.approx(metrics["mse"])
    assert entry["by"]["position"]["ids"] == list(range(32))


def test_many_saes_in_one_call_get_what_each_gets_alone(here: Path) -> None:
    save_sae(here / "second.st", random_sae(seed=1))
    both = json.loads(runner.invoke(app, ["eval", "jump.st", "second.st"]).stdout)["saes"]
    for i, name in enumerate(("jump.st", "second.st")):
        alone = json.loads(runner.invoke(app, ["eval", name]).stdout)["saes"][0]
        assert both[i] == alone


def test_meta_writes_an_sae_and_a_record(here: Path) -> None:
    result = runner.invoke(app, ["meta", "jump.st", "--latents", "6", "--k", "2", "--steps", "50", "-o", "m.st"])
    assert result.exit_code == 0, result.output
    assert result.stdout == "m.st\n"
    loaded = sae_files.load(Path("m.st"))
    assert (loaded.sae.d_sae, loaded.sae.inference, loaded.header.model["hook_name"]) == (6, "jumprelu", "decoder")
    header, payload = container.read_json(Path("m.json"))
    assert header.schema == "saetool/meta@1"
    assert len(payload["decompositions"]["latents"]) == 24
    assert {c["name"] for c in payload["controls"]} == {"random_directions", "shuffled_coordinates"}
    again = runner.invoke(app, ["meta", "jump.st", "--latents", "6", "--k", "2", "--steps", "50", "-o", "m.st"])
    assert "up to date" in again.stderr


def test_meta_recovers_planted_atoms_and_a_null_parent_explains_less(here: Path) -> None:
    g = generator(3)
    atoms = unit_rows(torch.randn(12, 32, generator=g))
    pairs = torch.stack([torch.randperm(12, generator=g)[:2] for _ in range(400)])
    weights = torch.rand(400, 2, 1, generator=g) + 0.5
    rows = unit_rows((atoms[pairs] * weights).sum(1) + 0.02 * torch.randn(400, 32, generator=g))
    parent = random_sae(d_sae=400, d_in=32)
    save_sae(here / "parent.st", replace(parent, W_dec=rows))
    args = ["meta", "parent.st", "--latents", "16", "--k", "2", "--steps", "1500", "--lr", "0.003", "-o", "m.st"]
    assert runner.invoke(app, args).exit_code == 0
    found = unit_rows(sae_files.load(Path("m.st")).sae.W_dec) @ atoms.T
    assert float(found.max(0).values.min()) > 0.95
    _, payload = container.read_json(Path("m.json"))
    explained = payload["variance_explained"]["threshold_mode"]
    assert explained > 0.9
    assert all(c["variance_explained"] < explained - 0.3 for c in payload["controls"])
    atom_of = found.argmax(1).tolist()
    parts = payload["decompositions"]["indices"]
    right = [{atom_of[j] for j in part} == set(pair) for part, pair in zip(parts, pairs.tolist(), strict=True)]
    assert sum(right) > 0.9 * len(right)


def refused(args: list[str], code: int, text: str) -> None:
    before = sorted(Path().rglob("*"))
    result = runner.invoke(app, args)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("hint:")]
    assert result.exit_code == code, result.output
    assert len(lines) == 1, lines
    assert text in lines[0]
    assert sorted(Path().rglob("*")) == before


def test_bad_input_is_one_line(here: Path) -> None:
    save_sae(here / "wide.st", random_sae(d_in=20))
    (here / "cut.st").write_bytes((here / "jump.st").read_bytes()[:-7])
    refused(["threshold", "jump.st"], 2, "states no k to estimate a threshold for")
    refused(["threshold", "raw.st", "--l0", "25"], 2, "--l0 25.0: not between 0 and the 24 latents")
    refused(["threshold", "raw.st", "--method", "median"], 2, "--method median: unknown")
    refused(["threshold", "raw.st", "--precision", "0"], 2, "--precision 0.0: must be positive")
    refused(["threshold", "raw.st", "--batches", "1"], 2, "--batches must be at least 2")
    refused(["threshold", "raw.st", "--batch-size", "600"], 1, "two batches of 600 tokens are the least")
    refused(["threshold", "acts"], 1, "acts: is an activation cache where an SAE was expected")
    refused(["threshold", "raw.st", "missing"], 1, "missing: no such cache")
    refused(["eval", "raw.st"], 2, "BatchTopK SAE without a threshold")
    refused(["eval", "wide.st"], 1, "wide.st: made for activations of width 20, and acts holds width 16")
    refused(["eval", "cut.st"], 1, "cut.st: cut off")
    refused(["eval", "-", "-"], 2, "only one input can be -")
    refused(["eval", "jump.st", "--split", "test"], 2, "--split test: unknown")
    refused(["eval", "jump.st", "--by", "layer"], 2, "--by layer: unknown")
    refused(["eval", "jump.st", "--batch-size", "0"], 2, "--batch-size 0: must be positive")
    refused(["meta", "jump.st", "--latents", "24"], 2, "not fewer than the parent's 24 rows")
    refused(["meta", "jump.st", "--latents", "4", "--k", "9"], 2, "--k 9 with --latents 4")
    refused(["meta", "jump.st", "-o", "no/folder/m.st"], 1, "does not exist")
