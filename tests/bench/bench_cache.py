"""How fast a cache is made, written and read, each beside the bare work that it cannot do without.

    python tests/bench/bench_cache.py pass  [--tokens 60000] [--model … --hook …]   saetool cache : truncated forward
    python tests/bench/bench_cache.py write [--rows 400000] [--d 576]               CacheWriter : safetensors.save_file
    python tests/bench/bench_cache.py read  [--rows 400000] [--d 576]               Reader.batch : memory bandwidth

Both sides of each comparison run in turns in one process, so that other load on the machine meets them alike; on a busy
machine processor time (all threads) is the steadier figure.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from saetool.artifacts import header as h
from saetool.artifacts.cache import TRAIN, open_cache
from saetool.artifacts.cache_writer import CacheWriter
from saetool.config import CacheConfig
from saetool.core.statistics import row_sums
from saetool.engines import cache as engine
from saetool.engines import cache_request
from saetool.engines import text as sources
from saetool.engines.memory import batch_tokens
from saetool.engines.model import find_model, load
from saetool.engines.reader import Reader
from saetool.engines.sites import find_site
from saetool.engines.source import capture


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("pass", "write", "read"))
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--model", default=None)
    parser.add_argument("--hook", default=CacheConfig.hook)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--store", default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    {"pass": bench_pass, "write": bench_write, "read": bench_read}[args.what](args)


def bench_pass(args: argparse.Namespace) -> None:
    """The whole of making a cache (tokenising and writing beside the model) : the model on the same batches."""
    request = cache_request.Request(
        ctx_len=CacheConfig.ctx_len,
        bos=True,
        keep_special=False,
        heldout=0.1,
        dtype=args.dtype,
        storage=args.store or args.dtype,
        tokens=args.tokens,
    )
    source, texts = find_model(args.model), sources.embedded()
    (hook,) = cache_request.hook_names([args.hook], source)
    plan = request.plan(hook, source, texts.as_input())
    first = cache_request.prepare(request, source, texts, [hook])
    first.counts()
    lm = load(source, first.config, first.tokenizer, device=args.device, dtype=args.dtype)
    site = find_site(lm.model, hook)
    size = batch_tokens(first.config, request.ctx_len, getattr(torch, args.dtype), lm.device)
    per_batch = size // request.ctx_len
    # Small shards, so that a short run has several and writing really happens beside the forward pass.
    per_shard = engine.contexts_per_shard(first, hook, per_batch, 8 * 1024 * 1024)
    batches = [
        torch.from_numpy(contexts.take(start, stop)[0]).long()
        for contexts in first.splits.values()
        for start, stop, _ in engine.batches(first.corpus, contexts, per_batch)
    ]
    tokens = sum(batch.numel() for batch in batches)

    def bare() -> None:
        for batch in batches:
            capture(lm, site, batch).cpu()

    def cached() -> None:
        with tempfile.TemporaryDirectory() as folder:
            writer = CacheWriter(Path(folder) / "acts", plan, storage=request.storage)
            corpus = cache_request.reading(request, texts, first.tokenizer, first.bos_id, first.separator_id)
            prepared = dataclasses.replace(first, corpus=corpus)
            for _ in engine.write(lm, prepared, [engine.Job(hook, site, writer, per_shard)], per_batch):
                pass
            writer.close()

    capture(lm, site, batches[0])
    print(f"{tokens:,} tokens, batches of {size}, {args.device}, {torch.get_num_threads()} threads")
    compare({"bare truncated forward": bare, "saetool cache": cached}, args.rounds, tokens, "tokens")


def bench_write(args: argparse.Namespace) -> None:
    """Shards through the writer (hash, record, fsync) : the same tensors by safetensors."""
    rows = torch.randn(args.rows, args.d).to(getattr(torch, args.dtype))
    per_shard = CacheConfig.shard_bytes // (args.d * rows.element_size())
    shards = [_shard(part) for part in rows.split(per_shard)]
    sums = [row_sums(part) for part in rows.split(per_shard)]  # made beside the forward pass, not by the writer
    plan = h.Plan("cache", h.CACHE, {"bench": "write"})

    def ours(folder: Path) -> None:
        writer = CacheWriter(folder / "acts", plan)
        pending: deque = deque()
        with ThreadPoolExecutor(engine.N_WRITERS) as pool:
            for index, shard in enumerate(shards):
                pending.append(pool.submit(writer.write, index, TRAIN, shard, sums[index]))
            for future in pending:
                future.result()
        writer.close()

    def raw(folder: Path, sync: bool) -> None:
        for index, shard in enumerate(shards):
            file = folder / f"{index}.safetensors"
            save_file(shard, file)
            if sync:
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)

    def into(write: Callable[[Path], None]) -> Callable[[], None]:
        def run() -> None:
            with tempfile.TemporaryDirectory(dir=".") as folder:
                write(Path(folder))

        return run

    print(f"{len(shards)} shards of {per_shard:,} rows, {args.dtype}, {torch.get_num_threads()} threads")
    work = {
        "save_file and fsync": into(lambda f: raw(f, True)),
        "save_file": into(lambda f: raw(f, False)),
        "CacheWriter": into(ours),
    }
    compare(work, args.rounds, args.rows, "rows")


def _shard(acts: torch.Tensor) -> dict[str, torch.Tensor]:
    numbers = torch.arange(len(acts), dtype=torch.int32)
    names = ("tokens", "positions", "contexts", "documents")
    return {"acts": acts, **{name: numbers.clone() for name in names}, "input_ids": numbers[:128].view(1, -1).clone()}


def bench_read(args: argparse.Namespace) -> None:
    """One epoch of shuffled float32 batches : copying as many bytes as they have, the best that memory can do."""
    rows = torch.randn(args.rows, args.d).to(getattr(torch, args.dtype))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        plan = h.Plan("cache", h.CACHE, {"bench": "read"})
        writer = CacheWriter(Path(folder) / "acts", plan, storage=args.store)
        per_shard = CacheConfig.shard_bytes // (args.d * rows.element_size())
        for part in rows.split(per_shard):
            writer.add(TRAIN, _shard(part))
        count = {"rows": args.rows, "contexts": 1, "documents": 1, "tokens": args.rows}
        header = plan.header(config={"d_in": args.d, "ctx_len": 128}, dtype=args.dtype)
        writer.finish(header, {TRAIN: count}, ["x"])
        reader = Reader(open_cache(Path(folder) / "acts"), TRAIN, overwrite=True)  # as training does
        steps = args.rows // args.batch_size
        stored = [rows[step * args.batch_size : (step + 1) * args.batch_size] for step in range(steps)]

        def shuffled() -> None:
            for step in range(steps):
                reader.batch(step, args.batch_size)

        def converted() -> None:
            for part in stored:
                part.float()

        source = np.empty(args.rows // 4 * args.d, dtype=np.float32)
        source[:] = 1
        target = np.empty_like(source)

        def copied() -> None:
            # Reading stored rows and writing float32 moves (item + 4) bytes a number; a copy of float32 moves 8.
            for _ in range(4):
                np.copyto(target, source)

        shuffled()
        print(f"{args.rows:,} rows of {args.d}, batches of {args.batch_size}, {torch.get_num_threads()} threads")
        found = compare({"memory copy": copied, "stored rows to float": converted, "Reader.batch": shuffled},
                        args.rounds, args.rows, "rows")  # fmt: skip
        item = {"int8": 1}.get(args.store or "", rows.element_size())
        moved = args.rows * args.d
        copy, batch = moved * 8 / found["memory copy"] / 1e9, moved * (item + 4) / found["Reader.batch"] / 1e9
        print(f"memory bandwidth {copy:.2f} GB/s, reader {batch:.2f} GB/s (share {batch / copy:.2f})")


def compare(work: dict[str, Callable[[], None]], rounds: int, n: int, unit: str) -> dict[str, float]:
    """Print and return the best wall time of each, run in turns; shares are of the first."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            start = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    best = {name: (min(t[0] for t in mine), min(t[1] for t in mine)) for name, mine in times.items()}
    base = next(iter(best.values()))
    print(f"{'':<24} {unit + '/s':>12} {unit + '/processor s':>20} {'share':>7} {'of processor':>13}")
    for name, (wall, processor) in best.items():
        print(
            f"{name:<24} {n / wall:>12,.0f} {n / processor:>20,.0f} {base[0] / wall:>7.3f} {base[1] / processor:>13.3f}"
        )
    return {name: wall for name, (wall, _) in best.items()}


if __name__ == "__main__":
    main()
