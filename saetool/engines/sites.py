"""Names of the places in a transformer whose activations can be read, and looking them up in a model.

A site is named as TransformerLens does, or by the model's own module path (``model.layers.8.mlp``: that module's
output; ``model.layers.8.mlp.down_proj:input``: its input). Both names are recorded.

    TransformerLens            place                            module (Llama, GPT-2, GPT-NeoX, BERT …)
    blocks.L.hook_resid_pre    input of block L                 model.layers.L, transformer.h.L, encoder.layer.L
    blocks.L.hook_resid_mid    between attention and MLP        input of the norm before the MLP
    blocks.L.hook_resid_post   output of block L                the block
    blocks.L.hook_attn_out     what attention adds              ….self_attn, ….attn, ….attention
    blocks.L.attn.hook_z       heads, before their projection   input of ….o_proj, ….c_proj, ….dense
    blocks.L.hook_mlp_out      what the MLP adds                ….mlp
    blocks.L.mlp.hook_post     hidden layer of the MLP          input of ….down_proj, ….c_proj, ….dense_4h_to_h

Where a block normalises what it adds (Gemma 2 and 3, OLMo 2), ``hook_attn_out`` and ``hook_mlp_out`` are the normalised
ones, as in TransformerLens; the module paths ``….self_attn`` and ``….mlp`` name them before that norm. Where the norm
comes after the sum (BERT), the residual stream is what the next part reads: after the norm, as in `transformers`'
``output_hidden_states``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from saetool.errors import ConfigError

INPUT, OUTPUT = "input", "output"

_NORMED_MLP = ("post_feedforward_layernorm",)
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
_ATTENTION = ("self_attn", "attn", "self_attention", "attention")

# For each place: (kind, path below the block), the first that the block has. Order matters: BERT's ``attention``
# adds and normalises, so the projection inside it is looked for before it.
_PLACES: dict[str, Sequence[tuple[str, str]]] = {
    "hook_resid_pre": [(INPUT, "")],
    "hook_resid_mid": [
        (INPUT, "pre_feedforward_layernorm"),
        (INPUT, "post_attention_layernorm"),
        (INPUT, "ln_2"),
        (INPUT, "norm_2"),
        (INPUT, "mlp_norm"),
        (OUTPUT, "sa_layer_norm"),
        (OUTPUT, "attention.output.LayerNorm"),
        (INPUT, "layernorm_after"),
        (INPUT, "final_layer_norm"),
    ],
    "hook_resid_post": [(OUTPUT, "")],
    "hook_attn_out": [(OUTPUT, "attention.output.dense"), *((OUTPUT, name) for name in _ATTENTION)],
    "hook_mlp_out": [
        *((OUTPUT, name) for name in (*_NORMED_MLP, *_MLP)),
        (OUTPUT, "fc2"),
        (OUTPUT, "output.dense"),
    ],
    "attn.hook_z": [
        *((INPUT, f"{a}.{p}") for a in _ATTENTION for p in ("o_proj", "c_proj", "out_proj", "dense", "out_lin", "Wo")),
        (INPUT, "attn.attention.out_proj"),
        (INPUT, "attention.output.dense"),
    ],
    "mlp.hook_post": [
        *(
            (INPUT, f"{m}.{p}")
            for m in _MLP
            for p in ("down_proj", "c_proj", "dense_4h_to_h", "fc_out", "fc2", "lin2", "Wo")
        ),
        (INPUT, "fc2"),
        (INPUT, "output.dense"),
    ],
}
PLACES = tuple(_PLACES)


@dataclass(frozen=True)
class Hook:
    """A site by name alone, before there is a model to look it up in."""

    name: str
    """As given."""
    block: int | None = None
    """For TransformerLens' names: the block …"""
    place: str | None = None
    """… and one of ``PLACES``; None: ``name`` is a module path."""


@dataclass(frozen=True)
class Site:
    """A place in a loaded model whose activations are read or replaced."""

    hook_name: str
    """TransformerLens' name, ``blocks.8.hook_resid_post``; a module path where it has none."""
    hf_hook_name: str
    """Path of the module whose output it is, ``model.layers.8``; with ``:input`` where it is the input."""
    module: nn.Module
    kind: str
    """Whether the activation is the ``input`` or the ``output`` of ``module``."""
    block: int | None
    """Number of the block it is in."""


def parse_hook(hook: str) -> Hook:
    """``blocks.8.hook_resid_post``, ``model.layers.8``, ``h.8.mlp`` … → the site's name. Raises ``ConfigError``."""
    if match := re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", hook):
        number, place = int(match[1]), match[2]
        if place in _PLACES:
            return Hook(f"blocks.{number}.{place}", number, place)
    elif re.fullmatch(r"\w+(\.\w+)*\.\d+(\.\w+)*(:input)?", hook) and not re.search(r"\bhook_", hook):
        return Hook(hook)
    raise ConfigError(
        f"--hook {hook}: not a site that can be read",
        f"blocks.L.{{{', '.join(_PLACES)}}}, or a module path such as model.layers.L, h.L.mlp, layers.L.self_attn",
    )


def find_site(model: nn.Module, hook: str) -> Site:
    """Look ``hook`` up in ``model``. Raises ``ConfigError`` naming the number of blocks, or the parts of the block."""
    wanted = parse_hook(hook)
    path, blocks = _blocks(model)
    if wanted.place is None:
        return _at_path(model, wanted.name, path, blocks)
    assert wanted.block is not None
    if wanted.block >= len(blocks):
        raise _no_such_block(hook, len(blocks))
    return _at_place(model, wanted.block, wanted.place, path, blocks)


