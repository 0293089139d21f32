"""What both ways of ``saetool autointerp`` share: its options checked, the latents asked for, where output goes."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from saetool.artifacts import container, writing
from saetool.artifacts import header as h
from saetool.artifacts.cache import HELDOUT, TRAIN
from saetool.config import AutointerpConfig
from saetool.console import Console
from saetool.errors import ArtifactError, ConfigError
from saetool.options import parse_count

if TYPE_CHECKING:
    from saetool.artifacts.sae import SAEFile
    from saetool.commands.autointerp_backend import Backend

NGRAM, LLM, GIVEN = "ngram", "llm", "given"
SCORERS = "simulate", "detect", "fuzz", "intruder"
NEURONPEDIA = "neuronpedia"
META_PANEL = "Meta-SAEs"
SPLITS = {"all": (TRAIN, HELDOUT), TRAIN: (TRAIN,), HELDOUT: (HELDOUT,)}
"""The cache's splits that each value of ``--on`` reads."""


CHOICES = {
    "on": tuple(SPLITS),
    "negatives": ("zero", "any", "neighbours"),
    "granularity": ("token", "example"),
    "control": ("shuffled", "none"),
}
LEAST: dict[tuple[str, ...], int] = {
    ("n_top", "n_random", "n_quantile", "score_top", "score_random", "score_quantile"): 0,
    ("skip_positions", "temperature", "max_missing", "seed"): 0,
    ("window", "n_options"): 2,
    ("min_firing", "table_size", "n_questions", "candidates", "max_output_tokens"): 1,
}


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
    backend: "Backend"
    explainer: str
    """ngram, llm or given."""
    scorers: tuple[str, ...] = ("simulate",)
    device: str = "auto"
    log: Path | None = None
    export: str | None = None
    explanations: Path | None = None
    tokenizer: str | None = None

    @property
    def windows_path(self) -> Path:
        """Where the windows go: OUT.windows.st for OUT.jsonl."""
        return self.out.with_suffix(".windows.st")

    @property
    def export_path(self) -> Path | None:
        return None if self.export is None else self.out.with_suffix(f".{self.export}.jsonl")

    def up_to_date(self, plan: h.Plan, windows: h.Plan | None) -> bool:
        """Whether all outputs are the ones wanted; then they are announced. Raises if something else is there."""
        current = writing.up_to_date(self.out, plan, overwrite=self.overwrite)
        if windows is not None and str(self.out) != "-":
            # Windows without explanations are of a run that was cut off: they are written again.
            current &= writing.up_to_date(self.windows_path, windows, overwrite=self.overwrite)
        if self.export_path is not None:
            current &= self.export_path.exists()
        header = container.read_header(self.out) if current else None
        if header is None or not header.config.get("complete", True):  # a run that was stopped goes on
            return False
        metrics = {name: header.config[name] for name in ("counts", "summary")}
        self.console.emit(header, self.out, h.sha256_file(self.out), metrics, fresh=False)
        return True


def parse_scorers(text: str, offline: bool) -> tuple[str, ...]:
    """``simulate,detect`` → both, in the order they are reported."""
    asked = [part.strip() for part in text.split(",")]
    for name in asked:
        if name == "choice":
            raise ConfigError(
                "--scorer choice: is for meta-SAEs, where it needs no asking", f"one of {', '.join(SCORERS)}"
            )
        if name not in SCORERS:
            raise ConfigError(f"--scorer {name}: unknown", f"some of {', '.join(SCORERS)}, by commas")
    if offline and "intruder" in asked:
        raise ConfigError("--scorer intruder: tables of tokens cannot judge it", "pass a --backend")
    return tuple(name for name in SCORERS if name in asked)


def explainer_for(asked: str | None, offline: bool, explanations: Path | None) -> str:
    """ngram, llm, or given (with ``--explanations``)."""
    if explanations is not None:
        if asked is not None:
            raise ConfigError(f"--explainer {asked}: with --explanations there is nothing to explain", "leave it out")
        return GIVEN
    if asked not in (None, NGRAM, LLM):
        raise ConfigError(f"--explainer {asked}: unknown", f"one of {NGRAM}, {LLM}")
    if asked == LLM and offline:
        raise ConfigError("--explainer llm: needs a language model", "pass --backend openai, anthropic or local")
    return asked or (NGRAM if offline else LLM)


def check(config: AutointerpConfig, out: Path, explainer: str, by_probability: bool, export: str | None) -> None:
    """Raise ``ConfigError`` for options that cannot work."""
    for name, values in CHOICES.items():
        if getattr(config, name) not in values:
            raise ConfigError(
                f"--{name.replace('_', '-')} {getattr(config, name)}: unknown", f"one of {', '.join(values)}"
            )
    for names, least in LEAST.items():
        for name in names:
            value = getattr(config, name)
            if not least <= value < math.inf:
                must = "not be negative" if least == 0 else f"be at least {least}"
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must {must}")
    if config.n_top + config.n_quantile == 0:
        raise ConfigError("--n-top 0 --n-quantile 0: an explanation needs windows with activations")
    if config.score_top + config.score_quantile == 0:
        raise ConfigError("--score-top 0 --score-quantile 0: a score needs windows with activations")
    if not 0 < config.split < 1:
        raise ConfigError(f"--split {config.split}: must lie between 0 and 1", "0.5 gives each half of the documents")
    if not 0 < config.max_density <= 1:
        raise ConfigError(f"--max-density {config.max_density}: must lie in (0, 1]")
    if not config.max_missing <= 1:
        raise ConfigError(f"--max-missing {config.max_missing}: is a share, at most 1")
    if config.candidates > 1 and (explainer != LLM or config.temperature == 0):
        raise ConfigError(
            f"--candidates {config.candidates}: at temperature 0, or without a language model, all are the same",
            "pass a --backend and --temperature 0.7",
        )
    if by_probability and config.n_options > 9:
        raise ConfigError(f"--n-options {config.n_options}: at most 9 with --simulate logprob")
    if export not in (None, NEURONPEDIA):
        raise ConfigError(f"--export {export}: unknown", f"one of {NEURONPEDIA}")
    if str(out) == "-" and export:
        raise ConfigError("--export: goes beside the output, which is standard output here", "give -o FILE.jsonl")
    if str(out) != "-" and out.suffix != ".jsonl":
        raise ConfigError(f"-o {out}: explanations are JSON Lines", "choose a name that ends in .jsonl")
