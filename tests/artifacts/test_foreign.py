"""Every layout is read: golden files made by the libraries' own code (tests/interop/run.py), which hold what that code
gives on random inputs; and files built here for the releases whose code is no package."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saetool.artifacts import container, foreign, hub
from saetool.artifacts import header as h
from saetool.artifacts import sae as sae_files
from saetool.artifacts.foreign import export
from saetool.artifacts.foreign.imported import Asked
from saetool.core.sae import SAE, unit_rows
from saetool.errors import ArtifactError, BackendError, ConfigError, SaetoolError
from tests.conftest import random_sae, save_sae

GOLDEN = Path(__file__).parent / "golden_foreign"
PROBES = sorted(p.parent for p in GOLDEN.rglob("probe.safetensors"))
REFUSED = {"transcoder/layers.5"}
D, F = 8, 20


def name_of(folder: Path) -> str:
    return folder.relative_to(GOLDEN).as_posix()


def refused_name(folder: Path) -> bool:
    return any(name_of(folder).endswith(name) for name in REFUSED)


READABLE = [f for f in PROBES if not refused_name(f)]


def test_there_are_golden_files_of_each_library() -> None:
    assert {name_of(f).split("/")[0] for f in READABLE} >= {"saelens", "sparsify", "dictionary_learning"}
    assert len(READABLE) >= 25


@pytest.mark.parametrize("folder", READABLE, ids=name_of)
def test_golden_files_give_what_their_library_gave(folder: Path) -> None:
    loaded = sae_files.load(folder)
    probe = load_file(folder / "probe.safetensors")
    # The libraries answered for a training checkpoint, or an unset threshold, as in training: over the whole batch.
    batch = loaded.inference == "batchtopk" or folder.name.endswith("checkpoint")
    z = loaded.sae.encode(probe["x"], batch=batch)
    x_hat = loaded.sae.decode(z, probe["x"])
    if folder.name == "abstopk":  # one latent for each sign
        z = z[:, : z.shape[1] // 2] - z[:, z.shape[1] // 2 :]
    assert (z - probe["z"]).abs().max() <= 1e-5
    assert (x_hat - probe["x_hat"]).abs().max() <= 1e-5
    assert loaded.header.config["proof"]["max_difference_z"] <= 1e-5
    assert loaded.header.model["hook_name"] or "openai" in name_of(folder)


@pytest.mark.parametrize("folder", [f for f in PROBES if refused_name(f)], ids=name_of)
def test_what_is_no_plain_sae_is_refused_with_the_reason(folder: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        sae_files.load(folder)
    assert caught.value.hint


@pytest.mark.parametrize("folder", READABLE, ids=name_of)
@pytest.mark.parametrize("target", list(foreign.WRITERS))
def test_each_sae_goes_out_and_comes_back_the_same(folder: Path, target: str, tmp_path: Path) -> None:
    before = sae_files.load(folder)
    plan = h.Plan("convert", h.EXPORT, {"to": target}, [before.as_input("sae")], [before.header])
    try:
        export.write(tmp_path / "out", before.sae, before.header, plan, target)
    except ConfigError as error:
        assert error.hint and not list(tmp_path.iterdir())
        return
    after = sae_files.load(tmp_path / "out")
    x = load_file(folder / "probe.safetensors")["x"]
    batch = before.inference == "batchtopk"
    one, two = before.sae.encode(x, batch=batch), after.sae.encode(x, batch=batch)
    assert torch.allclose(one, two, atol=1e-5)
    assert torch.allclose(before.sae.decode(one, x), after.sae.decode(two, x), atol=1e-5)
    assert after.header.model["hook_name"] == before.header.model["hook_name"] or target in ("gemma_scope", "sparsify")


def test_saelens_holds_every_sae_that_encodes_tokens(tmp_path: Path) -> None:
    for i, folder in enumerate(READABLE):
        loaded = sae_files.load(folder)
        plan = h.Plan("convert", h.EXPORT, {}, [], [])
        if loaded.inference in ("batchtopk", "groupmax"):
            with pytest.raises(ConfigError, match=r"no threshold yet|no groupmax"):
                export.write(tmp_path / str(i), loaded.sae, loaded.header, plan, "saelens")
        else:
            export.write(tmp_path / str(i), loaded.sae, loaded.header, plan, "saelens")


# --- what only files can say -----------------------------------------------------------------------------------


def test_a_batchtopk_sae_of_saelens_keeps_its_k_and_can_be_estimated_again() -> None:
    loaded = sae_files.load(GOLDEN / "saelens" / "batchtopk_short")
    assert (loaded.sae.arch, loaded.sae.k, loaded.inference) == ("batchtopk", 4, "jumprelu")


def test_a_threshold_that_was_never_set_is_none_not_minus_one() -> None:
    loaded = sae_files.load(GOLDEN / "dictionary_learning" / "batchtopk_short")
    assert loaded.sae.threshold is None and loaded.inference == "batchtopk" and loaded.sae.k == 4
    assert loaded.header.config["proof"]["active"] == 4.0
    topk = sae_files.load(GOLDEN / "dictionary_learning" / "topk")  # it has a threshold too, and ranks all the same
    assert topk.sae.threshold is None and topk.inference == "topk"


def test_sparsify_with_num_latents_0_has_expansion_factor_times_d() -> None:
    folder = GOLDEN / "sparsify" / "layers.5.mlp"
    assert json.loads((folder / "cfg.json").read_text())["num_latents"] == 0
    loaded = sae_files.load(folder)
    assert loaded.sae.d_sae == 2 * loaded.sae.d_in
    assert loaded.header.model["hook_name"] == "blocks.5.hook_mlp_out"
    assert loaded.header.model["hf_hook_name"] == "layers.5.mlp"
    assert loaded.header.model["id"] == "EleutherAI/pythia-160m"


@pytest.mark.parametrize("kind", ["standard", "topk_plain"])
def test_saelens_before_version_6_is_flat_and_reads_the_same(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(GOLDEN / "saelens" / kind, folder)
    new = json.loads((folder / "cfg.json").read_text())
    old = {
        "d_in": new["d_in"], "d_sae": new["d_sae"], "dtype": "float32", "hook_point": "blocks.8.hook_resid_pre",
        "hook_point_head_index": None, "model_name": "gpt2-small", "normalize_activations": False,
        "activation_fn_str": "relu" if kind == "standard" else "topk",
        "activation_fn_kwargs": {} if kind == "standard" else {"k": new["k"]},
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(old))
    probe = load_file(folder / "probe.safetensors")
    loaded = sae_files.load(folder)
    assert torch.allclose(loaded.sae.encode(probe["x"]), probe["z"], atol=1e-5)
    assert loaded.header.model["hook_name"] == "blocks.8.hook_resid_pre"
    assert loaded.header.model["id"] == "gpt2-small"
    (folder / "cfg.json").write_text(json.dumps({**old, "normalize_activations": True}))
    with pytest.raises(ConfigError, match="scaled by") as caught:  # the constant is nowhere in the files
        sae_files.load(folder)
    assert "--input-scale" in (caught.value.hint or "")
    scaled = sae_files.load(folder, Asked(input_scale=0.5)).sae
    x = 2 * probe["x"]
    assert torch.allclose(scaled.encode(x) / 2, probe["z"], atol=1e-5)
    assert torch.allclose(scaled.decode(scaled.encode(x)) / 2, probe["x_hat"], atol=1e-5)


def test_old_scaling_factors_go_into_the_decoder_or_stop_the_import(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(GOLDEN / "saelens" / "standard", folder)
    t = load_file(folder / "sae_weights.safetensors")
    factor = torch.linspace(0.5, 1.5, len(t["b_enc"]))
    save_file({**t, "scaling_factor": factor}, folder / "sae_weights.safetensors")
    with pytest.raises(ArtifactError, match="scaling_factor"):
        sae_files.load(folder)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, "finetuning_scaling_factor": True}))
    x = load_file(folder / "probe.safetensors")["x"]
    plain, tuned = sae_files.load(GOLDEN / "saelens" / "standard").sae, sae_files.load(folder).sae
    z = plain.encode(x)
    assert torch.equal(tuned.encode(x), z)
    assert torch.allclose(tuned.decode(z), (z * factor) @ t["W_dec"] + t["b_dec"], atol=1e-5)


@pytest.mark.parametrize("folder", ["saelens/standard_square", "dictionary_learning/topk_square"])
def test_square_weights_stored_the_wrong_way_round_are_caught(folder: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / folder, tmp_path / "sae")
    sae_files.load(tmp_path / "sae")
    for both in (False, True):
        if folder.startswith("saelens"):
            file = GOLDEN / folder / "sae_weights.safetensors"
            t = load_file(file)
            names = ["W_enc", "W_dec"] if both else ["W_enc"]
            turned = {n: v.T.contiguous() if n in names else v for n, v in t.items()}
            save_file(turned, tmp_path / "sae" / "sae_weights.safetensors")
        else:
            t = torch.load(GOLDEN / folder / "ae.pt", weights_only=True)
            names = ["encoder.weight", "decoder.weight"] if both else ["encoder.weight"]
            torch.save({n: v.T.contiguous() if n in names else v for n, v in t.items()}, tmp_path / "sae" / "ae.pt")
        if both and not unit(t):
            continue  # tied weights with free norms: turned over they are an SAE as good as the other
        with pytest.raises(ConfigError, match="square") as caught:
            sae_files.load(tmp_path / "sae")
        assert "--transposed" in (caught.value.hint or "")
    if unit(t):
        right, turned_back = (sae_files.load(p, a).sae for p, a in (
            (GOLDEN / folder, Asked()), (tmp_path / "sae", Asked(transposed=True))
        ))  # fmt: skip
        assert torch.equal(right.W_enc, turned_back.W_enc) and torch.equal(right.W_dec, turned_back.W_dec)


def unit(t: dict[str, Tensor]) -> bool:
    rows = t["W_dec"] if "W_dec" in t else t["decoder.weight"].T
    return bool(torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=1e-3))


def test_a_reading_that_differs_from_the_formula_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = foreign.READERS["saelens"]
    for change in ({"subtract_b_dec": False}, {"b_enc": torch.zeros(24)}, {"k": 3}):
        folder = GOLDEN / "saelens" / ("topk" if "k" in change else "standard")

        def wrong(found, asked, change=change):  # type: ignore[no-untyped-def]
            imported = reader(found, asked)
            return replace(imported, sae=replace(imported.sae, **change))

        monkeypatch.setitem(foreign.READERS, "saelens", wrong)
        with pytest.raises(ArtifactError, match="differ on the probe"):
            sae_files.load(folder)


def test_the_hash_is_that_of_the_files_that_were_read(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "saelens" / "standard", tmp_path / "a")
    first = sae_files.load(tmp_path / "a").sha256
    (tmp_path / "a" / "notes.txt").write_text("irrelevant")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert sae_files.load(tmp_path / "b").sha256 == first
    config = json.loads((tmp_path / "a" / "cfg.json").read_text())
    (tmp_path / "a" / "cfg.json").write_text(json.dumps({**config, "more": 1}))
    assert sae_files.load(tmp_path / "a").sha256 != first


# --- releases whose files are built here -----------------------------------------------------------------------


def parts(seed: int = 0) -> dict[str, Tensor]:
    """W_enc [d, F], b_enc, W_dec [F, d] with unit rows, b_dec, threshold."""
    g = torch.Generator().manual_seed(seed)
    w_dec = unit_rows(torch.randn(F, D, generator=g))
    return {
        "W_enc": w_dec.T.contiguous() + 0.1 * torch.randn(D, F, generator=g),
        "b_enc": 0.2 * torch.randn(F, generator=g),
        "W_dec": w_dec,
        "b_dec": 0.3 * torch.randn(D, generator=g),
        "threshold": 0.3 + 0.3 * torch.rand(F, generator=g),
    }


def by_hand(x: Tensor, p: dict[str, Tensor], active: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """One latent after the other, in plain arithmetic: z_f where it is active, and the sum of decoder rows."""
    z = torch.zeros(len(x), len(p["b_enc"]))
    out = p["b_dec"].expand(len(x), -1).clone()
    pre = torch.stack([(x * p["W_enc"][:, f]).sum(1) + p["b_enc"][f] for f in range(z.shape[1])], dim=1)
    keep = active(pre)
    for f in range(z.shape[1]):
        z[:, f] = torch.where(keep[:, f], pre[:, f], torch.zeros(len(x)))
        out += z[:, f : f + 1] * p["W_dec"][f]
    return z, out


def rows(n: int = 40) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(9))


def check(sae: SAE, x: Tensor, z: Tensor, x_hat: Tensor) -> None:
    assert (z > 0).any()
    assert torch.allclose(sae.encode(x), z, atol=1e-5)
    assert torch.allclose(sae.decode(sae.encode(x), x), x_hat, atol=1e-5)


def largest(k: int) -> Callable[[Tensor], Tensor]:
    return lambda pre: (pre >= pre.sort(dim=1, descending=True).values[:, k - 1 : k]) & (pre > 0)


def test_gemma_scope_1(tmp_path: Path) -> None:
    p = parts()
    place = tmp_path / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k"
    for l0 in (176, 82):
        (place / f"average_l0_{l0}").mkdir(parents=True)
        np.savez(place / f"average_l0_{l0}" / "params.npz", **{n: t.numpy() for n, t in p.items()})
    loaded = sae_files.load(place / "average_l0_82")
    check(loaded.sae, rows(), *by_hand(rows(), p, lambda pre: (pre > p["threshold"]) & (pre > 0)))
    assert loaded.header.model["hook_name"] == "blocks.12.hook_resid_post"
    assert loaded.header.model["id"] == "google/gemma-2-2b"
    with pytest.raises(ArtifactError) as caught:
        sae_files.load(place)
    assert "average_l0_82, average_l0_176" in caught.value.message  # listed in order, none picked
    assert "average_l0_82" in (caught.value.hint or "")
    with pytest.raises(ArtifactError, match="holds 2 SAEs: layer_12/width_16k/average_l0_82"):
        sae_files.load(place.parent.parent)


def test_gemma_scope_embedding_saes_read_x_over_root_d(tmp_path: Path) -> None:
    p = parts()
    place = tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_44"
    place.mkdir(parents=True)
    np.savez(place / "params.npz", **{n: t.numpy() for n, t in p.items()})
    root = math.sqrt(D)
    scaled = {**p, "W_enc": p["W_enc"] / root, "W_dec": p["W_dec"] * root}
    loaded = sae_files.load(place)
    check(loaded.sae, 3 * rows(), *by_hand(3 * rows(), scaled, lambda pre: (pre > p["threshold"]) & (pre > 0)))
    assert loaded.header.model["hook_name"] == "hook_embed"


def test_gemma_scope_2(tmp_path: Path) -> None:
    p = parts()
    place = tmp_path / "resid_post" / "layer_9_width_16k_l0_small"
    place.mkdir(parents=True)
    save_file({n.replace("W_", "w_"): t for n, t in p.items()}, place / "params.safetensors")
    config = {"architecture": "jump_relu", "model_name": "gemma-3-1b-pt", "hf_hook_point_in": "model.layers.9.output"}
    (place / "config.json").write_text(json.dumps(config))
    loaded = sae_files.load(place)
    check(loaded.sae, rows(), *by_hand(rows(), p, lambda pre: (pre > p["threshold"]) & (pre > 0)))
    assert loaded.header.model["hook_name"] == "blocks.9.hook_resid_post"
    save_file({**{n.replace("W_", "w_"): t for n, t in p.items()}, "affine_skip_connection": torch.eye(D)},
              place / "params.safetensors")  # fmt: skip
    with pytest.raises(ArtifactError, match="transcoder"):
        sae_files.load(place)


def test_qwen_scope_has_the_same_names_the_other_way_round(tmp_path: Path) -> None:
    p = parts()
    place = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"
    place.mkdir()
    stored = {"W_enc": p["W_enc"].T.contiguous(), "W_dec": p["W_dec"].T.contiguous(), "b_enc": p["b_enc"],
              "b_dec": p["b_dec"]}  # fmt: skip
    torch.save(stored, place / "layer7.sae.pt")
    loaded = sae_files.load(place / "layer7.sae.pt")
    check(loaded.sae, rows(), *by_hand(rows(), p, largest(5)))
    assert loaded.header.model == {
        "id": "Qwen/Qwen3-1.7B-Base", "revision": None, "hook_name": "blocks.7.hook_resid_post",
        "hf_hook_name": "model.layers.7", "width": D,
    }  # fmt: skip
    torch.save({n: p[n] for n in stored}, place / "layer8.sae.pt")  # as SAELens would: the shape decides
    assert torch.equal(sae_files.load(place / "layer8.sae.pt").sae.W_enc, loaded.sae.W_enc)
    elsewhere = tmp_path / "layer7.sae.pt"
    shutil.copy(place / "layer7.sae.pt", elsewhere)
    with pytest.raises(ConfigError, match="does not say k"):
        sae_files.load(elsewhere)
    assert sae_files.load(elsewhere, Asked(k=5)).sae.k == 5


def test_bare_square_weights_are_turned_by_the_probe_or_asked_about(tmp_path: Path) -> None:
    w = unit_rows(torch.randn(D, D, generator=torch.Generator().manual_seed(2)))
    stored = {"W_enc": w.contiguous(), "W_dec": w.T.contiguous(), "b_enc": torch.zeros(D), "b_dec": torch.zeros(D)}
    torch.save(stored, tmp_path / "layer1.sae.pt")
    right = sae_files.load(tmp_path / "layer1.sae.pt", Asked(k=2)).sae
    assert torch.equal(right.W_dec, w)
    torch.save({**stored, "W_enc": w.T.contiguous(), "W_dec": w.contiguous()}, tmp_path / "layer1.sae.pt")
    assert torch.equal(sae_files.load(tmp_path / "layer1.sae.pt", Asked(k=2)).sae.W_dec, w)
    basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(2))).Q
    torch.save({**stored, "W_enc": basis, "W_dec": basis.T.contiguous()}, tmp_path / "layer1.sae.pt")
    with pytest.raises(ConfigError, match="does not confirm"):  # rows and columns of norm 1: no evidence
        sae_files.load(tmp_path / "layer1.sae.pt", Asked(k=2))
    sae_files.load(tmp_path / "layer1.sae.pt", Asked(k=2, transposed=False))


def test_goodfire(tmp_path: Path) -> None:
    p = parts()
    file = tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    stored = {"encoder_linear.weight": p["W_enc"].T, "encoder_linear.bias": p["b_enc"],
              "decoder_linear.weight": p["W_dec"].T, "decoder_linear.bias": p["b_dec"]}  # fmt: skip
    torch.save({n: t.contiguous() for n, t in stored.items()}, file)
    loaded = sae_files.load(file)
    check(loaded.sae, rows(), *by_hand(rows(), p, lambda pre: pre > 0))
    assert loaded.header.model["hook_name"] == "blocks.19.hook_resid_post"
    assert loaded.header.model["id"] == "meta-llama/Llama-3.1-8B-Instruct"


@pytest.mark.parametrize("k", [None, 4])
def test_openai(k: int | None, tmp_path: Path) -> None:
    p = parts()
    stored = {"pre_bias": p["b_dec"], "encoder.weight": p["W_enc"].T.contiguous(), "latent_bias": p["b_enc"],
              "decoder.weight": p["W_dec"].T.contiguous(), "stats_last_nonzero": torch.zeros(F, dtype=torch.long),
              "activation": "ReLU" if k is None else "TopK",
              "activation_state_dict": {} if k is None else {"k": k, "postact_fn": "ReLU"}}  # fmt: skip
    torch.save(stored, tmp_path / "8.pt")
    x = 5 * rows() + 2
    mean, sd = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    normed = x if k is None else (x - mean) / (sd + 1e-5)
    z, x_hat = by_hand(normed - p["b_dec"], p, (lambda pre: pre > 0) if k is None else largest(k))
    loaded = sae_files.load(tmp_path / "8.pt")
    check(loaded.sae, x, z, x_hat if k is None else x_hat * sd + mean)
    assert loaded.header.config["input_normalization"] == ("none" if k is None else "per_token")
    torch.save({**stored, "activation": "TopK", "activation_state_dict": {"k": 4, "postact_fn": "Identity"}},
               tmp_path / "8.pt")  # fmt: skip
    with pytest.raises(ArtifactError, match="negative"):
        sae_files.load(tmp_path / "8.pt")


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "vanilla", "jumprelu", "global-matryoshka-topk"])
@pytest.mark.parametrize("unit_norm", [False, True])
def test_the_batchtopk_repositories(kind: str, unit_norm: bool, tmp_path: Path) -> None:
    p = parts()
    stored = {n: p[n] for n in ("W_enc", "W_dec", "b_enc", "b_dec")}
    if kind == "jumprelu":
        stored["jumprelu.log_threshold"] = p["threshold"].log()
    if kind.startswith("global"):
        stored["threshold"] = torch.tensor(0.4)
    config = {"sae_type": kind, "input_unit_norm": unit_norm, "top_k": 3, "hook_point": "blocks.8.hook_resid_pre",
              "model_name": "gpt2-small", "batch_size": 4096, "group_sizes": "[4, 16]"}  # fmt: skip
    torch.save(stored, tmp_path / "sae.pt")
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = sae_files.load(tmp_path)
    x = 4 * rows() - 1
    mean, sd = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    normed = (x - mean) / (sd + 1e-5) if unit_norm else x
    ignored = {**p, "b_enc": torch.zeros(F)}
    if kind == "jumprelu":
        z, x_hat = by_hand(normed, p, lambda pre: (pre > p["threshold"]) & (pre > 0))
    elif kind == "vanilla":
        z, x_hat = by_hand(normed - p["b_dec"], p, lambda pre: pre > 0)
    elif kind == "topk":
        z, x_hat = by_hand(normed - p["b_dec"], ignored, largest(3))
    elif kind == "batchtopk":
        z, x_hat = by_hand(normed - p["b_dec"], ignored, lambda pre: pre >= pre.flatten().topk(3 * len(pre)).values[-1])
        assert torch.allclose(loaded.sae.encode(x, batch=True), z, atol=1e-5)
        assert loaded.header.config["batch_size"] == 4096 and loaded.inference == "batchtopk"
        return
    else:
        z, x_hat = by_hand(normed - p["b_dec"], ignored, lambda pre: pre > 0.4)
        assert loaded.header.config["group_sizes"] == [4, 16]
    check(loaded.sae, x, z, x_hat * sd + mean if unit_norm else x_hat)


def test_what_a_bare_checkpoint_does_not_say_is_asked_for(tmp_path: Path) -> None:
    p = parts()
    torch.save({n: p[n] for n in ("W_enc", "W_dec", "b_enc", "b_dec")}, tmp_path / "x.pt")
    for asked, option in (
        (Asked(), "--arch"),
        (Asked(arch="topk"), "--normalization"),
        (Asked(arch="topk", normalization="none"), "--k"),
    ):
        with pytest.raises(ConfigError, match="does not say") as caught:
            sae_files.load(tmp_path / "x.pt", asked)
        assert option in (caught.value.hint or "")
    assert sae_files.load(tmp_path / "x.pt", Asked(arch="topk", normalization="per_token", k=3)).sae.k == 3
    ae = torch.load(GOLDEN / "dictionary_learning" / "topk" / "ae.pt", weights_only=True)
    torch.save(ae, tmp_path / "ae.pt")
    with pytest.raises(ConfigError, match="topk or a batchtopk"):
        sae_files.load(tmp_path / "ae.pt")


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("norm", ["dataset-wise", "token-wise", "inference"])
def test_llamascopium(act_fn: str, norm: str, tmp_path: Path) -> None:
    p = parts()
    norms = 0.5 + torch.rand(F, generator=torch.Generator().manual_seed(4))
    w_d = p["W_dec"] * norms[:, None]
    hook = "blocks.4.hook_resid_post"
    t = {"W_E": p["W_enc"], "b_E": p["b_enc"], "W_D": w_d, "b_D": p["b_dec"],
         f"dataset_average_activation_norm.{hook}": torch.tensor(5.0)}  # fmt: skip
    if act_fn == "jumprelu":
        t["activation_function.log_jumprelu_threshold"] = p["threshold"].log()
    save_file(t, tmp_path / "sae_weights.safetensors")
    config = {"sae_type": "sae", "d_model": D, "expansion_factor": F / D, "act_fn": act_fn, "norm_activation": norm,
              "sparsity_include_decoder_norm": True, "top_k": 3, "hook_point_in": hook,
              "hook_point_out": hook}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = sae_files.load(tmp_path)
    x = 2 * rows()
    c = {"dataset-wise": math.sqrt(D) / 5, "inference": 1.0}.get(norm, math.sqrt(D) / x.norm(dim=1, keepdim=True))
    active = {
        "relu": lambda pre: pre > 0,
        "jumprelu": lambda pre: (pre * norms > p["threshold"]) & (pre > 0),
        "topk": lambda pre: largest(3)(pre * norms),
        "batchtopk": lambda pre: pre * norms >= (pre * norms).flatten().topk(3 * len(pre)).values[-1],
    }[act_fn]
    z, x_hat = by_hand(x * c, {**p, "W_dec": w_d}, active)
    batch = act_fn == "batchtopk"
    ours = loaded.sae.encode(x, batch=batch)
    assert torch.allclose(loaded.sae.decode(ours, x), x_hat / c, atol=1e-4)
    in_data_units = z if norm == "token-wise" else z / c
    scale = norms if act_fn in ("topk", "batchtopk") else 1.0  # ranked latents: in units of unit decoder rows
    assert torch.allclose(ours, in_data_units * scale, atol=1e-4)
    (tmp_path / "config.json").write_text(json.dumps({**config, "hook_point_out": "blocks.4.hook_mlp_out"}))
    with pytest.raises(ArtifactError, match="transcoder"):
        sae_files.load(tmp_path)


def test_llama_scope_thresholds_are_in_the_datas_units(tmp_path: Path) -> None:
    p = parts()
    (tmp_path / "Llama3_1-8B-Base-L15R-8x" / "checkpoints").mkdir(parents=True)
    place = tmp_path / "Llama3_1-8B-Base-L15R-8x"
    t = {"encoder.weight": p["W_enc"].T.contiguous(), "encoder.bias": p["b_enc"],
         "decoder.weight": p["W_dec"].T.contiguous(), "decoder.bias": p["b_dec"]}  # fmt: skip
    save_file({n: v.to(torch.bfloat16) for n, v in t.items()}, place / "checkpoints" / "final.safetensors")
    config = {"act_fn": "jumprelu", "jump_relu_threshold": 0.35, "norm_activation": "dataset-wise", "d_model": D,
              "d_sae": F, "dataset_average_activation_norm": {"in": 10.8, "out": 10.8},
              "hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post",
              "sparsity_include_decoder_norm": False}  # fmt: skip
    (place / "hyperparams.json").write_text(json.dumps(config))
    loaded = sae_files.load(place)
    c = math.sqrt(D) / 10.8
    half = {n: v.to(torch.bfloat16).float() for n, v in p.items()}
    x = 10 * rows()
    z, x_hat = by_hand(x * c, half, lambda pre: (pre / c > 0.35) & (pre > 0))
    assert torch.allclose(loaded.sae.encode(x), z / c, atol=1e-4)
    assert torch.allclose(loaded.sae.decode(z / c), x_hat / c, atol=1e-4)
    assert loaded.header.model["id"] == "meta-llama/Llama-3.1-8B"
    assert sae_files.load(place / "checkpoints" / "final.safetensors").sha256 == loaded.sha256


# --- writing ---------------------------------------------------------------------------------------------------


def test_an_exported_saelens_folder_says_what_that_library_looks_for(tmp_path: Path) -> None:
    loaded = sae_files.load(save_sae(tmp_path / "sae.st", random_sae()))
    plan = h.Plan("convert", h.EXPORT, {}, [loaded.as_input("sae")], [loaded.header])
    export.write(tmp_path / "out", loaded.sae, loaded.header, plan, "saelens")
    config = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu" and config["d_in"] == 16 and config["d_sae"] == 24
    assert config["metadata"]["sae_lens_version"] == "6.54.12"  # without it SAELens takes it for a file before 6
    assert config["metadata"]["hook_name"] == "blocks.0.hook_resid_post"
    table, metadata = container.read_table(tmp_path / "out" / "sae_weights.safetensors")
    assert {n: i.shape for n, i in table.items()} == {
        "W_enc": (16, 24), "b_enc": (24,), "W_dec": (24, 16), "b_dec": (16,), "threshold": (24,)
    }  # fmt: skip
    assert metadata == {}
    record = json.loads((tmp_path / "out" / "saetool.json").read_text())
    assert record["proof"]["max_difference_z"] <= 1e-6 and set(record["files"]) == {
        "cfg.json",
        "sae_weights.safetensors",
    }


def test_an_export_whose_proof_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = sae_files.load(save_sae(tmp_path / "sae.st", random_sae()))
    plan = h.Plan("convert", h.EXPORT, {}, [loaded.as_input("sae")], [loaded.header])
    write = foreign.WRITERS["saelens"]

    def wrong(sae: SAE, header: h.Header, folder: Path) -> None:
        write(replace(sae, b_dec=sae.b_dec + 0.01), header, folder)

    monkeypatch.setitem(foreign.WRITERS, "saelens", wrong)
    with pytest.raises(ArtifactError, match="differ on the probe"):
        export.write(tmp_path / "out", loaded.sae, loaded.header, plan, "saelens")
    assert [p.name for p in tmp_path.iterdir()] == ["sae.st"]


@pytest.mark.parametrize("target", list(foreign.WRITERS))
def test_the_same_export_has_the_same_bytes(target: str, tmp_path: Path) -> None:
    sae = replace(random_sae(threshold=None), arch="topk", k=4) if target == "sparsify" else random_sae()
    loaded = sae_files.load(save_sae(tmp_path / "sae.st", sae))
    plan = h.Plan("convert", h.EXPORT, {"to": target}, [loaded.as_input("sae")], [loaded.header])
    one, two = (export.write(tmp_path / n, loaded.sae, loaded.header, plan, target) for n in ("one", "two"))
    assert one.sha256 == two.sha256


# --- the hub ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["hf://", "hf://owner", "hf://owner/repo/../../etc", "hf://o/r@/x", "hf://o w/r", "hf://o/r\\x/y\\..", "hf:/"],
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        hub.parse(text)


def test_addresses_survive_being_paths() -> None:
    wanted = hub.Address("google/gemma-scope-2b-pt-res", "main", "layer_12/width_16k")
    for text in ("hf://google/gemma-scope-2b-pt-res@main/layer_12/width_16k",
                 str(Path("hf://google/gemma-scope-2b-pt-res@main/layer_12/width_16k/"))):  # fmt: skip
        assert hub.is_address(text) and hub.parse(text) == wanted
    assert not hub.is_address("hf/local/folder")


class Hub:
    """A hub with one repository, on this disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path, offline: bool = False) -> None:
        import huggingface_hub

        self.root, self.asked = root, []

        def download(repository: str, **options: object) -> str:
            self.asked.append((repository, options))
            return str(root)

        names = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo, revision=None: names)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)