def _no_such_block(hook: str, n: int) -> ConfigError:
    return ConfigError(f"--hook {hook}: the model has {n} blocks, 0 to {n - 1}", "counting starts at 0")


def _at_place(model: nn.Module, number: int, place: str, path: str, blocks: nn.ModuleList) -> Site:
    block, hook_name = blocks[number], f"blocks.{number}.{place}"
    if place == "hook_resid_mid" and _parallel(model.config):
        raise ConfigError(
            f"--hook {hook_name}: attention and MLP of this model read the same input; there is nothing in between"
        )
    parts = dict(block.named_modules())
    found = _locate(place, parts)
    if found is None:
        names = ", ".join(name for name, _ in block.named_children())
        raise ConfigError(f"--hook {hook_name}: no such part in the model's blocks", f"they have: {names}")
    kind, name = found
    full = f"{path}.{number}.{name}".rstrip(".")
    if place == "hook_resid_pre" and number:
        recorded = f"{path}.{number - 1}"  # the output of the block before: how module paths can say it
    else:
        recorded = full + (":input" if kind == INPUT else "")
    return Site(hook_name, recorded, parts[name], kind, number)


def _locate(place: str, parts: dict[str, nn.Module]) -> tuple[str, str] | None:
    """Kind and path of ``place`` in a block with ``parts``: by the table, but for blocks that do more in a part."""
    candidates = _PLACES[place]
    if "post_feedforward_layernorm" in parts:  # Gemma 2 and 3, OLMo 2 normalise what they add
        if place == "hook_attn_out":
            candidates = [(OUTPUT, "post_attention_layernorm")]
        elif place == "hook_resid_mid" and "pre_feedforward_layernorm" not in parts:
            candidates = [(INPUT, "mlp")]
    elif "self_attention" in parts:  # Bloom's attention and MLP return the sum with the residual stream
        if place == "hook_attn_out":
            candidates = [(OUTPUT, "self_attention.dense")]
        elif place == "hook_mlp_out":
            candidates = [(OUTPUT, "mlp.dense_4h_to_h")]
    return next((c for c in candidates if c[1] in parts), None)


def _parallel(config: Any) -> bool:
    """Whether attention and MLP read the same input (GPT-J, GPT-NeoX, Falcon, Phi)."""
    names = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")
    return any(bool(getattr(config.get_text_config(), name, False)) for name in names)


def _at_path(model: nn.Module, name: str, path: str, blocks: nn.ModuleList) -> Site:
    """The module whose path ends with ``name``; by TransformerLens' name where that is the same place."""
    bare, _, suffix = name.partition(":")
    kind = INPUT if suffix else OUTPUT
    ends = [full for full, _ in model.named_modules() if f".{full}".endswith(f".{bare}")]
    full = next((f for f in ends if f.startswith(f"{path}.")), ends[0] if ends else None)
    if full is None:
        short = f".{path}".rpartition(".")[2]
        beyond = re.match(rf"(?:.*\.)?{re.escape(short)}\.(\d+)(?:\.|$)", bare)
        if beyond and int(beyond[1]) >= len(blocks):
            raise _no_such_block(name, len(blocks))
        first, _, _ = re.split(r"(\.\d+)", bare, maxsplit=1)
        has = any(f".{full}".endswith(f".{first}") for full, _ in model.named_modules())
        parts = ", ".join(n for n, _ in blocks[0].named_children())
        what = bare if has else first
        raise ConfigError(
            f"--hook {name}: the model has no {what}, its {len(blocks)} blocks are {path}.0 and on",
            f"a block has: {parts}",
        )
    module = model.get_submodule(full)
    match = re.match(rf"{re.escape(path)}\.(\d+)(?:\.|$)", full)
    number = int(match[1]) if match else None
    if number is not None:
        parts = dict(blocks[number].named_modules())
        for place in _PLACES:
            found = _locate(place, parts)
            same = found and found[0] == kind and f"{path}.{number}.{found[1]}".rstrip(".") == full
            if same and not (place == "hook_resid_mid" and _parallel(model.config)):
                return _at_place(model, number, place, path, blocks)
    recorded = full + (":input" if kind == INPUT else "")
    return Site(recorded, recorded, module, kind, number)


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the model's blocks: the first module list as long as the config says there are blocks."""
    n = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n:
            return path, module
    raise ConfigError(f"{type(model).__name__}: no list of {n} blocks found in this model")


def site_width(model: nn.Module, site: Site) -> int:
    """Width of the activations at ``site``; works on a model without weights. Raises ``ConfigError``."""
    if site.hook_name.startswith("blocks.") and "hook_resid" in site.hook_name:
        return hidden_size(model.config)
    weight = getattr(site.module, "weight", None)
    if isinstance(weight, torch.Tensor):
        if weight.dim() == 1:  # a norm
            return int(weight.shape[0])
        # nn.Linear stores [out, in], transformers' Conv1D [in, out].
        ends = weight.shape if isinstance(site.module, nn.Linear) else weight.shape[::-1]
        return int(ends[1] if site.kind == INPUT else ends[0])
    if site.hook_name.endswith(("hook_attn_out", "hook_mlp_out")) or site.hf_hook_name.endswith((*_MLP, *_ATTENTION)):
        return hidden_size(model.config)
    raise ConfigError(
        f"--hook {site.hf_hook_name}: the width of its activations cannot be told from the model's shapes",
        "name a projection, a norm, an MLP, an attention or a block",
    )


def hidden_size(config: Any) -> int:
    """d of the residual stream, from a `transformers` config."""
    return int(config.get_text_config().hidden_size)
