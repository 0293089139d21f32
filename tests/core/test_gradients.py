"""The gradients by hand against autograd over the dense losses, for every architecture and kernel."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from conftest import random_sae, sparse_data

from saetool.core import gradients
from saetool.core.gradients import backward
from saetool.core.losses import AUX_SCALES, Losses, Objective, Parameters, Share

ARCHES = ("topk", "batchtopk", "matryoshka")


def parameters(frozen: bool = False) -> Parameters:
    sae = random_sae(seed=4)
    tensors = (sae.W_enc.T.contiguous(), sae.b_enc, sae.W_dec * 1.2, sae.b_dec)
    p = Parameters(*(t.clone().requires_grad_() for t in tensors))
    if frozen:
        p.W_dec.requires_grad_(False)
    return p


def objective(arch: str) -> Objective:
    return Objective(arch, k=3, aux_alpha=0.25, k_aux=2, prefixes=(4, 10, 24) if arch == "matryoshka" else (24,))


def both(monkeypatch, goal: Objective, dead: torch.Tensor | None, frozen: bool = False, hint: float = 0.0):
    """(parameters, losses) of the dense way and of the way by hand."""
    x, found = sparse_data(60), []
    for by_hand in (False, True):
        monkeypatch.setattr(gradients, "by_hand", lambda *_, answer=by_hand: answer)
        p = parameters(frozen)
        found.append((p, backward(p, x, goal, dead, hint)))
    return found


def agree(dense: tuple[Parameters, Losses], hand: tuple[Parameters, Losses]) -> None:
    (p, a), (q, b) = dense, hand
    for name in ("loss", "mse", "aux"):
        torch.testing.assert_close(getattr(b, name), getattr(a, name), rtol=1e-4, atol=1e-5)
    assert b.fired.equal(a.fired)
    assert int(b.active) == int(a.active)
    assert b.cut == pytest.approx(a.cut, rel=1e-5)
    for name, tensor in p.named().items():
        other = q.named()[name].grad
        if tensor.grad is None:
            assert other is None, name
        else:
            torch.testing.assert_close(other, tensor.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kernels", ["reference", "float32", "screened"])
@pytest.mark.parametrize("arch", ARCHES)
def test_gradients_by_hand_equal_autograd(monkeypatch, arch, kernels):
    monkeypatch.setenv("SAETOOL_KERNELS", kernels)
    agree(*both(monkeypatch, objective(arch), None))


@pytest.mark.parametrize("scale", AUX_SCALES)
@pytest.mark.parametrize("arch", ARCHES)
def test_aux_gradients_by_hand_equal_autograd(monkeypatch, arch, scale):
    dead = torch.zeros(24, dtype=torch.bool)
    dead[[1, 6, 7, 20]] = True
    goal = replace(objective(arch), aux_scale=scale)
    dense, hand = both(monkeypatch, goal, dead)
    assert float(dense[1].aux) > 0
    agree(dense, hand)


def test_a_frozen_decoder_has_no_gradient(monkeypatch):
    dead = torch.ones(24, dtype=torch.bool)
    dense, hand = both(monkeypatch, objective("batchtopk"), dead, frozen=True)
    assert hand[0].W_dec.grad is None
    agree(dense, hand)


def test_aux_in_blocks_of_rows_is_the_same(monkeypatch):
    dead = torch.ones(24, dtype=torch.bool)
    whole = both(monkeypatch, objective("topk"), dead)
    monkeypatch.setattr(gradients, "DENSE_ELEMENTS", 4 * 24 * 7)
    agree(whole[1], both(monkeypatch, objective("topk"), dead)[1])


@pytest.mark.parametrize("goal", [Objective("relu", sparsity=0.7), Objective("gated", sparsity=0.7)])
def test_dense_losses_in_blocks_of_rows_are_the_same(monkeypatch, goal):
    x, found = sparse_data(50), []
    for limit in (2**26, 24 * 8):
        monkeypatch.setattr(gradients, "DENSE_ELEMENTS", limit)
        p = parameters()
        if goal.arch == "gated":
            p = replace(
                p, r_mag=torch.full((24,), 0.2).requires_grad_(), b_mag=torch.full((24,), -0.1).requires_grad_()
            )
        found.append((p, backward(p, x, goal)))
    agree(*found)


class Exchange:
    """Joins the values of two threads that stand for two processes."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2)
        self._sent: list[torch.Tensor] = [torch.empty(0)] * 2

    def gather(self, rank: int, values: torch.Tensor) -> torch.Tensor:
        self._sent[rank] = values
        self._barrier.wait(20)
        joined = torch.cat(self._sent)
        self._barrier.wait(20)
        return joined


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("hint", [0.0, 0.3, 1e6])
def test_parts_of_a_batch_add_up_to_it(monkeypatch, arch, by_hand, hint):
    """Two processes with half of the rows each: their losses and gradients sum to the whole batch's."""
    monkeypatch.setattr(gradients, "by_hand", lambda *_: by_hand)
    x, dead = sparse_data(60), torch.zeros(24, dtype=torch.bool)
    dead[[2, 9]] = True
    goal = replace(objective(arch), aux_scale="variance")
    whole, exchange = parameters(), Exchange()
    expected = backward(whole, x, goal, dead, hint)

    def run(rank: int) -> tuple[Parameters, Losses]:
        p = parameters()
        share = Share(2, lambda values: exchange.gather(rank, values))
        return p, backward(p, x[30 * rank : 30 * (rank + 1)], goal, dead, hint, share=share)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, (0, 1)))
    for name in ("loss", "mse", "aux"):
        total = sum(getattr(r, name) for _, r in results)
        torch.testing.assert_close(total, getattr(expected, name), rtol=1e-4, atol=1e-5)
    assert sum(int(r.active) for _, r in results) == int(expected.active)
    for name, tensor in whole.named().items():
        total = sum(p.named()[name].grad for p, _ in results)
        torch.testing.assert_close(total, tensor.grad, rtol=1e-3, atol=1e-4)
