"""What a ``saetool train`` is asked to make: its settings, and the files."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.commands.train_source import Source
from saetool.config import ARCHITECTURES, RECIPES, TrainConfig
from saetool.errors import ArtifactError, ConfigError
from saetool.options import parse_count, parse_counts

CHOICES = {
    "arch": ARCHITECTURES,
    "penalty": ("l0", "tanh"),
    "aux_scale": ("plain", "dead-share", "variance"),
    "decoder_norm": ("unit", "free"),
    "b_dec_init": ("mean", "geometric-median", "zero"),
    "dtype": ("fp32", "bf16"),
}
COUNTS = ("tokens", "dead_after", "resample")
"""Options that are written like 2M."""


@dataclass(frozen=True)
class Product:
    """One file to write: an SAE, or a prefix of a matryoshka."""

    path: Path
    plan: h.Plan
    config: TrainConfig
    """Resolved; products of one matryoshka share it."""
    width: int


def settings(context: typer.Context, source: Source) -> tuple[TrainConfig, list[int]]:
    """The config, not yet resolved, and its widths: a preset's, another SAE's or the defaults, and over them what was
    given. Raises ``ConfigError`` for what is none."""
    params = context.params
    base, widths = _base(params["preset"], params["like"], source)
    given = {n for n in params if context.get_parameter_source(n).name != "DEFAULT"}  # type: ignore[union-attr]
    plain = params["preset"] is None and params["like"] is None
    chosen: dict[str, Any] = {}
    for name in TrainConfig.__dataclass_fields__:
        if name in params and (name in given or plain):
            value = params[name]
            chosen[name] = parse_count(value, option(name)) if name in COUNTS and value is not None else value
    if "latents" in chosen:
        widths = parse_counts(chosen.pop("latents"), "--latents")
    if chosen.get("resample", 0) is None:
        del chosen["resample"]
    base = dataclasses.replace(base, **chosen)
    for name, choices in CHOICES.items():
        if getattr(base, name) not in (*choices, None):
            raise ConfigError(f"{option(name)} {getattr(base, name)}: unknown", f"one of {', '.join(choices)}")
    return base, widths


def _base(preset: str | None, like: Path | None, source: Source) -> tuple[TrainConfig, list[int]]:
    """The config that options given explicitly are laid over, and its widths."""
    if preset is not None and like is not None:
        raise ConfigError("--preset and --like both say what to start from: give one of them")
    if preset is not None:
        if preset not in RECIPES:
            raise ConfigError(f"--preset {preset}: unknown", f"one of {', '.join(RECIPES)}")
        options = dict(RECIPES[preset].options)
        widths = parse_counts(str(options.pop("latents", TrainConfig.latents)), "--latents")
        return TrainConfig(**options), widths
    if like is not None:
        from saetool.engines.recipe import like as config_of

        header = container.read_header(like)
        h.expect(header, h.SAE, str(like))
        entries = [entry for entry in header.history if entry["verb"] == "train"]
        if not entries:
            raise ArtifactError(f"{like}: was not trained by saetool train", "give its settings as options")
        used = entries[-1]["inputs"]
        if [i.sha256 for i in source.inputs] != used:
            raise ArtifactError(f"{source.name}: is not what {like} was trained on", "give the same cache, or text")
        config = config_of(entries[-1]["options"], source.d_in)
        return config, list(config.prefixes or (config.latents,))
    return TrainConfig(), [TrainConfig.latents]


def products(base: TrainConfig, widths: list[int], source: Source, out: str) -> list[Product]:
    """The files that ``out`` names, in the order of their widths."""
    from saetool.engines.recipe import options_of, resolve

    nested = base.arch == "matryoshka"
    if len(widths) > 1 and not nested and "{latents}" not in out:
        raise ConfigError(f"-o {out}: {len(widths)} widths need {{latents}} in the name", "-o 'sae-{latents}.st'")
    found = []
    for config, prefixes in _configs(base, widths):
        config = resolve(config, source.d_in)
        for width in prefixes or (config.latents,):
            prefix = {"prefix": width} if width < config.latents else {}
            options = {**options_of(config), **source.options, **prefix}
            plan = h.Plan("train", h.SAE, options, source.inputs, source.parents)
            found.append(Product(Path(out.replace("{latents}", str(width))), plan, config, width))
    return found[-1:] if nested and "{latents}" not in out else found


def _configs(base: TrainConfig, widths: list[int]) -> list[tuple[TrainConfig, tuple[int, ...]]]:
    """What is trained: an SAE a width, or one matryoshka with them all nested. With each, its prefixes."""
    if base.arch == "matryoshka":
        nested = tuple(sorted(widths))
        return [(dataclasses.replace(base, latents=nested[-1], prefixes=nested), nested)]
    return [(dataclasses.replace(base, latents=width, prefixes=()), ()) for width in widths]


def describe(base: TrainConfig, wanted: Sequence[Product], source: Source, preset: str | None) -> dict[str, Any]:
    """What a dry run says."""
    from saetool.engines.recipe import n_steps

    rows, recipe = source.n_rows(), RECIPES.get(preset or "")
    return {
        "input": f"{source.name}: {rows:,} rows of {source.d_in}",
        **({"preset": f"{preset}: {recipe.source}", "differs": recipe.differs} if recipe else {}),
        "steps": n_steps(base),
        "epochs": round(base.tokens / max(rows, 1), 2),
        **{str(p.path): json.dumps(dict(p.plan.options)) for p in wanted},
        "parameters_and_optimizer_bytes": sum(2 * source.d_in * p.config.latents * 12 for p in wanted),
    }


def option(name: str) -> str:
    """A config's field as it is typed."""
    return f"--{name.replace('_', '-')}"
