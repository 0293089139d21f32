"""How good a reconstruction is.

    mse                           Σ‖x − x̂‖² / n                       (summed over d; mse_mean: also divided by d)
    explained_variance            1 − Σ‖x − x̂‖² / Σ‖x − x̄‖²             (fvu = 1 − that)
    explained_variance_legacy     mean over tokens of 1 − ‖x − x̂‖² / ‖x − x̄‖²
    frac_variance_explained       1 − Var(x − x̂) / Var(x), the residual centred as well
    cossim, l2_ratio              mean over tokens of cos(x, x̂) and of ‖x̂‖ / ‖x‖
    relative_reconstruction_bias  Σ‖x̂‖² / Σ x·x̂
    c_dec                         mean over pairs i < j of |cos(d_i, d_j)|, d the decoder's rows (arXiv 2508.16560)

x̄ is the mean of the evaluated set, known before. All but frac_variance_explained and what counts latents are
functions of sums over tokens: of the columns in ``COLUMNS``. So one table of column sums by document (or position, or
token) gives the metrics of each group, of all tokens, and of resampled documents. Sums are kept in float64, so that
batch size changes nothing. Names as in SAELens and SAEBench.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from saetool.core.sae import SAE, unit_rows
from saetool.core.sparse import Codes
from saetool.core.statistics import Moments

RESIDUALS = 2**25
"""Numbers in the table of residuals by document, at most: 256 MB."""
TINY = torch.finfo(torch.float64).tiny

COLUMNS = (
    "n",
    "l0",
    "l1",
    "error",
    "variance",
    "error_plain",
    "variance_plain",
    "legacy",
    "cossim",
    "norm_in",
    "norm_out",
    "l2_ratio",
    "x_hat_sq",
    "x_x_hat",
)
"""Per token: 1, Σ1[z>0], Σz, ‖x−x̂‖², ‖x−x̄‖², the same two over the dimensions that are no outliers,
1 − ‖x−x̂‖²/‖x−x̄‖², cos(x, x̂), ‖x‖, ‖x̂‖, ‖x̂‖/‖x‖, ‖x̂‖², x·x̂."""


@dataclass(frozen=True)
class Quality:
    """Metrics of one SAE on one set of tokens (formulas in the module's docstring)."""

    l0: float
    l1: float
    mse: float
    mse_mean: float
    explained_variance: float
    explained_variance_no_outliers: float
    """explained_variance over the dimensions that are no outliers: not ``Moments.wide``."""
    explained_variance_legacy: float
    frac_variance_explained: float
    fvu: float
    cossim: float
    l2_norm_in: float
    """mean ‖x‖."""
    l2_norm_out: float
    """mean ‖x̂‖."""
    l2_ratio: float
    relative_reconstruction_bias: float
    frac_alive: float
    dead: int
    """Latents that never fired on the set."""


class Ratios(NamedTuple):
    """The metrics that are functions of the column sums, one value for each group of tokens."""

    l0: Tensor
    l1: Tensor
    mse: Tensor
    mse_mean: Tensor
    explained_variance: Tensor
    explained_variance_no_outliers: Tensor
    explained_variance_legacy: Tensor
    fvu: Tensor
    cossim: Tensor
    l2_norm_in: Tensor
    l2_norm_out: Tensor
    l2_ratio: Tensor
    relative_reconstruction_bias: Tensor


def ratios(sums: Float[Tensor, "*groups columns"], d_in: int) -> Ratios:
    """The metrics of each group from its column sums; NaN where a group is empty or has no variance."""
    s = dict(zip(COLUMNS, sums.unbind(-1), strict=True))
    fvu = s["error"] / s["variance"]
    return Ratios(
        l0=s["l0"] / s["n"],
        l1=s["l1"] / s["n"],
        mse=s["error"] / s["n"],
        mse_mean=s["error"] / s["n"] / d_in,
        explained_variance=_without_variance(1 - fvu),
        explained_variance_no_outliers=_without_variance(1 - s["error_plain"] / s["variance_plain"]),
        explained_variance_legacy=s["legacy"] / s["n"],
        fvu=_without_variance(fvu),
        cossim=s["cossim"] / s["n"],
        l2_norm_in=s["norm_in"] / s["n"],
        l2_norm_out=s["norm_out"] / s["n"],
        l2_ratio=s["l2_ratio"] / s["n"],
        relative_reconstruction_bias=_without_variance(s["x_hat_sq"] / s["x_x_hat"]),
    )


def frac_variance_explained(
    sums: Float[Tensor, "*groups columns"], residual: Float[Tensor, "*groups d_in"]
) -> Float[Tensor, "*groups"]:
    """1 − (Σ‖x − x̂‖² − ‖Σ(x − x̂)‖² / n) / Σ‖x − x̄‖² of each group, from its column sums and Σ(x − x̂)."""
    n, error, variance = (sums[..., COLUMNS.index(name)] for name in ("n", "error", "variance"))
    return _without_variance(1 - (error - residual.square().sum(-1) / n) / variance)


def _without_variance(value: Tensor) -> Tensor:
    """``value`` with NaN for the infinities of a division by zero."""
    return torch.where(value.isfinite(), value, torch.nan)


class QualitySums:
    """Accumulates batches of one SAE by group: ``groups`` names each grouping and how many groups it has."""

    def __init__(self, d_sae: int, moments: Moments, groups: Mapping[str, int]) -> None:
        mean = moments.mean
        self._mean, self._outliers = mean, moments.wide.nonzero().squeeze(1)
        self._d_sae = d_sae
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=mean.device)
        """How often each latent was active."""
        self.by = {
            name: torch.zeros(size, len(COLUMNS), dtype=torch.float64, device=mean.device)
            for name, size in groups.items()
        }
        """Column sums of each group."""
        kept = groups.get("document", 1)
        self.residuals = mean.new_zeros(kept if kept * len(mean) <= RESIDUALS else 1, len(mean))
        """Σ(x − x̂) of each document; one row for all of them where that would be too large a table."""
        self.totals = torch.zeros(len(COLUMNS), dtype=torch.float64, device=mean.device)

    def add(
        self,
        x: Float[Tensor, "n d_in"],
        codes: Codes,
        x_hat: Float[Tensor, "n d_in"],
        groups: Mapping[str, Int[Tensor, " n"]],
    ) -> None:
        """Count one batch: inputs, active pairs, reconstructions, and each token's group in every grouping."""
        device = self._mean.device
        placed = {name: groups[name].to(device) for name in self.by}
        rows = placed["document"] if len(self.residuals) > 1 else torch.zeros_like(placed["document"])
        parts = zip(_parts(x.to(device)), _parts(x_hat.to(device)), _parts(rows), strict=True)
        columns = _columns(torch.cat([self._square_norms(*part) for part in parts], dim=1), codes)
        self.fired += codes.fired.to(device)
        self.totals += columns.sum(0)
        for name, sums in self.by.items():
            sums.index_add_(0, placed[name], columns)

    def _square_norms(self, x: Tensor, x_hat: Tensor, rows: Tensor) -> Float64[Tensor, "6 n"]:
        """‖x‖², ‖x̂‖², and of x − x̂ and x − x̄ over the dimensions that are no outliers and over those that are.

        Differences are taken in the precision of x and x̂, as norms of single tokens are; the rest is float64.
        """
        error, centred = x - x_hat, x - self._mean.to(torch.result_type(x, x_hat))
        self.residuals.index_add_(0, rows, error.to(self.residuals))
        norms = [_norms(x), _norms(x_hat)]
        for difference in (error, centred):
            wide = _norms(difference[:, self._outliers])
            norms += [_norms(difference.index_fill_(1, self._outliers, 0)), wide]
        return torch.stack(norms).to(self._mean).square()

    @property
    def n(self) -> int:
        """Tokens counted."""
        return int(self.totals[0])

    def result(self) -> Quality:
        """The metrics of all tokens together."""
        d_in = len(self._mean)
        found = {name: float(value) for name, value in ratios(self.totals, d_in)._asdict().items()}
        dead = int((self.fired == 0).sum())
        found["frac_variance_explained"] = float(frac_variance_explained(self.totals, self.residuals.sum(0)))
        found["frac_alive"] = 1 - dead / self._d_sae
        return Quality(**{f.name: found[f.name] for f in fields(Quality) if f.name != "dead"}, dead=dead)


