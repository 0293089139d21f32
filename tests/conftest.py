"""Shared fixtures: a tiny cache of synthetic activations, and planted SAEs with a known stitching answer."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saetool.artifacts import cache as cache_files
from saetool.artifacts import header as h
from saetool.artifacts import sae as sae_files
from saetool.artifacts.cache import Cache
from saetool.artifacts.cache_writer import CacheWriter
from saetool.core.sae import SAE, unit_rows

os.environ.setdefault("HF_HUB_OFFLINE", "1")

D, CTX, N_DOCUMENTS = 16, 32, 40


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sparse_data(n: int, d: int = D, n_features: int = 24, active: float = 3.0, seed: int = 0) -> Tensor:
    """Rows that are sums of a few of ``n_features`` fixed random directions, plus a mean and a little noise."""
    g = generator(seed)
    directions = unit_rows(torch.randn(n_features, d, generator=generator(1234)))
    on = torch.rand(n, n_features, generator=g) < active / n_features
    strength = torch.rand(n, n_features, generator=g) + 0.5
    return (on * strength) @ directions + 0.3 + 0.01 * torch.randn(n, d, generator=g)


def write_cache(
    path: Path, acts: Tensor | None = None, ctx_len: int = CTX, dtype: torch.dtype = torch.float32
) -> Cache:
    """A finished cache: contexts of ``ctx_len`` rows, one document each, every fifth context held out.

    Token ids are the argmax of each row (so tokens and activations are related); the vocabulary is `` t0``, `` t1``….
    """
    if acts is None:
        acts = sparse_data(N_DOCUMENTS * CTX)
    n, d = acts.shape
    plan = h.Plan("cache", h.CACHE, {"made_for": "tests", "n": n, "d": d, "sum": float(acts.double().sum())})
    writer = CacheWriter(path, plan)
    documents = torch.arange(n) // ctx_len
    splits: dict[str, dict[str, int]] = {}
    for split, mine in (("train", documents % 5 != 4), ("heldout", documents % 5 == 4)):
        rows = mine.nonzero().squeeze(1)
        contexts = torch.zeros(n, dtype=torch.int32)
        contexts[rows] = (torch.arange(len(rows)) // ctx_len).int() + sum(s["contexts"] for s in splits.values())
        for part in rows.split(max(ctx_len, 8 * ctx_len)):
            tokens = acts[part].argmax(1).int()
            padding = torch.full((-len(part) % ctx_len,), -1, dtype=torch.int32)
            writer.add(
                split,
                {
                    "acts": acts[part].to(dtype),
                    "tokens": tokens,
                    "input_ids": torch.cat([tokens, padding]).view(-1, ctx_len),
                    "positions": (part % ctx_len).int(),
                    "contexts": contexts[part],
                    "documents": documents[part].int(),
                },
            )
        n_ctx = int(contexts[rows].unique().numel())
        splits[split] = {"rows": len(rows), "contexts": n_ctx, "documents": n_ctx, "tokens": len(rows)}
    config = {"d_in": d, "ctx_len": ctx_len, "bos": "none"}
    model = {"id": "tests", "hook_name": "blocks.0.hook_resid_post", "hf_hook_name": "h.0", "width": d}
    writer.finish(plan.header(config=config, model=model, dtype="float32"), splits, [f" t{i}" for i in range(d)])
    return cache_files.open_cache(path)


@pytest.fixture
def acts_dir(tmp_path: Path) -> Path:
    write_cache(tmp_path / "acts")
    return tmp_path / "acts"


def random_sae(d_sae: int = 24, d_in: int = D, seed: int = 0, *, threshold: float | None = 0.2) -> SAE:
    """A random SAE with unit decoder rows; JumpReLU with one ``threshold`` unless it is None (then plain ReLU)."""
    g = generator(seed)
    W_dec = unit_rows(torch.randn(d_sae, d_in, generator=g))
    return SAE(
        W_enc=W_dec.T.contiguous() + 0.05 * torch.randn(d_in, d_sae, generator=g),
        b_enc=0.1 * torch.randn(d_sae, generator=g),
        W_dec=W_dec,
        b_dec=0.1 * torch.randn(d_in, generator=g),
        threshold=None if threshold is None else torch.full((d_sae,), threshold),
        arch="relu" if threshold is None else "jumprelu",
        k=None,
    )


def save_sae(path: Path, sae: SAE, **options: object) -> Path:
    """Write ``sae`` as an artifact that says it was trained on the tests' cache."""
    plan = h.Plan("train", h.SAE, {"made_for": "tests", "name": path.name, **options})
    model = {"id": "tests", "hook_name": "blocks.0.hook_resid_post", "hf_hook_name": "h.0", "width": sae.d_in}
    sae_files.save(path, sae, plan.header(config=sae_files.config_of(sae), model=model, seed=0, dtype="float32"))
    return path


def planted_pair(seed: int = 0, n_small: int = 10, n_split: int = 4, n_novel: int = 6) -> tuple[SAE, SAE]:
    """A small SAE and a large one with a known answer at theta 0.7 (d_in 32, so that random rows are far apart).

    Large latents 0 … n_small-1 copy the small ones; the next ``n_split`` are near-copies of small latents
    0 … n_split-1 (cosine about 0.95); the last ``n_novel`` are orthogonal to every small latent.
    Answer: novel = n_novel; components = n_small, of which n_split are 1→2 and the rest 1→1; no unmatched latent.
    """
    d = 32
    g = generator(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=g)).Q
    small_rows, novel_rows = basis[:n_small], basis[n_small : n_small + n_novel]
    tilt = basis[n_small + n_novel : n_small + n_novel + n_split]
    split_rows = unit_rows(small_rows[:n_split] + 0.3 * tilt)
    large_rows = torch.cat([small_rows, split_rows, novel_rows])

    def build(rows: Tensor) -> SAE:
        n = len(rows)
        return SAE(
            W_enc=rows.T.contiguous(),
            b_enc=0.05 * torch.randn(n, generator=g),
            W_dec=rows.contiguous(),
            b_dec=0.1 * torch.randn(d, generator=g),
            threshold=torch.full((n,), 0.3),
            arch="jumprelu",
            k=None,
        )

    return build(small_rows), build(large_rows)


TINY_TEXT = (
    "The cat sat on the mat while the rain fell.",
    "Prices rose by 3% in the last quarter, said the bank.",
    "A new phone was shown at the fair in the town hall.",
    "The striker scored twice and the keeper saved a penalty.",
)


def tiny_documents(n: int = 40) -> list[str]:
    """Different short documents of a few sentences each."""
    return [f"Story {i}. {TINY_TEXT[i % 4]} {TINY_TEXT[(i + i // 4) % 4]} It was day {i * 7}." for i in range(n)]


def save_tiny_model(folder: Path, kind: str) -> Path:
    """A random ``gpt2`` or ``llama`` of 3 blocks and width 32 with a byte-level BPE tokenizer, saved to ``folder``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TINY_TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>")
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=3, n_head=2, n_positions=128, **ids)
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=128,
                **ids,
            )
        )
    with torch.no_grad():  # random, but not so small that a block leaves its input as it is
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random three-block GPT-2 of width 32 with its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-gpt2", "gpt2")


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random three-block Llama of width 32 with its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")
