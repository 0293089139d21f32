"""Cross-entropy and KL with x̂ in the model's place: real forward passes, counted at the cached positions."""

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
from saetool.engines import loss_recovered
from saetool.engines.model import load_model
from saetool.engines.source import capture, find_site, logits_with
from saetool.engines.splice import Splice

runner = CliRunner()
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def cache(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """Activations of the tiny model in float32, ``acts`` in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    for i, document in enumerate(tiny_documents(60)):
        Path(f"text/{i:02}.txt").write_text(document)
    args = ["--model", str(tiny_model_dir), "--hook", HOOK, "--ctx-len", "32", "--dtype", "fp32"]
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
    data = loss_recovered.contexts(cache, HELDOUT, 10**6)
    assert data.ids.shape[1] == 32
    assert (data.ids[:, 0] == cache.header.config["bos_id"]).all()
    assert not data.cached[:, 0].any()
    tokens, documents = (cache.row_tensor(HELDOUT, name).long() for name in ("tokens", "documents"))
    assert torch.equal(data.ids[data.cached], tokens[: int(data.cached.sum())])
    assert torch.equal(data.documents[data.cached], documents[: int(data.cached.sum())])


def test_fewer_contexts_are_spread_over_the_split(cache: Cache) -> None:
    every = loss_recovered.contexts(cache, HELDOUT, 10**6)
    some = loss_recovered.contexts(cache, HELDOUT, 3 * 32)
    assert len(some.ids) == 3
    assert torch.equal(some.ids[[0, -1]], every.ids[[0, -1]])


def test_clean_and_identity_loss_equal_the_models_own_and_ablations_are_what_they_say(
    cache: Cache, tiny_model_dir: Path
) -> None:
    lm = load_model(str(tiny_model_dir), device="cpu", dtype="float32")
    site = find_site(lm.model, HOOK)
    data, mean = loss_recovered.contexts(cache, HELDOUT, 10**6), cache.moments()["mean"]
    constant = replace(identity(32), W_enc=torch.zeros(32, 64), b_dec=mean.float(), subtract_b_dec=False)
    same, flat = (m.values for m in last(loss_recovered.measure(lm, site, [identity(32), constant], data, mean, 3)))
    logits = lm.model(input_ids=data.ids).logits.log_softmax(-1).detach()
    counted = data.cached[:, :-1]
    own = -logits[:, :-1].gather(-1, data.ids[:, 1:, None])[..., 0][counted].mean()
    assert same.n_tokens == int(counted.sum())
    assert same.ce_loss_without_sae == pytest.approx(float(own), rel=1e-5)
    assert same.ce_loss_with_sae == pytest.approx(same.ce_loss_without_sae, rel=1e-5)
    assert same.ce_loss_score_zero == pytest.approx(1, abs=1e-4)
    assert same.kl_div_with_sae == pytest.approx(0, abs=1e-6)
    assert same.kl_div_score_zero == pytest.approx(1, abs=1e-5)
    assert flat.ce_loss_with_sae == pytest.approx(flat.ce_loss_with_mean_ablation, rel=1e-5)
    assert flat.ce_loss_score_mean == pytest.approx(0, abs=1e-4)
    assert flat.kl_div_score_mean == pytest.approx(0, abs=1e-4)
    zeroed = logits_with(lm, site, data.ids, lambda a: torch.where(data.cached[..., None], 0.0, a)).log_softmax(-1)
    expected = -zeroed[:, :-1].gather(-1, data.ids[:, 1:, None])[..., 0][counted].mean()
    assert same.ce_loss_with_zero_ablation == pytest.approx(float(expected), rel=1e-5)
    divergence = (logits.exp() * (logits - zeroed)).sum(-1)[data.cached].mean()
    assert same.kl_div_with_zero_ablation == pytest.approx(float(divergence), rel=1e-5)


def test_rows_that_were_cached_without_their_mean_go_to_the_model_with_it(cache: Cache, tiny_model_dir: Path) -> None:
    lm = load_model(str(tiny_model_dir), device="cpu", dtype="float32")
    site = find_site(lm.model, HOOK)
    # x̂ = x + mean(x)·v: the identity of centred rows, and of no others.
    rows = torch.eye(32) + torch.randn(32, generator=torch.Generator().manual_seed(0)) * 20 / 32
    sae = replace(identity(32), W_dec=torch.cat([rows, -rows]))
    data = loss_recovered.contexts(cache, HELDOUT, 10**6)
    assert not data.centered
    found = {}
    for centered in (True, False):
        events = loss_recovered.measure(lm, site, [sae], replace(data, centered=centered), torch.zeros(32), 3)
        found[centered] = last(events)[0].values
    clean = found[True].ce_loss_without_sae
    assert found[True].ce_loss_with_sae == pytest.approx(clean, rel=1e-5)
    assert abs(found[False].ce_loss_with_sae - clean) > 1e-4
    header = replace(cache.header, config={**cache.header.config, "center": True})
    assert loss_recovered.contexts(replace(cache, header=header), HELDOUT, 64).centered


def test_neither_the_batch_size_nor_other_saes_change_an_saes_figures(cache: Cache, tiny_model_dir: Path) -> None:
    lm = load_model(str(tiny_model_dir), device="cpu", dtype="float32")
    site, mean = find_site(lm.model, HOOK), cache.moments()["mean"]
    data = loss_recovered.contexts(cache, HELDOUT, 10**6)
    one, two = random_sae(d_in=32), random_sae(d_in=32, seed=1)
    alone = last(loss_recovered.measure(lm, site, [two], data, mean, 1))[0]
    beside = last(loss_recovered.measure(lm, site, [one, two], data, mean, 4))[1]
    for name, value in vars(alone.values).items():
        assert getattr(beside.values, name) == pytest.approx(value, rel=1e-5), name
    assert beside.intervals["kl_div_with_sae"] == pytest.approx(alone.intervals["kl_div_with_sae"], rel=1e-5)


# --- passes that begin after the site --------------------------------------------------------------------------------

SITES = [f"blocks.{block}.{place}" for block in (0, 1, 2) for place in ("hook_resid_pre", "hook_resid_post")]
SITES += ["blocks.1.hook_mlp_out", "blocks.1.hook_attn_out", "blocks.0.hook_mlp_out"]


@pytest.mark.parametrize("hook", SITES)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_stepping_over_the_blocks_before_the_site_changes_no_logit(
    hook: str, kind: str, tiny_model_dir: Path, tiny_llama_dir: Path
) -> None:
    lm = load_model(str(tiny_model_dir if kind == "gpt2" else tiny_llama_dir), device="cpu", dtype="float32")
    site = find_site(lm.model, hook)
    splice = Splice(lm, site)
    ids = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    run = splice.clean(ids)
    assert torch.equal(run.acts, capture(lm, site, ids))
    changed = run.acts * 0.5 + 0.1
    assert torch.allclose(splice.logits(run, changed), logits_with(lm, site, ids, lambda _: changed), atol=1e-5)
    assert torch.equal(lm.model(input_ids=ids).logits, run.logits), "the model is as it was"
    begins_at_the_start = hook.startswith("blocks.0") and hook != "blocks.0.hook_resid_post"
    assert splice.resumes is not begins_at_the_start


def test_blocks_before_the_site_run_once_for_all_variants(cache: Cache, tiny_model_dir: Path) -> None:
    lm = load_model(str(tiny_model_dir), device="cpu", dtype="float32")
    site, ran = find_site(lm.model, HOOK), [0, 0, 0]

    def count(number: int):  # type: ignore[no-untyped-def]
        return lambda *_: ran.__setitem__(number, ran[number] + 1)

    for number, block in enumerate(lm.model.transformer.h):
        block.mlp.register_forward_hook(count(number))
    data = loss_recovered.contexts(cache, HELDOUT, 4 * 32)
    saes = [random_sae(d_in=32, seed=seed) for seed in range(3)]
    last(loss_recovered.measure(lm, site, saes, data, cache.moments()["mean"], 2))
    batches, variants = 2, 2 + 3
    assert ran == [batches, batches, batches * (1 + variants) + 1]  # and once for the check


def test_a_model_that_cannot_be_resumed_gets_whole_passes(tiny_model_dir: Path) -> None:
    lm = load_model(str(tiny_model_dir), device="cpu", dtype="float32")
    site, first, third = find_site(lm.model, HOOK), lm.model.transformer.h[0], lm.model.transformer.h[2]
    side: list[torch.Tensor] = []
    first.register_forward_hook(lambda _m, _a, output: side.append(output if torch.is_tensor(output) else output[0]))

    def shortcut(_module, _args, output):  # type: ignore[no-untyped-def]
        extra = side.pop() if side else 0.0  # block 2 reads what block 0 wrote beside the residual stream
        return output + extra if torch.is_tensor(output) else (output[0] + extra, *output[1:])

    third.register_forward_hook(shortcut)
    splice = Splice(lm, site)
    ids = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    run = splice.clean(ids)
    assert splice.resumes is False
    assert torch.allclose(splice.logits(run, run.acts), run.logits, atol=1e-5)


# --- the command -----------------------------------------------------------------------------------------------------


def test_eval_with_ce_gives_scores_intervals_and_saelens_groups(cache: Cache, tiny_model_dir: Path) -> None:
    save_sae(Path("a.st"), random_sae(d_in=32))
    result = runner.invoke(app, ["eval", "a.st", "--model", str(tiny_model_dir), "--dtype", "fp32"])
    assert result.exit_code == 0, result.output
    entry = json.loads(result.stdout)["saes"][0]
    ce = entry["ce"]
    expected = (ce["ce_loss_with_zero_ablation"] - ce["ce_loss_with_sae"]) / (
        ce["ce_loss_with_zero_ablation"] - ce["ce_loss_without_sae"]
    )
    assert ce["ce_loss_score_zero"] == pytest.approx(expected)
    for name in ("ce_loss_with_sae", "ce_loss_score_mean", "kl_div_with_sae"):
        low, high = entry["intervals"][name]
        assert low < ce[name] < high, name
    groups = entry["saelens"]
    assert groups["model_behavior_preservation"]["kl_div_with_sae"] == ce["kl_div_with_sae"]
    assert groups["model_performance_preservation"]["ce_loss_with_ablation"] == ce["ce_loss_with_zero_ablation"]


def test_an_unknown_model_is_one_line(cache: Cache) -> None:
    save_sae(Path("a.st"), random_sae(d_in=32))
    result = runner.invoke(app, ["eval", "a.st", "--model", "no/such/folder", "-o", "e.json"])
    assert result.exit_code == 1
    assert len([line for line in result.stderr.splitlines() if line.startswith("saetool eval:")]) == 1
    assert not Path("e.json").exists()
