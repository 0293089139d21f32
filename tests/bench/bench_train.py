"""Training beside the peers: time of a whole step, and quality at equal tokens.

    sh tests/bench/peers.sh PEERS
    python tests/bench/bench_train.py speed --peers PEERS
    python tests/bench/bench_train.py quality --peers PEERS --acts acts --seeds 0,1

Every trainer runs in its own process, the peers' in their own environments, with its own optimizer and bookkeeping
(`peers/run_*.py`), on the same batches in the same order. Without --peers only saetool and the floor run.

speed     One step each in turn, so that other load meets all alike; the median of --rounds steps after a warm-up.
          Sparse random inputs, each subject's default learning rate. No latent is dead yet: AuxK is not in the times.
          Columns "× peer": how many times faster than that peer a row is. Memory is the highest resident size of the
          process in a step beyond its libraries and data: parameters, gradients, optimizer and temporaries (on a GPU:
          the highest allocation).
quality   Same inputs (scaled to E‖x‖² = d), k, width, batch size, learning rate, schedule and steps; own losses,
          initialisation, decoder constraint and (without --dead-after) own rule for dead latents. One evaluator for
          all: explained variance 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖² over the held-out split, BatchTopK selecting by batch;
          dead: latents that never fire on the first --dead-rows rows of the train split.
"""

import argparse
import contextlib
import math
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from train_evaluator import Quality, evaluate
from train_subjects import FLOORS, QUALITY, SPEED, Child, Row, available

from saetool.artifacts.cache import HELDOUT, TRAIN, open_cache
from saetool.engines.reader import Order, Reader


