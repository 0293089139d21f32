"""Artifacts → what the page shows: its sections in order, its findings, and what is not in it."""

from dataclasses import dataclass

from saetool.artifacts.header import KINDS
from saetool.report.blocks import Missing, Section, number
from saetool.report.cards import latents
from saetool.report.collect import Found
from saetool.report.explained import autointerp
from saetool.report.findings import findings
from saetool.report.glossary import glossary
from saetool.report.metasae import meta
from saetool.report.provenance import provenance, stale_sentences
from saetool.report.quality import quality, training
from saetool.report.run import Run
from saetool.report.stitching import stitching

_OPTIONAL = (
    (quality, "SAEs compared", "saetool eval sae.st --acts acts -o eval.json"),
    (training, "Training", "saetool train acts --log train.jsonl; saetool threshold sae.st acts"),
    (stitching, "Stitching", "saetool stitch small.st large.st --acts acts -o stitch.json"),
    (meta, "Meta-SAE", "saetool meta sae.st -o meta.st"),
    (autointerp, "Descriptions and their scores", "saetool autointerp sae.st --acts acts -o explanations.jsonl"),
    (latents, "Latents", "saetool autointerp sae.st --acts acts -o explanations.jsonl"),
)


@dataclass(frozen=True)
class Page:
    """Everything on the page."""

    title: str
    found: list[str]
    """What was found: '3 SAEs', …"""
    warnings: list[str]
    findings: list[str]
    sections: list[Section]
    missing: list[Missing]


def page(found: Found, title: str, n_cards: int) -> Page:
    """The page of the artifacts ``found``, with cards of ``n_cards`` latents."""
    run = Run(found, n_cards)
    sections, missing = [provenance(found)], []
    for build, name, command in _OPTIONAL:
        section = build(run)
        if section is None:
            missing.append(Missing(name, command))
        else:
            sections.append(section)
    sections.append(glossary(found))
    return Page(title, _counts(found), warnings_of(found), findings(run), sections, missing)


def warnings_of(found: Found) -> list[str]:
    """What a reader must know before believing the page: damaged files, inputs that have changed."""
    return [*found.warnings, *stale_sentences(found)]


def _counts(found: Found) -> list[str]:
    """How many artifacts of each kind there are, in the page's order."""
    counts: dict[str, int] = {}
    for artifact in found.artifacts:
        counts[artifact.schema] = counts.get(artifact.schema, 0) + 1
    return [f"{number(n)} × {KINDS[schema].removeprefix('an ').removeprefix('a ')}" for schema, n in counts.items()]
