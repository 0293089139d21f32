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
from conftest import random_sae, save_sae, sparse_data, tiny_documents, write_cache
from safetensors.torch import save_file
from typer.testing import CliRunner

from saetool.artifacts import container, train_log
from saetool.artifacts import sae as sae_files
from saetool.cli import app
from saetool.config import RECIPES

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


@pytest.mark.parametrize("arch", ["batchtopk", "topk", "relu", "jumprelu", "gated", "matryoshka"])
def test_the_header_says_everything_needed_to_use_and_repeat(here: Path, arch: str) -> None:
    runner.invoke(app, ["train", "acts", *SMALL, "--arch", arch, "--latents", "24", "-o", "a.st", "--seed", "4"])
    header = sae_files.load(Path("a.st")).header
    assert header.seed == 4
    assert header.model["hook_name"] == "blocks.0.hook_resid_post"
    for name in ("arch", "d_in", "d_sae", "inference", "apply_b_dec_to_input", "strict_threshold", "lr", "tokens"):
        assert name in header.config, name
    assert header.config["normalization"]["folded"] is True
    assert [e["verb"] for e in header.history] == ["cache", "train"]
    assert ("k" in header.history[-1]["options"]) == (arch in ("batchtopk", "topk", "matryoshka"))


def test_the_log_has_a_header_and_named_metrics(here: Path) -> None:
    args = ["train", "acts", *SMALL, "--latents", "8,24", "-o", "l-{latents}.st", "--log", "log.jsonl"]
    assert runner.invoke(app, args).exit_code == 0
    header, records = container.read_jsonl(Path("log.jsonl"))
    assert header.schema == "saetool/trainlog@2"
    assert {r["sae"] for r in records} == {"l-8.st", "l-24.st"}
    assert set(records[0]) == {"sae", "latents", "step", "time", *train_log.NAMES.values()}
    assert {"step", "tokens", "loss", "mse", "l0", "dead", "explained_variance", "lr"} <= set(
        train_log.ours(records[0])
    )


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


def test_a_matryoshka_writes_its_prefixes_as_saes(here: Path) -> None:
    args = ["train", "acts", *SMALL, "--arch", "matryoshka", "--latents", "8,16,24"]
    result = runner.invoke(app, [*args, "-o", "m-{latents}.st"])
    assert result.stdout.split() == ["m-8.st", "m-16.st", "m-24.st"], result.output
    whole, small = sae_files.load(Path("m-24.st")), sae_files.load(Path("m-8.st"))
    assert torch.equal(small.sae.W_dec, whole.sae.W_dec[:8])
    assert torch.equal(small.sae.threshold, whole.sae.threshold[:8])
    assert small.header.config["prefix"] == 8
    assert whole.header.config["prefixes"] == [8, 16, 24]
    x = sparse_data(50)
    assert torch.equal(small.sae.encode(x), whole.sae.encode(x)[:, :8])
    assert runner.invoke(app, ["eval", "m-8.st", "m-24.st", "--acts", "acts"]).exit_code == 0
    one = runner.invoke(app, [*args, "-o", "one.st"])
    assert one.stdout.split() == ["one.st"]
    assert torch.equal(sae_files.load(Path("one.st")).sae.W_dec, whole.sae.W_dec)


def test_like_repeats_with_another_seed_or_width(here: Path) -> None:
    first = ["train", "acts", *SMALL, "--latents", "24", "--lr", "0.01"]
    runner.invoke(app, [*first, "-o", "a.st"])
    assert runner.invoke(app, ["train", "acts", "--like", "a.st", "--device", "cpu", "-o", "b.st"]).exit_code == 0
    assert Path("a.st").read_bytes() == Path("b.st").read_bytes()
    runner.invoke(app, [*first, "--seed", "3", "-o", "c.st"])
    like = ["train", "acts", "--like", "a.st", "--device", "cpu", "--seed", "3"]
    runner.invoke(app, [*like, "-o", "d.st"])
    assert Path("c.st").read_bytes() == Path("d.st").read_bytes()
    wide = json.loads(runner.invoke(app, [*like, "--latents", "40", "-o", "e.st", "--json"]).stdout)
    assert wide["kind"] == "sae"
    assert sae_files.load(Path("e.st")).sae.d_sae == 40
    write_cache(here / "other", sparse_data(640, seed=8))
    refused(["train", "other", "--like", "a.st"], 1, "other: is not what a.st was trained on")
    refused(["train", "acts", "--like", "a.st", "--preset", "sparsify"], 2, "give one of them")
    refused(["train", "acts", "--like", "acts"], 1, "acts")


