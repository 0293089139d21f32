"""What every side of the comparison shares: the data the tiny SAEs are trained on, and where inputs and answers lie.

Runs in each library's own environment, so it needs torch and safetensors only.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

D, F, K, STEPS, BATCH = 12, 24, 4, 600, 256
PROBE, ANSWER = "probe.safetensors", "answer.safetensors"


def rows(n: int, seed: int) -> Tensor:
    """Sums of a few of 20 fixed directions, with a mean and a little noise: something an SAE can learn."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(20, D, generator=torch.Generator().manual_seed(99)), dim=1)
    on = torch.rand(n, 20, generator=g) < 0.15
    return (on * (torch.rand(n, 20, generator=g) + 0.5)) @ directions * 3 + 0.4 + 0.02 * torch.randn(n, D, generator=g)


def batches(seed: int = 0) -> Iterator[Tensor]:
    """Training batches without end."""
    step = 0
    while True:
        yield rows(BATCH, seed * 1_000_003 + step)
        step += 1


def inputs() -> Tensor:
    """The random inputs on which both sides are compared: like the data, and plain Gaussian."""
    return torch.cat([rows(24, 7_777), torch.randn(8, D, generator=torch.Generator().manual_seed(5))])


def write_probe(folder: Path, x: Tensor, z: Tensor, x_hat: Tensor) -> None:
    """Inputs with what the library that made the SAE gives on them."""
    tensors = {"x": x, "z": z.detach().to_dense() if z.is_sparse else z.detach(), "x_hat": x_hat.detach()}
    save_file({name: t.float().contiguous() for name, t in tensors.items()}, folder / PROBE)


def read_probe(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / PROBE)


def write_answer(folder: Path, z: Tensor, x_hat: Tensor) -> None:
    """What a library gives on the inputs of ``folder`` after loading the files there."""
    save_file({"z": z.detach().float().contiguous(), "x_hat": x_hat.detach().float().contiguous()}, folder / ANSWER)
