"""Stitching against planted answers and against a brute force that rebuilds equation 5 in every state."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import generator, planted_pair, random_sae, sparse_data
from torch import Tensor

from saetool.core import interpolation
from saetool.core import similarity as similarity_module
from saetool.core.cosines import max_cosines
from saetool.core.prediction import predict
from saetool.core.sae import SAE, unit_rows
from saetool.core.similarity import random_directions, shuffled_coordinates, similarity
from saetool.core.stitch import BIASES, ORDERS, Deltas, Included, partition, path, stitched
from saetool.engines import stitch as engine
from saetool.engines.reader import Reader
from saetool.engines.stitch import Comparison, Job, Measured, compare, job, measure
from saetool.errors import ConfigError

SWEEP = (0.1, 0.3, 0.5, 0.7, 0.9)
THETA, N_ORDERS = 0.4, 2
"""At this cut-off random rows in 16 dimensions give novel latents, components of many shapes and unmatched ones."""


class Rows(Reader):
    """A reader of rows held in memory."""

    def __init__(self, x: Tensor, size: int = 64) -> None:
        self.x, self.size = x, size

    def sequential(self, size: int, limit: int | None = None) -> Iterator[Tensor]:
        yield from self.x[: limit or len(self.x)].split(min(size, self.size))


def run(
    saes: list[SAE], x: Tensor, theta: float = THETA, order: str = "random", bias: str = "eq5", seed: int = 0
) -> list[tuple[Comparison, Job, Measured]]:
    comparisons = [compare(a, b, theta, SWEEP, seed, "cpu") for a, b in itertools.pairwise(saes)]
    deltas = [None] * len(comparisons)
    if order == "effect":
        deltas = [found.deltas for _, _, found in run(saes, x, theta, "index", bias)]
    jobs = [
        job(k, k + 1, c, order, seed, N_ORDERS, d) for k, (c, d) in enumerate(zip(comparisons, deltas, strict=True))
    ]
    *_, results = measure(saes, jobs, Rows(x), bias=bias, thetas=(*SWEEP, theta))
    return list(zip(comparisons, jobs, results.pairs, strict=True))


def pair(kind: str, seed: int) -> tuple[SAE, SAE]:
    """A small and a large random SAE of several architectures."""
    small, large = random_sae(12, seed=seed), random_sae(20, seed=seed + 100)
    relu = {"threshold": None, "arch": "relu"}
    topk = {"threshold": None, "arch": "topk", "k": 4}
    match kind:
        case "jumprelu":
            return small, large
        case "relu, jumprelu":
            return replace(small, **relu), replace(large, subtract_b_dec=False)
        case "topk, relu":
            return replace(small, **topk), replace(large, **relu)
        case "topk, norms 2":
            return replace(small, **topk, W_dec=2 * small.W_dec), replace(large, **topk)
    raise AssertionError(kind)


KINDS = ("jumprelu", "relu, jumprelu", "topk, relu", "topk, norms 2")


def reconstruction(
    small: SAE, large: SAE, x: Tensor, in_small: Tensor, in_large: Tensor, alpha: float
) -> tuple[float, float]:
    """MSE and L0 of equation 5, literally."""
    z0, z1 = small.encode(x).double()[:, in_small], large.encode(x).double()[:, in_large]
    out = alpha * small.b_dec.double() + (1 - alpha) * large.b_dec.double()
    out = out + z0 @ small.W_dec.double()[in_small] + z1 @ large.W_dec.double()[in_large]
    mse = (x.double() - out).square().sum(1).mean()
    return float(mse), float((z0 > 0).sum() + (z1 > 0).sum()) / len(x)


def everything(sae: SAE) -> Tensor:
    return torch.ones(sae.d_sae, dtype=torch.bool)


# --- what the decoders say -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_pair_gives_exactly_the_planted_answer(seed):
    small, large = planted_pair(seed, n_small=10, n_split=4, n_novel=6)
    parts = partition(similarity(small.W_dec, large.W_dec, 0.7), 0.7)
    assert parts.novel.nonzero().squeeze(1).tolist() == list(range(14, 20))
    assert parts.reconstruction.nonzero().squeeze(1).tolist() == list(range(14))
    assert parts.shapes() == [(1, 1, 6), (1, 2, 4)]
    assert parts.largest(2) == [(1, 2), (1, 2)]
    assert not parts.unmatched.any()
    assert parts.novel_share == 0.3


def test_a_small_latent_without_a_partner_is_unmatched():
    small, large = planted_pair()
    kept = [i for i in range(large.d_sae) if i != 7]  # latent 7 has one copy only
    parts = partition(similarity(small.W_dec, large.W_dec[kept], 0.7), 0.7)
    assert parts.unmatched.nonzero().squeeze(1).tolist() == [7]
    assert parts.n_components == 9


def test_novel_means_exactly_without_an_edge_also_when_a_cosine_equals_theta():
    small, large = torch.eye(3), torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, -1.0]])
    theta = float(unit_rows(large.double())[0] @ small[1].double())
    found = similarity(small, large, theta)
    assert partition(found, theta).novel.tolist() == [False, True]
    assert (found.edges.small.tolist(), found.edges.large.tolist()) == ([1], [0])


def test_cosines_are_signed_and_do_not_depend_on_row_lengths():
    found = similarity(torch.tensor([[2.0, 0.0]]), torch.tensor([[-5.0, 0.0], [0.1, 0.0]]), 0.5)
    assert found.max_cosine.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("block", [1, 3, 7, 40, 1000])
def test_cosines_in_blocks_equal_the_whole_matrix(block):
    small, large = random_sae(23, seed=1).W_dec, random_sae(40, seed=2).W_dec
    found = similarity(small, large, 0.3, SWEEP, block=block)
    whole = (unit_rows(large.double()) @ unit_rows(small.double()).T).clamp(-1, 1)
    torch.testing.assert_close(found.max_cosine, whole.max(1).values, rtol=0, atol=1e-15)
    torch.testing.assert_close(found.max_cosine_of_small, whole.max(0).values, rtol=0, atol=1e-15)
    assert torch.equal(found.nearest, whole.argmax(1))
    where = (whole >= 0.3).nonzero()
    assert torch.equal(torch.stack([found.edges.large, found.edges.small], dim=1), where)
    torch.testing.assert_close(found.edges.cosine, whole[where[:, 0], where[:, 1]], rtol=0, atol=1e-15)


@pytest.mark.parametrize("kernels", ["reference", "float32", "screened"])
@pytest.mark.parametrize("cutoffs", [(0.15, 0.3), (0.5, 0.9)], ids=["most rows have a pair", "most rows have none"])
def test_every_kernel_finds_the_maxima_edges_and_components_of_float64(kernels, cutoffs, monkeypatch):
    monkeypatch.setenv("SAETOOL_KERNELS", kernels)
    small, large = random_sae(150, 64, seed=1).W_dec, random_sae(400, 64, seed=2).W_dec
    large[:90] = small[:90] + 0.1 * large[:90]
    small[7], large[[3, 250]] = 0, 0
    found = similarity(small, large, 0.6, cutoffs, block=90)
    whole = unit_rows(large.double()) @ unit_rows(small.double()).T
    whole[:, 7], whole[[3, 250]] = -torch.inf, -torch.inf
    alive = torch.ones(400, dtype=torch.bool).index_fill(0, torch.tensor([3, 250]), False)
    torch.testing.assert_close(found.max_cosine[alive], whole.amax(1)[alive], rtol=0, atol=1e-15)
    torch.testing.assert_close(found.max_cosine_of_small.nan_to_num(nan=-torch.inf), whole.amax(0), rtol=0, atol=1e-15)
    assert torch.equal(found.nearest, torch.where(alive, whole.argmax(1), -1))
    assert torch.equal(torch.stack([found.edges.large, found.edges.small], dim=1), (whole >= 0.6).nonzero())
    for theta in (0.6, *cutoffs):
        assert torch.equal(partition(found, theta).novel, alive & (whole.amax(1) < theta))


@pytest.mark.parametrize("crowded", [0.0, 1.0])
def test_maxima_are_right_where_the_floor_rose_between_two_blocks(crowded, monkeypatch):
    monkeypatch.setattr(similarity_module, "MAX_EDGES", 40)
    small, large = random_sae(12, seed=3).W_dec, random_sae(60, seed=4).W_dec
    monkeypatch.setattr(similarity_module, "_CROWDED", crowded)
    found = similarity(small, large, 0.85, (0.1, 0.3), block=6)
    assert set(found.labels) == {0.85}
    whole = unit_rows(large.double()) @ unit_rows(small.double()).T
    torch.testing.assert_close(found.max_cosine_of_small, whole.amax(0), rtol=0, atol=1e-15)
    torch.testing.assert_close(found.max_cosine, whole.amax(1), rtol=0, atol=1e-15)


def naive_components(small: Tensor, large: Tensor, theta: float) -> set[frozenset[int]]:
    parent = list(range(len(small) + len(large)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, j in itertools.product(range(len(small)), range(len(large))):
        cosine = float(torch.nn.functional.cosine_similarity(small[i].double(), large[j].double(), dim=0))
        if cosine >= theta:
            parent[root(i)] = root(len(small) + j)
    return {frozenset(i for i in range(len(parent)) if root(i) == r) for r in set(map(root, range(len(parent))))}


@pytest.mark.parametrize(("seed", "block"), [(0, 4), (1, 1), (2, 100)])
def test_components_equal_a_naive_union_find_at_every_cutoff(seed, block):
    small, large = random_sae(15, seed=seed).W_dec, random_sae(25, seed=seed + 9).W_dec
    found = similarity(small, large, THETA, SWEEP, block=block)
    for theta, labels in found.labels.items():
        components = {frozenset((labels == n).nonzero().squeeze(1).tolist()) for n in labels.unique()}
        assert components == naive_components(small, large, theta)
        parts = partition(found, theta)
        both = [c for c in components if min(c) < 15 <= max(c)]
        assert sorted(map(sum, parts.sizes.tolist())) == sorted(map(len, both))
        assert int(parts.sizes[:, 0].sum() + parts.unmatched.sum()) == 15
        assert int(parts.sizes[:, 1].sum() + parts.novel.sum()) == 25


def test_novel_share_never_falls_as_theta_rises():
    small, large = random_sae(30, seed=1), random_sae(60, seed=2)
    thetas = [t / 50 for t in range(51)]
    found = similarity(small.W_dec, large.W_dec, 0.7, thetas)
    shares = [partition(found, t).novel_share for t in thetas]
    assert shares == sorted(shares)
    assert shares[0] < 0.1 < 0.9 < shares[-1]


def test_rows_of_norm_zero_are_neither_novel_nor_matched():
    small, large = planted_pair()
    W_small, W_large = small.W_dec.clone(), large.W_dec.clone()
    W_small[9], W_large[9], W_large[19] = 0, 0, 0
    found = similarity(W_small, W_large, 0.0)
    assert found.max_cosine.isnan().nonzero().squeeze(1).tolist() == [9, 19]
    assert found.nearest[[9, 19]].tolist() == [-1, -1]
    parts = partition(similarity(W_small, W_large, 0.7), 0.7)
    assert int(parts.novel.sum()) == 5
    assert int(parts.reconstruction.sum()) == 13
    assert not parts.unmatched.any()
    with pytest.raises(ConfigError, match="zero"):
        similarity(torch.zeros(3, 4), torch.ones(5, 4), 0.7)
    with pytest.raises(ConfigError, match="larger"):
        similarity(torch.ones(3, 4), torch.zeros(5, 4), 0.7)


def test_nulls_reconstruct_less_than_the_small_sae_does():
    small, large = planted_pair()
    assert torch.equal(random_directions(9, 32, generator(3)), random_directions(9, 32, generator(3)))
    assert not torch.equal(random_directions(9, 32, generator(3)), random_directions(9, 32, generator(4)))
    shuffled = shuffled_coordinates(small.W_dec, generator())
    assert torch.equal(shuffled.sort(dim=0).values, small.W_dec.sort(dim=0).values)
    for rows in (random_directions(small.d_sae, 32, generator(3)), shuffled):
        null = max_cosines(rows, large.W_dec, block=7)
        whole = unit_rows(large.W_dec.double()) @ unit_rows(rows.double()).T
        torch.testing.assert_close(null, whole.amax(1), rtol=0, atol=1e-6)
        assert (null >= 0.7).sum() == 0


def test_pairs_nearer_to_a_cutoff_than_float32_can_tell_are_told_apart():
    g = generator(8)
    small = unit_rows(torch.randn(1, 64, generator=g).double())
    other = torch.randn(400, 64, generator=g).double()
    other = unit_rows(other - (other @ small.T) * small)
    cosines = 0.7 + 1e-8 * torch.arange(-200, 200, dtype=torch.float64)
    large = cosines[:, None] * small + (1 - cosines**2).sqrt()[:, None] * other
    found = similarity(small, large, 0.7, (0.5,))
    exact = (unit_rows(large) @ unit_rows(small).T).squeeze(1)
    clear = (exact - 0.7).abs() > 1e-12
    assert torch.equal((found.max_cosine >= 0.7)[clear], (exact >= 0.7)[clear])
    assert found.edges.large.tolist() == (found.max_cosine >= 0.7).nonzero().squeeze(1).tolist()


def test_a_cutoff_that_joins_too_many_pairs_has_no_components(monkeypatch):
    monkeypatch.setattr(similarity_module, "MAX_EDGES", 30)
    small, large = random_sae(12, seed=3).W_dec, random_sae(20, seed=4).W_dec
    assert set(similarity(small, large, 0.6, (-0.5, 0.7)).labels) == {0.6, 0.7}
    with pytest.raises(ConfigError, match=r"theta -0\.5 joins more than 30 pairs"):
        similarity(small, large, -0.5)


# --- the path --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_a_path_adds_novel_latents_then_swaps_components_then_drops_the_unmatched(order):
    small, large = random_sae(12, seed=3), random_sae(20, seed=4)
    found = similarity(small.W_dec, large.W_dec, 0.5)
    parts = partition(found, 0.5)
    g = generator(5)
    deltas = Deltas(*(torch.randn(n, generator=g, dtype=torch.float64) for n in (20, parts.n_components, 12)))
    way = path(found, parts, order, generator(), deltas)
    n_novel, n_unmatched = int(parts.novel.sum()), int(parts.unmatched.sum())
    assert min(n_novel, parts.n_components, n_unmatched) > 1
    assert (way.n_add, way.n_swap) == (n_novel, parts.n_components)
    assert way.n_steps == n_novel + parts.n_components + n_unmatched
    assert sorted(way.added_at[parts.novel].tolist()) == list(range(1, n_novel + 1))
    assert sorted(way.removed_at[parts.unmatched].tolist()) == list(
        range(way.n_steps - n_unmatched + 1, way.n_steps + 1)
    )
    for n in range(parts.n_components):
        steps = {*way.added_at[parts.component_of_large == n].tolist()}
        assert steps == {*way.removed_at[parts.component_of_small == n].tolist()}
        assert len(steps) == 1
    n_small, n_large = way.included()
    assert (n_small[0], n_large[0], n_small[-1], n_large[-1]) == (12, 0, 0, 20)
    assert (way.alpha()[0], way.alpha()[-1]) == (1, 0)
    novel_order = way.added_at[parts.novel].argsort()
    if order == "cosine":
        cosines = found.max_cosine[parts.novel][novel_order]
        assert torch.equal(cosines, cosines.sort().values)
    if order == "effect":
        assert torch.equal(deltas.added[parts.novel][novel_order], deltas.added[parts.novel].sort().values)
        at = torch.zeros(parts.n_components, dtype=torch.int64)
        at[parts.component_of_large[parts.reconstruction]] = way.added_at[parts.reconstruction]
        assert torch.equal(at.argsort(), deltas.swapped.argsort())
        gone = way.removed_at[parts.unmatched].argsort()
        assert torch.equal(gone, deltas.removed[parts.unmatched].argsort())
    if order == "index":
        assert torch.equal(novel_order, torch.arange(n_novel))


def test_a_random_order_follows_the_generator_alone():
    small, large = random_sae(12, seed=3), random_sae(20, seed=4)
    found = similarity(small.W_dec, large.W_dec, THETA)
    parts = partition(found, THETA)
    one, same, other = (path(found, parts, "random", generator(s)).added_at for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for seed, kind in enumerate(KINDS * 2)])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bias", BIASES)
def test_every_step_equals_equation_5_rebuilt_from_scratch(order, bias, kind, seed, monkeypatch):
    monkeypatch.setattr(interpolation, "_ROWS", 7)  # several blocks of rows
    small, large = pair(kind, seed)
    x = sparse_data(150, seed=seed)
    [(_, j, found)] = run([small, large], x, order=order, bias=bias, seed=seed)
    assert min(j.path.n_add, j.path.n_swap, j.path.n_steps - j.path.n_add - j.path.n_swap) > 0
    for t in range(j.path.n_steps + 1):
        in_small, in_large = j.path.removed_at > t, j.path.added_at <= t
        n_small, n_large = int(in_small.sum()), int(in_large.sum())
        alpha = {"eq5": n_small / (n_small + n_large), "small": 1.0, "large": 0.0}[bias]
        mse, l0 = reconstruction(small, large, x, in_small, in_large, alpha)
        assert float(found.curve.mse[t]) == pytest.approx(mse, rel=1e-11)
        assert float(found.curve.l0[t]) == pytest.approx(l0, abs=1e-12)
        assert int(found.curve.n_latents[t]) == n_small + n_large


@pytest.mark.parametrize("kind", KINDS)
def test_the_path_starts_at_the_small_sae_and_ends_at_the_large_one(kind):
    small, large = pair(kind, 5)
    x = sparse_data(300, seed=5)
    [(_, _, found)] = run([small, large], x)
    for sae, own, state in ((small, found.small, 0), (large, found.large, -1)):
        z = sae.map(Tensor.double).decode(sae.encode(x).double())
        assert own.mse == pytest.approx(float((x.double() - z).square().sum(1).mean()), rel=1e-12)
        assert own.l0 == pytest.approx(float((sae.encode(x) > 0).sum()) / len(x), abs=1e-12)
        assert float(found.curve.mse[state]) == pytest.approx(own.mse, rel=1e-12)
        assert float(found.curve.l0[state]) == pytest.approx(own.l0, abs=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_an_sae_stitched_with_itself_has_nothing_novel_and_no_swap_changes_anything(order):
    sae = random_sae(40, 32, seed=2)
    [(comparison, j, found)] = run([sae, sae], sparse_data(200, 32), theta=0.9, order=order)
    assert not comparison.parts.novel.any()
    assert comparison.parts.shapes() == [(1, 1, 40)]
    assert j.path.n_steps == 40
    assert found.curve.mse.tolist() == pytest.approx([found.small.mse] * 41, rel=1e-12)
    assert found.curve.l0.tolist() == pytest.approx([found.small.l0] * 41, rel=1e-12)


def test_a_firing_latent_with_a_zero_row_counts_in_l0_so_that_the_ends_agree():
    small, large = random_sae(12, seed=1), random_sae(20, seed=2)
    small.W_dec[3] = 0
    large.W_dec[5] = 0
    [(comparison, _, found)] = run([small, large], sparse_data(200))
    assert not comparison.parts.novel[5]
    assert min(float(found.small.fires[3]), float(found.large.fires[5])) > 0
    assert float(found.curve.l0[-1]) == pytest.approx(found.large.l0)
    assert float(found.curve.mse[-1]) == pytest.approx(found.large.mse, rel=1e-12)
    assert float(found.deltas.added[5]) == 0


# --- effects ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "seed"), list(zip(KINDS, range(4), strict=True)))
def test_the_effect_of_each_latent_equals_adding_it_and_measuring_again(kind, seed):
    small, large = pair(kind, seed)
    x = sparse_data(200, seed=seed)
    [(_, _, found)] = run([small, large], x)
    before, _ = reconstruction(small, large, x, everything(small), torch.zeros(20, dtype=torch.bool), 1.0)
    for i in range(large.d_sae):
        only = torch.arange(20) == i
        after, _ = reconstruction(small, large, x, everything(small), only, 1.0)
        assert float(found.deltas.added[i]) == pytest.approx(after - before, abs=1e-11 * before)
    assert torch.equal(found.large.fires, (large.encode(x) > 0).double().mean(0))


@pytest.mark.parametrize(("kind", "seed"), list(zip(KINDS, range(4), strict=True)))
def test_group_effects_equal_adding_the_group_and_measuring_again(kind, seed, monkeypatch):
    monkeypatch.setattr(interpolation, "_ROWS", 6)
    small, large = pair(kind, seed)
    large.W_dec[4] = 0
    x = sparse_data(200, seed=seed)
    [(comparison, _, found)] = run([small, large], x)
    assert {g.theta for g in found.groups} >= {*SWEEP, THETA, found.prediction.best_theta}
    for group in found.groups:
        cosines = comparison.found.max_cosine
        for members, n, delta in (
            (cosines < group.theta, group.n_novel, group.novel_delta),
            (cosines >= group.theta, group.n_reconstruction, group.reconstruction_delta),
        ):
            mse, _ = reconstruction(small, large, x, everything(small), members, 1.0)
            assert n == int(members.sum())
            assert delta == pytest.approx(mse / found.small.mse - 1, abs=1e-11)


def test_latent_order_changes_neither_counts_nor_groups_nor_effects():
    small, large = pair("relu, jumprelu", 1)
    x = sparse_data(200)
    shuffled_small, shuffled_large = (
        torch.randperm(12, generator=generator(1)),
        torch.randperm(20, generator=generator(2)),
    )

    def shuffle(sae: SAE, order: Tensor) -> SAE:
        threshold = None if sae.threshold is None else sae.threshold[order]
        return replace(
            sae, W_enc=sae.W_enc[:, order], b_enc=sae.b_enc[order], W_dec=sae.W_dec[order], threshold=threshold
        )

    [(before, _, one)] = run([small, large], x)
    [(after, _, two)] = run([shuffle(small, shuffled_small), shuffle(large, shuffled_large)], x)
    assert before.parts.shapes() == after.parts.shapes()
    assert int(before.parts.unmatched.sum()) == int(after.parts.unmatched.sum())
    assert torch.equal(before.parts.novel[shuffled_large], after.parts.novel)
    torch.testing.assert_close(one.deltas.added[shuffled_large], two.deltas.added, rtol=1e-6, atol=1e-6)
    for a, b in zip(one.groups, two.groups, strict=True):
        assert (a.n_novel, a.n_reconstruction) == (b.n_novel, b.n_reconstruction)
        assert (a.novel_delta, a.reconstruction_delta) == pytest.approx(
            (b.novel_delta, b.reconstruction_delta), abs=1e-6
        )


def test_batches_and_portions_of_tokens_do_not_change_the_result(monkeypatch):
    saes = [random_sae(8, seed=1), random_sae(12, seed=2), random_sae(20, seed=3)]
    x = sparse_data(300)
    whole = run(saes, x)
    monkeypatch.setattr(engine, "_HELD", 50)
    monkeypatch.setattr(engine, "_BATCH", 13)
    for (_, _, one), (_, _, two) in zip(whole, run(saes, x), strict=True):
        # a batch of another size rounds the encoder's float32 product differently
        torch.testing.assert_close(one.curve.mse, two.curve.mse, rtol=1e-6, atol=0)
        torch.testing.assert_close(one.deltas.added, two.deltas.added, rtol=1e-5, atol=1e-6)


def test_a_ladder_gives_what_its_pairs_give_alone():
    saes = [random_sae(8, seed=1), random_sae(12, seed=2), random_sae(20, seed=3)]
    x = sparse_data(200)
    ladder = run(saes, x)
    for k, (_, j, together) in enumerate(ladder):
        [(_, alone_job, alone)] = run(saes[k : k + 2], x)
        assert torch.equal(j.path.added_at, alone_job.path.added_at)
        torch.testing.assert_close(together.curve.mse, alone.curve.mse, rtol=1e-12, atol=0)
        torch.testing.assert_close(together.deltas.added, alone.deltas.added, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_auc_and_best_theta_equal_counting_all_pairs_and_all_cutoffs(seed):
    g = generator(seed)
    cosine = torch.randint(0, 12, (60,), generator=g).double() / 12  # many ties
    delta = cosine - 0.5 + 0.4 * torch.randn(60, generator=g, dtype=torch.float64)
    usable = torch.rand(60, generator=g) < 0.8
    cosine[0], usable[0] = torch.nan, True
    mine = usable & ~cosine.isnan()
    lowers, raises = cosine[mine & (delta < 0)].tolist(), cosine[mine & (delta >= 0)].tolist()
    wins = [1.0 if r > w else 0.5 if r == w else 0.0 for r, w in itertools.product(raises, lowers)]
    found = predict(cosine, delta, usable)
    assert found.auc == pytest.approx(sum(wins) / len(wins))

    def accuracy(theta: float) -> float:
        return sum(w < theta for w in lowers) / len(lowers) / 2 + sum(r >= theta for r in raises) / len(raises) / 2

    best = max(accuracy(t / 24) for t in range(26))
    assert found.best_balanced_accuracy == pytest.approx(best)
    assert accuracy(found.best_theta) == pytest.approx(best)


def test_without_both_kinds_of_effect_there_is_no_auc():
    found = predict(torch.tensor([0.1, 0.9]), torch.tensor([-1.0, -2.0]), torch.tensor([True, True]))
    assert all(value != value for value in found)


# --- the stitched SAE ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kind", ["jumprelu", "relu, jumprelu"])
def test_the_stitched_sae_computes_equation_5(kind, bias):
    small, large = pair(kind, 2)
    x = sparse_data(200)
    novel = partition(similarity(small.W_dec, large.W_dec, THETA), THETA).novel
    sae = stitched(small, large, Included(everything(small), novel), bias)
    assert sae.d_sae == 12 + int(novel.sum())
    z = sae.encode(x)
    torch.testing.assert_close(z, torch.cat([small.encode(x), large.encode(x)[:, novel]], dim=1), rtol=1e-4, atol=1e-5)
    alpha = {"eq5": 12 / sae.d_sae, "small": 1.0, "large": 0.0}[bias]
    mse, l0 = reconstruction(small, large, x, everything(small), novel, alpha)
    assert float((x - sae.decode(z)).square().sum(1).mean()) == pytest.approx(mse, rel=1e-5)
    assert float((z > 0).sum()) / len(x) == pytest.approx(l0)


@pytest.mark.parametrize("arch", ["topk", "batchtopk"])
def test_latents_selected_by_rank_cannot_be_merged(arch):
    small, large = pair("jumprelu", 0)
    ranked = replace(large, threshold=None, arch=arch, k=4)
    with pytest.raises(ConfigError, match=f"latents of a {arch} SAE"):
        stitched(small, ranked, Included(everything(small), everything(large)), "eq5")
