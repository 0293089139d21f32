"""Where ``saetool autointerp`` reads activations: a cache, or latents as delphi stores them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saetool.artifacts import header as h
from saetool.artifacts.cache import open_cache
from saetool.commands.autointerp_job import SPLITS, Job
from saetool.commands.checks import check_site
from saetool.config import AutointerpConfig
from saetool.errors import ArtifactError, ConfigError
from saetool.options import resolve_device

if TYPE_CHECKING:
    from saetool.engines.activations import Activations
    from saetool.engines.strings import Strings


@dataclass(frozen=True)
class Source:
    """The activations to explain, and what is written of them."""

    activations: "Activations"
    strings: "Strings"
    input: h.Input
    headers: list[h.Header]
    model: dict[str, Any]


def open_source(job: Job, acts: Path) -> Source:
    """What is at ``acts``, fit to the SAE of ``job``. Raises for what cannot be read, or does not fit."""
    from saetool.artifacts import delphi

    return _stored(job, acts) if delphi.is_delphi(acts) else _cached(job, acts)


def _cached(job: Job, acts: Path) -> Source:
    from saetool.engines.activations import Encoded
    from saetool.engines.strings import Strings

    file, config = job.file, job.config
    if job.tokenizer is not None:
        raise ConfigError("--tokenizer: a cache has its tokens' text", "it is for latents as delphi stores them")
    cache = open_cache(acts)
    cache.check_text()
    check_site(file, cache, job.console)
    splits = [s for s in SPLITS[config.on] if cache.rows(s)]
    if not splits:
        raise ArtifactError(f"{cache.path}: has no rows in {config.on}", "cache more text, or use another --on")
    _check_window(config, int(cache.header.config["ctx_len"]), "the cache's contexts")
    activations = Encoded(file.sae, cache, splits, resolve_device(job.device))
    # Missing or damaged: better said now than after the work.
    strings = Strings(cache.vocabulary, str(cache.path / "vocabulary.json"))
    return Source(activations, strings, cache.as_input(), [file.header, cache.header], cache.header.model)


def _stored(job: Job, acts: Path) -> Source:
    from saetool.artifacts import delphi
    from saetool.engines.activations import Stored
    from saetool.engines.model import find_model, load_tokenizer, vocabulary
    from saetool.engines.strings import Strings

    file, config = job.file, job.config
    if config.on != "all":
        raise ConfigError(f"--on {config.on}: {acts} holds delphi's latents, which have no splits", "leave --on out")
    if job.tokenizer is None:
        raise ConfigError(f"{acts}: delphi's latents come without the tokens' text", "pass --tokenizer MODEL")
    latents = delphi.open_delphi(acts)
    _check_window(config, latents.tokens.shape[1], "delphi's contexts")
    strings = Strings(vocabulary(load_tokenizer(find_model(job.tokenizer))), f"the tokenizer of {job.tokenizer}")
    stored = Stored(latents, file.sae.d_sae)
    return Source(stored, strings, latents.as_input(), [file.header], file.header.model)


def _check_window(config: AutointerpConfig, longest: int, whose: str) -> None:
    if config.window > longest:
        raise ConfigError(f"--window {config.window}: longer than {whose} of {longest} tokens")
    if config.skip_positions >= longest:
        raise ConfigError(f"--skip-positions {config.skip_positions}: nothing is left of {whose} of {longest} tokens")
