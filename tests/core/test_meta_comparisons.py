"""Baselines, shared edges and edits of meta-SAEs, each against brute force or a planted answer."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import generator, random_sae
from hypothesis import given, settings
from hypothesis import strategies as st
from test_meta import dictionary_sae

from saetool.core import meta, sparse
from saetool.core import meta_baselines as baselines
from saetool.core.meta_edges import _pairs, shared_edges
from saetool.core.meta_edit import Edit, edit
from saetool.core.sae import unit_rows
from saetool.errors import ConfigError


def random_rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return unit_rows(torch.randn(n, d, generator=generator(seed)) + 0.2)


def saebench_variance_explained(decoder: torch.Tensor, reconstruct, batch_size: int) -> float:
    """``_decoder_variance_metrics`` of SAEBench's meta_structure, in its own steps: sums over batches of rows."""
    total_var = residual = 0.0
    decoder_mean = decoder.mean(dim=0, keepdim=True)
    for start in range(0, decoder.shape[0], batch_size):
        batch = decoder[start : start + batch_size]
        residual += torch.sum((batch - reconstruct(batch)) ** 2).item()
        total_var += torch.sum((batch - decoder_mean) ** 2).item()
    return 1 - residual / total_var


def test_variance_explained_is_saebenchs() -> None:
    rows = random_rows(100, 8)
    sae = dictionary_sae(torch.linalg.qr(torch.randn(8, 8, generator=generator())).Q[:5])
    at = saebench_variance_explained(rows, lambda x: sae.decode(sae.encode(x)), 17)
    assert meta.explain(sae, rows).variance_explained == pytest.approx(at, rel=1e-5)
    batch = saebench_variance_explained(rows, lambda x: sae.decode(sae.encode(x, batch=True)), 100)
    assert meta.explain(sae, rows, batch=True).variance_explained == pytest.approx(batch, rel=1e-5)


def test_weights_are_the_same_as_repeating_rows() -> None:
    rows, counts = random_rows(6, 8), torch.tensor([1, 3, 2, 1, 4, 1])
    sae = dictionary_sae(torch.eye(8)[:4])
    weighted = meta.explain(sae, rows, weights=counts.double()).variance_explained
    assert weighted == pytest.approx(meta.explain(sae, rows.repeat_interleave(counts, 0)).variance_explained)


def test_pca_is_the_truncated_svd_about_the_mean() -> None:
    rows = random_rows(40, 10)
    mean = rows.double().mean(0)
    u, s, v = torch.linalg.svd(rows.double() - mean, full_matrices=False)
    expected = mean + u[:, :3] @ torch.diag(s[:3]) @ v[:3]
    assert torch.allclose(baselines.pca(rows, 3).double(), expected, atol=1e-6)


@pytest.mark.parametrize("c", [0.9, 0.5, 0.2])
def test_other_directions_at_cosine_c_explain_2c_minus_1_of_what_the_meta_sae_does(c: float) -> None:
    """Orthonormal d_j at cosine c to d'_j, nothing else in common: Σ z² (1 − 2c + 1) of Σ z² is left, not Σ z² (1 − 1).

    So decoder rows replaced at a cosine below 1/2 explain less than predicting zero (the untuned bars of Fig. 20).
    """
    atoms = torch.linalg.qr(torch.randn(12, 12, generator=generator())).Q
    rows = torch.cat([atoms[:6], -atoms[:6]])  # the mean row is 0; the negative half is explained by nothing
    sae = dictionary_sae(atoms[:6])
    other = meta.with_decoder(sae, c * atoms[:6] + (1 - c**2) ** 0.5 * atoms[6:])
    assert meta.explain(sae, rows).variance_explained == pytest.approx(0.5, abs=1e-6)
    assert meta.explain(other, rows).variance_explained == pytest.approx(0.5 * (2 * c - 1), abs=1e-6)


