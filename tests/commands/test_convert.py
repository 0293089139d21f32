"""``saetool convert`` and every verb that takes another library's SAE, as a user types them."""

import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from saetool.artifacts import sae as sae_files
from saetool.cli import app
from tests.conftest import random_sae, save_sae, sparse_data, write_cache

GOLDEN = Path(__file__).parent.parent / "artifacts" / "golden_foreign"
BATCHTOPK = GOLDEN / "saelens" / "batchtopk_short"
D = 12


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def acts(folder: Path) -> Path:
    """A cache whose activations have the golden files' width."""
    write_cache(folder / "acts", sparse_data(40 * 32, d=D))
    return folder / "acts"


def test_a_folder_becomes_one_file_that_says_where_it_comes_from(here: Path) -> None:
    result = run("convert", GOLDEN / "saelens" / "topk", "-o", "sae.st")
    assert result.exit_code == 0 and result.stdout == "sae.st\n"
    assert "proved on 64 probe rows" in result.stderr
    header = sae_files.load(here / "sae.st").header
    assert header.config["source"]["format"] == "saelens"
    assert header.config["source"]["settings"]["k"] == 4
    assert header.config["proof"]["max_difference_z"] <= 1e-5
    assert header.model["hook_name"] == "blocks.8.hook_resid_pre" and header.model["id"] == "gpt2"
    assert [e["verb"] for e in header.history] == ["convert"]
    again = run("convert", GOLDEN / "saelens" / "topk", "-o", "sae.st")
    assert again.exit_code == 0 and "up to date" in again.stderr
    other = run("convert", GOLDEN / "saelens" / "gated", "-o", "sae.st")
    assert other.exit_code == 1 and "--overwrite" in other.stderr
    assert run("convert", GOLDEN / "saelens" / "gated", "-o", "sae.st", "--overwrite").exit_code == 0


def test_json_and_dry_run(here: Path) -> None:
    planned = run("convert", GOLDEN / "saelens" / "gated", "-o", "sae.st", "--dry-run", "--json")
    assert planned.exit_code == 0 and json.loads(planned.stdout)["arch"] == "jumprelu"
    assert not list(here.iterdir())
    record = json.loads(run("convert", GOLDEN / "saelens" / "gated", "-o", "sae.st", "--json").stdout)
    assert record["kind"] == "sae" and record["metrics"]["format"] == "saelens"
    assert record["metrics"]["max_difference_z"] <= 1e-5


def test_out_and_back_gives_the_same_sae(here: Path) -> None:
    save_sae(here / "sae.st", replace(random_sae(threshold=None), arch="topk", k=4))
    for target in ("saelens", "sparsify", "dictionary_learning"):
        result = run("convert", "sae.st", "--to", target, "-o", target)
        assert result.exit_code == 0 and result.stdout == f"{target}\n", result.stderr
        back = run("convert", target, "-o", f"{target}.st", "--hook", "blocks.0.hook_resid_post")
        assert back.exit_code == 0, back.stderr
        one, two = sae_files.load(here / "sae.st").sae, sae_files.load(here / f"{target}.st").sae
        x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(one.encode(x), two.encode(x), atol=1e-5)
    again = run("convert", "sae.st", "--to", "saelens", "-o", "saelens")
    assert again.exit_code == 0 and "up to date" in again.stderr
    (here / "saelens" / "cfg.json").write_text("{}")
    assert "not the file that was exported" in run("convert", "sae.st", "--to", "saelens", "-o", "saelens").stderr
    assert run("convert", "sae.st", "--to", "saelens", "-o", "saelens", "--overwrite").exit_code == 0


def test_one_library_to_another_without_a_stop(here: Path) -> None:
    assert run("convert", GOLDEN / "sparsify" / "layers.5", "--to", "saelens", "-o", "out").exit_code == 0
    probe = load_file(GOLDEN / "sparsify" / "layers.5" / "probe.safetensors")
    loaded = sae_files.load(here / "out")
    assert torch.allclose(loaded.sae.encode(probe["x"]), probe["z"], atol=1e-5)
    assert loaded.header.model["hook_name"] == "blocks.5.hook_resid_post"


