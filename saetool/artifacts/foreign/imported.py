"""What is read from another library's files, what the user may have to add, and the helpers of every reader."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saetool.core import proof
from saetool.core.sae import SAE
from saetool.errors import ArtifactError, ConfigError

ASK = "say it: saetool convert SRC -o sae.st {option}"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the user says of a file that does not say it itself; None: not said."""

    format: str | None = None
    arch: str | None = None
    """topk or batchtopk, where the tensors are the same for both."""
    k: int | None = None
    hook: str | None = None
    model: str | None = None
    subtract_b_dec: bool | None = None
    normalization: str | None = None
    input_scale: float | None = None
    """Constant that the inputs were multiplied by while training."""
    transposed: bool | None = None
    """Whether both weight matrices are stored the other way round than the format documents."""

    def said(self) -> dict[str, Any]:
        """What was said, for the header."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Found:
    """Files of one SAE: a folder, or one file (with its folder's configuration, if it has one)."""

    format: str
    where: str
    """As the user wrote it, for messages."""
    name: str
    """Last part of it, for headers."""
    folder: Path
    weights: Path
    configs: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything that is read, and so hashed."""
        return tuple(dict.fromkeys([*self.configs, self.weights]))


@dataclass(frozen=True)
class Imported:
    """An SAE of another library, with that library's own formula on its own tensors."""

    sae: SAE
    formula: str
    """Name of the formula in ``core/peers.py``, with its settings: what the proof compares with."""
    other: Callable[[Tensor], tuple[Tensor, Tensor]]
    """x → z, x̂ by that formula."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The source's own configuration, kept as it is."""
    config: dict[str, Any] = field(default_factory=dict)
    """Facts that our header states beside those of every SAE (group sizes, a batch size)."""
    model: str | None = None
    hook_name: str | None = None
    hf_hook_name: str | None = None
    whole_batch: bool = False
    """Proved by selection over the probe as one batch: a BatchTopK SAE without a threshold."""

    def proved(self) -> proof.Proof:
        """Our SAE compared with the source's formula."""
        return proof.prove(self.sae, self.other, batch=self.whole_batch)


def exact(t: dict[str, Tensor], formula: Callable[..., Any], **settings: Any) -> Callable[[Tensor], Any]:
    """``formula`` on the stored tensors, in the type of the x it is given (so the proof is not one of float16)."""

    def other(x: Tensor) -> Any:
        wide = {name: tensor.to(x.dtype) if tensor.is_floating_point() else tensor for name, tensor in t.items()}
        return formula(wide, x, **settings)

    return other


def named(formula: Callable[..., Any], **settings: Any) -> str:
    """A formula's name and settings in a few words, for the header."""
    inside = ", ".join(f"{name}={value}" for name, value in settings.items() if value not in (None, False))
    return f"{formula.__name__}({inside})"


def take(t: dict[str, Tensor], found: Found, *names: str) -> dict[str, Tensor]:
    """The tensors ``names``, all there and floating point. Raises ``ArtifactError`` naming what is missing."""
    missing = [name for name in names if name not in t]
    if missing:
        raise ArtifactError(
            f"{found.where}: lacks {', '.join(missing)} (read as {found.format}; it has {', '.join(sorted(t)[:8])})",
            "is it another format? --from says which",
        )
    for name in names:
        if not t[name].is_floating_point():
            kind = str(t[name].dtype).removeprefix("torch.")
            raise ArtifactError(f"{found.where}: {name} is {kind}, and floating point was expected")
    return {name: t[name] for name in names}


def shapes(t: dict[str, Tensor], found: Found, **wanted: tuple[int, ...]) -> None:
    """Raise ``ArtifactError`` unless each tensor has the shape wanted (dots in names are written as __)."""
    for name, shape in wanted.items():
        key = name.replace("__", ".")
        if key in t and tuple(t[key].shape) != shape:
            raise ArtifactError(f"{found.where}: {key} has shape {tuple(t[key].shape)}, {shape} expected")


def setting(config: dict[str, Any], found: Found, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
    """A value of a configuration, of the right kind."""
    value = config.get(name, default)
    if value is ...:
        raise ArtifactError(f"{found.where}: its configuration lacks {name}", "is it another format? --from says which")
    kinds = kind if isinstance(kind, tuple) else (kind,)
    wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
    if wrong and not (value is None and default is None):
        raise ArtifactError(f"{found.where}: its configuration says {name} = {value!r}, which makes no sense")
    return value


def whole_k(value: Any, found: Found, d_sae: int) -> int:
    """``value`` as a k that fits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or not 1 <= value <= d_sae:
        raise ArtifactError(f"{found.where}: k = {value!r} with {d_sae} latents", "say it: --k N")
    return int(value)


def ask(found: Found, what: str, option: str) -> ConfigError:
    """The error for something that the files do not say."""
    return ConfigError(f"{found.where}: does not say {what}", ASK.format(option=option))


def refuse(found: Found, what: str, why: str) -> ArtifactError:
    """The error for something that no SAE file of ours can hold."""
    return ArtifactError(f"{found.where}: {what}", why)


def oriented(
    t: dict[str, Tensor], found: Found, asked: Asked, enc: str, dec: str, d: int, f: int, *, enc_rows: str, bare: bool
) -> dict[str, Tensor]:
    """``t`` with the matrices ``enc`` and ``dec`` in the documented orientation, decided by shape.

    ``enc_rows``: "d" where the format documents the encoder as [d, F] and the decoder as [F, d], "F" for the opposite,
    or "linear": two nn.Linear layers, encoder [F, d] and decoder [d, F]; "F,F" for both [F, d]. With d = F the shape
    says nothing and the probe decides: a decoder row, encoded, must excite its own latent, and decoder rows of norm 1
    tell a decoder from its transpose. ``bare``: nothing but names documents the orientation.
    """
    documented = {"d": ((d, f), (f, d)), "linear": ((f, d), (d, f)), "F,F": ((f, d), (f, d))}[enc_rows]
    result = dict(t)
    for name, shape in zip((enc, dec), documented, strict=True):
        if t[name].dim() != 2 or sorted(t[name].shape) != sorted(shape):
            raise ArtifactError(
                f"{found.where}: {name} has shape {tuple(t[name].shape)} where d = {d} and F = {f} (from the biases)"
            )
        if d != f and tuple(t[name].shape) != shape:
            result[name] = t[name].T.contiguous()
    if d != f:
        return result
    if asked.transposed is not None:
        flip = asked.transposed
    else:
        flip = _probe_square(
            t[enc] if enc_rows == "d" else t[enc].T,
            t[dec].T if enc_rows == "linear" else t[dec],
            found,
            bare,
        )
    if flip:
        result[enc], result[dec] = t[enc].T.contiguous(), t[dec].T.contiguous()
    return result


def _probe_square(w_enc: Tensor, w_dec: Tensor, found: Found, bare: bool) -> bool:
    """Whether square matrices, turned as documented, must both be turned over. Asks where the probe cannot tell."""
    ways = {
        (a, b): proof.orientation(w_enc.T if a else w_enc, w_dec.T if b else w_dec)
        for a in (False, True)
        for b in (False, True)
    }
    fits = [way for way, seen in ways.items() if seen.hits >= 0.5]
    normed = [way for way in fits if ways[way].unit_rows and not ways[way[0], not way[1]].unit_rows]
    found_ways = normed or fits
    numbers = ", ".join(
        f"{'encoder turned' if a else 'as stored'}{' and decoder turned' if b else ''}: {seen.hits:.0%}"
        for (a, b), seen in ways.items()
        if a == b
    )
    if found_ways == [(False, False)] or (not bare and (False, False) in found_ways and not normed):
        return False
    if found_ways == [(True, True)] and bare:
        return True
    raise ConfigError(
        f"{found.where}: its weights are square, and the probe does not confirm that they are stored as "
        f"{found.format} documents (decoder rows that excite their own latent; {numbers})",
        "say it: --no-transposed (as documented) or --transposed",
    )


def scaled(sae: SAE, scale: float | None) -> SAE:
    """``sae`` on raw inputs, where it was trained on inputs times ``scale``."""
    from saetool.core.sae import fold_scale

    return sae if scale is None or scale == 1.0 else fold_scale(sae, scale)


_PLACES = {
    "": "hook_resid_post",
    "mlp": "hook_mlp_out", "feed_forward": "hook_mlp_out",
    "self_attn": "hook_attn_out", "attn": "hook_attn_out", "attention": "hook_attn_out",
}  # fmt: skip


def transformer_lens_name(module: str) -> str | None:
    """``layers.5``, ``h.3.mlp``, ``model.layers.9.output`` → TransformerLens' name; None where it has none."""
    match = re.fullmatch(r"(?:\w+\.)*?(?:layers|h|blocks)\.(\d+)((?:\.\w+)*)", module.removesuffix(".output"))
    place = _PLACES.get(match.group(2).removeprefix(".")) if match else None
    return f"blocks.{int(match.group(1))}.{place}" if match and place else None


def with_asked(imported: Imported, asked: Asked) -> Imported:
    """``imported`` with the hook and model that the user named, if any."""
    return replace(
        imported,
        model=asked.model or imported.model,
        hook_name=asked.hook or imported.hook_name,
        hf_hook_name=None if asked.hook else imported.hf_hook_name,
    )


def float32(**tensors: Tensor) -> dict[str, Tensor]:
    """Contiguous float32 copies."""
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}
