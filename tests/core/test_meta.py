"""Meta-SAE maths: variance explained, controls, decompositions."""

import pytest
import torch
from conftest import generator, random_sae

from saetool.core import meta
from saetool.core.sae import SAE, unit_rows


def dictionary_sae(atoms: torch.Tensor, threshold: float = 0.1) -> SAE:
    """A meta-SAE whose latents are the rows of ``atoms`` (orthonormal), exact on sparse sums of them."""
    n, d = atoms.shape
    return SAE(
        W_enc=atoms.T.contiguous(),
        b_enc=torch.zeros(n),
        W_dec=atoms,
        b_dec=torch.zeros(d),
        threshold=torch.full((n,), threshold),
        arch="batchtopk",
        k=2,
    )


def test_zero_rows_are_left_out_and_the_others_have_unit_norm() -> None:
    sae = random_sae()
    sae.W_dec[4] = 0
    sae.W_dec[7] *= 3
    rows = meta.decoder_rows(sae)
    assert rows.latents.tolist() == [i for i in range(sae.d_sae) if i != 4]
    assert torch.allclose(rows.rows.norm(dim=1), torch.ones(sae.d_sae - 1))


def test_planted_rows_are_explained_and_decomposed_exactly() -> None:
    atoms = torch.linalg.qr(torch.randn(12, 12, generator=generator())).Q[:6]
    pairs = [(0, 1), (2, 3), (4, 5), (0, 5), (1, 3)]
    rows = unit_rows(torch.stack([atoms[a] + 0.5 * atoms[b] for a, b in pairs]))
    explained = meta.explain(dictionary_sae(atoms), rows)
    assert explained.variance_explained == pytest.approx(1.0, abs=1e-6)
    assert (explained.mean_active, explained.dead, explained.unexplained_rows) == (2.0, 0, 0)
    parts = meta.decompose(dictionary_sae(atoms), meta.Rows(rows, torch.arange(5)))
    assert [p[1] for p in parts] == [list(pair) for pair in pairs]
    assert parts[0][2] == pytest.approx([2 / 5**0.5, 1 / 5**0.5], abs=1e-6)


def test_variance_explained_is_about_the_mean_row_over_all_rows() -> None:
    sae, rows = dictionary_sae(torch.eye(8)[:4]), unit_rows(torch.randn(30, 8, generator=generator()) + 0.5)
    x, x_hat = rows.double(), sae.decode(sae.encode(rows)).double()
    expected = 1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert meta.explain(sae, rows).variance_explained == pytest.approx(float(expected))


def test_a_row_nothing_fires_on_is_counted() -> None:
    explained = meta.explain(dictionary_sae(torch.eye(8)[:2], threshold=0.9), torch.eye(8)[:3])
    assert (explained.unexplained_rows, explained.dead, explained.mean_active) == (1, 0, pytest.approx(2 / 3))


def test_the_shuffled_control_keeps_each_coordinates_values_before_normalising() -> None:
    rows = unit_rows(torch.randn(50, 6, generator=generator()))
    shuffled = meta.shuffled_rows(rows, generator(1))
    assert torch.allclose(shuffled.norm(dim=1), torch.ones(50))
    assert not torch.allclose(shuffled, rows)
    again = meta.shuffled_rows(rows, generator(1))
    assert torch.equal(shuffled, again)


def test_the_cosine_histogram_counts_all() -> None:
    edges, counts, mean = meta.cosine_histogram(torch.tensor([-1.0, 0.0, 0.5, 1.0]))
    assert sum(counts) == 4
    assert (edges[0], edges[-1], mean) == (-1.0, 1.0, 0.125)
