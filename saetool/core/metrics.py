"""How good a reconstruction is. Sums are kept in float64, so that batch size changes nothing.

    mse                           Σ‖x − x̂‖² / n                       (summed over d)
    explained_variance            1 − Σ‖x − x̂‖² / Σ‖x − x̄‖²             (fvu = 1 − that)
    explained_variance_legacy     mean over tokens of 1 − ‖x − x̂‖² / ‖x − x̄‖²
    frac_variance_explained       1 − Var(x − x̂) / Var(x), the residual centred as well
    relative_reconstruction_bias  Σ‖x̂‖² / Σ x·x̂

x̄ is the mean of the evaluated set, given beforehand. Names as in SAELens and SAEBench.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

OUTLIER_FACTOR = 20
"""A dimension is an outlier where its variance is above this many times the mean over dimensions."""


@dataclass(frozen=True)
class Quality:
    """Metrics of one SAE on one set of tokens (formulas in the module's docstring)."""

    l0: float
    l1: float
    mse: float
    mse_mean: float
    explained_variance: float
    explained_variance_no_outliers: float
    """explained_variance over the dimensions that are no outliers."""
    explained_variance_legacy: float
    frac_variance_explained: float
    fvu: float
    cossim: float
    l2_ratio: float
    relative_reconstruction_bias: float
    frac_alive: float
    dead: int
    """Latents that never fired on the set."""


class QualitySums:
    """Accumulates batches; ``result()`` gives the metrics of all of them together."""

    def __init__(self, d_in: int, d_sae: int, mean: Float[Tensor, " d_in"]) -> None:
        self._mean = mean.double()
        self.n = 0
        self.fired = torch.zeros(d_sae, dtype=torch.int64)
        """How often each latent was active."""
        self._error_sq = torch.zeros(d_in, dtype=torch.float64)
        self._error = torch.zeros(d_in, dtype=torch.float64)
        self._variance = torch.zeros(d_in, dtype=torch.float64)
        self._sums = dict.fromkeys(("l1", "legacy", "cossim", "l2_ratio", "xhat_sq", "x_xhat"), 0.0)

    def add(self, x: Float[Tensor, "n d_in"], z: Float[Tensor, "n d_sae"], x_hat: Float[Tensor, "n d_in"]) -> None:
        """Count one batch: inputs, activations and reconstructions, on any device."""
        x, x_hat = x.double().cpu(), x_hat.double().cpu()
        error, centred = x - x_hat, x - self._mean
        self.n += len(x)
        self.fired += (z > 0).sum(0).cpu()
        self._error += error.sum(0)
        self._error_sq += error.square().sum(0)
        self._variance += centred.square().sum(0)
        norm, norm_hat, dot = x.norm(dim=1), x_hat.norm(dim=1), (x * x_hat).sum(1)
        tiny = torch.finfo(torch.float64).tiny
        sums = self._sums
        sums["l1"] += float(z.double().sum())
        sums["legacy"] += float((1 - error.square().sum(1) / centred.square().sum(1).clamp_min(tiny)).sum())
        sums["cossim"] += float((dot / (norm * norm_hat).clamp_min(tiny)).sum())
        sums["l2_ratio"] += float((norm_hat / norm.clamp_min(tiny)).sum())
        sums["xhat_sq"] += float(norm_hat.square().sum())
        sums["x_xhat"] += float(dot.sum())

    def outliers(self) -> Bool[Tensor, " d_in"]:
        """Dimensions whose variance is above ``OUTLIER_FACTOR`` times the mean over dimensions."""
        return self._variance > OUTLIER_FACTOR * self._variance.mean()

    def result(self) -> Quality:
        n, sums = self.n, self._sums
        error_sq, variance = float(self._error_sq.sum()), float(self._variance.sum())
        plain = ~self.outliers()
        dead = int((self.fired == 0).sum())
        nan = float("nan")
        fvu = error_sq / variance if variance else nan
        plain_variance = float(self._variance[plain].sum())
        residual_variance = error_sq - float(self._error.square().sum()) / n
        return Quality(
            l0=float(self.fired.sum()) / n,
            l1=sums["l1"] / n,
            mse=error_sq / n,
            mse_mean=error_sq / n / len(self._error),
            explained_variance=1 - fvu,
            explained_variance_no_outliers=(
                1 - float(self._error_sq[plain].sum()) / plain_variance if plain_variance else nan
            ),
            explained_variance_legacy=sums["legacy"] / n,
            frac_variance_explained=1 - residual_variance / variance if variance else nan,
            fvu=fvu,
            cossim=sums["cossim"] / n,
            l2_ratio=sums["l2_ratio"] / n,
            relative_reconstruction_bias=sums["xhat_sq"] / sums["x_xhat"] if sums["x_xhat"] else nan,
            frac_alive=1 - dead / len(self.fired),
            dead=dead,
        )


def density_histogram(fired: Tensor, n: int, bins_per_decade: int = 4) -> tuple[list[float], list[int]]:
    """Histogram of log10(firing frequency) over the latents that fired; edges from 1/n (rounded down) to 0."""
    lowest = -int(torch.tensor(float(max(n, 10))).log10().ceil())
    edges = torch.linspace(lowest, 0, -lowest * bins_per_decade + 1, dtype=torch.float64)
    log = (fired[fired > 0].double() / n).log10()
    counts = torch.histc(log, bins=len(edges) - 1, min=float(lowest), max=0.0)
    return [round(float(e), 6) for e in edges], [int(c) for c in counts]
