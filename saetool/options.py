"""Options that mean the same on every verb, declared once."""

from pathlib import Path
from typing import Annotated

import typer

from saetool.errors import ConfigError

FILES, RUN, LOOK = "Files", "Running", "Output"


class Debug:
    """Whether ``--debug`` was given; read by the error boundary."""

    on = False


def _debug(value: bool) -> bool:
    Debug.on = Debug.on or value
    return value


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=FILES)]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check the inputs, print the plan, write nothing.", rich_help_panel=RUN),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON record on standard output.", rich_help_panel=LOOK)]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Say nothing on standard error but errors.", rich_help_panel=LOOK),
]
DebugFlag = Annotated[
    bool,
    typer.Option("--debug", help="Show a traceback with errors.", callback=_debug, is_eager=True, rich_help_panel=LOOK),
]
Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.", envvar="SAETOOL_DEVICE", rich_help_panel=RUN),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice of this command.", rich_help_panel=RUN)]
CrossEntropy = Annotated[
    bool, typer.Option("--ce", help="Also cross-entropy and KL with x̂ in the model's place (runs the model).")
]
CEModel = Annotated[
    str | None,
    typer.Option("--model", help="The model for --ce; implies it.", show_default="the one the cache was made with"),
]
CETokens = Annotated[
    str, typer.Option("--ce-tokens", help="Tokens for the cross-entropies, evenly spaced over the split.")
]
CEDtype = Annotated[str, typer.Option("--dtype", help="Of the model in --ce: bf16 or fp32.")]
Resume = Annotated[
    bool,
    typer.Option("--resume/--no-resume", help="Continue work that was interrupted.", rich_help_panel=RUN),
]
Log = Annotated[
    Path | None,
    typer.Option(
        "--log",
        "--log-file",  # torchrun takes --log for an abbreviation of its own options
        help="Append a JSONL log of the run here (times, device, metrics).",
        rich_help_panel=FILES,
    ),
]


def resolve_device(name: str) -> str:
    """The torch device for ``--device``: ``auto`` takes cuda, then mps, then cpu. Raises ``ConfigError``."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name}: not usable here ({reason})", "use --device cpu or auto") from None
    return name


def parse_count(text: str, option: str) -> int:
    """A count with an optional suffix k, M or B (thousand, million, billion): ``500k`` → 500000."""
    factors = {"k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
    body, factor = text.strip().replace("_", ""), 1
    if body and body[-1].lower() in factors:
        body, factor = body[:-1], factors[body[-1].lower()]
    try:
        value = float(body) * factor
    except ValueError:
        value = -1.0
    if value < 1 or value != int(value):
        raise ConfigError(f"{option} {text}: not a positive count", "examples: 500000, 500k, 2M")
    return int(value)


def parse_counts(text: str, option: str) -> list[int]:
    """A comma-separated list of counts, each at most once: ``768,1536`` → [768, 1536]."""
    counts = [parse_count(part, option) for part in text.split(",")]
    if len(set(counts)) != len(counts):
        raise ConfigError(f"{option} {text}: names a count twice")
    return counts