@pytest.mark.parametrize("target", ["saelens", "sparsify", "dictionary_learning"])
def test_an_export_can_be_read_by_whom_the_umask_lets(here: Path, target: str) -> None:
    assert run("convert", GOLDEN / "sparsify" / "layers.5", "--to", target, "-o", "out").exit_code == 0
    mask = os.umask(0)
    os.umask(mask)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (here / "out").rglob("*") if file.is_file()}
    assert modes == {0o666 & ~mask}


def test_threshold_repairs_a_batchtopk_sae_of_saelens_and_goes_back(here: Path) -> None:
    cache = acts(here)
    shutil.copytree(BATCHTOPK, here / "theirs")
    result = run("threshold", "theirs", cache, "--batch-size", 256, "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["path"] == "theirs-threshold.st"
    before, after = sae_files.load(here / "theirs").sae, sae_files.load(here / "theirs-threshold.st")
    x = sparse_data(40 * 32, d=D)
    l0 = [(s.encode(x) > 0).sum(1).float().mean().item() for s in (before, after.sae)]
    assert abs(l0[1] - 4) < 0.4 < abs(l0[0] - 4)
    assert [e["verb"] for e in after.header.history] == ["convert", "cache", "threshold"]
    assert run("convert", "theirs-threshold.st", "--to", "saelens", "-o", "repaired").exit_code == 0
    config = json.loads((here / "repaired" / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu" and config["metadata"]["training_architecture"] == "batchtopk"
    assert config["metadata"]["context_size"] == 128  # what its metadata said before
    weights = load_file(here / "repaired" / "sae_weights.safetensors")
    assert torch.equal(weights["threshold"], after.sae.threshold)


def test_the_example_script_repairs_a_threshold(here: Path) -> None:
    script = Path(__file__).parent.parent.parent / "examples" / "repair_threshold.sh"
    cache = acts(here)
    shutil.copytree(BATCHTOPK, here / "theirs")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(script), "theirs/", str(cache), "theirs-repaired", "--batch-size", "256"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    before, after = json.loads((here / "theirs-repaired.json").read_text())["saes"]
    assert abs(after["metrics"]["l0"] - 4) < 0.5 < abs(before["metrics"]["l0"] - 4)


def test_verbs_take_folders_where_they_take_files(here: Path) -> None:
    cache = acts(here)
    one, two = GOLDEN / "saelens" / "jumprelu", GOLDEN / "dictionary_learning" / "matryoshka"
    evaluated = run("eval", one, two, GOLDEN / "saelens" / "standard_layer_norm", "--acts", cache)
    assert evaluated.exit_code == 0, evaluated.stderr
    entries = json.loads(evaluated.stdout)["saes"]
    assert [e["name"] for e in entries] == ["jumprelu", "matryoshka", "standard_layer_norm"]
    assert all(e["metrics"]["explained_variance"] is not None for e in entries)
    assert "trained on blocks.8.hook_resid_pre" in evaluated.stderr
    stitched = run("stitch", one, two, "--theta", 0.7)
    assert stitched.exit_code == 0 and json.loads(stitched.stdout)["saes"][0]["name"] == "jumprelu"
    assert run("stitch", one, two, "--theta", 0.7, "-o", "both.st").exit_code == 0
    meta = run("meta", one, "--latents", 6, "--k", 2, "--steps", 5, "-o", "meta.st")
    assert meta.exit_code == 0, meta.stderr
    shown = run("inspect", one)
    assert shown.exit_code == 0 and "proof" in shown.stdout and "W_enc F32 [12, 24]" in shown.stdout


def test_what_normalises_each_token_is_not_stitched_on_data(here: Path) -> None:
    cache = acts(here)
    one, two = GOLDEN / "saelens" / "standard_layer_norm", GOLDEN / "saelens" / "standard"
    assert run("stitch", one, two, "--theta", 0.7).exit_code == 0  # decoder cosines
    for arguments in (["--acts", cache], ["-o", "both.st"]):
        result = run("stitch", one, two, "--theta", 0.7, *arguments)
        assert result.exit_code == 2 and "each token" in result.stderr and "hint:" in result.stderr
    assert not (here / "both.st").exists()
    assert run("convert", one, "--to", "sparsify", "-o", "x").exit_code == 2
    assert run("convert", one, "--to", "saelens", "-o", "x").exit_code == 0
    assert json.loads((here / "x" / "cfg.json").read_text())["normalize_activations"] == "layer_norm"


def test_a_hook_that_is_nowhere_in_the_files_is_asked_for(here: Path) -> None:
    folder = here / "saes"
    shutil.copytree(GOLDEN / "saelens" / "standard", folder)
    config = json.loads((folder / "cfg.json").read_text())
    del config["metadata"]["hook_name"]
    (folder / "cfg.json").write_text(json.dumps(config))
    result = run("convert", folder, "-o", "sae.st")
    assert result.exit_code == 2 and "--hook" in result.stderr and not (here / "sae.st").exists()
    assert run("convert", folder, "-o", "sae.st", "--hook", "blocks.3.hook_resid_pre", "--model", "gpt2").exit_code == 0
    header = sae_files.load(here / "sae.st").header
    assert header.model["hook_name"] == "blocks.3.hook_resid_pre" and header.model["id"] == "gpt2"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["none", "-o", "x.st"], "no such file"),
        (["FOLDER", "-o", "x.st", "--from", "keras"], "--from keras: unknown"),
        (["FOLDER", "-o", "x", "--to", "keras"], "--to keras: unknown"),
        (["FOLDER", "-o", "x.st", "--k", "0"], "must be positive"),
        (["FOLDER", "-o", "x.st", "--from", "sparsify"], "no SAE that saetool can read"),
        (["FOLDER", "-o", "x.st", "--input-scale", "2"], "not scaled"),
        (["sae.st", "-o", "x.st"], "saetool's own already"),
        (["sae.st", "-o", "-", "--to", "saelens"], "cannot go to standard output"),
        (["sae.st", "-o", "sae.st", "--to", "saelens"], "is a file"),
        (["sae.st", "-o", "full", "--to", "saelens"], "something else in it"),
        (["sae.st", "-o", "no/x", "--to", "saelens"], "does not exist"),
        (["sae.st", "-o", "x", "--to", "sparsify"], "knows topk and groupmax alone"),
        (["acts", "-o", "x.st"], "activation cache where an SAE"),
        (["empty", "-o", "x.st"], "it holds nothing"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(here: Path, arguments: list[str], word: str) -> None:
    save_sae(here / "sae.st", random_sae())
    write_cache(here / "acts")
    (here / "empty").mkdir()
    (here / "full").mkdir()
    (here / "full" / "thesis.tex").write_text("do not delete")
    before = {p for p in here.rglob("*") if "acts" not in str(p)}
    folder = str(GOLDEN / "saelens" / "standard")
    result = run("convert", *[folder if a == "FOLDER" else a for a in arguments])
    assert result.exit_code in (1, 2) and word in result.stderr, result.stderr
    assert len([line for line in result.stderr.splitlines() if not line.startswith("hint:")]) == 1
    assert {p for p in here.rglob("*") if "acts" not in str(p)} == before


def test_overwrite_never_deletes_a_folder_that_is_no_export(here: Path) -> None:
    save_sae(here / "sae.st", random_sae())
    (here / "full").mkdir()
    (here / "full" / "thesis.tex").write_text("do not delete")
    result = run("convert", "sae.st", "-o", "full", "--to", "saelens", "--overwrite")
    assert result.exit_code == 1 and (here / "full" / "thesis.tex").exists()


def test_a_batchtopk_sae_without_a_threshold_says_what_to_do(here: Path) -> None:
    folder = GOLDEN / "dictionary_learning" / "batchtopk_short"
    result = run("convert", folder, "-o", "sae.st")
    assert result.exit_code == 0 and "saetool threshold" in result.stderr
    refused = run("convert", folder, "--to", "saelens", "-o", "out")
    assert refused.exit_code == 2 and "saetool threshold" in refused.stderr
