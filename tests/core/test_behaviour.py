"""Cross-entropy and KL against torch's own."""

import pytest
import torch

from saetool.core import behaviour


@pytest.mark.parametrize("at_a_time", [1, 10**9])
def test_ce_and_kl_equal_torchs(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour, "_ELEMENTS", {"cpu": at_a_time})
    g = torch.Generator().manual_seed(0)
    clean, logits = torch.randn(20, 50, generator=g) * 3, torch.randn(20, 50, generator=g) * 3
    targets = torch.randint(50, (20,), generator=g)
    ce, kl = behaviour.ce_and_kl(logits, clean, targets)
    assert torch.allclose(ce, torch.nn.functional.cross_entropy(logits, targets, reduction="none").double(), atol=1e-5)
    log_q, log_p = clean.double().log_softmax(1), logits.double().log_softmax(1)
    assert torch.allclose(kl, (log_q.exp() * (log_q - log_p)).sum(1), atol=1e-5)


def test_equal_logits_have_no_divergence_at_all() -> None:
    logits = torch.randn(8, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    ce, kl = behaviour.ce_and_kl(logits, logits, torch.zeros(8, dtype=torch.int64))
    assert (kl == 0).all()
    assert torch.equal(ce, behaviour.cross_entropy(logits, torch.zeros(8, dtype=torch.int64)))
