"""What a training run will do, before it is done: derived values, and the options that matter. No torch."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from saetool.config import SPARSE, TrainConfig
from saetool.errors import ConfigError

USED_BY = {
    "k": SPARSE,
    "l1": ("relu", "gated"),
    "l0": ("jumprelu",),
    "penalty": ("jumprelu",),
    "bandwidth": ("jumprelu",),
    "sparsity_warmup": ("relu", "gated", "jumprelu"),
    "aux_alpha": SPARSE,
    "aux_scale": SPARSE,
    "k_aux": SPARSE,
    "resample": ("relu",),
    "dtype": ("relu", "gated", "jumprelu"),
    "prefixes": ("matryoshka",),
}
"""Options that only some architectures use."""
DERIVED = ("lr", "bandwidth", "k_aux", "dead_after", "decoder_norm")
"""Options whose None is filled in from width, length or architecture."""


def n_steps(config: TrainConfig) -> int:
    return max(config.tokens // config.batch_size, 1)


def steps_of(share: float, total: int) -> float:
    """A share of ``total`` steps, or a number of steps where it is above 1."""
    return share if share > 1 else share * total


def resolve(config: TrainConfig, d_in: int) -> TrainConfig:
    """``config`` with every derived value filled in. Raises ``ConfigError`` for values that cannot work."""
    if config.arch in SPARSE and not 1 <= config.k <= config.latents:
        raise ConfigError(f"--k {config.k} with --latents {config.latents}: k must be between 1 and the width")
    for name in ("batch_size", "tokens", "latents"):
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be positive")
    for name in ("lr", "l1", "l0", "aux_alpha", "bandwidth", "clip", "warmup", "decay", "sparsity_warmup"):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: a number of at least 0 is needed")
    if config.decoder_norm == "free" and config.arch in SPARSE:
        raise ConfigError(
            f"--decoder-norm free with --arch {config.arch}: norms could not be folded away, selection is by value",
            "unit norm is what all recipes of this family amount to",
        )
    if config.prefixes and list(config.prefixes) != sorted({*config.prefixes, config.latents}):
        raise ConfigError(f"prefixes {config.prefixes}: ascending widths that end with {config.latents} are needed")
    tokens = n_steps(config) * config.batch_size
    derived: dict[str, Any] = {
        "lr": 2e-4 * math.sqrt(16384 / config.latents),
        "bandwidth": 0.1,
        "k_aux": 2 ** round(math.log2(max(d_in / 2, 1))),
        "dead_after": min(10_000_000, tokens // 10),
        "decoder_norm": "unit" if config.arch in (*SPARSE, "jumprelu") else "free",
    }
    return replace(config, **{name: derived[name] for name in DERIVED if getattr(config, name) is None})


def options_of(config: TrainConfig) -> dict[str, object]:
    """The options of a resolved config that this architecture uses: what key, header and log carry."""
    options = {name: getattr(config, name) for name in config.__dataclass_fields__}
    options["prefixes"] = list(config.prefixes)
    return {name: value for name, value in options.items() if config.arch in USED_BY.get(name, (config.arch,))}


def like(options: Mapping[str, Any], d_in: int) -> TrainConfig:
    """The config that trained an SAE, from the ``options`` in its history; derived values are derived again.

    A value that is what the derivation gives is left open, so that another width gets its own learning rate.
    """
    known = {name: value for name, value in options.items() if name in TrainConfig.__dataclass_fields__}
    known["prefixes"] = tuple(known.get("prefixes", ()))
    given = resolve(TrainConfig(**known), d_in)
    for name in DERIVED:
        opened = replace(given, **{name: None})
        if getattr(resolve(opened, d_in), name) == getattr(given, name):
            given = opened
    return given
