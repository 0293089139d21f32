"""z by its active pairs (token, latent) alone, and x̂ from them.

Of d_sae latents some tens are active on a token; a dense z is zeros but for 0.1 to 5%. Finding the active pairs costs
one comparison per latent, and decoding them a weighted sum of a few decoder rows, where z W_dec costs as much as the
encoder. Which latents are active, and their values, are exactly those of ``SAE.encode``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetool.core import ops
from saetool.core.normalization import normalize
from saetool.core.sae import SAE

DENSE_FROM = 1 / 16
"""Share of active latents from which z W_dec is the faster decoder (measured on a CPU: 1/15 to 1/10)."""


SCREENED_FROM = 1024
"""Latents from which a screened product is the faster encoder."""


@dataclass(frozen=True)
class Codes:
    """The active pairs of ``n`` tokens, token after token."""

    tokens: Int[Tensor, " pairs"]
    """Which of the n tokens, rising."""
    latents: Int[Tensor, " pairs"]
    values: Float[Tensor, " pairs"]
    """z > 0."""
    n: int
    d_sae: int

    @property
    def counts(self) -> Int[Tensor, " n"]:
        """Active latents of each token."""
        return torch.bincount(self.tokens, minlength=self.n)

    @property
    def fired(self) -> Int[Tensor, " d_sae"]:
        """Tokens on which each latent is active."""
        return torch.bincount(self.latents, minlength=self.d_sae)

    def sums(self) -> Float[Tensor, " n"]:
        """Σ_i z_i of each token, in float64 where the device has it."""
        wide = torch.float32 if self.values.device.type == "mps" else torch.float64
        zeros = torch.zeros(self.n, dtype=wide, device=self.values.device)
        return zeros.index_add_(0, self.tokens, self.values.to(wide))

    def dense(self) -> Float[Tensor, "n d_sae"]:
        """z as a matrix."""
        z = torch.zeros(self.n, self.d_sae, dtype=self.values.dtype, device=self.values.device)
        z[self.tokens, self.latents] = self.values
        return z


Screen = Callable[[Float[Tensor, "n d_in"]], ops.Found]


def screen_of(sae: SAE) -> Screen | None:
    """For ``encode`` of many batches, where the encoder's product is screened (core/ops); None where the dense one
    serves."""
    pays = sae.inference == "jumprelu" and sae.d_sae >= SCREENED_FROM
    if not pays or sae.threshold is None or ops.kernels(sae.W_enc.device) not in ("screened", "triton"):
        return None
    return ops.above(sae.W_enc.T.contiguous(), sae.b_enc, sae.threshold)


def encode(sae: SAE, x: Float[Tensor, "n d_in"], screen: Screen | None = None) -> Codes:
    """The active pairs of ``sae.encode(x)``; with ``screen_of(sae)`` in a fraction of the encoder's time.

    Its values are then sums in another order: the same to the rounding of float32, and so are the latents that a
    rounding puts above their threshold.
    """
    if screen is not None:
        inner = normalize(x, sae.normalization)
        inner = inner - sae.b_dec if sae.subtract_b_dec else inner
        return Codes(*screen(inner), len(x), sae.d_sae)
    if sae.inference == "jumprelu" and sae.threshold is not None:
        return above(sae.pre_activations(x), sae.threshold.clamp_min(0))
    if sae.inference == "relu":
        return above(sae.pre_activations(x), torch.zeros((), device=x.device))
    return of_dense(sae.encode(x))


def encode_batch(p: Float[Tensor, "n d_sae"], cut: float) -> Codes:
    """The active pairs of BatchTopK over all rows of ``p``, whose smallest kept value is ``cut`` (ties stay)."""
    before = torch.nextafter(torch.tensor(cut, dtype=p.dtype), torch.tensor(-torch.inf, dtype=p.dtype))
    return above(p, before.clamp_min(0).to(p.device))


def above(p: Float[Tensor, "n d_sae"], floor: Float[Tensor, "*latents"]) -> Codes:
    """The pairs with p > ``floor`` (strictly), one floor for all latents or one each; floors must not be negative."""
    if p.device.type == "cpu":
        # NumPy's comparison and search are 3 to 5 times as fast as torch's here.
        flat = torch.from_numpy(np.flatnonzero(p.numpy() > floor.numpy()))
    else:
        flat = (p > floor).view(-1).nonzero().squeeze(1)
    return _pairs(p, flat)


def of_dense(z: Float[Tensor, "n d_sae"]) -> Codes:
    """The pairs with z > 0."""
    return above(z, torch.zeros((), device=z.device))


def _pairs(p: Tensor, flat: Tensor) -> Codes:
    n, d_sae = p.shape
    return Codes(flat // d_sae, flat % d_sae, p.reshape(-1)[flat], n, d_sae)


def decode(sae: SAE, codes: Codes, x: Float[Tensor, "n d_in"] | None = None) -> Float[Tensor, "n d_in"]:
    """x̂ = z W_dec + b_dec; an SAE that normalises each token needs its input ``x`` (see ``SAE.decode``)."""
    if sae.normalization != "none" or len(codes.values) > DENSE_FROM * codes.n * codes.d_sae:
        return sae.decode(codes.dense(), x)
    counts = codes.counts
    starts = counts.cumsum(0) - counts
    x_hat = torch.nn.functional.embedding_bag(
        codes.latents, sae.W_dec, starts, mode="sum", per_sample_weights=codes.values
    )
    return x_hat.add_(sae.b_dec)
