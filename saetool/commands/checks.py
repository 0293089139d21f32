"""Checks that several verbs make of their inputs together."""

from typing import TYPE_CHECKING

from saetool.artifacts.cache import Cache
from saetool.console import Console
from saetool.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from saetool.artifacts.sae import SAEFile


def check_site(file: "SAEFile", cache: Cache, console: Console) -> None:
    """Raise if ``file`` cannot read the cache's activations (width); warn if it was trained on another hook's."""
    if file.sae.d_in != cache.d_in:
        raise ArtifactError(
            f"{file.name}: made for activations of width {file.sae.d_in}, and {cache.path} holds width {cache.d_in}",
            "use the cache it was trained on",
        )
    here, there = (m.get("hook_name") for m in (cache.header.model, file.header.model))
    if here and there and here != there:
        console.say(f"warning: {file.name} was trained on {there}, and {cache.path} holds {here}")


def check_split(cache: Cache, split: str) -> None:
    """Raise unless ``split`` is one of the cache's, and not empty."""
    if split not in cache.splits:
        raise ConfigError(f"--split {split}: unknown", f"one of {', '.join(sorted(cache.splits))}")
    if not cache.rows(split):
        raise ArtifactError(f"{cache.path}: its {split} split is empty", "cache more text, or use another --split")
