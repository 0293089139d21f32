"""What a meta-SAE's reconstruction of decoder rows is compared with (the paper's Fig. 20, and more).

pca     w̄ + projection of w − w̄ on the k leading principal directions of the rows
omp     orthogonal matching pursuit: k unit atoms chosen one by one, each the one with the largest |cosine| to what is
        left of w − w̄, with least-squares weights of either sign after each choice (Pati et al. 1993)
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetool.core.sae import unit_rows

_BLOCK = 4096  # rows at a time


def pca(rows: Float[Tensor, "n d"], k: int) -> Float[Tensor, "n d"]:
    """``rows`` reconstructed from their mean and k leading principal directions."""
    exact = rows.double()
    mean = exact.mean(0)
    centred = exact - mean
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -k:]
    return (mean + centred @ directions @ directions.T).float()


def omp(rows: Float[Tensor, "n d"], atoms: Float[Tensor, "m d"], k: int) -> Float[Tensor, "n d"]:
    """``rows`` reconstructed from their mean and ``k`` atoms each (fewer where there are fewer atoms)."""
    atoms, mean = unit_rows(atoms.double()), rows.double().mean(0)
    parts = []
    for block in rows.split(_BLOCK):
        target = block.double() - mean
        parts.append((mean + _pursue(target, atoms, min(k, len(atoms)))).float())
    return torch.cat(parts)


def _pursue(target: Float[Tensor, "n d"], atoms: Float[Tensor, "m d"], k: int) -> Float[Tensor, "n d"]:
    numbers = torch.arange(len(target))
    chosen = torch.empty(len(target), 0, dtype=torch.int64)
    estimate = torch.zeros_like(target)
    for _ in range(k):
        score = ((target - estimate) @ atoms.T).abs()
        score[numbers[:, None], chosen] = -1.0
        chosen = torch.cat([chosen, score.argmax(1, keepdim=True)], dim=1)
        picked = atoms[chosen]
        gram = picked @ picked.transpose(1, 2)
        # Atoms may be nearly equal: the pseudo-inverse leaves directions without support alone.
        weights = torch.linalg.pinv(gram, hermitian=True) @ (picked @ target[:, :, None])
        estimate = (picked.transpose(1, 2) @ weights).squeeze(2)
    return estimate


def nearest_rows(of: Float[Tensor, "m d"], pool: Float[Tensor, "p d"]) -> Int[Tensor, " m"]:
    """The row of ``pool`` with the largest cosine to each row of ``of``."""
    columns = unit_rows(pool.double()).T
    return torch.cat([(unit_rows(part.double()) @ columns).argmax(1) for part in of.split(_BLOCK)])