def sparse_rows(n: int, d_in: int, seed: int) -> np.ndarray:
    """Inputs of known sparsity, float32 [n, d_in]: a mean, 32 of 4·d_in random unit directions, a little noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(4 * d_in, d_in, generator=generator), dim=1)
    active = torch.randint(4 * d_in, (n, 32), generator=generator)
    strength = -torch.rand(n, 32, generator=generator).clamp_min(1e-6).log()
    rows = torch.nn.functional.embedding_bag(active, directions, per_sample_weights=strength, mode="sum")
    rows += torch.randn(d_in, generator=generator) / d_in**0.5
    rows += 0.1 * torch.randn(n, d_in, generator=generator) / d_in**0.5
    return (rows * (d_in / rows.square().sum(1).mean()).sqrt()).numpy()


def speed(args: argparse.Namespace) -> None:
    """Print the table of step times."""
    rows = available(SPEED, args.peers, args.only)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = Path(folder) / "rows.npy"
        np.save(path, sparse_rows(4 * args.batch, args.d_in, seed=0))
        setting = common(args) | {
            "d_in": args.d_in,
            "steps": 1_000_000,
            "lr": None,
            "warmup": 1000,
            "decay": 0,
            "dead_after": None,
            "seed": 0,
            "rows": str(path),
            "order": None,
        }
        children = [stack.enter_context(Child(row, setting, args.peers)) for row in rows]
        abouts = [child.about() for child in children]
        seconds: dict[str, list[float]] = {row.name: [] for row in rows}
        peaks: dict[str, int | None] = {}
        for turn in range(args.warm_up + args.rounds):
            for child in children:
                time.sleep(0.2)  # the last one's waiting threads spin for a while
                answer = child.ask({"steps": 1})
                peaks[child.row.name] = answer["peak"]
                if turn >= args.warm_up:
                    seconds[child.row.name] += answer["seconds"]
        machine(abouts, args.device)
    print(f"D={args.d_in} F={args.latents} k={args.k} batch={args.batch} tokens, float32, {args.device}")
    print(f"{args.threads} threads; one step in turn, median of {args.rounds} after {args.warm_up}\n")
    print(
        "\n".join(speed_table(seconds, peaks, args.batch, [row.name for row in rows if row.home or row is FLOORS[0]]))
    )


def speed_table(
    seconds: Mapping[str, Sequence[float]],
    peaks: Mapping[str, int | None],
    batch: int,
    against: Sequence[str],
) -> list[str]:
    """Lines of the table; one column of ratios (their time / this row's time) for each name in ``against``."""
    lines = [f"[{letter}] {name}" for letter, name in zip(letters(), against, strict=False)]
    head = f"{'':<32} {'ms':>8} {'min':>8} {'tokens/s':>9} {'peak MiB':>9}"
    lines += ["", head + "".join(f" {'× [' + letter + ']':>8}" for letter in letters()[: len(against)])]
    for name, times in seconds.items():
        middle = median(times)
        peak = peaks.get(name)
        memory = "" if peak is None else f"{peak / 2**20:,.0f}"
        line = f"{name:<32} {middle * 1e3:>8,.1f} {min(times) * 1e3:>8,.1f} {batch / middle:>9,.0f} {memory:>9}"
        lines.append(line + "".join(f" {median(seconds[other]) / middle:>8.2f}" for other in against))
    return lines


def letters() -> str:
    return "abcdefghijklmnopqrstuvwxyz"


def quality(args: argparse.Namespace) -> None:
    """Train everything, print the table of quality."""
    rows = available(QUALITY, args.peers, args.only)
    cache = open_cache(args.acts)
    scale = (cache.d_in / cache.statistics["mean_sq_norm"]) ** 0.5
    train = Reader(cache, TRAIN, scale=scale)
    held = torch.cat(list(Reader(cache, HELDOUT, scale=scale).sequential(65_536)))
    lr = args.lr if args.lr is not None else 2e-4 * math.sqrt(16384 / args.latents)
    setting = common(args) | {
        "d_in": cache.d_in,
        "steps": args.steps,
        "lr": lr,
        "warmup": round(0.05 * args.steps),
        "decay": round(0.2 * args.steps),
        "dead_after": args.dead_after,
    }
    with tempfile.TemporaryDirectory() as folder:
        setting["rows"] = str(Path(folder) / "rows.npy")
        store(train, Path(setting["rows"]))

        def one(row: Row, seed: int) -> Run:
            saved = Path(folder) / f"{row.name}-{seed}.safetensors"
            mine = setting | {"seed": seed, "order": str(order_file(Path(folder), train.n_rows, seed, args))}
            about, seconds = fit(row, mine, args.peers, saved)
            shown = train.sequential(args.batch, args.dead_rows)
            measured = evaluate(load_file(saved), row.selection, args.k, held.split(args.batch), shown)
            print(f"{row.name}, seed {seed}: {seconds:.0f} s", file=sys.stderr)
            return Run(measured, seconds, about)

        with ThreadPoolExecutor(args.jobs) as pool:
            runs = {(row.name, seed): pool.submit(one, row, seed) for seed in args.seeds for row in rows}
            results = {key: run.result() for key, run in runs.items()}
    machine([run.about for run in results.values()], args.device)
    tokens = args.steps * args.batch
    print(f"{args.acts.name}: {train.n_rows:,} train rows of {cache.d_in}, {len(held):,} held out")
    print(f"{args.steps} steps of {args.batch} = {tokens:,} tokens, {tokens / train.n_rows:.1f} epochs")
    print(f"width {args.latents}, k {args.k}, lr {lr:.2e} (up 5%, down 20%), seeds {args.seeds}")
    print(f"{args.jobs} runs at a time, {args.threads} threads each\n")
    print(f"{'':<32} {'explained variance':>19} {'L0':>6} {'dead':>7} {'s':>6}   explained variance by seed")
    for row in rows:
        print(quality_line(row.name, [results[row.name, seed] for seed in args.seeds]))


@dataclass(frozen=True)
class Run:
    """One trained and measured SAE."""

    quality: Quality
    seconds: float
    """Of training, reading of batches included, start of the process not."""
    about: Mapping[str, Any]


def fit(row: Row, setting: Mapping[str, Any], peers: Path | None, saved: Path) -> tuple[Mapping[str, Any], float]:
    """Train ``row``'s subject to its end and write its weights to ``saved``; its versions and the seconds it took."""
    with Child(row, setting, peers) as child:
        about = child.about()
        start = time.perf_counter()
        child.ask({"steps": setting["steps"]})
        seconds = time.perf_counter() - start
        child.ask({"save": str(saved)})
    return about, seconds


def order_file(folder: Path, n_rows: int, seed: int, args: argparse.Namespace) -> Path:
    """The row numbers of all batches, in saetool's order for ``seed``; written once."""
    path = folder / f"order-{seed}.npy"
    if not path.exists():
        order = Order(n_rows, seed)
        rows = torch.cat([order.rows(step, args.batch) for step in range(args.steps)])
        unique = path.with_suffix(f".{threading.get_ident()}.npy")  # several runs of one seed may start together
        np.save(unique, rows.numpy())
        unique.replace(path)
    return path


def quality_line(name: str, runs: Sequence[Run]) -> str:
    """Means over the ``runs`` of one subject, and each one's explained variance."""
    explained = [run.quality.explained_variance for run in runs]
    l0, dead = fmean(run.quality.l0 for run in runs), fmean(run.quality.dead for run in runs)
    seconds = fmean(run.seconds for run in runs)
    by_seed = " ".join(f"{value:.4f}" for value in explained)
    return f"{name:<32} {fmean(explained):>19.4f} {l0:>6.2f} {dead:>7.2%} {seconds:>6.0f}   {by_seed}"


def store(reader: Reader, path: Path) -> None:
    """All rows of ``reader``, in stored order, as one ``.npy`` file."""
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(reader.n_rows, reader.d_in))
    start = 0
    for batch in reader.sequential(65_536):
        out[start : start + len(batch)] = batch.numpy()
        start += len(batch)
    out.flush()


