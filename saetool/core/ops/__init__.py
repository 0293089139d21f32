"""Kernels: the products of a sparse training step, each in O(kept pairs · d) but for one matrix product.

A batch's activations are kept as ``Pairs`` (token, latent, value). Latents are rows here: ``encoder`` and ``decoder``
are [d_sae, d_in]. ``reference`` is the definition of every function, in plain dense torch; ``blocked`` is what CPUs and
GPUs run by default; ``triton`` replaces single steps of it on a GPU. The choice is made per call, from the tensors'
device and ``SAETOOL_KERNELS``:

    auto        blocked; screened in bfloat16 where the machine is fast at it; Triton on a CUDA device that has it
    reference   the definitions
    float32     blocked, without screening
    screened    blocked, screened
    triton      Triton, which must be there: on a CUDA device, or interpreted (TRITON_INTERPRET=1)
"""

import importlib.util
import os
from collections.abc import Callable
from functools import cache, partial

import torch
from jaxtyping import Float
from torch import Tensor

from saetool.core.ops import blocked, reference
from saetool.core.ops.pairs import Found, Pairs
from saetool.errors import ConfigError

__all__ = ["Found", "Pairs", "above", "batch_topk", "decode", "kernels", "pair_dots", "pair_sums", "topk"]

KERNELS = ("auto", "reference", "float32", "screened", "triton")


def kernels(device: torch.device) -> str:
    """The implementation used on ``device``: reference, float32, screened or triton. Raises ``ConfigError``."""
    wanted = os.environ.get("SAETOOL_KERNELS", "auto")
    if wanted not in KERNELS:
        raise ConfigError(f"SAETOOL_KERNELS={wanted}: unknown", f"one of {', '.join(KERNELS)}")
    if wanted == "triton" and not _has_triton():
        raise ConfigError("SAETOOL_KERNELS=triton: Triton is not installed", "pip install triton")
    if wanted == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"SAETOOL_KERNELS=triton: runs on CUDA devices, not on {device.type}", "SAETOOL_KERNELS=auto")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):  # no bfloat16 in the matrix units
            return "float32"
        return "triton" if _has_triton() else "screened"
    return "screened" if device.type == "cpu" and _fast_bfloat16() else "float32"


def _fast_bfloat16() -> bool:
    # AVX512-BF16 without tiles gains too, but oneDNN's emulation on older CPUs loses: ask for the instructions.
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def batch_topk(
    x: Float[Tensor, "n d"],
    encoder: Float[Tensor, "d_sae d"],
    bias: Float[Tensor, " d_sae"],
    wanted: int,
    hint: float = 0.0,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Pairs, float]:
    """The ``wanted`` largest positive values of x encoderᵀ + bias over the whole batch, and the smallest of them.

    Values tied with that cut stay. If fewer than ``wanted`` are positive, all positive ones are kept and the cut is 0.
    ``hint``, a guess of the cut, changes the time and not the result. ``gather`` joins the values of several processes
    (each with its own rows): the ``wanted`` largest of all processes are then kept.
    """
    choice = kernels(x.device)
    if choice == "reference":
        return reference.batch_topk(x, encoder, bias, wanted, gather)
    return blocked.batch_topk(x, encoder, bias, wanted, hint, gather, choice)


def topk(x: Float[Tensor, "n d"], encoder: Float[Tensor, "d_sae d"], bias: Float[Tensor, " d_sae"], k: int) -> Pairs:
    """The ``k`` largest positive values of each row of x encoderᵀ + bias."""
    choice = kernels(x.device)
    if choice == "reference":
        return reference.topk(x, encoder, bias, k)
    return blocked.topk(x, encoder, bias, k, choice)


def above(
    encoder: Float[Tensor, "d_sae d"], bias: Float[Tensor, " d_sae"], floors: Float[Tensor, " d_sae"]
) -> Callable[[Float[Tensor, "n d"]], Found]:
    """A function: of x, the positive values of x encoderᵀ + bias that are above (strictly) their latent's floor.

    It is for many batches, and not for two at a time.
    """
    choice = kernels(encoder.device)
    if choice == "reference":
        return partial(reference.above, encoder=encoder, bias=bias, floors=floors)
    return blocked.Above(encoder, bias, floors, choice)


def decode(pairs: Pairs, decoder: Float[Tensor, "d_sae d"]) -> Float[Tensor, "n d"]:
    """Σ over a row's pairs of value · decoder[latent]."""
    return _pairwise(pairs).decode(pairs, decoder)


def pair_dots(
    pairs: Pairs, rows: Float[Tensor, "n d"], directions: Float[Tensor, "d_sae d"]
) -> Float[Tensor, " pairs"]:
    """rows[row] · directions[latent] for each pair."""
    return _pairwise(pairs).pair_dots(pairs, rows, directions)


def pair_sums(pairs: Pairs, weights: Float[Tensor, " pairs"], rows: Float[Tensor, "n d"]) -> Float[Tensor, "d_sae d"]:
    """Σ over a latent's pairs of weight · rows[row]: 0 for a latent without pairs."""
    return _pairwise(pairs).pair_sums(pairs, weights, rows)


def _pairwise(pairs: Pairs):  # type: ignore[no-untyped-def]  # one of three modules with the same functions
    choice = kernels(pairs.rows.device)
    if choice == "reference":
        return reference
    if choice == "triton":
        from saetool.core.ops import triton

        return triton
    return blocked
