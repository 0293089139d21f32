"""Active pairs equal the dense activations they stand for."""

from dataclasses import replace

import pytest
import torch
from conftest import random_sae, sparse_data

from saetool.core import activations, sparse
from saetool.core.sae import SAE


def saes() -> list[SAE]:
    jump, relu = random_sae(), random_sae(threshold=None)
    each = torch.linspace(-0.5, 1.5, jump.d_sae)  # a negative threshold still needs p > 0
    return [jump, replace(jump, threshold=each), relu, replace(relu, arch="topk", k=3)]


@pytest.mark.parametrize("number", range(4))
def test_codes_are_the_positive_entries_of_z(number: int) -> None:
    sae, x = saes()[number], sparse_data(100)
    z, codes = sae.encode(x), sparse.encode(sae, x)
    assert torch.equal(codes.dense(), z)
    assert torch.equal(codes.counts, (z > 0).sum(1))
    assert torch.equal(codes.fired, (z > 0).sum(0))
    assert torch.allclose(codes.sums(), z.double().sum(1))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_both_ways_of_decoding_give_the_dense_reconstruction(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "DENSE_FROM", share)  # 0: always dense, 1: always by active pairs
    for sae in saes():
        x = sparse_data(100)
        assert torch.allclose(sparse.decode(sae, sparse.encode(sae, x)), sae.decode(sae.encode(x)), atol=1e-5)


def test_tokens_without_an_active_latent_decode_to_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "DENSE_FROM", 1.0)
    sae, x = random_sae(), sparse_data(10)
    silent = replace(sae, threshold=torch.full((sae.d_sae,), 1e9))
    codes = sparse.encode(silent, x)
    assert codes.counts.tolist() == [0] * 10
    assert torch.equal(sparse.decode(silent, codes), silent.b_dec.expand(10, -1))


def test_the_pairs_of_a_batch_are_batch_topks() -> None:
    p = random_sae().pre_activations(sparse_data(50))
    cut = float(activations.batch_topk_cut(p, 3))
    assert torch.equal(sparse.encode_batch(p, cut).dense(), activations.batch_topk(p, 3))
    assert len(sparse.encode_batch(p, cut).values) == 150


def test_the_screened_encoder_finds_what_the_dense_one_finds(monkeypatch):
    monkeypatch.setattr(sparse, "SCREENED_FROM", 1)
    monkeypatch.setenv("SAETOOL_KERNELS", "screened")
    sae, x = random_sae(), sparse_data(300)
    screen = sparse.screen_of(sae)
    assert screen is not None
    dense, screened = sparse.encode(sae, x), sparse.encode(sae, x, screen)
    assert torch.equal(screened.tokens, dense.tokens)
    assert torch.equal(screened.latents, dense.latents)
    torch.testing.assert_close(screened.values, dense.values, rtol=1e-4, atol=1e-5)
