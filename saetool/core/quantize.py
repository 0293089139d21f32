"""Eight-bit activations: each row x is stored as whole numbers q in −127 … 127 and one scale.

    s = max|x| / 127      q = round(x / s)      x ≈ s·q

The largest error of an element is s/2: relative to its row's largest element, 1/254.
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

LEVELS = 127


def quantize_rows(x: Float[Tensor, "n d"]) -> tuple[Int8[Tensor, "n d"], Float[Tensor, " n"]]:
    """q and s (float32) of each row; a row of zeros has s = 0. NaN or infinity in a row makes its s NaN or infinite."""
    exact = x.float()
    scales = exact.abs().amax(dim=1) / LEVELS
    safe = torch.where(scales > 0, scales, 1.0)
    q = (exact / safe[:, None]).round_().nan_to_num_(0.0).clamp_(-LEVELS, LEVELS).to(torch.int8)
    return q, scales


def dequantize_rows(q: Int8[Tensor, "n d"], scales: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """s·q, float32."""
    return q.float().mul_(scales[:, None])
