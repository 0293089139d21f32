"""Stitching at size: cosines in blocks beside their GEMM, and the whole measurement beside encoding with both SAEs.

    python tests/bench/bench_stitch.py cosines --n-small 12288 --n-large 24576 --d 768
    python tests/bench/bench_stitch.py path --n-small 3072 --n-large 6144 --d 768 --tokens 20000

Rows are random unit directions; of the large SAE's, six in ten are near a row of the small one, as in the paper's
pairs. Thresholds are such that about 44 latents are active on a token. Timings are of one run each, after a small one.
"""

import argparse
import resource
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from saetool.core import sparse
from saetool.core.sae import SAE, unit_rows
from saetool.core.similarity import similarity
from saetool.engines.reader import Reader
from saetool.engines.stitch import Found, compare, job, measure

THETA, SWEEP, ACTIVE = 0.7, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), 44


def rows_of(n_small: int, n_large: int, d: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    small, large = (unit_rows(torch.randn(n, d, generator=g)) for n in (n_small, n_large))
    near = torch.rand(n_large, generator=g) < 0.6
    parents = torch.randint(0, n_small, (int(near.sum()),), generator=g)
    large[near] = unit_rows(small[parents] + 0.5 * large[near])
    return small, large


def peak() -> float:
    """GiB of this process at most, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def cosines(n_small: int, n_large: int, d: int) -> None:
    small, large = rows_of(n_small, n_large, d)
    similarity(small[:500], large[:500], THETA, SWEEP)
    before, block = peak(), max(8_388_608 // n_small, 1)
    start = time.perf_counter()
    for part in large.split(block):
        part @ small.T
    gemm = time.perf_counter() - start
    start = time.perf_counter()
    similarity(small, large, THETA, SWEEP)
    whole = time.perf_counter() - start
    print(f"cosines {n_large} x {n_small} x {d}: GEMM {gemm:.2f} s, similarity {whole:.2f} s, ratio {whole / gemm:.2f}")
    print(f"peak memory {peak():.2f} GiB (before: {before:.2f} GiB, the rows themselves among it)")


class Rows(Reader):
    """Rows in memory."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def sequential(self, size: int, limit: int | None = None) -> Iterator[Tensor]:
        yield from self.x[:limit].split(size)


def path(n_small: int, n_large: int, d: int, tokens: int, repeats: int) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, d, generator=g)

    def sae(rows: Tensor) -> SAE:
        p = x[:512] @ rows.T
        cut = float(p.flatten().kthvalue(p.numel() - 512 * ACTIVE).values)
        n = len(rows)
        zeros = torch.zeros(d)
        return SAE(rows.T.contiguous(), torch.zeros(n), rows, zeros, torch.full((n,), cut), "jumprelu", None)

    small, large = map(sae, rows_of(n_small, n_large, d))
    jobs = [job(0, 1, compare(small, large, THETA, SWEEP, 0, "cpu"), "random", 0, repeats)]
    screens = [sparse.screen_of(sae) for sae in (small, large)]
    size = max(min(4096, 33_554_432 // n_large), 1)

    def dense() -> None:
        for part in x.split(size):
            for sae in (small, large):
                sae.encode(part)

    def pairs() -> None:
        for part in x.split(4096):
            for sae, screen in zip((small, large), screens, strict=True):
                sparse.encode(sae, part, screen)

    encoding, fastest = timed(dense), timed(pairs)
    start = time.perf_counter()
    *_, found = measure([small, large], jobs, Rows(x), bias="eq5", thetas=SWEEP)
    whole = time.perf_counter() - start
    assert isinstance(found, Found)
    own = found.pairs[0]
    print(
        f"path {n_small} -> {n_large}, d {d}, {tokens} tokens, L0 {own.small.l0:.0f} and {own.large.l0:.0f}, "
        f"{len(own.curve.mse) - 1} steps, {repeats} random orders: all {whole:.2f} s; "
        f"encoding alone: z as matrices {encoding:.2f} s (ratio {whole / encoding:.2f}), "
        f"active pairs only {fastest:.2f} s (ratio {whole / fastest:.2f}); peak memory {peak():.2f} GiB"
    )


def timed(run: Callable[[], None]) -> float:
    """Seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cosines", "path"])
    parser.add_argument("--n-small", type=int, default=3072)
    parser.add_argument("--n-large", type=int, default=6144)
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    if given.what == "cosines":
        cosines(given.n_small, given.n_large, given.d)
    else:
        path(given.n_small, given.n_large, given.d, given.tokens, given.repeats)
