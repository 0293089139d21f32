"""Checks that several verbs make of their inputs together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from saetool.artifacts.cache import Cache
from saetool.artifacts.header import Header
from saetool.console import Console
from saetool.errors import ArtifactError, ConfigError


class Described(Protocol):
    """An SAE file, read whole or only its header: what the checks need to know of it."""

    @property
    def name(self) -> str: ...

    @property
    def header(self) -> Header: ...

    @property
    def d_in(self) -> int: ...

    @property
    def inference(self) -> str: ...


def check_one_stdin(paths: Sequence[Path]) -> None:
    """Raise if more than one input is standard input."""
    if [str(p) for p in paths].count("-") > 1:
        raise ConfigError("only one input can be - (standard input)")


def check_site(file: Described, cache: Cache, console: Console) -> None:
    """Raise if ``file`` cannot read the cache's activations (width); warn if it was trained on another hook's."""
    if file.d_in != cache.d_in:
        raise ArtifactError(
            f"{file.name}: made for activations of width {file.d_in}, and {cache.path} holds width {cache.d_in}",
            "use the cache it was trained on",
        )
    here, there = (m.get("hook_name") for m in (cache.header.model, file.header.model))
    if here and there and here != there:
        console.say(f"warning: {file.name} was trained on {there}, and {cache.path} holds {here}")


def check_encodes(file: Described, then: str) -> None:
    """Raise if ``file`` cannot encode single tokens; ``then`` is what was to be done with it (evaluate, explain)."""
    if file.inference == "batchtopk":
        raise ConfigError(
            f"{file.name}: a BatchTopK SAE without a threshold cannot encode single tokens",
            f"saetool threshold {file.name} -o WITH-THRESHOLD.st, and {then} that",
        )


def check_split(cache: Cache, split: str) -> None:
    """Raise unless ``split`` is one of the cache's, and not empty."""
    if split not in cache.splits:
        raise ConfigError(f"--split {split}: unknown", f"one of {', '.join(sorted(cache.splits))}")
    if not cache.rows(split):
        raise ArtifactError(f"{cache.path}: its {split} split is empty", "cache more text, or use another --split")
