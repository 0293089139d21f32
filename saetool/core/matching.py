"""One-to-one matching of the latents of two SAEs, for two seeds of one width.

The Hungarian algorithm pairs latents so that the sum of cosines is largest: by decoder rows, by encoder columns, and by
both (the sum of the two cosines). Paulo & Belrose, arXiv 2501.16615, call a latent shared if decoder and encoder
matching agree on its partner; the mean cosine of the matched pairs is PW-MCC (arXiv 2505.20254).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from saetool.core.sae import SAE, unit_rows

MAX_CELLS = 8192 * 8192
"""Matching costs the cube of the width, and its matrices 8 bytes a cell."""


@dataclass(frozen=True)
class Matching:
    """Pairs of one matching, ordered by small latent."""

    small: Int[Tensor, " n"]
    large: Int[Tensor, " n"]
    decoder: Float[Tensor, " n"]
    """Decoder cosine of each pair."""
    encoder: Float[Tensor, " n"]
    """Encoder cosine of each pair."""


@dataclass(frozen=True)
class Matchings:
    by_decoder: Matching
    by_encoder: Matching
    by_both: Matching

    def same_partner(self) -> float:
        """Share of the small latents that decoder and encoder matching give the same partner."""
        large = self.by_encoder.large
        partner = torch.full((int(self.by_encoder.small.max()) + 1,), -1)
        partner[self.by_encoder.small] = large
        return float((partner[self.by_decoder.small] == self.by_decoder.large).double().mean())


def match(small: SAE, large: SAE) -> Matchings:
    """The three matchings; of SAEs of different widths every latent of the narrower one gets a partner."""
    decoder = _cosines(small.W_dec, large.W_dec)
    encoder = _cosines(small.W_enc.T, large.W_enc.T)

    def best(scores: Tensor) -> Matching:
        rows, columns = (torch.from_numpy(ends) for ends in linear_sum_assignment(scores.numpy(), maximize=True))
        return Matching(rows, columns, decoder[rows, columns], encoder[rows, columns])

    return Matchings(best(decoder), best(encoder), best(decoder + encoder))


def _cosines(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    return (unit_rows(a.double().cpu()) @ unit_rows(b.double().cpu()).T).clamp_(-1.0, 1.0)
