"""Large and largest cosines between the rows of two matrices: screened by cheap products, decided in float64.

A float32 product of unit rows is within ``slack`` of their cosine. So what is at least a floor is among the products
above floor − slack, the largest of a row among those within 2 slack of its largest product, and only those pairs are
computed again in float64. Listing the products above a floor is ``ops.above``, itself screened in bfloat16 where the
machine is fast at it; multiplying out whole rows is the plain way, for rows of which nothing is listed.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetool.core import ops
from saetool.core.sae import unit_rows

BLOCK = 2**23
"""Entries of one block of cosines that is held: 32 MB."""
_PAIRS = 1024  # rows that are made float64 at once: what a core's cache holds


class Cosines:
    """Cosines between chosen rows of two matrices in float64, and what screening by float32 products needs."""

    def __init__(self, small: Float[Tensor, "n_small d"], large: Float[Tensor, "n_large d"]) -> None:
        self.small, self.large = small, large
        self._small_norms, self._large_norms = _norms(small), _norms(large)
        self.usable_small, self.usable_large = self._small_norms > 0, self._large_norms > 0
        self.unit_small = _unit_float32(small)
        self.slack = (small.shape[1] + 4) * 2.0**-24
        """A float32 product of two unit rows is at most this far from their cosine."""
        self._above: tuple[float, Callable[[Tensor], ops.Found]] | None = None

    def above(self, level: float) -> Callable[[Float[Tensor, "m d"]], ops.Found]:
        """Lists the products of unit rows with the small ones that are above ``level``."""
        if self._above is None or self._above[0] != level:
            levels = torch.full((len(self.small),), level, device=self.small.device)
            self._above = level, ops.above(self.unit_small, torch.zeros_like(levels), levels)
        return self._above[1]

    def __call__(self, rows: Int[Tensor, " n"], columns: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """cos(large row, small column) of each pair; 0 where a row is zero."""
        parts = [torch.zeros(0, dtype=torch.float64, device=self.small.device)]
        for mine, theirs in zip(rows.split(_PAIRS), columns.split(_PAIRS), strict=True):
            norms = self._large_norms[mine] * self._small_norms[theirs]
            inner = (self.large[mine].double() * self.small[theirs].double()).sum(1)
            parts.append((inner / norms.clamp_min(torch.finfo(torch.float64).tiny)).clamp_(-1.0, 1.0))
        return torch.cat(parts)

    def settle(self, values: Tensor, rows: Tensor, columns: Tensor, cutoff: float) -> Tensor:
        """``values`` with those too near to ``cutoff`` to tell the side computed in float64."""
        near = ((values - cutoff).abs() <= self.slack).nonzero().squeeze(1)
        values[near] = self(rows[near], columns[near])
        return values


class Maxima(NamedTuple):
    values: Float[Tensor, " m"]
    indices: Int[Tensor, " m"]


def near(exact: Cosines, start: int, stop: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Large row, small column and float32 cosine of all pairs with cosine ≥ ``floor``, and some just below.

    Of the large rows ``start`` to ``stop``, one after the other.
    """
    level = floor - 2 * exact.slack
    if level > 0:
        large = _unit_float32(exact.large[start:stop])
        rows, columns, values = exact.above(level)(large)
        return rows + start, columns, values
    found = []
    for rows in torch.arange(start, stop, device=exact.large.device).split(max(BLOCK // len(exact.small), 1)):
        cosines = _matrix(exact, rows)
        own, columns = _at_least(cosines, level)
        found.append((rows[own], columns, cosines[own, columns]))
    rows, columns, values = (torch.cat(part) for part in zip(*found, strict=True))
    return rows, columns, values


def row_maxima(
    exact: Cosines, start: int, stop: int, floor: float, rows: Tensor, columns: Tensor, values: Tensor
) -> Maxima:
    """Of the large rows ``start`` to ``stop``, from their pairs near or above ``floor`` where there are any."""
    found = _settled(exact, rows, columns, values, start, stop)
    low = (found.values < floor) & exact.usable_large[start:stop]
    plain = _multiplied_out(exact, low.nonzero().squeeze(1) + start)
    found.values[low], found.indices[low] = plain
    return found


def _multiplied_out(exact: Cosines, rows: Int[Tensor, " m"]) -> Maxima:
    """The same of any rows, by multiplying them out."""
    best = [torch.zeros(0, dtype=torch.float64, device=rows.device)]
    first = [rows.new_zeros(0)]
    for part in rows.split(max(BLOCK // len(exact.small), 1)):
        cosines = _matrix(exact, part)
        own, columns = _at_least(cosines, cosines.amax(dim=1, keepdim=True) - 2 * exact.slack)
        at = _settled(exact, own, columns, cosines[own, columns], 0, len(part), part)
        best.append(at.values)
        first.append(at.indices)
    return Maxima(torch.cat(best), torch.cat(first))


def column_maxima(small: Float[Tensor, "m d"], large: Float[Tensor, "n_large d"]) -> Float[Tensor, " m"]:
    """The largest cosine of each small row in float64, by multiplying them out."""
    exact = Cosines(small, large)
    best = torch.full((len(small),), -torch.inf, dtype=torch.float64, device=small.device)
    for rows in torch.arange(len(large), device=large.device).split(max(BLOCK // max(len(small), 1), 1)):
        cosines = _matrix(exact, rows)
        own, columns = _at_least(cosines, cosines.amax(dim=0) - 2 * exact.slack)
        raise_maxima(exact, best, rows[own], columns, cosines[own, columns])
    return best


def _settled(
    exact: Cosines, rows: Tensor, columns: Tensor, values: Tensor, start: int, stop: int, numbers: Tensor | None = None
) -> Maxima:
    """The largest cosine of the rows ``start`` to ``stop`` among the pairs, in float64, and the first column with it.

    ``numbers``: which large rows those are. −inf and the number of columns for a row without pairs.
    """
    n, own = stop - start, rows - start
    top = torch.full((n,), -torch.inf, dtype=values.dtype, device=values.device)
    top = top.scatter_reduce(0, own, values, "amax")
    close = values >= top[own] - 2 * exact.slack
    own, columns = own[close], columns[close]
    cosines = exact(own + start if numbers is None else numbers[own], columns)
    best = torch.full((n,), -torch.inf, dtype=torch.float64, device=values.device)
    best = best.scatter_reduce(0, own, cosines, "amax")
    winners = cosines == best[own]
    first = torch.full((n,), len(exact.small), device=values.device)
    return Maxima(best, first.scatter_reduce(0, own[winners], columns[winners], "amin"))


def raise_maxima(exact: Cosines, best: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> None:
    """Raise each column's largest cosine so far, ``best`` (float64), to the largest of these pairs."""
    top = best.to(values.dtype).scatter_reduce(0, columns, values, "amax")
    close = values >= top[columns] - 2 * exact.slack
    rows, columns = rows[close], columns[close]
    best.scatter_reduce_(0, columns, exact(rows, columns), "amax")


def _at_least(cosines: Float[Tensor, "m n"], floor: Tensor | float) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries ≥ ``floor`` that are not −inf, row after row."""
    if cosines.device.type == "cpu":  # NumPy's comparison and search are several times as fast as torch's here
        values = cosines.numpy()
        low = floor.numpy() if isinstance(floor, Tensor) else np.float32(floor)
        flat = torch.from_numpy(np.flatnonzero(values >= low))
    else:
        flat = (cosines >= floor).view(-1).nonzero().squeeze(1)
    flat = flat[cosines.view(-1)[flat] > -torch.inf]
    return torch.div(flat, cosines.shape[1], rounding_mode="floor"), flat % cosines.shape[1]


def _norms(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Norms in float64, without a float64 copy of the whole."""
    return torch.cat([part.double().norm(dim=1) for part in rows.split(_PAIRS)])


def _unit_float32(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    unit = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    for part, target in zip(rows.split(_PAIRS), unit.split(_PAIRS), strict=True):
        target.copy_(unit_rows(part.double()))
    return unit


def _matrix(exact: Cosines, rows: Int[Tensor, " m"]) -> Float[Tensor, "m n_small"]:
    """Cosines of some large rows in float32; −inf wherever a row of norm zero takes part."""
    cosines = _unit_float32(exact.large[rows]) @ exact.unit_small.T
    if not exact.usable_small.all():
        cosines[:, ~exact.usable_small] = -torch.inf
    if not exact.usable_large[rows].all():
        cosines[~exact.usable_large[rows]] = -torch.inf
    return cosines


def max_cosines(
    small: Float[Tensor, "n_small d"], large: Float[Tensor, "n_large d"], *, block: int | None = None
) -> Float[Tensor, " n_usable"]:
    """Max cosine of each large row (of norm > 0) to ``small``'s rows; float32 products, as float64 on the CPU."""
    exact = Cosines(small, large)
    everyone = torch.arange(len(large), device=large.device)
    blocks = everyone.split(block or max(BLOCK // len(small), 1))
    maxima = torch.cat([_matrix(exact, rows).amax(dim=1).cpu() for rows in blocks])
    return maxima[maxima > -torch.inf].double().clamp_(-1.0, 1.0)


def max_cosine_to_others(rows: Float[Tensor, "n d"], *, block: int | None = None) -> Float[Tensor, " n_usable"]:
    """Each row's largest cosine to another row of the same matrix (rows of norm 0 left out); float64, CPU."""
    usable = rows[rows.norm(dim=1) > 0].double()
    columns = unit_rows(usable).T
    block = block or max(BLOCK // max(len(usable), 1), 1)
    maxima = [torch.zeros(0, dtype=torch.float64)]
    for start in range(0, len(usable), block):
        cosines = (unit_rows(usable[start : start + block]) @ columns).clamp_(-1.0, 1.0)
        own = torch.arange(len(cosines), device=rows.device)
        cosines[own, own + start] = -torch.inf
        maxima.append(cosines.amax(dim=1).cpu())
    return torch.cat(maxima)
