"""Editing an SAE's decoder rows through its meta-SAE: which part of a latent's direction does what?

    w' = w + Σ_j (v_j − z_j) d_j        of the unit row w with meta-activations z; what the meta-SAE leaves over stays
    w' = b + Σ_j z'_j d_j               rebuilt: z with the edits in it, the rest is lost (the authors' steering)

Either is brought back to the row's own norm. d_j, b: the meta-SAE's decoder rows and bias.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from saetool.core.sae import SAE, unit_rows
from saetool.errors import ConfigError


@dataclass(frozen=True)
class Edit:
    """Set meta-latent ``meta`` to ``value`` in the row of ``latent`` (None: in every row)."""

    latent: int | None
    meta: int
    value: float


@dataclass(frozen=True)
class Edited:
    """The edited SAE."""

    sae: SAE
    changed: list[int]
    """Latents whose row is another now."""
    mean_cosine: float
    """Of their new rows to their old ones."""


def edit(parent: SAE, meta: SAE, edits: Sequence[Edit], *, rebuild: bool = False) -> Edited:
    """``parent`` with ``edits`` made; later ones win. Raises ``ConfigError`` for latents that there are not."""
    norms = parent.W_dec.norm(dim=1)
    for one in edits:
        if one.latent is not None and not 0 <= one.latent < parent.d_sae:
            raise ConfigError(f"edit {one.latent}:{one.meta}: the SAE has latents 0 to {parent.d_sae - 1}")
        if not 0 <= one.meta < meta.d_sae:
            raise ConfigError(f"edit {one.latent}:{one.meta}: the meta-SAE has meta-latents 0 to {meta.d_sae - 1}")
        if one.latent is not None and not norms[one.latent] > 0:
            raise ConfigError(f"edit {one.latent}:{one.meta}: decoder row {one.latent} is zero, it has no direction")
    rows = unit_rows(parent.W_dec)
    z = meta.encode(rows)
    wanted = z.clone()
    for one in edits:
        wanted[slice(None) if one.latent is None else one.latent, one.meta] = one.value
    wanted[norms == 0] = z[norms == 0]
    touched = (wanted != z).any(1)
    chosen = touched.nonzero().squeeze(1)
    if rebuild:
        directions = meta.decode(wanted[chosen])
    else:
        directions = rows[chosen] + (wanted[chosen] - z[chosen]) @ meta.W_dec
    if len(chosen) and not bool((directions.norm(dim=1) > 1e-6).all()):
        lost = int(chosen[directions.norm(dim=1).argmin()])
        raise ConfigError(f"edit: nothing is left of the decoder row of latent {lost}")
    W_dec = parent.W_dec.clone()
    W_dec[chosen] = unit_rows(directions) * norms[chosen, None]
    cosine = (unit_rows(directions) * rows[chosen]).sum(1)
    mean = float(cosine.mean()) if len(chosen) else float("nan")
    return Edited(replace(parent, W_dec=W_dec), chosen.tolist(), mean)
