"""Rows per second of SAELens' cache runner with a model that costs next to nothing (its embedding, d = 512).

    python tests/bench/peers_cache_sae_lens.py [--tokens 100000]      in an environment with sae-lens==6.54.12

Beside it: python tests/bench/bench_cache.py write --d 512 --dtype float32
"""

import argparse
import tempfile
import time
from pathlib import Path

import sae_lens.cache_activations_runner as runner_module
import torch
from datasets import Dataset
from sae_lens.cache_activations_runner import CacheActivationsRunner
from sae_lens.config import CacheActivationsRunnerConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig

CTX, D, VOCABULARY = 128, 512, 1000

parser = argparse.ArgumentParser()
parser.add_argument("--tokens", type=int, default=100_000)
n_tokens = parser.parse_args().tokens // CTX * CTX

shape = HookedTransformerConfig(n_layers=1, d_model=D, n_ctx=CTX, d_head=64, d_vocab=VOCABULARY, act_fn="relu")
model = HookedTransformer(shape)
runner_module.load_model = lambda **_: model
tokens = torch.randint(0, VOCABULARY, (n_tokens // CTX + 64, CTX), generator=torch.Generator().manual_seed(0))
data = Dataset.from_dict({"tokens": tokens.tolist()})
with tempfile.TemporaryDirectory(dir=".") as folder:
    config = CacheActivationsRunnerConfig(
        dataset_path="none",
        model_name="none",
        model_batch_size=32,
        hook_name="hook_embed",
        d_in=D,
        training_tokens=n_tokens,
        context_size=CTX,
        new_cached_activations_path=str(Path(folder) / "acts"),
        shuffle=False,
        device="cpu",
        buffer_size_gb=0.1,
        prepend_bos=False,
        streaming=False,
    )
    runner = CacheActivationsRunner(config, override_dataset=data)
    started = time.perf_counter()
    runner.run()
    seconds = time.perf_counter() - started
print(f"SAELens cache runner: {n_tokens:,} rows of {D} float32 in {seconds:.1f} s, {n_tokens / seconds:,.0f} rows/s")
