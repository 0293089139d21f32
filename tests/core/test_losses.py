"""Losses and their gradients against the formulas written out."""

import pytest
import torch
from conftest import random_sae, sparse_data

from saetool.core.losses import Objective, Parameters, aux_k, losses


def parameters(seed: int = 0, jumprelu: bool = False) -> Parameters:
    sae = random_sae(seed=seed)
    tensors = [sae.W_enc.T.contiguous(), sae.b_enc, sae.W_dec * 1.3, sae.b_dec]
    if jumprelu:
        tensors.append(torch.full((sae.d_sae,), -1.5))
    return Parameters(*(t.double().clone().requires_grad_() for t in tensors))


def naive(p: Parameters, x: torch.Tensor, objective: Objective) -> torch.Tensor:
    """The loss, one token at a time where the formula is per token."""
    pre = (x - p.b_dec) @ p.encoder.T + p.b_enc
    positive = pre.relu()
    match objective.arch:
        case "relu":
            z = positive
        case "topk":
            z = torch.stack([row * (row >= row.sort(descending=True).values[objective.k - 1]) for row in positive])
        case "batchtopk":
            cut = positive.flatten().sort(descending=True).values[len(x) * objective.k - 1]
            z = positive * (positive >= cut)
    total = torch.zeros((), dtype=x.dtype)
    for i in range(len(x)):
        total = total + (x[i] - (z[i] @ p.W_dec + p.b_dec)).square().sum()
        if objective.arch == "relu":
            total = total + objective.sparsity * (z[i] * p.W_dec.norm(dim=1)).sum()
    return total / len(x)


@pytest.mark.parametrize("arch", ["relu", "topk", "batchtopk"])
def test_loss_and_gradients_equal_the_formula(arch: str) -> None:
    objective = Objective(arch, k=3, sparsity=0.7)
    x = sparse_data(30).double()
    a, b = parameters(), parameters()
    losses(a, x, objective).loss.backward()
    expected = naive(b, x, objective)
    expected.backward()
    assert torch.allclose(losses(a, x, objective).loss, expected)
    for name, tensor in a.named().items():
        assert torch.allclose(tensor.grad, b.named()[name].grad, atol=1e-9), name


def test_jumprelu_loss_counts_active_latents_and_moves_the_threshold() -> None:
    p, x = parameters(jumprelu=True), sparse_data(60).double()
    result = losses(p, x, Objective("jumprelu", sparsity=0.5, bandwidth=0.2))
    pre = (x - p.b_dec) @ p.encoder.T + p.b_enc
    active = (pre > p.log_threshold.exp()).sum() / len(x)
    assert torch.allclose(result.sparsity, active.double())
    assert torch.allclose(result.loss, result.mse + 0.5 * active)
    result.loss.backward()
    assert p.log_threshold.grad.abs().sum() > 0


def test_aux_is_exactly_zero_without_dead_latents() -> None:
    p, x = parameters(), sparse_data(30).double()
    objective = Objective("batchtopk", k=3, aux_alpha=1 / 32, k_aux=4)
    none_dead = torch.zeros(24, dtype=torch.bool)
    with_none, without = losses(p, x, objective, none_dead), losses(p, x, objective)
    assert float(with_none.aux) == 0.0
    assert torch.equal(with_none.loss, without.loss)


def test_aux_uses_dead_pre_activations_without_b_dec_and_a_detached_residual() -> None:
    p, x = parameters(), sparse_data(30).double()
    dead = torch.zeros(24, dtype=torch.bool)
    dead[[2, 5, 7, 11]] = True
    objective = Objective("topk", k=3, aux_alpha=0.25, k_aux=2)
    result = losses(p, x, objective, dead)
    pre = ((x - p.b_dec) @ p.encoder.T + p.b_enc).detach()
    z = torch.zeros_like(pre)
    for i, row in enumerate(pre):
        for j in sorted([2, 5, 7, 11], key=lambda j: -float(row[j]))[:2]:
            z[i, j] = max(row[j], 0.0)
    plain = losses(p, x, objective)
    error = x - (naive_x_hat(p, x, 3))
    aux = (error - z @ p.W_dec).square().sum() / len(x)
    assert torch.allclose(result.aux, aux.detach())
    assert torch.allclose(result.loss, plain.mse + 0.25 * aux)
    # Detached: AuxK alone gives no gradient to b_dec of the decoder's output.
    error = error.detach().requires_grad_()
    fixed = parameters()
    aux_k(fixed, (x - fixed.b_dec.detach()) @ fixed.encoder.T + fixed.b_enc, error.detach(), dead, 2).backward()
    assert fixed.b_dec.grad is None


def naive_x_hat(p: Parameters, x: torch.Tensor, k: int) -> torch.Tensor:
    positive = ((x - p.b_dec) @ p.encoder.T + p.b_enc).relu()
    z = torch.stack([row * (row >= row.sort(descending=True).values[k - 1]) for row in positive])
    return (z @ p.W_dec + p.b_dec).detach()


def test_latents_that_fire_are_reported() -> None:
    p, x = parameters(), sparse_data(40, seed=3).double()
    result = losses(p, x, Objective("batchtopk", k=2))
    assert float(result.active) == 40 * 2
    assert 0 < int(result.fired.sum()) <= 24
    assert result.cut > 0
    again = losses(p, x, Objective("batchtopk", k=2), cut_hint=0.9 * result.cut)
    assert torch.equal(again.loss, result.loss)
