"""Cross-entropy with x̂ in the model's place: a real forward pass, counted at the cached positions."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_sae, save_sae, tiny_documents
from typer.testing import CliRunner

from saetool.artifacts.cache import HELDOUT, Cache, open_cache
from saetool.cli import app
from saetool.core.sae import SAE
from saetool.engines import evaluate
from saetool.engines.model import load_model
from saetool.engines.source import find_site, logits_with

runner = CliRunner()


@pytest.fixture
def cache(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """Activations of the tiny model in float32, ``acts`` in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    for i, document in enumerate(tiny_documents(60)):
        Path(f"text/{i:02}.txt").write_text(document)
    args = ["--model", str(tiny_model_dir), "--hook", "blocks.1.hook_resid_post", "--ctx-len", "32", "--dtype", "fp32"]
    result = runner.invoke(app, ["cache", "text", *args, "--device", "cpu", "-o", "acts"])
    assert result.exit_code == 0, result.output
    return open_cache(Path("acts"))


def identity(d: int) -> SAE:
    """An SAE with x̂ = x: latents ± each coordinate."""
    eye = torch.eye(d)
    rows = torch.cat([eye, -eye])
    return SAE(rows.T.contiguous(), torch.zeros(2 * d), rows, torch.zeros(d), None, "relu", None)


def last(events):  # type: ignore[no-untyped-def]
    *_, result = events
    return result


def test_contexts_are_what_the_model_read(cache: Cache) -> None:
    data = evaluate.contexts(cache, HELDOUT, 10**6)
    assert data.ids.shape[1] == 32
    assert (data.ids[:, 0] == cache.header.config["bos_id"]).all()
    assert not data.cached[:, 0].any()
    tokens = cache.row_tensor(HELDOUT, "tokens").long()
    assert torch.equal(data.ids[data.cached], tokens[: int(data.cached.sum())])


def test_clean_and_identity_loss_equal_the_models_own_and_ablations_are_what_they_say(
    cache: Cache, tiny_model_dir: Path
) -> None:
    lm = load_model(str(tiny_model_dir), device="cpu", dtype="float32")
    site = find_site(lm.model, "blocks.1.hook_resid_post")
    data, mean = evaluate.contexts(cache, HELDOUT, 10**6), cache.moments()["mean"]
    constant = replace(identity(32), W_enc=torch.zeros(32, 64), b_dec=mean.float(), subtract_b_dec=False)
    same, flat = last(evaluate.cross_entropy(lm, site, [identity(32), constant], data, mean, 3))
    logits = lm.model(input_ids=data.ids).logits.log_softmax(-1)
    counted = data.cached[:, :-1]
    own = -logits.detach()[:, :-1].gather(-1, data.ids[:, 1:, None])[..., 0][counted].mean()
    assert same.n_tokens == int(counted.sum())
    assert same.ce_loss_without_sae == pytest.approx(float(own), rel=1e-5)
    assert same.ce_loss_with_sae == pytest.approx(same.ce_loss_without_sae, rel=1e-5)
    assert same.ce_loss_score_zero == pytest.approx(1, abs=1e-4)
    assert flat.ce_loss_with_sae == pytest.approx(flat.ce_loss_with_mean_ablation, rel=1e-5)
    assert flat.ce_loss_score_mean == pytest.approx(0, abs=1e-4)
    zeroed = logits_with(lm, site, data.ids, lambda a: torch.where(data.cached[..., None], 0.0, a)).log_softmax(-1)
    expected = -zeroed[:, :-1].gather(-1, data.ids[:, 1:, None])[..., 0][counted].mean()
    assert same.ce_loss_with_zero_ablation == pytest.approx(float(expected), rel=1e-5)


def test_eval_with_ce_gives_the_scores_in_its_record(cache: Cache, tiny_model_dir: Path) -> None:
    save_sae(Path("a.st"), random_sae(d_in=32))
    result = runner.invoke(app, ["eval", "a.st", "--model", str(tiny_model_dir), "--dtype", "fp32"])
    assert result.exit_code == 0, result.output
    ce = json.loads(result.stdout)["saes"][0]["ce"]
    expected = (ce["ce_loss_with_zero_ablation"] - ce["ce_loss_with_sae"]) / (
        ce["ce_loss_with_zero_ablation"] - ce["ce_loss_without_sae"]
    )
    assert ce["ce_loss_score_zero"] == pytest.approx(expected)


def test_an_unknown_model_is_one_line(cache: Cache) -> None:
    save_sae(Path("a.st"), random_sae(d_in=32))
    result = runner.invoke(app, ["eval", "a.st", "--model", "no/such/folder", "-o", "e.json"])
    assert result.exit_code == 1
    assert len([line for line in result.stderr.splitlines() if line.startswith("saetool eval:")]) == 1
    assert not Path("e.json").exists()
