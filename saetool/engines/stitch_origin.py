"""Which latents a stitched SAE is made of: what ``--take`` asks for, and what the header says of the result.

``config["stitched"]`` of an SAE holds ``sources``, the SAEs its latents were trained in, and ``latents``: runs
``[source, first, count]`` that list its latents in order. A stitched SAE that is stitched again is looked through, so
sources are never stitched themselves. Verbs that keep an SAE's latents keep its config, and with it this.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from saetool.artifacts.sae import SAEFile
from saetool.core.stitch import Included, Partition, included_at
from saetool.core.stitch import Path as Way
from saetool.errors import ArtifactError, ConfigError

Origin = tuple[dict[str, Any], int]
"""The SAE a latent was trained in ({name, sha256, d_sae}), and its number there."""


def taken(take: str, parts: Partition, way: Way | None) -> Included:
    """The latents that ``take`` names: small+novel, large, path:STEP (of ``way``), or @FILE. Raises ``ConfigError``."""
    everything, nothing = torch.ones_like(parts.unmatched), torch.zeros_like(parts.unmatched)
    if take == "small+novel":
        return Included(everything, parts.novel)
    if take == "large":
        return Included(nothing, torch.ones_like(parts.novel))
    if take.startswith("path:"):
        assert way is not None
        return included_at(way, int(take.removeprefix("path:")))
    if take.startswith("@"):
        return _listed(Path(take[1:]), len(nothing), len(parts.novel))
    raise ConfigError(f"--take {take}: unknown", "small+novel, large, path:STEP or @FILE")


def _listed(file: Path, n_small: int, n_large: int) -> Included:
    """The latents of a file with a line ``small N``, ``small N-M``, ``small all`` (or ``large …``) for each of them."""
    sides = {"small": torch.zeros(n_small, dtype=torch.bool), "large": torch.zeros(n_large, dtype=torch.bool)}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise ArtifactError(f"{file}: cannot be read ({reason})", "--take @FILE lists the latents to take") from None
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or words[0] not in sides:
            raise ConfigError(
                f"{file}, line {number}: {line.strip()[:60]!r} is not a latent", "small 17, large 3-90 or small all"
            )
        _mark(sides[words[0]], words[0], words[1], f"{file}, line {number}")
    return Included(**sides)


def _mark(side: Bool[Tensor, " n"], name: str, which: str, where: str) -> None:
    if which == "all":
        side[:] = True
        return
    first, dash, last = which.partition("-")
    ends = [first, last if dash else first]
    if not all(end.isascii() and end.isdigit() for end in ends):
        raise ConfigError(f"{where}: {which!r} is not a latent's number", "17, 3-90 or all")
    low, high = map(int, ends)
    if low > high or high >= len(side):
        raise ConfigError(f"{where}: the {name} SAE has no latents {which}, it has 0 to {len(side) - 1}")
    side[low : high + 1] = True


def origins(file: SAEFile) -> list[Origin]:
    """Where each latent of an SAE was trained: in itself, or as its header says in others."""
    made = file.header.config.get("stitched")
    if not made or "latents" not in made:
        own = {"name": file.name, "sha256": file.sha256, "d_sae": file.sae.d_sae}
        return [(own, latent) for latent in range(file.sae.d_sae)]
    found = [
        (made["sources"][source], latent)
        for source, first, count in made["latents"]
        for latent in range(first, first + count)
    ]
    if len(found) != file.sae.d_sae:
        raise ArtifactError(
            f"{file.name}: its header tells the origin of {len(found)} latents, and it has {file.sae.d_sae}",
            "stitch it again",
        )
    return found


def provenance(small: SAEFile, large: SAEFile, included: Included) -> dict[str, Any]:
    """``sources`` and ``latents`` of the SAE made of ``included``."""
    kept = [
        origin
        for file, mine in ((small, included.small), (large, included.large))
        for origin, taken in zip(origins(file), mine.tolist(), strict=True)
        if taken
    ]
    sources: list[dict[str, Any]] = []
    runs: list[list[int]] = []
    for source, latent in kept:
        if source not in sources:
            sources.append(source)
        number = sources.index(source)
        if runs and runs[-1][0] == number and runs[-1][1] + runs[-1][2] == latent:
            runs[-1][2] += 1
        else:
            runs.append([number, latent, 1])
    return {"sources": sources, "latents": runs}
