"""Tokens per second of `saetool cache` beside the bare truncated forward pass on the same batches.

    python tests/bench/bench_cache.py [--tokens 60000] [--model … --hook …]

Both run in turns in one process, so that other load on the machine meets them alike; on a busy machine processor
time (all threads) is the steadier figure. The share is what writing, hashing and statistics leave of the forward pass.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from saetool.artifacts.cache_writer import CacheWriter
from saetool.config import CacheConfig
from saetool.engines import cache as engine
from saetool.engines import text as sources
from saetool.engines.model import find_model, load
from saetool.engines.source import capture, find_site


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--model", default=None)
    parser.add_argument("--hook", default=CacheConfig.hook)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    request = engine.Request(
        hook=args.hook,
        ctx_len=CacheConfig.ctx_len,
        bos=True,
        keep_special=False,
        heldout=0.1,
        dtype=args.dtype,
        batch_size=CacheConfig.batch_size,
        tokens=args.tokens,
    )
    source, texts = find_model(args.model), sources.embedded()
    # Small shards, so that a short run has several and writing really happens beside the forward pass.
    prepared = engine.prepare(request, source, texts, CacheConfig.shard_bytes // 4)
    lm = load(source, prepared.config, prepared.tokenizer, device=args.device, dtype=args.dtype)
    site = find_site(lm.model, args.hook)
    batches = [
        torch.from_numpy(contexts.take(start, stop)[0]).long()
        for contexts in engine.splits(prepared.corpus).values()
        for start, stop in contexts.batches(0, len(contexts), prepared.per_batch)
    ]
    tokens = sum(batch.numel() for batch in batches)
    capture(lm, site, batches[0])
    bare: list[tuple[float, float]] = []
    cached: list[tuple[float, float]] = []
    for _ in range(args.rounds):
        start = clocks()
        for batch in batches:
            capture(lm, site, batch).cpu()
        bare.append(since(start))
        with tempfile.TemporaryDirectory() as folder:
            writer = CacheWriter(Path(folder) / "acts", request.plan(source, texts))
            start = clocks()
            for _ in engine.write(lm, site, prepared, writer, None):
                pass
            cached.append(since(start))
    print(f"{tokens:,} tokens, {len(prepared.shards)} shards, {args.device}, {torch.get_num_threads()} threads")
    print(f"{'':<24} {'tokens/s':>10} {'tokens/processor s':>20}   (best of {args.rounds})")
    best = {"bare truncated forward": fastest(bare), "saetool cache": fastest(cached)}
    for name, (wall, processor) in best.items():
        print(f"{name:<24} {tokens / wall:>10,.0f} {tokens / processor:>20,.0f}")
    (wall, processor), (wall_cached, processor_cached) = best.values()
    print(f"{'share':<24} {wall / wall_cached:>10.3f} {processor / processor_cached:>20.3f}")


def clocks() -> tuple[float, float]:
    """Wall and processor seconds."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    wall, processor = clocks()
    return wall - start[0], processor - start[1]


def fastest(times: list[tuple[float, float]]) -> tuple[float, float]:
    return min(t[0] for t in times), min(t[1] for t in times)


if __name__ == "__main__":
    main()
