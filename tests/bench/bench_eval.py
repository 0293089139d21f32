"""Tokens per second of the evaluation from a cache beside the encoder's matrix product alone, on the same rows.

    python tests/bench/bench_eval.py [--d 768] [--latents 1536,6144,24576] [--k 32] [--rows 65536] [--device cpu]

Random SAEs with a threshold at which about k latents are active, on random rows in bfloat16; both run in turns.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from saetool.artifacts import header as h
from saetool.artifacts.cache import HELDOUT, TRAIN, open_cache
from saetool.artifacts.cache_writer import CacheWriter
from saetool.config import EvalConfig
from saetool.core.sae import SAE, unit_rows
from saetool.engines.evaluate import reconstruct, rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--latents", default="1536,6144,24576")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=EvalConfig.batch_size)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"d {args.d}, k {args.k}, {args.rows:,} rows, {args.device}, {torch.get_num_threads()} threads")
    print(f"{'latents':>8} {'encoder, tokens/s':>18} {'eval, tokens/s':>15} {'times the encoder':>18}")
    with tempfile.TemporaryDirectory() as folder:
        cache = write_cache(Path(folder) / "acts", args.rows, args.d)
        for latents in map(int, args.latents.split(",")):
            sae = random_sae(args.d, latents, args.k).map(lambda t: t.to(args.device))
            encoder, whole = [], []
            for _ in range(args.rounds):
                batches = list(rows(cache, HELDOUT, args.batch_size, None, args.device))
                start = clock(args.device)
                for batch in batches:
                    sae.pre_activations(batch.acts)
                encoder.append(clock(args.device) - start)
                start = clock(args.device)
                for _ in reconstruct([sae], cache, HELDOUT, args.batch_size, device=args.device):
                    pass
                whole.append(clock(args.device) - start)
            a, b = args.rows / min(encoder), args.rows / min(whole)
            print(f"{latents:>8} {a:>18,.0f} {b:>15,.0f} {a / b:>18.2f}")


def clock(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def write_cache(path: Path, n: int, d: int):  # type: ignore[no-untyped-def]
    plan = h.Plan("cache", h.CACHE, {"made_for": "a benchmark"})
    writer = CacheWriter(path, plan)
    generator, splits = torch.Generator().manual_seed(0), {}
    for first, (split, size) in enumerate(((TRAIN, 128), (HELDOUT, n))):
        numbers = torch.arange(size, dtype=torch.int32)
        row = {"tokens": numbers % 1000, "positions": numbers % 128, "contexts": numbers // 128 + first}
        acts = torch.randn(size, d, generator=generator).bfloat16()
        ids = torch.zeros(-(-size // 128), 128, dtype=torch.int32)
        writer.add(split, {"acts": acts, **row, "documents": numbers // 500, "input_ids": ids})
        splits[split] = {"rows": size, "contexts": len(ids), "documents": size // 500 + 1, "tokens": size}
    header = plan.header(
        config={"d_in": d, "ctx_len": 128, "bos": "none"}, model={"hook_name": "none"}, dtype="bfloat16"
    )
    writer.finish(header, splits, [])
    return open_cache(path)


def random_sae(d: int, latents: int, k: int) -> SAE:
    generator = torch.Generator().manual_seed(1)
    W_dec = unit_rows(torch.randn(latents, d, generator=generator))
    theta = float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - k / latents)))  # p ~ N(0, 1)
    return SAE(
        W_dec.T.contiguous(),
        torch.zeros(latents),
        W_dec,
        torch.zeros(d),
        torch.full((latents,), theta),
        "jumprelu",
        None,
    )


if __name__ == "__main__":
    main()
