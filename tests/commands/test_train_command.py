"""``saetool train`` as a user meets it: ladders, interruption, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import random_sae, save_sae, sparse_data, write_cache
from safetensors.torch import save_file
from typer.testing import CliRunner

from saetool.artifacts import container
from saetool.artifacts import sae as sae_files
from saetool.cli import app

runner = CliRunner()
SMALL = ["--k", "3", "--tokens", "3000", "--batch-size", "64", "--device", "cpu"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_cache(tmp_path / "acts")
    return tmp_path


def test_a_ladder_writes_the_files_that_single_runs_write(here: Path) -> None:
    result = runner.invoke(app, ["train", "acts", *SMALL, "--latents", "8,24", "-o", "l-{latents}.st"])
    assert result.stdout.split() == ["l-8.st", "l-24.st"]
    runner.invoke(app, ["train", "acts", *SMALL, "--latents", "24", "-o", "alone.st"])
    assert (here / "l-24.st").read_bytes() == (here / "alone.st").read_bytes()


def test_a_ladder_trains_only_what_is_missing(here: Path) -> None:
    args = ["train", "acts", *SMALL, "--latents", "8,24", "-o", "l-{latents}.st"]
    runner.invoke(app, args)
    (here / "l-24.st").unlink()
    again = runner.invoke(app, args)
    assert again.exit_code == 0
    assert "l-8.st: up to date" in again.stderr
    assert "training 1 SAE on" in again.stderr


@pytest.mark.parametrize("arch", ["batchtopk", "topk", "relu", "jumprelu"])
def test_the_header_says_everything_needed_to_use_and_repeat(here: Path, arch: str) -> None:
    runner.invoke(app, ["train", "acts", *SMALL, "--arch", arch, "--latents", "24", "-o", "a.st", "--seed", "4"])
    header = sae_files.load(Path("a.st")).header
    assert header.seed == 4
    assert header.model["hook_name"] == "blocks.0.hook_resid_post"
    for name in ("arch", "d_in", "d_sae", "inference", "apply_b_dec_to_input", "strict_threshold", "lr", "tokens"):
        assert name in header.config, name
    assert header.config["normalization"]["folded"] is True
    assert [e["verb"] for e in header.history] == ["cache", "train"]
    assert ("k" in header.history[-1]["options"]) == (arch in ("batchtopk", "topk"))


def test_the_log_has_a_header_and_named_metrics(here: Path) -> None:
    args = ["train", "acts", *SMALL, "--latents", "8,24", "-o", "l-{latents}.st", "--log", "log.jsonl"]
    assert runner.invoke(app, args).exit_code == 0
    header, records = container.read_jsonl(Path("log.jsonl"))
    assert header.schema == "saetool/trainlog@1"
    assert {r["sae"] for r in records} == {"l-8.st", "l-24.st"}
    assert {"step", "tokens", "loss", "mse", "l0", "dead", "explained_variance", "lr"} <= set(records[0])


def test_killed_and_run_again_gives_the_bytes_of_an_undisturbed_run(here: Path) -> None:
    command = [sys.executable, "-m", "saetool", "train", "acts", "--k", "3", "--latents", "24,40", "--batch-size", "64"]
    command += ["--tokens", "200k", "--device", "cpu", "--checkpoint-every", "0.05", "-o"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "whole-{latents}.st"], env=environment, check=True, capture_output=True)
    kills = 0
    for wait in (0.2, 0.6):
        process = subprocess.Popen([*command, "killed-{latents}.st"], env=environment, stderr=subprocess.DEVNULL)
        while not Path("killed-40.st.ckpt.st").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(wait)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills, "the run must be long enough to be killed"
    last = subprocess.run(
        [*command, "killed-{latents}.st"], env=environment, check=True, capture_output=True, text=True
    )
    assert "resuming at step" in last.stderr
    for width in (24, 40):
        assert Path(f"killed-{width}.st").read_bytes() == Path(f"whole-{width}.st").read_bytes()
    assert not list(here.glob("*.ckpt.st"))


def test_an_interrupt_keeps_a_checkpoint_and_exits_with_130(here: Path) -> None:
    command = [sys.executable, "-m", "saetool", "train", "acts", "--k", "3", "--latents", "24", "--batch-size", "64"]
    process = subprocess.Popen(
        [*command, "--tokens", "20M", "--log", "log.jsonl"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while not Path("log.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "the same command goes on from there" in err
    assert "Traceback" not in err
    assert Path("sae.st.ckpt.st").exists()
    assert not Path("sae.st").exists()


def refused(args: list[str], code: int, text: str) -> None:
    """The command fails with ``code`` and one line (and maybe a hint), and writes nothing."""
    before = sorted(Path().rglob("*"))
    result = runner.invoke(app, args)
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("hint:", "training"))]
    assert result.exit_code == code, result.output
    assert len(lines) == 1, lines
    assert text in lines[0]
    assert result.stdout == ""
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--k", "25", "--latents", "24"], 2, "--k 25 with --latents 24"),
        (["--arch", "vae"], 2, "--arch vae: unknown"),
        (["--latents", "8,24"], 2, "2 widths need {latents}"),
        (["--latents", "8,8", "-o", "{latents}"], 2, "names a count twice"),
        (["--tokens", "many"], 2, "--tokens many: not a positive count"),
        (["--device", "cuda:99"], 2, "--device cuda:99: not usable"),
        (["--latents", "24", "--k", "3", "-o", "no/such/folder/a.st"], 1, "does not exist"),
        (["--latents", "24", "--k", "3", "-o", "acts"], 1, "is a folder"),
    ],
)
def test_bad_options_are_one_line(here: Path, args: list[str], code: int, text: str) -> None:
    refused(["train", "acts", *args], code, text)


def test_a_file_of_another_kind_is_named(here: Path) -> None:
    save_sae(here / "a.st", random_sae())
    refused(["train", "a.st"], 1, "a.st: is not an activation cache (schema saetool/sae@1)")
    save_file({"x": torch.zeros(2)}, here / "foreign.st")
    refused(["train", "foreign.st"], 1, "without a saetool header")


def test_a_damaged_cache_is_named(here: Path) -> None:
    shard = here / "acts" / "shard-00001.st"
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(["train", "acts"], 1, "shard-00001.st: has")
    shard.unlink()
    refused(["train", "acts"], 1, "missing from the cache")
    manifest = here / "acts" / "manifest.json"
    data = json.loads(manifest.read_text())
    del data["shards"]
    manifest.write_text(json.dumps(data))
    refused(["train", "acts"], 1, "manifest.json: damaged")


def test_nan_activations_cannot_get_into_a_cache(tmp_path: Path) -> None:
    acts = sparse_data(640)
    acts[100, 3] = float("nan")
    with pytest.raises(Exception, match="hold NaN or infinity"):
        write_cache(tmp_path / "acts", acts)
    assert not (tmp_path / "acts").exists()
