"""Time of a meta-SAE's training step at the paper's size, and of the record made after it.

    python tests/bench/bench_meta.py [--rows 49152] [--latents 2304] [--steps 6] [--device cpu] [--record]

The rows are sums of few random directions: time depends on shapes, and a little on how many latents fire.
"""

import argparse
import time

import torch

from saetool.config import MetaConfig
from saetool.core.meta import Rows
from saetool.core.sae import unit_rows
from saetool.engines import meta, meta_record
from saetool.engines import train as trainer
from saetool.engines.trainee import Trainee


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("rows", 49_152), ("width", 768), ("latents", 2304), ("steps", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    g = torch.Generator().manual_seed(0)
    atoms = unit_rows(torch.randn(asked.latents, asked.width, generator=g))
    chosen = torch.randint(0, asked.latents, (asked.rows, 4), generator=g)
    noise = 0.03 * torch.randn(asked.rows, asked.width, generator=g)
    rows = unit_rows(atoms[chosen].sum(1) + noise)
    config = meta.training_config(MetaConfig(latents=asked.latents, steps=asked.steps), asked.rows, asked.width)
    batches = meta.RowBatches(rows.to(asked.device), seed=0)
    batches.scale = asked.width**0.5
    trainee = Trainee(config, asked.width, rows.mean(0), batches.scale, asked.device)
    times, last = [], time.perf_counter()
    for event in trainer.train([trainee], batches, log_every=10**9):
        if isinstance(event, trainer.Tick):
            if asked.device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - last)
            last = time.perf_counter()
    usual = sorted(times[1:])[len(times[1:]) // 2]
    total, dead = sum(times), int(trainee.dead().sum())
    print(f"{asked.rows} x {asked.width}, {asked.latents} meta-latents, batch {config.batch_size}, {asked.device},")
    threads = torch.get_num_threads()
    print(f"{threads} threads: median step {usual:.3f} s; 2000 steps at that rate {2000 * usual / 60:.0f} min")
    print(f"{len(times)} steps in {total:.1f} s, slowest {max(times):.3f} s; {dead} meta-latents dead at the end")
    if asked.record:
        started = time.perf_counter()
        trained = meta.finish(trainee.sae(), meta.RowBatches(rows, seed=0), config)
        print(f"threshold {time.perf_counter() - started:.1f} s")
        parent = meta_record.Parent("rows", "", asked.rows, Rows(rows, torch.arange(asked.rows)), 0, 0)
        bars = meta_record.Bars(None, None, unit_rows(torch.randn(atoms.shape, generator=g)), None)
        started = time.perf_counter()
        meta_record.payload([parent], trained, config, [], bars, None)
        print(f"record {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
