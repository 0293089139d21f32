"""Proof that two ways of computing an SAE agree: a fixed probe, both ways, the largest differences.

The probe: 64 rows, 32 Gaussian and 32 that the decoder can write (b_dec plus the sum of three of its rows), times
the first of 1, 2, 4, … at which at least one latent fires in each row on average (so that equal silence proves
nothing). A latent whose pre-activation is at its threshold within rounding may fire one way and not the other: such
rows are counted and left out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saetool.core.sae import SAE

ROWS = 64
TOLERANCE = 1e-5
"""Of a difference, relative to the largest value or 1."""
_LARGEST_SCALE = 2.0**20
_FLOAT64_ENTRIES = 2**27
"""Weight matrices up to this size are multiplied in float64 (1 GiB each), larger ones in float32."""


@dataclass(frozen=True)
class Proof:
    """Two computations compared on the probe."""

    rows: int
    """Rows compared."""
    rows_at_threshold: int
    """Rows left out: a latent within rounding of its threshold fired one way only."""
    active: float
    """Mean number of active latents in a row of the probe."""
    scale: float
    """What the probe was multiplied by."""
    max_difference_z: float
    max_difference_x_hat: float
    largest_z: float
    largest_x_hat: float
    precision: str

    @property
    def holds(self) -> bool:
        """Whether both differences are within ``TOLERANCE``, most rows were compared and something fired."""
        return (
            math.isfinite(self.max_difference_z + self.max_difference_x_hat)
            and self.rows_at_threshold <= ROWS // 8
            and self.active > 0
            and self.max_difference_z <= TOLERANCE * max(self.largest_z, 1.0)
            and self.max_difference_x_hat <= TOLERANCE * max(self.largest_x_hat, 1.0)
        )


def precision(sae: SAE) -> torch.dtype:
    """The type that both ways are computed in."""
    return torch.float64 if sae.W_enc.numel() <= _FLOAT64_ENTRIES else torch.float32


@torch.no_grad()
def probe(sae: SAE, *, batch: bool = False) -> tuple[Float[Tensor, "n d_in"], float]:
    """The probe of ``sae``, and its scale. Deterministic: the seed is fixed."""
    dtype = precision(sae)
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(ROWS // 2, sae.d_in, generator=generator, dtype=torch.float64)
    picked = torch.randint(sae.d_sae, (ROWS // 2, 3), generator=generator)
    written = sae.W_dec[picked].double().sum(1) + sae.b_dec.double()
    rows = torch.cat([gaussian, written]).to(dtype)
    exact = sae.map(lambda tensor: tensor.to(dtype))
    scale = 1.0
    while scale < _LARGEST_SCALE and float((exact.encode(rows * scale, batch=batch) > 0).sum()) < ROWS:
        scale *= 2
    return rows * scale, scale


@torch.no_grad()
def prove(sae: SAE, other: Callable[[Tensor], tuple[Tensor, Tensor]], *, batch: bool = False) -> Proof:
    """Compare ``sae`` with ``other`` (x → z, x̂) on the probe of ``sae``.

    ``batch``: a BatchTopK SAE without a threshold, which selects over the whole probe.
    """
    x, scale = probe(sae, batch=batch)
    exact = sae.map(lambda tensor: tensor.to(x.dtype))
    z = exact.encode(x, batch=batch)
    x_hat = exact.decode(z, x)
    z_other, x_hat_other = other(x)
    same = _same_or_clear(exact, x, z, z_other, batch)
    if not same.any():
        same = torch.ones_like(same)  # then nothing is left out: the difference shows
    return Proof(
        rows=int(same.sum()),
        rows_at_threshold=int((~same).sum()),
        active=float((z > 0).sum(1).double().mean()),
        scale=scale,
        max_difference_z=_largest(z[same] - z_other[same]),
        max_difference_x_hat=_largest(x_hat[same] - x_hat_other[same]),
        largest_z=_largest(z[same]),
        largest_x_hat=_largest(x_hat[same]),
        precision=str(x.dtype).removeprefix("torch."),
    )


def _largest(values: Tensor) -> float:
    """max |values|; NaN anywhere is infinitely wrong."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    return largest if largest == largest else float("inf")


def _same_or_clear(sae: SAE, x: Tensor, z: Tensor, z_other: Tensor, batch: bool) -> Tensor:
    """Rows in which every latent that fires one way only is clear of its threshold, or none does."""
    differs = (z > 0) != (z_other > 0)
    if not differs.any():
        return torch.ones(len(x), dtype=torch.bool)
    if sae.inference == "matching_pursuit":
        return torch.ones(len(x), dtype=torch.bool)  # it has no threshold: every difference counts
    p = sae.pre_activations(x)
    if batch:
        cut = z[z > 0].min() if (z > 0).any() else torch.zeros(())
    elif sae.inference == "groupmax":
        cut = (
            p.relu().unflatten(1, (sae.k, -1)).max(2, keepdim=True).values.expand(-1, -1, sae.d_sae // sae.k).flatten(1)
        )
    elif sae.inference == "topk":
        assert sae.k is not None
        cut = p.relu().topk(sae.k, dim=1).values[:, -1:]
    else:
        cut = torch.zeros(()) if sae.threshold is None else sae.threshold
    near = (p - cut.to(p)).abs() <= 1e-6 * (1 + p.abs())
    return ~(differs & near).any(1)


@dataclass(frozen=True)
class Orientation:
    """Of two weight matrices whose shapes do not tell: how often the probe finds its own latent."""

    hits: float
    """Share of decoder rows whose own latent has the largest pre-activation among all."""
    unit_rows: bool
    """Whether all decoder rows have norm 1, within 1e-3."""


@torch.no_grad()
def orientation(W_enc: Float[Tensor, "d_in d_sae"], W_dec: Float[Tensor, "d_sae d_in"]) -> Orientation:
    """The probe for square matrices: each decoder row is encoded, and its own latent should answer most."""
    rows = W_dec.double()
    answers = (rows @ W_enc.double()).argmax(1)
    own = torch.arange(len(rows))
    norms = rows.norm(dim=1)
    return Orientation(
        hits=float((answers == own).double().mean()),
        unit_rows=bool(torch.allclose(norms, torch.ones_like(norms), atol=1e-3)),
    )
