"""Scales of a plot's axes: linear, logarithmic and signed logarithmic, with round ticks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from saetool.report.blocks import MINUS, number

Values = Sequence[float | None]


def defined(values: Values) -> list[float]:
    """The numbers among ``values``: neither null nor NaN nor infinite."""
    return [v for v in values if v is not None and math.isfinite(v)]


@dataclass(frozen=True)
class Scale:
    """Maps values ``low`` … ``high`` to ``start`` … ``end`` (pixels).

    ``symlog`` is linear within ±``linear`` and logarithmic beyond, as sign(v)·log10(1 + |v|/linear).
    """

    kind: Literal["linear", "log", "symlog"]
    low: float
    high: float
    start: float = 0.0
    end: float = 1.0
    linear: float = 1.0

    def warp(self, value: float) -> float:
        if self.kind == "log":
            return math.log10(max(value, 1e-300))
        if self.kind == "symlog":
            return math.copysign(math.log10(1 + abs(value) / self.linear), value)
        return value

    def __call__(self, value: float) -> float:
        a, b = self.warp(self.low), self.warp(self.high)
        share = (self.warp(value) - a) / (b - a) if b != a else 0.5
        return self.start + share * (self.end - self.start)

    def placed(self, start: float, end: float) -> "Scale":
        return Scale(self.kind, self.low, self.high, start, end, self.linear)

    def ticks(self) -> list[tuple[float, str]]:
        """Round values within the range, with their labels."""
        if self.kind == "linear":
            return _linear_ticks(self.low, self.high)
        if self.kind == "log":
            return _log_ticks(self.low, self.high)
        return _symlog_ticks(self.low, self.high, self.linear)


def linear(values: Values, *, pad: float = 0.05, include: Sequence[float] = ()) -> Scale:
    """A linear scale over ``values`` and ``include``, a little wider."""
    known = [*defined(values), *include] or [0.0, 1.0]
    low, high = min(known), max(known)
    room = pad * (high - low) if high > low else 0.5 * abs(high) or 0.5
    return Scale("linear", low - room, high + room)


def log(values: Values) -> Scale:
    """A logarithmic scale over the positive ``values``."""
    known = [v for v in defined(values) if v > 0] or [0.1, 1.0]
    low, high = min(known), max(known)
    return Scale("log", low / 1.15, high * 1.15) if high > low else Scale("log", low / 2, high * 2)


def symlog(values: Values, *, linear_for: Values = ()) -> Scale:
    """A signed logarithmic scale over ``values``, linear below the (decade of the) median size of ``linear_for``.

    Without ``linear_for`` of ``values``. A side of zero without values gets little room.
    """
    known = [v for v in defined(values) if v] or [1.0]
    sizes = sorted(abs(v) for v in defined(linear_for) if v) or sorted(abs(v) for v in known)
    unit = 10.0 ** math.floor(math.log10(sizes[len(sizes) // 2]))
    low = min(*known, -unit) if min(known) < 0 else -0.25 * unit
    high = max(*known, unit) if max(known) > 0 else 0.25 * unit
    return Scale("symlog", 1.3 * low, 1.3 * high, linear=unit)


def _linear_ticks(low: float, high: float) -> list[tuple[float, str]]:
    raw = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next(f * size for f in (1, 2, 2.5, 5, 10) if f * size >= raw * 0.999)
    found = [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [(v, tick(v, step)) for v in found]


def tick(value: float, step: float) -> str:
    """A tick's label with as many decimals as ``step`` needs; thousands as k, millions as M."""
    if abs(value) < step * 1e-6:
        return "0"
    if step >= 1000:
        unit, suffix = (1e6, "M") if step >= 1e6 or abs(value) >= 1e7 else (1e3, "k")
        return f"{value / unit:g}{suffix}".replace("-", MINUS)
    if step < 1e-4:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", MINUS)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step, decimals) != round(step, decimals + 1):
        decimals += 1
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = last - first
    factors = (1, 2, 5) if decades <= 2 else (1, 3) if decades == 3 else (1,)
    every = max(1, decades // 6)
    found = [f * 10.0**e for e in range(first, last + 1, every) for f in factors if low <= f * 10.0**e <= high]
    if len(found) < 2:
        return [pair for pair in _linear_ticks(low, high) if pair[0] > 0]
    return [(v, number(v, 3)) for v in found]


def _symlog_ticks(low: float, high: float, unit: float) -> list[tuple[float, str]]:
    exponent = round(math.log10(unit))
    most = max(abs(low), abs(high))
    top = max(exponent, math.floor(math.log10(most)))
    every = max(1, math.ceil((top - exponent + 1) / 4))
    sizes = [10.0**e for e in range(top, exponent - 1, -every)]
    if top - exponent <= 1:
        sizes += [3 * size for size in sizes]
    found = sorted({0.0, *sizes, *(-s for s in sizes)})
    return [(v, _power(v)) for v in found if low <= v <= high]


def _power(value: float) -> str:
    if value == 0:
        return "0"
    if 0.01 <= abs(value) < 10_000:
        return number(value, 3)
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("-", MINUS)