def test_omp_is_the_textbook_loop() -> None:
    rows, atoms = random_rows(20, 12), random_rows(30, 12, seed=1)
    mean = rows.double().mean(0)
    for row, got in zip(rows.double(), baselines.omp(rows, atoms, 3), strict=True):
        residual, chosen = row - mean, []
        for _ in range(3):
            chosen.append(int((atoms.double() @ residual).abs().argmax()))
            basis = atoms[chosen].double().T
            residual = row - mean - basis @ torch.linalg.lstsq(basis, (row - mean)[:, None]).solution[:, 0]
        assert torch.allclose(got.double(), row - residual, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_more_atoms_never_explain_less(seed: int) -> None:
    rows = random_rows(15, 6, seed)
    atoms = torch.cat([random_rows(4, 6, seed + 1), random_rows(1, 6, seed + 2).repeat(3, 1)])  # three equal ones
    explained = [meta.quality(rows, baselines.omp(rows, atoms, k))[0] for k in range(1, 8)]
    assert all(b >= a - 1e-6 for a, b in itertools.pairwise(explained))


def test_nearest_rows_are_the_largest_cosines() -> None:
    pool = random_rows(50, 8) * 3
    assert baselines.nearest_rows(pool[[4, 17]] + 0.01, pool).tolist() == [4, 17]


def all_pairs(members: list[list[int]]) -> set[tuple[int, int]]:
    return {pair for rows in members for pair in itertools.combinations(sorted(rows), 2)}


@pytest.mark.parametrize("seed", range(6))
def test_shared_edges_are_those_of_brute_force(seed: int) -> None:
    rows, other = random_rows(40, 10, seed), random_rows(12, 10, seed + 50)
    sae = dictionary_sae(torch.linalg.qr(torch.randn(10, 10, generator=generator(seed))).Q[:6], threshold=0.45)
    found = meta.codes(sae, rows)
    z = found.dense()
    a = all_pairs([(z[:, j] > 0).nonzero().flatten().tolist() for j in range(6)])
    got = shared_edges(found, rows, other)
    assert got is not None
    cosine = rows.double() @ unit_rows(other.double()).T
    # The largest τ that gives B at least as many edges as A: try every cosine, from the largest down.
    for tau in cosine.flatten().sort(descending=True).values.tolist():
        b = all_pairs([(cosine[:, j] >= tau).nonzero().flatten().tolist() for j in range(12)])
        if len(b) >= len(a):
            break
    assert (got.edges, got.other_edges, got.shared) == (len(a), len(b), len(a & b))
    assert got.tau == pytest.approx(tau)
    assert got.overlap == pytest.approx(len(a & b) / len(a))
    assert got.chance == pytest.approx(len(b) / (40 * 39 / 2))


def test_the_same_directions_share_all_edges_and_none_are_undefined() -> None:
    atoms = torch.eye(9)[:3]
    rows = unit_rows(atoms.repeat(5, 1) + 0.05 * torch.randn(15, 9, generator=generator()))
    got = shared_edges(meta.codes(dictionary_sae(atoms, threshold=0.5), rows), rows, atoms)
    assert got is not None
    assert (got.edges, got.overlap) == (30, 1.0)
    assert shared_edges(meta.codes(dictionary_sae(atoms, threshold=2.0), rows), rows, atoms) is None


def test_pairs_are_counted_once() -> None:
    found = sparse.of_dense(torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]]))
    assert _pairs(found.tokens.numpy(), found.latents.numpy(), (3, 2)).nnz == 3


def parent_of(atoms: torch.Tensor):
    """Six latents, each two of the atoms and something outside them; norms differ."""
    rows = torch.stack([atoms[i] + 0.5 * atoms[(i + 1) % 4] for i in range(6 - 2)] + [atoms[0], torch.zeros(12)])
    rows = rows + 0.3 * torch.eye(12)[11] * (rows.norm(dim=1, keepdim=True) > 0)
    return replace(random_sae(6, 12), W_dec=rows * torch.arange(1.0, 7.0)[:, None])


def test_removing_a_meta_latent_takes_its_part_out_and_keeps_the_rest() -> None:
    atoms = torch.eye(12)[:4]
    parent = parent_of(atoms)
    sae = dictionary_sae(atoms)
    edited = edit(parent, sae, [Edit(1, 2, 0.0)])
    assert edited.changed == [1]
    row, before = edited.sae.W_dec[1], parent.W_dec[1]
    assert float(row[2]) == pytest.approx(0.0, abs=1e-6)
    assert float(row.norm()) == pytest.approx(float(before.norm()), rel=1e-6)
    others = [i for i in range(12) if i != 2]
    assert torch.allclose(unit_rows(row[None, others]), unit_rows(before[None, others]), atol=1e-6)
    untouched = [0, 2, 3, 4, 5]
    assert torch.equal(edited.sae.W_dec[untouched], parent.W_dec[untouched])
    assert torch.equal(edited.sae.W_enc, parent.W_enc)


def test_an_edit_that_says_what_is_there_changes_nothing() -> None:
    parent, sae = parent_of(torch.eye(12)[:4]), dictionary_sae(torch.eye(12)[:4])
    z = float(sae.encode(unit_rows(parent.W_dec))[1, 2])
    assert edit(parent, sae, [Edit(1, 2, z)]).changed == []


def test_star_edits_every_latent_that_has_the_meta_latent_and_rebuild_leaves_nothing_else() -> None:
    parent, sae = parent_of(torch.eye(12)[:4]), dictionary_sae(torch.eye(12)[:4])
    everywhere = edit(parent, sae, [Edit(None, 0, 0.0)])
    assert everywhere.changed == [0, 3, 4]  # 0 and 4 have it first, 3 second; row 5 is zero
    rebuilt = edit(parent, sae, [Edit(1, 2, 0.0)], rebuild=True)
    assert torch.allclose(unit_rows(rebuilt.sae.W_dec[1:2]), torch.eye(12)[1:2], atol=1e-6)


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (Edit(6, 0, 1.0), "latents 0 to 5"),
        (Edit(-1, 0, 1.0), "latents 0 to 5"),
        (Edit(0, 4, 1.0), "meta-latents 0 to 3"),
        (Edit(5, 0, 1.0), "row 5 is zero"),
    ],
)
def test_edits_of_what_is_not_there_are_refused(one: Edit, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        edit(parent_of(torch.eye(12)[:4]), dictionary_sae(torch.eye(12)[:4]), [one])


def test_a_rebuilt_row_of_nothing_is_refused() -> None:
    edits = [Edit(4, 0, 0.0)]
    with pytest.raises(ConfigError, match="nothing is left of the decoder row of latent 4"):
        edit(parent_of(torch.eye(12)[:4]), dictionary_sae(torch.eye(12)[:4]), edits, rebuild=True)
