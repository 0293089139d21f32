"""How many tokens a forward pass may read at once."""

import os
from pathlib import Path
from typing import Any

import torch

USUAL = {"cpu": 4096, "cuda": 16384}
"""Tokens per forward pass where memory allows it, by kind of device (others as cpu): more is not faster."""


def batch_tokens(config: Any, ctx_len: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens per forward pass: the usual number, halved until the pass is estimated to need a quarter of the free
    memory at most, and one context at least. ``config`` is the model's, whose weights are loaded already."""
    text = config.get_text_config()
    d = int(text.hidden_size)
    hidden = int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * d)
    heads = int(getattr(text, "num_attention_heads", 1))
    # A dozen vectors of the residual stream and four of the MLP are alive at once; attention scores may be float32.
    per_token = (12 * d + 4 * hidden) * dtype.itemsize + 4 * heads * ctx_len
    tokens, free = USUAL.get(device.type, USUAL["cpu"]), free_memory(device)
    while tokens > ctx_len and tokens * per_token > free / 4:
        tokens //= 2
    return max(tokens, ctx_len)


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on ``device`` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
