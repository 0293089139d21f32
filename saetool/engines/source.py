"""Language model → activations at hooked sites, by a forward pass that ends at the last of them.

No later block, no final norm, no unembedding runs. Several sites are read in one pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saetool.engines.model import LanguageModel, load_model, width
from saetool.engines.sites import Site, find_site, parse_hook
from saetool.errors import BackendError

__all__ = [
    "LanguageModel",
    "Site",
    "capture",
    "capture_all",
    "find_site",
    "load_model",
    "logits_with",
    "parse_hook",
    "width",
]


class _Reached(Exception):
    """The forward pass has come by every site, and ends."""


@contextmanager
def _hooked(site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, ``site``'s activation is what ``change`` makes of it."""

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # attention, and blocks of older versions, return more than the activation
            return (change(output[0]), *output[1:])
        return change(output)

    if site.kind == "input":
        handle = site.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = site.module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class _Collector:
    """Keeps what the sites see, and ends the forward pass when all have seen something."""

    found: list[Tensor | None]

    def at(self, index: int) -> Callable[[Tensor], Tensor]:
        def keep(acts: Tensor) -> Tensor:
            self.found[index] = acts
            if all(f is not None for f in self.found):
                raise _Reached
            return acts

        return keep


@torch.no_grad()
def capture_all(lm: LanguageModel, sites: Sequence[Site], input_ids: Int[Tensor, "n ctx"]) -> list[Tensor]:
    """The activations [n, ctx, d of the site] at each of ``sites``, in the model's dtype, by one forward pass that ends
    at the last of them. Raises ``BackendError`` for a site that the pass does not come by."""
    collector = _Collector([None] * len(sites))
    with ExitStack() as stack:
        for index, site in enumerate(sites):
            stack.enter_context(_hooked(site, collector.at(index)))
        try:
            _forward(lm, input_ids.to(lm.device))
        except _Reached:
            return [acts.view(*input_ids.shape, -1) for acts in collector.found if acts is not None]
    missed = next(site for site, acts in zip(sites, collector.found, strict=True) if acts is None)
    raise BackendError(f"{missed.hf_hook_name}: the forward pass never came by this module")


def capture(lm: LanguageModel, site: Site, input_ids: Int[Tensor, "n ctx"]) -> Float[Tensor, "n ctx d"]:
    """The activations at ``site``, in the model's dtype, by a forward pass that ends there."""
    return capture_all(lm, [site], input_ids)[0]


def _forward(lm: LanguageModel, ids: Tensor) -> Any:
    """A forward pass; no cache of keys and values is kept, where the model would."""
    return lm.model(input_ids=ids, **lm.forward_options)


@torch.no_grad()
def logits_with(
    lm: LanguageModel,
    site: Site,
    input_ids: Int[Tensor, "n ctx"],
    replace: Callable[[Tensor], Tensor] | None,
) -> Float[Tensor, "n ctx vocab"]:
    """Logits of the full forward pass with ``replace(acts)`` in the place of ``site``'s activations (None: as is)."""
    if lm.model.get_output_embeddings() is None:
        raise BackendError(f"{lm.reference['id']}: has no language-model head, so there are no logits")
    ids = input_ids.to(lm.device)
    if replace is None:
        return _forward(lm, ids).logits
    with _hooked(site, partial(_replaced, replace)):
        return _forward(lm, ids).logits


def _replaced(replace: Callable[[Tensor], Tensor], acts: Tensor) -> Tensor:
    return replace(acts).to(acts.dtype)