@pytest.mark.parametrize("preset", sorted(RECIPES))
def test_a_preset_prints_every_value_that_it_sets(here: Path, preset: str) -> None:
    result = runner.invoke(app, ["train", "acts", "--preset", preset, "-o", "p-{latents}.st", "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert RECIPES[preset].source in plan["preset"]
    options = [json.loads(v) for name, v in plan.items() if name.endswith(".st")]
    for name, value in RECIPES[preset].options.items():
        if name == "latents":
            assert sorted(o["latents"] for o in options) == [int(w) for w in str(value).split(",")]
        else:
            assert all(o.get(name, value) == value for o in options), name
    assert not list(Path().glob("*.st"))


def test_options_given_win_over_the_preset(here: Path) -> None:
    args = ["train", "acts", "--preset", "batchtopk", "--k", "3", "--latents", "24", "--tokens", "640", "--batch-size"]
    plan = json.loads(runner.invoke(app, [*args, "64", "--dry-run", "--json"]).stdout)
    options = json.loads(plan["sae.st"])
    assert (options["k"], options["latents"], options["tokens"], options["lr"]) == (3, 24, 640, 3e-4)
    refused(["train", "acts", "--preset", "gpt5"], 2, "--preset gpt5: unknown")


def test_an_interrupted_run_can_be_exported_and_still_goes_on(here: Path) -> None:
    command = [sys.executable, "-m", "saetool", "train", "acts", "--k", "3", "--latents", "24", "--batch-size", "64"]
    command += ["--tokens", "20M", "--device", "cpu"]
    process = subprocess.Popen([*command, "--log", "log.jsonl"], stderr=subprocess.DEVNULL)
    while not Path("log.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    export = runner.invoke(app, [*command[3:], "--export-partial"])
    assert export.exit_code == 0, export.output
    path = Path(export.stdout.strip())
    steps = int(path.name.split(".")[1].removeprefix("step"))
    assert path.name == f"sae.step{steps}.st"
    loaded = sae_files.load(path)
    assert loaded.header.config["stopped_at_step"] == steps
    assert loaded.header.key != container.read_header(Path("sae.st.ckpt.st")).key
    assert Path("sae.st.ckpt.st").exists()
    assert not Path("sae.st").exists()
    assert "up to date" in runner.invoke(app, [*command[3:], "--export-partial"]).stderr
    refused(["train", "acts", *SMALL, "--latents", "24", "--export-partial"], 1, "no checkpoint of this run")


def test_divergence_keeps_the_last_good_checkpoint(here: Path) -> None:
    args = ["train", "acts", *SMALL, "--latents", "24", "--arch", "relu", "--checkpoint-every", "0"]
    result = runner.invoke(app, [*args, "--lr", "1e30"])
    assert result.exit_code == 1
    assert "a loss of" in result.stderr.splitlines()[-2]
    assert "lower --lr" in result.stderr.splitlines()[-1]
    assert not Path("sae.st").exists()
    if Path("sae.st.ckpt.st").exists():
        tensors = container.read_tensors(Path("sae.st.ckpt.st"), "saetool/checkpoint@1").tensors
        assert all(bool(t.isfinite().all()) for t in tensors.values())


def test_logging_more_often_changes_no_byte(here: Path) -> None:
    for every, name in ((1, "often.st"), (1000, "seldom.st")):
        args = ["train", "acts", *SMALL, "--latents", "24", "--log-every", str(every), "--log", f"{name}.jsonl"]
        assert runner.invoke(app, [*args, "-o", name]).exit_code == 0
    assert Path("often.st").read_bytes() == Path("seldom.st").read_bytes()
    assert len(Path("often.st.jsonl").read_text().splitlines()) == 1 + 3000 // 64
    assert len(Path("seldom.st.jsonl").read_text().splitlines()) == 2
    refused(["train", "acts", "--log-every", "0"], 2, "--log-every 0")


def test_tensorboard_without_its_package_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused(["train", "acts", *SMALL, "--latents", "24", "--tensorboard", "tb"], 1, "needs the package tensorboard")


def test_more_tokens_than_cached_are_said_to_be_epochs(here: Path) -> None:
    result = runner.invoke(app, ["train", "acts", *SMALL, "--latents", "24"])
    assert "3,000 tokens are 2.9 epochs" in result.stderr


@pytest.mark.parametrize("arch", ["batchtopk", "relu"])
def test_two_processes_train_what_one_trains(here: Path, arch: str) -> None:
    """Under torchrun with gloo: the same weights to float32 rounding; one writer; resumable."""
    options = ["acts", "--arch", arch, "--k", "3", "--latents", "8,40", "--tokens", "3200", "--batch-size", "64"]
    options += ["--device", "cpu", "--log-every", "1"]
    assert runner.invoke(app, ["train", *options, "-o", "one-{latents}.st", "--log", "one.jsonl"]).exit_code == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "saetool"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "train", *options, "-o", "two-{latents}.st", "--log-file", "two.jsonl"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["two-8.st", "two-40.st"]
    assert result.stderr.count("2 processes") == 1
    for width in (8, 40):
        one, two = sae_files.load(Path(f"one-{width}.st")), sae_files.load(Path(f"two-{width}.st"))
        assert one.header.key == two.header.key
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            torch.testing.assert_close(getattr(two.sae, name), getattr(one.sae, name), rtol=1e-2, atol=2e-3)
    (_, one_log), (_, two_log) = (container.read_jsonl(Path(f"{n}.jsonl")) for n in ("one", "two"))
    for a, b in zip(one_log, two_log, strict=True):
        assert a["losses/mse_loss"] == pytest.approx(b["losses/mse_loss"], rel=1e-3)
        assert a["metrics/l0"] == pytest.approx(b["metrics/l0"], rel=1e-2)
    odd = subprocess.run(
        [*command, "train", "acts", *SMALL, "--batch-size", "63", "--latents", "24"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert odd.returncode != 0
    assert "--batch-size 63: cannot be divided among 2 processes" in odd.stderr


def test_a_model_and_text_take_the_place_of_a_cache(here: Path, tiny_model_dir: Path) -> None:
    for i, document in enumerate(tiny_documents()):
        (here / "texts").mkdir(exist_ok=True)
        (here / "texts" / f"{i:03}.txt").write_text(document)
    live = ["train", "--model", str(tiny_model_dir), "--layer", "1", "--text", "texts", "--ctx-len", "16"]
    options = ["--k", "3", "--latents", "24", "--tokens", "2000", "--batch-size", "50", "--device", "cpu"]
    result = runner.invoke(app, [*live, *options])
    assert result.exit_code == 0, result.output
    assert "computes activations of" in result.stderr
    header = sae_files.load(Path("sae.st")).header
    assert header.model["hook_name"] == "blocks.1.hook_resid_post"
    assert header.history[-1]["options"]["live"]["ctx_len"] == 16
    first = Path("sae.st").read_bytes()
    assert "up to date" in runner.invoke(app, [*live, *options]).stderr
    assert runner.invoke(app, [*live, *options, "--overwrite"]).exit_code == 0
    assert Path("sae.st").read_bytes() == first
    plan = json.loads(runner.invoke(app, [*live, *options, "-o", "b.st", "--dry-run", "--json"]).stdout)
    assert plan["steps"] == 40
    refused([*live, *options, "--dataset", "x"], 2, "one source of text is enough")
    refused(["train", "--model", str(tiny_model_dir)], 2, "--model needs --hook or --layer")
