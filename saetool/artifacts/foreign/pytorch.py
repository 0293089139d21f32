"""Writing a state dict as ``torch.save`` does, with the same bytes for the same tensors."""

from pathlib import Path

import torch
from torch import Tensor


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write ``tensors`` to ``path``, each with storage of its own."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with open(path, "wb") as file:  # a file's name would be in the archive; a stream is called archive
        torch.save(plain, file)
