"""The SAE's equations, and folding."""

from dataclasses import replace

import pytest
import torch
from conftest import generator, random_sae, sparse_data

from saetool.core.sae import fold_decoder_norms, fold_scale, initial, unit_rows
from saetool.errors import ConfigError


def by_hand(sae, x):  # type: ignore[no-untyped-def]
    """x̂ of a JumpReLU SAE, one token and one latent at a time."""
    out = []
    for row in x.double():
        x_hat = sae.b_dec.double().clone()
        for i in range(sae.d_sae):
            centred = row - sae.b_dec.double() if sae.subtract_b_dec else row
            p = centred @ sae.W_enc[:, i].double() + sae.b_enc[i].double()
            if p > sae.threshold[i] and p > 0:
                x_hat += p * sae.W_dec[i].double()
        out.append(x_hat)
    return torch.stack(out)


@pytest.mark.parametrize("subtract", [True, False])
def test_encode_and_decode_are_the_equations(subtract: bool) -> None:
    sae = replace(random_sae(), subtract_b_dec=subtract)
    x = sparse_data(20)
    assert torch.allclose(sae.decode(sae.encode(x)).double(), by_hand(sae, x), atol=1e-5)


@pytest.mark.parametrize("subtract", [True, False])
def test_folding_a_scale_gives_the_same_function_on_raw_inputs(subtract: bool) -> None:
    sae = replace(random_sae(), subtract_b_dec=subtract)
    x, scale = sparse_data(50), 3.7
    folded = fold_scale(sae, scale)
    assert torch.allclose(folded.encode(x), sae.encode(x * scale) / scale, atol=1e-6)
    assert torch.allclose(folded.decode(folded.encode(x)), sae.decode(sae.encode(x * scale)) / scale, atol=1e-6)


def test_folding_decoder_norms_keeps_the_function_and_l0_and_gives_unit_rows() -> None:
    sae = random_sae()
    norms = torch.rand(sae.d_sae, generator=generator(5)) + 0.5
    norms[3] = 0.0
    free = replace(sae, W_dec=sae.W_dec * norms[:, None])
    folded = fold_decoder_norms(free)
    x = sparse_data(50)
    assert torch.allclose(folded.decode(folded.encode(x)), free.decode(free.encode(x)), atol=1e-5)
    assert torch.equal(folded.encode(x) > 0, free.encode(x) > 0)
    length = folded.W_dec.norm(dim=1)
    assert torch.allclose(length[norms > 0], torch.ones(int((norms > 0).sum())))
    assert length[3] == 0


def test_norms_of_a_topk_sae_are_not_folded_silently() -> None:
    sae = replace(random_sae(threshold=None), arch="topk", k=3)
    with pytest.raises(ConfigError, match="selection would change"):
        fold_decoder_norms(replace(sae, W_dec=2 * sae.W_dec))


def test_batchtopk_without_a_threshold_cannot_encode_single_tokens() -> None:
    sae = replace(random_sae(threshold=None), arch="batchtopk", k=3)
    with pytest.raises(ConfigError, match="without a threshold"):
        sae.encode(sparse_data(4))
    assert float((sae.encode(sparse_data(64), batch=True) > 0).sum()) == 64 * 3


def test_a_zero_row_has_cosine_zero_never_nan() -> None:
    assert unit_rows(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


def test_initialisation_is_tied_unit_norm_and_a_function_of_the_generator() -> None:
    a, b = (initial(8, 20, "batchtopk", 2, torch.ones(8), generator(7)) for _ in range(2))
    assert torch.equal(a.W_enc, b.W_enc)
    assert torch.equal(a.W_enc, a.W_dec.T)
    assert torch.allclose(a.W_dec.norm(dim=1), torch.ones(20))