def common(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("latents", "k", "batch", "device", "threads")}


def machine(abouts: Sequence[Mapping[str, Any]], device: str) -> None:
    """Print what ran where."""
    versions: dict[str, set[str]] = {}
    for about in abouts:
        for name, of in about["versions"].items():
            versions.setdefault(name, set()).add(of)
    cpu = Path("/proc/cpuinfo")
    text = cpu.read_text() if cpu.exists() else ""
    model = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    has = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in text]
    print(f"{os.cpu_count()} cores, {model or platform.processor()} ({' '.join(has)})")
    if device == "cuda":
        print(torch.cuda.get_device_name())
    ran = ", ".join(f"{name} {'/'.join(sorted(of))}" for name, of in sorted(versions.items()))
    print(f"{ran}; Python {platform.python_version()}, numpy {version('numpy')}")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    cores = os.cpu_count() or 1
    for verb, run in (("speed", speed), ("quality", quality)):
        sub = verbs.add_parser(verb)
        sub.set_defaults(run=run)
        sub.add_argument("--peers", type=Path, help="folder made by peers.sh")
        sub.add_argument("--only", help="rows whose name contains one of these, comma-separated")
        sub.add_argument("--k", type=int, default=32)
        sub.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    sub = verbs.choices["speed"]
    sub.add_argument("--d-in", type=int, default=576)
    sub.add_argument("--latents", type=int, default=12288)
    sub.add_argument("--batch", type=int, default=4096)
    sub.add_argument("--threads", type=int, default=2)
    sub.add_argument("--rounds", type=int, default=5)
    sub.add_argument("--warm-up", type=int, default=1)
    sub = verbs.choices["quality"]
    sub.add_argument("--acts", type=Path, required=True, help="activation cache (saetool cache)")
    sub.add_argument("--latents", type=int, default=1152)
    sub.add_argument("--batch", type=int, default=2048)
    sub.add_argument("--steps", type=int, default=1500)
    sub.add_argument("--lr", type=float, default=None, help="default: 2e-4·sqrt(16384/latents)")
    sub.add_argument("--dead-after", type=int, default=None, help="tokens, the same for all; default: their own")
    sub.add_argument("--dead-rows", type=int, default=200_000)
    sub.add_argument("--seeds", type=numbers, default=[0])
    sub.add_argument("--threads", type=int, default=1, help="of each run")
    sub.add_argument("--jobs", type=int, default=cores, help="runs at a time")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
