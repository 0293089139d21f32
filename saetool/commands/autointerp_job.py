"""What both ways of ``saetool autointerp`` share: its options checked, the latents asked for, where output goes."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.artifacts.cache import HELDOUT, TRAIN
from saetool.config import AutointerpConfig
from saetool.console import Console
from saetool.errors import ArtifactError, ConfigError
from saetool.options import parse_count

if TYPE_CHECKING:
    from saetool.artifacts.sae import SAEFile

SPLITS = {"all": (TRAIN, HELDOUT), TRAIN: (TRAIN,), HELDOUT: (HELDOUT,)}
"""The cache's splits that each value of ``--on`` reads."""


@dataclass(frozen=True)
class Wanted:
    """Which latents were asked for: a number of random ones, certain ones, or (both None) all."""

    number: int | None = None
    ids: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.ids is not None:
            return ",".join(str(i) for i in self.ids)
        return "all" if self.number is None else str(self.number)


def parse_latents(text: str, d_sae: int) -> Wanted:
    """``200``, ``all``, ``1,5,9`` or ``@FILE`` (ids between spaces, commas or line ends). Ids come out rising."""
    if text == "all":
        return Wanted()
    if text.startswith("@"):
        path = Path(text[1:])
        try:
            words = path.read_text().replace(",", " ").split()
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"--latents {text}: cannot be read ({getattr(error, 'strerror', error)})") from None
    elif "," in text:
        words = [word for word in text.split(",") if word.strip()]
    else:
        return Wanted(number=parse_count(text, "--latents"))
    bad = [word for word in words if not word.strip().isdecimal()]
    if bad or not words:
        raise ConfigError(f"--latents {text}: {bad[0] if bad else 'nothing'} is no latent's number", "example: 1,5,9")
    ids = sorted(int(word) for word in words)
    twice = [a for a, b in itertools.pairwise(ids) if a == b]
    if twice:
        raise ConfigError(f"--latents {text}: names latent {twice[0]} twice")
    if ids[-1] >= d_sae:
        raise ConfigError(f"--latents {text}: no latent {ids[-1]} among {d_sae}", f"they are numbered 0 … {d_sae - 1}")
    return Wanted(ids=tuple(ids))


@dataclass(frozen=True)
class Job:
    """One run of the command."""

    console: Console
    file: "SAEFile"
    wanted: Wanted
    config: AutointerpConfig
    out: Path
    overwrite: bool
    dry_run: bool

    @property
    def windows_path(self) -> Path:
        """Where the windows go: OUT.windows.st for OUT.jsonl."""
        return self.out.with_suffix(".windows.st")

    def up_to_date(self, plan: h.Plan, windows: h.Plan | None) -> bool:
        """Whether all outputs are the ones wanted; then they are announced. Raises if something else is there."""
        current = container.up_to_date(self.out, plan, overwrite=self.overwrite)
        if windows is not None and str(self.out) != "-":
            # Windows without explanations are of a run that was cut off: they are written again.
            current &= container.up_to_date(self.windows_path, windows, overwrite=self.overwrite)
        if current:
            header = container.read_header(self.out)
            metrics = {name: header.config[name] for name in ("counts", "summary")}
            self.console.emit(header, self.out, h.sha256_file(self.out), metrics, fresh=False)
        return current


def check(config: AutointerpConfig, out: Path) -> None:
    """Raise ``ConfigError`` for options that cannot work."""
    if config.on not in SPLITS:
        raise ConfigError(f"--on {config.on}: unknown", f"one of {', '.join(SPLITS)}")
    for name in ("n_top", "n_random", "n_quantile", "score_top", "score_random", "score_quantile"):
        if getattr(config, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(config, name)}: must not be negative")
    for name, least in (("window", 2), ("min_firing", 1), ("table_size", 1), ("n_options", 2), ("n_questions", 1)):
        if getattr(config, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least {least}")
    if config.n_top + config.n_quantile == 0:
        raise ConfigError("--n-top 0 --n-quantile 0: an explanation needs windows with activations")
    if config.score_top + config.score_quantile == 0:
        raise ConfigError("--score-top 0 --score-quantile 0: a score needs windows with activations")
    if not 0 < config.split < 1:
        raise ConfigError(f"--split {config.split}: must lie between 0 and 1", "0.5 gives each half of the documents")
    if not 0 < config.max_density <= 1:
        raise ConfigError(f"--max-density {config.max_density}: must lie in (0, 1]")
    if str(out) != "-" and out.suffix != ".jsonl":
        raise ConfigError(f"-o {out}: explanations are JSON Lines", "choose a name that ends in .jsonl")
