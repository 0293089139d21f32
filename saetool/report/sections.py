"""Artifacts → what the page shows: its sections in order, its findings, and what is not in it."""

from dataclasses import dataclass, replace
from typing import Any

from saetool.artifacts.header import KINDS
from saetool.report.activations import activations
from saetool.report.blocks import Missing, Section, number
from saetool.report.cards import latents
from saetool.report.choice import choose_cards
from saetool.report.collect import Found
from saetool.report.explained import autointerp
from saetool.report.findings import findings
from saetool.report.glossary import glossary
from saetool.report.metasae import meta
from saetool.report.provenance import provenance, stale_sentences
from saetool.report.quality import quality
from saetool.report.run import Look, Run
from saetool.report.stitching import stitching
from saetool.report.training import training

_OPTIONAL = (
    (stitching, "stitching", "Stitching", "saetool stitch small.st large.st --acts acts -o stitch.json"),
    (meta, "meta", "Meta-SAE", "saetool meta sae.st -o meta.st"),
    (None, "latents", "Latents", "saetool autointerp sae.st --acts acts -o explanations.jsonl"),
    (
        autointerp,
        "autointerp",
        "Descriptions and their scores",
        "saetool autointerp sae.st --acts acts -o explanations.jsonl",
    ),
    (quality, "saes", "SAEs compared", "saetool eval sae.st --acts acts -o eval.json"),
    (training, "training", "Training", "saetool train acts --log train.jsonl; saetool threshold sae.st acts"),
    (activations, "activations", "Activations", "saetool cache -o acts"),
)
"""The parts of the page that need an artifact, in the order they are read: who splits into whom comes first."""


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
    artifacts: Found
    n_cards: int

    @property
    def has_cards(self) -> bool:
        return self.n_cards > 0

    def record(self) -> dict[str, Any]:
        """What the page is made of, for machines."""
        return {
            "title": self.title,
            "sections": {
                "shown": [s.id for s in self.sections],
                "skipped": [
                    {"section": m.id, "reason": "no artifact for it was given", "command": m.command}
                    for m in self.missing
                ],
            },
            "findings": self.findings,
            "warnings": self.warnings,
            "artifacts": [
                {"path": a.label, "schema": a.schema, "sha256": a.sha256, "key": a.header.key}
                for a in self.artifacts.artifacts
            ],
            "ignored": self.artifacts.ignored,
            "cards": self.n_cards,
        }


def page(found: Found, title: str, look: Look) -> Page:
    """The page of the artifacts ``found``, with the cards that ``look`` asks for."""
    run = Run(found, look)
    chosen = choose_cards(run)
    run = replace(run, anchors=chosen.anchors())
    sections, missing = [], []
    for build, name, heading, command in _OPTIONAL:
        section = latents(run, chosen) if build is None else build(run)
        if section is None:
            missing.append(Missing(name, heading, command))
        else:
            sections.append(section)
    sections += [provenance(found), glossary(found)]
    return Page(
        title, _counts(found), warnings_of(found), findings(run), sections, missing, found, len(chosen.anchors())
    )


def warnings_of(found: Found) -> list[str]:
    """What a reader must know before believing the page: damaged files, inputs that have changed."""
    return [*found.warnings, *stale_sentences(found)]


def _counts(found: Found) -> list[str]:
    """How many artifacts of each kind there are, in the page's order."""
    counts: dict[str, int] = {}
    for artifact in found.artifacts:
        counts[artifact.schema] = counts.get(artifact.schema, 0) + 1
    return [f"{number(n)} × {KINDS[schema].removeprefix('an ').removeprefix('a ')}" for schema, n in counts.items()]
