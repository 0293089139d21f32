"""Language model → activations at a hook.

A site is named as TransformerLens does (``blocks.8.hook_resid_post``) or as the model's own module path
(``model.layers.8``). Both names are recorded. The truncated forward pass ends inside the hooked layer: no later block,
no final norm, no unembedding runs.

    TransformerLens            place                      module (Llama, GPT-2, …)
    blocks.L.hook_resid_pre    input of block L           model.layers.L, transformer.h.L, gpt_neox.layers.L
    blocks.L.hook_resid_post   output of block L          the same
    blocks.L.hook_mlp_out      output of its MLP          ….mlp
    blocks.L.hook_attn_out     output of its attention    ….self_attn, ….attn, ….attention
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saetool.engines.model import LanguageModel, load_model, width
from saetool.errors import BackendError, ConfigError

__all__ = ["Hook", "LanguageModel", "Site", "capture", "find_site", "load_model", "logits_with", "parse_hook", "width"]

_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_PLACES = {
    "hook_resid_pre": ("input", ()),
    "hook_resid_post": ("output", ()),
    "hook_mlp_out": ("output", _MLP),
    "hook_attn_out": ("output", _ATTENTION),
}


# --- sites -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hook:
    """A site by name alone, before there is a model to look it up in."""

    hook_name: str
    """TransformerLens' name."""
    block: int
    kind: str
    """``input`` or ``output`` of the module."""
    children: tuple[str, ...]
    """Names the block's part may have; empty: the block itself."""
    blocks: str | None
    """End of the path of the model's list of blocks, where the name says it."""


def parse_hook(hook: str) -> Hook:
    """``blocks.8.hook_resid_post``, ``model.layers.8``, ``h.8.mlp`` … → the site. Raises ``ConfigError``."""
    match = re.fullmatch(r"((?:\w+\.)*?)(\d+)((?:\.\w+)*)", hook)
    prefix, number, rest = match.groups() if match else ("", "", "")
    rest = rest.removeprefix(".")
    name = rest if prefix == "blocks." else _transformer_lens_name(rest)
    if not prefix or name not in _PLACES:
        raise ConfigError(
            f"--hook {hook}: not a site that can be read",
            f"blocks.L.{{{', '.join(_PLACES)}}}, or a module path such as model.layers.L, h.L.mlp, layers.L.self_attn",
        )
    kind, children = _PLACES[name]
    blocks = None if prefix == "blocks." else prefix.removesuffix(".")
    return Hook(f"blocks.{int(number)}.{name}", int(number), kind, children, blocks)


def _transformer_lens_name(rest: str) -> str | None:
    if not rest:
        return "hook_resid_post"
    return "hook_mlp_out" if rest in _MLP else "hook_attn_out" if rest in _ATTENTION else None


@dataclass(frozen=True)
class Site:
    """A place in a loaded model whose activations are read or replaced."""

    hook_name: str
    """TransformerLens' name, ``blocks.8.hook_resid_post``."""
    hf_hook_name: str
    """Path of the module whose output it is, ``model.layers.8``; for the input of block 0, its path and ``:input``."""
    module: nn.Module
    kind: str
    """Whether the activation is the ``input`` or the ``output`` of ``module``."""
    block: int


def find_site(model: nn.Module, hook: str) -> Site:
    """Look ``hook`` up in ``model``. Raises ``ConfigError`` naming the number of blocks, or the parts of the block."""
    wanted = parse_hook(hook)
    path, blocks = _blocks(model)
    if wanted.blocks and not f".{path}".endswith(f".{wanted.blocks}"):
        raise ConfigError(
            f"--hook {hook}: the model has no {wanted.blocks}, its {len(blocks)} blocks are {path}.0 and on"
        )
    if wanted.block >= len(blocks):
        raise ConfigError(
            f"--hook {hook}: the model has {len(blocks)} blocks, 0 to {len(blocks) - 1}",
            "counting starts at 0",
        )
    module: nn.Module = blocks[wanted.block]
    name = f"{path}.{wanted.block}"
    if wanted.children:
        parts = [part for part, _ in module.named_children()]
        child = next((c for c in wanted.children if c in parts), None)
        if child is None:
            raise ConfigError(f"--hook {hook}: no such part in the model's blocks", f"they have: {', '.join(parts)}")
        module, name = getattr(module, child), f"{name}.{child}"
    if wanted.kind == "input":
        # The input of block L is the output of block L − 1, which is how module paths can say it.
        name = f"{path}.{wanted.block - 1}" if wanted.block else f"{name}:input"
    return Site(wanted.hook_name, name, module, wanted.kind, wanted.block)


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the model's blocks: the first module list as long as the config says there are blocks."""
    n = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n:
            return path, module
    raise ConfigError(f"{type(model).__name__}: no list of {n} blocks found in this model")


# --- running ---------------------------------------------------------------------------------------------------


class _Reached(Exception):
    """The forward pass has come to the site; carries what was found there and ends the pass."""

    def __init__(self, acts: Tensor) -> None:
        super().__init__()
        self.acts = acts


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


def _stop(acts: Tensor) -> Tensor:
    raise _Reached(acts)


@torch.no_grad()
def capture(lm: LanguageModel, site: Site, input_ids: Int[Tensor, "n ctx"]) -> Float[Tensor, "n ctx d"]:
    """The activations at ``site``, in the model's dtype, by a forward pass that ends there."""
    with _hooked(site, _stop):
        try:
            lm.model(input_ids=input_ids.to(lm.device), use_cache=False)
        except _Reached as reached:
            return reached.acts
    raise BackendError(f"{site.hf_hook_name}: the forward pass never came by this module")


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
        return lm.model(input_ids=ids, use_cache=False).logits
    with _hooked(site, partial(_replaced, replace)):
        return lm.model(input_ids=ids, use_cache=False).logits


def _replaced(replace: Callable[[Tensor], Tensor], acts: Tensor) -> Tensor:
    return replace(acts).to(acts.dtype)
