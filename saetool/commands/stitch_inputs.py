"""The SAEs given to ``saetool stitch``, and what must be true of them before anything is computed."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.artifacts.kinds import is_foreign
from saetool.commands.checks import check_one_stdin
from saetool.console import Console
from saetool.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from saetool.artifacts.sae import SAEFile


@dataclass(frozen=True)
class Look:
    """An SAE file of which only the header was read (standard input and other libraries' files are read whole)."""

    path: Path
    name: str
    header: h.Header
    d_in: int
    d_sae: int
    inference: str
    normalization: str
    sha256: str
    file: "SAEFile | None"

    def load(self) -> "SAEFile":
        from saetool.artifacts import sae as sae_files

        return self.file or sae_files.load(self.path)


def look(path: Path) -> Look:
    """What stands in the header of the SAE at ``path``."""
    if str(path) == "-" or is_foreign(path):
        from saetool.artifacts import sae as sae_files

        file = sae_files.load(path)
        sae = file.sae
        return Look(
            path,
            file.name or "-",
            file.header,
            sae.d_in,
            sae.d_sae,
            sae.inference,
            sae.normalization,
            file.sha256,
            file,
        )
    hint = "SAEs are made by: saetool train, threshold, stitch, meta"
    header = h.expect(container.read_header(path), h.SAE, str(path), hint)
    tensors = container.read_contents(path).tensors
    if "W_dec" not in tensors or len(tensors["W_dec"].shape) != 2:
        raise ArtifactError(f"{path}: lacks the tensor W_dec", "make or copy it again")
    d_sae, d_in = tensors["W_dec"].shape
    inference = "jumprelu" if "threshold" in tensors else str(header.config.get("arch"))
    normalization = str(header.config.get("input_normalization", "none"))
    return Look(path, path.name, header, d_in, d_sae, inference, normalization, h.sha256_file(path), None)


def check_options(saes: list[Path], theta: float, out: Path, take: str | None) -> None:
    """Raise unless the options make sense together."""
    if len(saes) < 2:
        raise ConfigError(
            "one SAE given, two or more are compared", "example: saetool stitch small.st large.st --theta 0.7"
        )
    check_one_stdin(saes)
    if not -1 < theta <= 1:
        raise ConfigError(
            f"--theta {theta}: not a cosine above -1 and up to 1", "the paper uses 0.7 for GPT-2, 0.4 for Gemma Scope"
        )
    if str(out) != "-" and out.suffix not in (".json", ".st"):
        raise ConfigError(f"-o {out}: neither .json nor .st", "FILE.json for the record, FILE.st for the stitched SAE")
    if take is not None and out.suffix != ".st":
        raise ConfigError(f"--take {take}: says what to write, and no SAE is written", "add -o FILE.st")
    if out.suffix == ".st" and len(saes) != 2:
        raise ConfigError(
            f"-o {out}: a stitched SAE is made of two SAEs, and {len(saes)} were given",
            "give two SAEs, or -o FILE.json for the record of all pairs",
        )


def check_ladder(inputs: list[Look], console: Console) -> None:
    """Raise unless the SAEs read the same width and get no narrower; warn of other models or hooks, and of twins."""
    first = inputs[0]
    for other in inputs[1:]:
        if other.d_in != first.d_in:
            raise ArtifactError(
                f"{other.name}: made for activations of width {other.d_in}, and {first.name} for width {first.d_in}",
                "stitch SAEs of the same model and layer",
            )
        for what in ("id", "hook_name"):
            there, here = (i.header.model.get(what) for i in (other, first))
            if here and there and here != there:
                console.say(
                    f"warning: {other.name} was trained on {there}, and {first.name} on {here}: "
                    "directions of different spaces resemble each other by chance only"
                )
                break
    for small, large in pairwise(inputs):
        if small.sha256 == large.sha256:
            console.say(f"warning: {large.name} is the same SAE as {small.name}: nothing will be novel")
    for small, large in pairwise(inputs):
        if small.d_sae > large.d_sae:
            raise ConfigError(
                f"{small.name} has {small.d_sae} latents and comes before {large.name} with {large.d_sae}",
                "give the smaller SAE first",
            )


def check_mergeable(inputs: list[Look]) -> None:
    """Raise if latents of one of the SAEs cannot be put into another SAE."""
    from saetool.core.sae import RANKED

    for i in inputs:
        if i.inference in RANKED:
            raise ConfigError(
                f"{i.name}: latents of a {i.inference} SAE without a threshold cannot be put into another SAE",
                f"saetool threshold {i.name} -o WITH-THRESHOLD.st, and stitch that",
            )
        check_plain(i, "its latents cannot be put into another SAE")


def check_plain(i: Look, so: str) -> None:
    """Raise if the SAE normalises each token: what its latents write is then not a sum."""
    if i.normalization != "none":
        raise ConfigError(
            f"{i.name}: normalises each token ({i.normalization}), so {so}",
            "use an SAE trained without it; cosines of its decoder rows work as they are, without --acts",
        )


def check_take(take: str) -> str:
    """``take``, if it is of a known form."""
    if take.startswith("path:") and not (take[5:].isascii() and take[5:].isdigit()):
        raise ConfigError(f"--take {take}: STEP is not a number", "example: --take path:120")
    if not (take in ("small+novel", "large") or take.startswith(("path:", "@"))):
        raise ConfigError(f"--take {take}: unknown", "small+novel, large, path:STEP or @FILE")
    return take


def listed(file: Path) -> h.Input:
    """The list of latents of ``--take @FILE``, as an input."""
    try:
        return h.Input("latents", file.name, h.sha256_file(file), "text")
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror})", "--take @FILE lists the latents") from None