def _columns(square_norms: Float64[Tensor, "6 n"], codes: Codes) -> Float64[Tensor, "n columns"]:
    """``COLUMNS`` of each token."""
    norm_sq, norm_hat_sq, error_plain, error_wide, variance_plain, variance_wide = square_norms
    norm, norm_hat = norm_sq.sqrt(), norm_hat_sq.sqrt()
    error, variance = error_plain + error_wide, variance_plain + variance_wide
    dot = (norm_sq + norm_hat_sq - error) / 2  # one pass less than Σ x·x̂
    return torch.stack(
        [
            torch.ones_like(norm),
            codes.counts.to(norm),
            codes.sums().to(norm),
            error,
            variance,
            error_plain,
            variance_plain,
            1 - error / variance.clamp_min(TINY),
            dot / (norm * norm_hat).clamp_min(TINY),
            norm,
            norm_hat,
            norm_hat / norm.clamp_min(TINY),
            norm_hat_sq,
            dot,
        ],
        dim=1,
    )


def _norms(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    return torch.linalg.vector_norm(rows, dim=1)


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """On a CPU small blocks of rows, which stay in its cache: several times as fast as all rows at once."""
    return x.split(256) if x.device.type == "cpu" else (x,)


def density_histogram(fired: Tensor, n: int, bins_per_decade: int = 4) -> tuple[list[float], list[int]]:
    """Histogram of log10(firing frequency) over the latents that fired; edges from 1/n (rounded down) to 0."""
    lowest = -math.ceil(math.log10(max(n, 10)))
    edges = torch.linspace(lowest, 0, -lowest * bins_per_decade + 1, dtype=torch.float64)
    log = (fired[fired > 0].double() / n).log10().cpu()
    counts = torch.histc(log, bins=len(edges) - 1, min=float(lowest), max=0.0)
    return [round(float(e), 6) for e in edges], [int(c) for c in counts]


# --- the dictionary ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecoderCosine:
    """c_dec, and from how many rows."""

    c_dec: float
    rows: int
    """Rows whose cosines with all others were taken: all, or an evenly spaced part of a large dictionary."""


def decoder_cosine(sae: SAE, most_rows: int = 2048, chunk: int = 512) -> DecoderCosine:
    """Mean |cos| over pairs of different decoder rows; zero rows are left out.

    Above ``most_rows`` latents the pairs are those of ``most_rows`` evenly spaced rows with all others: the cost of
    all pairs would grow past that of the evaluation itself.
    """
    rows = sae.W_dec[sae.W_dec.norm(dim=1) > 0]
    if len(rows) < 2:
        return DecoderCosine(math.nan, len(rows))
    units = unit_rows(rows)
    picked = torch.linspace(0, len(units) - 1, min(most_rows, len(units)), device=units.device).long()
    total = 0.0
    for part in picked.split(chunk):
        cosines = (units[part] @ units.T).abs_()
        cosines[torch.arange(len(part), device=part.device), part] = 0
        total += float(cosines.sum(1).double().sum())
    return DecoderCosine(total / (len(picked) * (len(units) - 1)), len(picked))


@dataclass(frozen=True)
class RecoveryBound:
    """Compressed sensing: M measurements determine a K-sparse code among N only if M is of the order K·ln(N/K).

    The constant of the order is not known; it is 1 here (Klindt et al., arXiv 2503.01824, eq. 7).
    """

    measurements: int
    """M: the width of the activations."""
    bound: float
    """K·ln(N/K), K the mean L0, N the latents alive; NaN without a sparse code (K = 0 or K ≥ N)."""
    ratio: float
    """M / bound: above 1, M is above the bound."""


def recovery_bound(d_in: int, l0: float, alive: int) -> RecoveryBound:
    """K·ln(N/K) for K = ``l0`` and N = ``alive``, beside M = ``d_in``."""
    bound = l0 * math.log(alive / l0) if 0 < l0 < alive else math.nan
    return RecoveryBound(d_in, bound, d_in / bound)
