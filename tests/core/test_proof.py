"""The proof of an import: it holds for the same function, fails for another, and is never empty."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saetool.core import proof
from saetool.core.normalization import NORMALIZATIONS, normalize, restore
from saetool.core.sae import SAE, require_plain, unit_rows
from saetool.errors import ConfigError
from tests.conftest import random_sae


def same(sae: SAE):  # type: ignore[no-untyped-def]
    def other(x: Tensor) -> tuple[Tensor, Tensor]:
        exact = sae.map(lambda t: t.to(x.dtype))
        z = exact.encode(x)
        return z, exact.decode(z, x)

    return other


def test_an_sae_agrees_with_itself_exactly() -> None:
    for threshold in (None, 0.2):
        result = proof.prove(random_sae(threshold=threshold), same(random_sae(threshold=threshold)))
        assert result.holds and result.max_difference_z == 0 and result.max_difference_x_hat == 0
        assert result.rows == proof.ROWS and result.precision == "float64"


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_one_changed_number_is_found(name: str) -> None:
    sae = random_sae()
    changed = getattr(sae, name).clone()
    changed.flatten()[3] += 0.05
    assert not proof.prove(sae, same(replace(sae, **{name: changed}))).holds


def test_each_wrong_reading_is_found() -> None:
    sae = random_sae()
    wrong = [
        replace(sae, subtract_b_dec=False),
        replace(sae, threshold=None, arch="relu"),
        replace(sae, threshold=None, arch="topk", k=5),
        replace(sae, normalization="per_token"),
    ]
    assert not any(proof.prove(sae, same(w)).holds for w in wrong)
    square = random_sae(d_sae=16)
    turned = replace(square, W_enc=square.W_enc.T.contiguous())
    assert not proof.prove(square, same(turned)).holds


def test_the_probe_grows_until_latents_fire() -> None:
    sae = replace(random_sae(), threshold=torch.full((24,), 300.0))
    x, scale = proof.probe(sae)
    assert scale > 64 and (sae.map(Tensor.double).encode(x) > 0).sum() >= proof.ROWS
    never = replace(random_sae(), threshold=torch.full((24,), 1e30))
    result = proof.prove(never, same(never))
    assert result.active == 0 and not result.holds


def test_a_latent_at_its_threshold_leaves_its_row_out() -> None:
    sae = random_sae()
    x, _ = proof.probe(sae)
    p = sae.map(Tensor.double).pre_activations(x)
    assert sae.threshold is not None
    at = sae.threshold.double().clone()
    at[2] = p[p[:, 2] > 0.5, 2][0]
    low, high = (replace(sae, threshold=at * (1 + sign * 1e-9)) for sign in (-1, 1))
    exact = low.map(Tensor.double)
    result = proof.prove(exact, same(replace(high, threshold=at * (1 + 1e-9))))
    assert result.rows_at_threshold == 1 and result.holds
    assert not proof.prove(exact, same(replace(high, threshold=at * 1.2))).holds


def test_nan_is_no_proof() -> None:
    sae = random_sae()

    def broken(x: Tensor) -> tuple[Tensor, Tensor]:
        z, x_hat = same(sae)(x)
        return z, x_hat * float("nan")

    assert not proof.prove(sae, broken).holds


def test_the_probe_tells_square_weights_from_their_transposes() -> None:
    rows = unit_rows(torch.randn(32, 32, generator=torch.Generator().manual_seed(3)))
    enc = rows.T + 0.02 * torch.randn(32, 32, generator=torch.Generator().manual_seed(4))
    right = proof.orientation(enc, rows)
    assert right.hits > 0.9 and right.unit_rows
    assert proof.orientation(enc.T, rows).hits < 0.3
    assert proof.orientation(enc, rows.T).hits < 0.3
    assert not proof.orientation(enc.T, rows.T).unit_rows


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_normalisation_is_undone(kind: str) -> None:
    x = torch.randn(20, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 1
    normed = normalize(x, kind)
    assert torch.allclose(restore(normed, x, kind), x, atol=1e-4)  # per_token adds 1e-5 to the deviation one way
    if kind == "per_token":
        assert torch.allclose(normed.mean(1), torch.zeros(20).double(), atol=1e-12)
        assert torch.allclose(normed.std(1), torch.ones(20).double(), atol=1e-4)
    if kind == "per_token_norm":
        assert torch.allclose(normed.norm(dim=1), torch.full((20,), 3.0).double())
        assert torch.equal(normalize(torch.zeros(1, 4), kind), torch.zeros(1, 4))


def test_an_sae_that_normalises_needs_its_input_to_decode() -> None:
    sae = replace(random_sae(), normalization="per_token")
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    z = sae.encode(x)
    assert torch.allclose(sae.encode(7 * x + 2), z, atol=1e-4)  # blind to scale and mean
    assert torch.allclose(sae.decode(z, 7 * x + 2), 7 * sae.decode(z, x) + 2, atol=1e-3)
    with pytest.raises(ConfigError, match="without the input"):
        sae.decode(z)
    with pytest.raises(ConfigError, match="rescales each token"):
        require_plain(sae, "a stitched SAE")
