"""Eight-bit rows: the error is half a level at most, and what can be exact is."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from saetool.core.quantize import LEVELS, dequantize_rows, quantize_rows


@given(st.integers(0, 1000), st.floats(-6, 6))
def test_the_error_is_half_a_level_at_most(seed: int, power: float) -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(seed)) * 10**power
    q, scales = quantize_rows(x)
    assert q.dtype == torch.int8 and int(q.abs().max()) == LEVELS
    room = scales[:, None] / 2 * (1 + 1e-4)
    assert ((dequantize_rows(q, scales) - x).abs() <= room).all()
    torch.testing.assert_close(scales * LEVELS, x.abs().amax(1))


def test_whole_multiples_zeros_and_signs_are_exact() -> None:
    x = torch.stack([torch.arange(-127, 128).float(), torch.zeros(255), torch.full((255,), -3.0)])
    assert torch.equal(dequantize_rows(*quantize_rows(x)), x)


def test_a_row_that_is_not_finite_stays_so() -> None:
    x = torch.tensor([[1.0, float("nan")], [float("inf"), 1.0], [1.0, 2.0]])
    finite = torch.isfinite(dequantize_rows(*quantize_rows(x))).all(1)
    assert finite.tolist() == [False, False, True]
