"""Forward passes with something else at a site, the blocks before the site run once.

For a batch of contexts the clean pass runs whole, and keeps the state that the first block after the site (or the
block with the site in it) reads. Every other pass is the model's own forward in which the blocks before are stepped
over and that state is put in: masks, rotary embeddings, the later blocks, the final norm and the unembedding are the
model's own code. That this gives the clean logits back is checked on the first batch; a model for which it does not
(one whose later blocks read more than the residual stream) gets whole passes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from saetool.engines.model import LanguageModel
from saetool.engines.source import Site, logits_with


@dataclass(frozen=True)
class Clean:
    """An undisturbed pass over a batch of contexts."""

    ids: Int[Tensor, "n ctx"]
    logits: Float[Tensor, "n ctx vocab"]
    acts: Float[Tensor, "n ctx d"]
    """At the site, in the model's dtype."""
    state: Float[Tensor, "n ctx d"] | None
    """What the first block that is not stepped over reads, where that is not ``acts``."""
    tails: list[tuple[Any, ...] | None]
    """What each block that is stepped over answers beside its activations; None where it answers a tensor alone."""


class Splice:
    """Runs a model clean and with replaced activations at one site."""

    def __init__(self, lm: LanguageModel, site: Site) -> None:
        self._lm, self._site = lm, site
        blocks = _blocks_around(lm.model, site)
        whole_block = any(site.module is block for block in blocks)
        n = site.block + (1 if whole_block and site.kind == "output" else 0)
        self._skipped = list(blocks[:n])
        self._site_is_state = whole_block
        self._first = blocks[min(n, len(blocks) - 1)]
        self._resumes: bool | None = None

    @property
    def resumes(self) -> bool | None:
        """Whether the blocks before the site are stepped over; None before the first clean pass."""
        return self._resumes

    def clean(self, ids: Int[Tensor, "n ctx"]) -> Clean:
        """The model's own logits, and its activations at the site."""
        seen: dict[str, Tensor] = {}
        tails: list[tuple[Any, ...] | None] = []

        def keep(acts: Tensor) -> Tensor:
            seen["acts"] = acts
            return acts

        def read(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["state"] = args[0] if args else kwargs["hidden_states"]

        def answered(_module: nn.Module, _args: Any, output: Any) -> None:
            tails.append(output[1:] if isinstance(output, tuple) else None)

        handles = [block.register_forward_hook(answered) for block in self._skipped]
        if not self._site_is_state:
            handles.append(self._first.register_forward_pre_hook(read, with_kwargs=True))
        try:
            logits = logits_with(self._lm, self._site, ids, keep)
        finally:
            for handle in handles:
                handle.remove()
        run = Clean(ids, logits, seen["acts"], seen.get("state"), tails)
        if self._resumes is None:
            self._resumes = bool(self._skipped) and self._gives_back(run)
        return run

    def logits(self, run: Clean, acts: Float[Tensor, "n ctx d"]) -> Float[Tensor, "n ctx vocab"]:
        """Logits of a forward pass over ``run``'s contexts with ``acts`` at the site."""
        if self._resumes:
            return self._resumed(run, acts)
        return logits_with(self._lm, self._site, run.ids, lambda _: acts)

    def _gives_back(self, run: Clean) -> bool:
        before, again = run.logits[0].float(), self._resumed(run, run.acts)[0].float()
        return bool((again - before).abs().max() <= 1e-3 * before.abs().max())

    def _resumed(self, run: Clean, acts: Tensor) -> Tensor:
        state = acts.to(run.acts.dtype) if self._site_is_state else run.state
        assert state is not None
        with _stepped_over(self._skipped, state, run.tails):
            if self._site_is_state:
                return self._lm.model(input_ids=run.ids.to(self._lm.device), use_cache=False).logits
            return logits_with(self._lm, self._site, run.ids, lambda _: acts)


def _blocks_around(model: nn.Module, site: Site) -> nn.ModuleList:
    """The model's list of blocks: the outermost one with the site in its block ``site.block``."""
    for _, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) <= site.block:
            continue
        if any(part is site.module for part in module[site.block].modules()):
            return module
    raise AssertionError(f"{site.hf_hook_name}: in no list of blocks")


@contextmanager
def _stepped_over(blocks: list[nn.Module], state: Tensor, tails: list[tuple[Any, ...] | None]) -> Iterator[None]:
    """Within the context ``blocks`` compute nothing and answer ``state``, in the form they answered in before."""
    for block, tail in zip(blocks, tails, strict=True):
        answer = state if tail is None else (state, *tail)
        block.forward = partial(_answer, answer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _answer(answer: Any, *_args: Any, **_kwargs: Any) -> Any:
    return answer
