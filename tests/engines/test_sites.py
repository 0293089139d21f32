"""Every place that can be hooked, on small models of many architectures, against what the models say themselves."""

from typing import Any

import pytest
import torch
import transformers

from saetool.engines.model import LanguageModel, _class_for
from saetool.engines.sites import PLACES, find_site, site_width
from saetool.engines.source import capture, capture_all
from saetool.errors import ConfigError

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 100, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {**GPT2, "n_inner": 48, "eos_token_id": 2}),
    "llama": ("LlamaConfig", GROUPED),
    "neox": ("GPTNeoXConfig", SHAPE),
    "neox-sequential": ("GPTNeoXConfig", {**SHAPE, "use_parallel_residual": False}),
    "gemma": ("GemmaConfig", {**GROUPED, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 16}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 16}),
    "olmo2": ("Olmo2Config", SHAPE),
    "opt": ("OPTConfig", {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", {"vocab_size": 100, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "bert": ("BertConfig", SHAPE),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": 100, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 64},
    ),
}
NORM_AFTER_SUM = ("bert", "distilbert")
Z_WIDTH = {"gemma": 64, "gemma2": 64, "gemma3": 64, "qwen3": 64}
HIDDEN_WIDTH = {"bloom": 128}


@pytest.fixture(scope="module", params=list(CONFIGS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def lm(name: str) -> LanguageModel:
    kind, options = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**options)
    model = _class_for(config).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # random, but not so small that a block leaves its input as it is
                parameter.normal_(0, 0.2)
    return LanguageModel(model, None, {"id": name})


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(0))


def places(lm: LanguageModel, name: str) -> list[str]:
    return [p for p in PLACES if (p, name) != ("hook_resid_mid", "neox")]


def test_residual_sites_equal_the_models_own_hidden_states(lm: LanguageModel, ids: torch.Tensor) -> None:
    with torch.no_grad():
        hidden = lm.model(ids, output_hidden_states=True).hidden_states
    for block in range(3):
        assert torch.equal(capture(lm, find_site(lm.model, f"blocks.{block}.hook_resid_pre"), ids), hidden[block])
        if block < 2:  # many models put the last entry through their final norm
            after = capture(lm, find_site(lm.model, f"blocks.{block}.hook_resid_post"), ids)
            assert torch.equal(after, hidden[block + 1])


def test_attention_and_mlp_add_up_to_the_block(lm: LanguageModel, name: str, ids: torch.Tensor) -> None:
    at = {p: capture(lm, find_site(lm.model, f"blocks.1.{p}"), ids) for p in places(lm, name)}
    pre, attention, mlp, post = (at[f"hook_{p}"] for p in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
    close = {"rtol": 1e-4, "atol": 1e-4}
    if name in NORM_AFTER_SUM:
        block = lm.model.get_submodule(find_site(lm.model, "blocks.1.hook_resid_post").hf_hook_name)
        bert = name == "bert"
        after_attention = block.attention.output.LayerNorm if bert else block.sa_layer_norm
        after_mlp = block.output.LayerNorm if bert else block.output_layer_norm
        torch.testing.assert_close(at["hook_resid_mid"], after_attention(pre + attention), **close)
        torch.testing.assert_close(post, after_mlp(at["hook_resid_mid"] + mlp), **close)
        return
    torch.testing.assert_close(pre + attention + mlp, post, **close)
    if name == "neox":  # attention and MLP side by side
        with pytest.raises(ConfigError, match="nothing in between"):
            find_site(lm.model, "blocks.1.hook_resid_mid")
    else:
        torch.testing.assert_close(pre + attention, at["hook_resid_mid"], **close)


def test_z_and_hidden_are_what_the_projections_read(lm: LanguageModel, name: str, ids: torch.Tensor) -> None:
    for place, width in (("attn.hook_z", Z_WIDTH.get(name, 32)), ("mlp.hook_post", HIDDEN_WIDTH.get(name, 48))):
        site = find_site(lm.model, f"blocks.1.{place}")
        acts = capture(lm, site, ids)
        assert acts.shape == (2, 10, width) and site_width(lm.model, site) == width
        output = capture(lm, find_site(lm.model, site.hf_hook_name.removesuffix(":input")), ids)
        with torch.no_grad():
            torch.testing.assert_close(site.module(acts), output, rtol=1e-4, atol=1e-4)


def test_several_sites_in_one_pass_equal_one_at_a_time(lm: LanguageModel, name: str, ids: torch.Tensor) -> None:
    # In an order that is not the order of the forward pass.
    sites = [find_site(lm.model, f"blocks.{b}.{p}") for b in (1, 0) for p in reversed(places(lm, name))]
    for site, acts in zip(sites, capture_all(lm, sites, ids), strict=True):
        assert torch.equal(acts, capture(lm, site, ids)), site.hook_name
        assert acts.shape[-1] == site_width(lm.model, site)


def test_the_recorded_path_names_the_same_site(lm: LanguageModel, name: str) -> None:
    for place in places(lm, name):
        site = find_site(lm.model, f"blocks.1.{place}")
        if place == "hook_resid_pre":  # recorded as the output of the block before
            assert find_site(lm.model, site.hf_hook_name).hook_name == "blocks.0.hook_resid_post"
        else:
            assert find_site(lm.model, site.hf_hook_name) == site


def test_a_path_before_a_norm_is_not_the_place_after_it() -> None:
    config = transformers.Gemma2Config(**CONFIGS["gemma2"][1])
    with torch.device("meta"):
        model = _class_for(config).from_config(config)
    assert find_site(model, "blocks.1.hook_mlp_out").hf_hook_name == "model.layers.1.post_feedforward_layernorm"
    before = find_site(model, "layers.1.mlp")
    assert before.hook_name == before.hf_hook_name == "model.layers.1.mlp"
    assert site_width(model, before) == 32