def test_only_the_files_of_one_sae_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "snapshots" / "abc1"
    shutil.copytree(GOLDEN / "saelens", root)
    stub = Hub(monkeypatch, root)
    loaded = sae_files.load(Path("hf://someone/saes@v1/standard"))
    [(repository, options)] = stub.asked
    assert repository == "someone/saes" and options["revision"] == "v1"
    assert sorted(options["allow_patterns"]) == ["standard/cfg.json", "standard/sae_weights.safetensors"]
    assert loaded.sha256 == sae_files.load(GOLDEN / "saelens" / "standard").sha256
    assert loaded.header.config["source"]["hub"] == {"repository": "someone/saes", "path": "standard", "commit": "abc1"}
    with pytest.raises(ArtifactError, match=r"hf://someone/saes@v1: holds \d+ SAEs: abstopk"):
        sae_files.load(Path("hf://someone/saes@v1"))
    assert len(stub.asked) == 1  # refused before anything was downloaded


def test_offline_takes_what_the_hubs_cache_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(GOLDEN / "saelens" / "topk", tmp_path / "repo" / "topk")
    stub = Hub(monkeypatch, tmp_path / "repo", offline=True)
    assert sae_files.load(Path("hf://someone/saes/topk")).sae.arch == "topk"
    assert stub.asked[0][1]["local_files_only"] is True
    with pytest.raises(BackendError, match="no such file or folder"):
        sae_files.load(Path("hf://someone/saes/other"))


def test_a_hub_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise OSError("no route to host\nwith details")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    with pytest.raises(BackendError) as caught:
        sae_files.load(Path("hf://someone/saes/x"))
    assert caught.value.message == "hf://someone/saes/x: not here, and the hub does not give it (no route to host)"


def test_the_formulas_share_nothing_with_our_own_code() -> None:
    import ast

    from saetool.core import peers

    tree = ast.parse(Path(peers.__file__).read_text())
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not {m for m in modules if m and m.startswith("saetool")}


def test_a_folder_without_an_sae_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SaetoolError, match=r"it holds notes\.txt"):
        sae_files.load(tmp_path)
    with pytest.raises(SaetoolError, match="no such file or folder"):
        sae_files.load(tmp_path / "none.pt")
    save_file({"x": torch.zeros(2)}, tmp_path / "lone.safetensors")
    with pytest.raises(SaetoolError, match="without a saetool header"):
        sae_files.load(tmp_path / "lone.safetensors")
