"""The work behind ``saetool stitch`` that takes time: measuring on activations, running the model, writing an SAE."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saetool.artifacts import header as h
from saetool.artifacts.cache import Cache
from saetool.config import EvalConfig, StitchConfig
from saetool.console import Console
from saetool.errors import ArtifactError

if TYPE_CHECKING:
    from saetool.artifacts.sae import SAEFile
    from saetool.core.sae import SAE
    from saetool.engines.stitch import Comparison, Found, Job


@dataclasses.dataclass(frozen=True)
class Settings:
    """How paths are measured."""

    split: str
    tokens: int | None
    order: str
    bias: str
    seed: int
    device: str


def jobs_of(
    console: Console, files: list["SAEFile"], compared: list["Comparison"], cache: Cache | None, settings: Settings
) -> list["Job"]:
    """The way of each pair of neighbours. Order ``effect`` reads the activations once for it."""
    from saetool.engines.stitch import job

    deltas: list[Any] = [None] * len(compared)
    if settings.order == "effect" and cache is not None:
        plain = [job(k, k + 1, c, "index", settings.seed) for k, c in enumerate(compared)]
        deltas = [pair.deltas for pair in measured(console, files, plain, cache, settings, "effects").pairs]
    return [
        job(k, k + 1, c, settings.order, settings.seed, StitchConfig.repeats, d)
        for k, (c, d) in enumerate(zip(compared, deltas, strict=True))
    ]


def measured(
    console: Console, files: list["SAEFile"], jobs: list["Job"], cache: Cache, settings: Settings, label: str = "stitch"
) -> "Found":
    """Everything about all pairs, from one read of the cache."""
    from saetool.engines.reader import Reader
    from saetool.engines.stitch import Found, measure

    reader = Reader(cache, settings.split, device=settings.device)
    saes = [f.sae.map(lambda t: t.to(settings.device)) for f in files]
    thetas = sorted({*StitchConfig.sweep, *(j.parts.theta for j in jobs)})
    limit = min(settings.tokens or reader.n_rows, reader.n_rows)
    result: Found | None = None
    with console.progress(label, limit, "tokens") as advance:
        for event in measure(saes, jobs, reader, bias=settings.bias, thetas=thetas, limit=limit):
            if isinstance(event, Found):
                result = event
            else:
                advance(event.n)
    assert result is not None
    for j, pair in zip(jobs, result.pairs, strict=True):
        for file, own in ((files[j.small], pair.small), (files[j.large], pair.large)):
            if not own.l0:
                raise ArtifactError(
                    f"{file.name}: none of its latents fires on these {pair.n_tokens:,} tokens",
                    "are they from the model and hook it was trained on? its threshold may be too high",
                )
    return result


def cross_entropies(
    console: Console,
    files: list["SAEFile"],
    jobs: list["Job"],
    cache: Cache,
    settings: Settings,
    options: dict[str, Any],
) -> list[list[dict[str, Any]]]:
    """CE and KL of the model with the stitched SAE in its place, at some steps of each pair's path.

    The ends are the SAEs as they are, and measured once where two pairs share one: to float32 rounding a stitched SAE
    of all their latents is the same, but in bfloat16 that rounding moves the model's loss by a thousandth.
    """
    from saetool.core.stitch import included_at, stitched
    from saetool.engines.loss_recovered import contexts, measure
    from saetool.engines.model import load_model
    from saetool.engines.source import find_site

    def at(j: "Job", step: int) -> "SAE":
        if step == 0 and settings.bias != "large":
            return own[j.small]
        if step == j.path.n_steps and settings.bias != "small":
            return own[j.large]
        sae = stitched(files[j.small].sae, files[j.large].sae, included_at(j.path, step), settings.bias)
        return sae.map(lambda t: t.to(settings.device))

    data = contexts(cache, settings.split, options["ce_tokens"])
    lm = load_model(options["model"], device=settings.device, dtype=options["dtype"])
    site = find_site(lm.model, cache.header.model["hook_name"])
    own = [f.sae.map(lambda t: t.to(settings.device)) for f in files]
    points = [(j, step, at(j, step)) for j in jobs for step in ce_steps(j)]
    saes = list({id(sae): sae for _, _, sae in points}.values())
    result: list[Any] = []
    passes = int(data.cached[:, :-1].sum()) * (len(saes) + 2)
    with console.progress("stitch --ce", passes, "token passes") as advance:
        for event in measure(lm, site, saes, data, cache.moments()["mean"], EvalConfig.ce_contexts):
            if isinstance(event, list):
                result = event
            else:
                advance(event.n)
    found = {id(sae): dataclasses.asdict(one.values) for sae, one in zip(saes, result, strict=True)}
    return [[{"step": step, **found[id(sae)]} for one, step, sae in points if one is j] for j in jobs]


def ce_steps(job: "Job") -> list[int]:
    """Small, half of the adds, all adds, half of the swaps, all swaps, large."""
    add, swap = job.path.n_add, job.path.n_swap
    return sorted({0, add // 2, add, add + swap // 2, add + swap, job.path.n_steps})


def write_stitched(
    out: Path, plan: h.Plan, files: list["SAEFile"], comparison: "Comparison", job: "Job", take: str, settings: Settings
) -> tuple[h.Header, str]:
    """Write the SAE that ``take`` names; its config says where each latent comes from."""
    from saetool.artifacts import sae as sae_files
    from saetool.core.stitch import stitched
    from saetool.engines.stitch_origin import provenance, taken

    small, large = files
    included = taken(take, comparison.parts, job.path)
    sae = stitched(small.sae, large.sae, included, settings.bias)
    made = {
        "take": take,
        "theta": comparison.parts.theta,
        "bias": settings.bias,
        "n_small": int(included.small.sum()),
        "n_large": int(included.large.sum()),
        **({"order": settings.order, "seed": settings.seed} if take.startswith("path:") else {}),
        **provenance(small, large, included),
    }
    config = sae_files.config_of(sae) | {"stitched": made}
    header = plan.header(config=config, model=small.header.model, dtype="float32")
    return header, sae_files.save(out, sae, header)
