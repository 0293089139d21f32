"""What a ladder of widths costs beside its SAEs trained one at a time on the same cache, steps and threads.

    python tests/bench/bench_ladder.py ACTS [--widths 288,576,1152,2304,4608] [--steps 100]

Prints seconds of the steps and of whole runs (reading included), and their ratio: 1 is the sum of their own runs.
"""

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the program does

import torch

from saetool.artifacts.cache import TRAIN, open_cache
from saetool.config import TrainConfig
from saetool.engines.reader import Reader
from saetool.engines.recipe import resolve
from saetool.engines.train import train
from saetool.engines.trainee import Trainee


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("acts", type=Path)
    parser.add_argument("--widths", default="288,576,1152,2304,4608")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    args = parser.parse_args()
    widths = [int(w) for w in args.widths.split(",")]
    cache = open_cache(args.acts)
    base = TrainConfig(k=args.k, batch_size=args.batch, tokens=args.steps * args.batch)
    scale = (cache.d_in / cache.statistics["mean_sq_norm"]) ** 0.5

    def run(chosen: list[int]) -> float:
        """Seconds of a run of ``chosen`` widths, after its first steps."""
        configs = [resolve(replace(base, latents=w), cache.d_in) for w in chosen]
        center = cache.moments()["mean"]
        trainees = [Trainee(c, cache.d_in, center, scale, "cpu") for c in configs]
        started = 0.0
        for event in train(trainees, Reader(cache, TRAIN, scale=scale), log_every=10**9):
            if getattr(event, "step", 0) == args.steps // 5 and not started:
                started = time.perf_counter()
        return time.perf_counter() - started

    run(widths[:1])
    together = [run(widths)]
    alone = [run([w]) for w in widths]
    together.append(run(widths))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.steps - args.steps // 5} steps timed")
    for width, seconds in zip(widths, alone, strict=True):
        print(f"{width:>8} alone     {seconds:7.2f} s")
    print(f"{'ladder':>8} {min(together):17.2f} s = {min(together) / sum(alone):.3f} × their sum {sum(alone):.2f} s")


if __name__ == "__main__":
    main()
