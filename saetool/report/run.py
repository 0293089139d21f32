"""What several parts of the page ask of a run: names, colours, descriptions of latents, explanation summaries."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from saetool.artifacts import header as h
from saetool.config import ReportConfig
from saetool.report.collect import Artifact, Found


def stated(artifact: Artifact, name: str) -> Any:
    """A fact that a header states in its config or beside it; None if it does not."""
    header = artifact.header
    return header.config.get(name, header.extra.get(name))


def last_entry(artifact: Artifact) -> dict[str, Any]:
    """What the last verb recorded of itself; empty if the header has no history."""
    return artifact.header.history[-1] if artifact.header.history else {}


def _usable(value: Any) -> bool:
    """Whether ``value`` is a number or a list of numbers."""
    if isinstance(value, list):
        return all(_usable(v) and not isinstance(v, list) for v in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the defined values; None if there is none."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def score(record: dict[str, Any], name: str, field: str) -> float | None:
    """One number of a latent's scores; None where the latent has none."""
    part = (record.get("scores") or {}).get(name) or {}
    value = part.get(field)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Explained:
    """One explanations file: the SAE it is about and its records."""

    artifact: Artifact
    sae_name: str
    sae_sha256: str
    windows: Artifact | None

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.artifact.payload

    def summary(self, scorer: str) -> dict[str, Any]:
        """The file's own summary of a scorer: its numbers and intervals; empty if it has none."""
        summaries = stated(self.artifact, "summary")
        mine = summaries.get(scorer) if isinstance(summaries, dict) else None
        return {k: v for k, v in mine.items() if _usable(v)} if isinstance(mine, dict) else {}


@dataclass(frozen=True)
class Look:
    """What the reader asked to see."""

    features: int = ReportConfig.features
    """Latents with a card of their own, over all explanations; their relatives get smaller ones."""
    contexts: int = ReportConfig.contexts
    """Contexts on a card."""
    pick: str = ReportConfig.pick
    """How the latents are chosen: mixed, top, worst, random, or where the list came from."""
    listed: tuple[tuple[str, int], ...] | None = None
    """(SAE file or '', latent) of a list."""
    seed: int = 0
    """Of ``pick="random"``."""
    asked: int | None = None
    """The number of cards asked for, where a limit on the page's size made it fewer."""


@dataclass(frozen=True)
class Run:
    """The artifacts of a run with the links between them."""

    found: Found
    look: Look = Look()
    anchors: Mapping[tuple[str, int], str] = field(default_factory=dict)
    """The place on the page of every latent that has a card, by (hash that stands for its SAE, number)."""

    def link(self, sha256: str, latent: int) -> str:
        """``#…`` of a latent's card; '' if it has none."""
        anchor = self.anchors.get((self.identity(sha256), latent))
        return f"#{anchor}" if anchor else ""

    def prefix(self, sha256: str) -> str:
        """What the places of all cards of an SAE begin with; '' if it has none."""
        sae = self.identity(sha256)
        return next((a.rpartition("-")[0] + "-" for (s, _), a in self.anchors.items() if s == sae), "")

    @cached_property
    def explanations(self) -> list[Explained]:
        """Every explanations file with the SAE and the windows that belong to it."""
        out = []
        for artifact in self.found.of(h.EXPLANATIONS):
            saes = [i for i in artifact.header.inputs if i["schema"] == h.SAE]
            chosen = next((i for i in saes if i["role"] in ("sae", "meta")), saes[0] if saes else None)
            name, sha = (chosen["name"], chosen["sha256"]) if chosen else (artifact.name, "")
            out.append(Explained(artifact, name, sha, self._windows_of(artifact)))
        return out

    def _windows_of(self, artifact: Artifact) -> Artifact | None:
        """The windows of ``artifact``: by the hash it states, else NAME.windows.st beside it, else of equal inputs."""
        stated_sha = stated(artifact, "windows_sha256")
        if isinstance(stated_sha, str):
            mine = self.found.by_sha.get(stated_sha)
            return mine if mine is not None and mine.schema == h.WINDOWS else None
        stem = artifact.label.removesuffix(".jsonl")
        inputs = {i["sha256"] for i in artifact.header.inputs if i["schema"] != h.EXPLANATIONS}
        windows = self.found.of(h.WINDOWS)
        beside = [w for w in windows if w.label.removesuffix(".st").removesuffix(".windows") == stem]
        same = [w for w in windows if inputs and inputs == {i["sha256"] for i in w.header.inputs}]
        return next(iter([*beside, *same]), None)

    @cached_property
    def _before_threshold(self) -> dict[str, str]:
        """The hash of an SAE as trained, by its hash with a threshold; also of SAEs that were not given themselves."""
        found = {}
        for artifact in self.found.of(h.SAE):
            if last_entry(artifact).get("verb") == "threshold":
                found.update((artifact.sha256, i["sha256"]) for i in artifact.header.inputs if i["schema"] == h.SAE)
        for explained in self.explanations:
            history = explained.artifact.header.history
            if any(entry["verb"] == "meta" for entry in history):  # then the threshold is its parent's
                continue
            made = [e for e in history if e["verb"] not in ("cache", "autointerp")]
            if made and made[-1]["verb"] == "threshold" and made[-1].get("inputs"):
                found.setdefault(explained.sae_sha256, made[-1]["inputs"][0])
        return found

    def identity(self, sha256: str) -> str:
        """The hash that stands for an SAE: ``threshold`` changes no decoder row and numbers no latent anew."""
        before = self._before_threshold.get(sha256, sha256)
        return sha256 if before == sha256 else self.identity(before) if before in self._before_threshold else before

    @cached_property
    def _descriptions(self) -> dict[str, dict[int, str]]:
        table: dict[str, dict[int, str]] = {}
        for explained in self.explanations:
            mine = table.setdefault(self.identity(explained.sae_sha256), {})
            for record in explained.records:
                if record.get("description"):
                    mine.setdefault(record["latent"], str(record["description"]))
        return table

    def description(self, sha256: str, latent: int) -> str | None:
        """What a latent of the SAE with this hash was described as, if it was."""
        return self._descriptions.get(self.identity(sha256), {}).get(latent)

    def origin(self, name: str, sha256: str) -> str:
        """The name of the SAE as trained: ``threshold`` gives an SAE a new file, not a new identity."""
        artifact = self.found.by_sha.get(sha256)
        if artifact is not None and last_entry(artifact).get("verb") == "threshold":
            for item in artifact.header.inputs:
                if item["schema"] == h.SAE:
                    return self.origin(item["name"], item["sha256"])
        return name

    @cached_property
    def _series(self) -> dict[str, int]:
        widths: dict[str, int] = {}
        for log in self.found.of(h.TRAIN_LOG):
            for record in log.payload:
                widths[record["sae"]] = int(record.get("latents") or 0)
        for artifact in self.found.of(h.EVAL):
            for sae in artifact.payload["saes"]:
                widths[self.origin(sae["name"], sae["sha256"])] = sae["d_sae"]
        for artifact in self.found.of(h.SAE):
            if last_entry(artifact).get("verb") != "meta":
                width = artifact.header.config.get("d_sae")
                widths[self.origin(artifact.name, artifact.sha256)] = width if isinstance(width, int) else 0
        # Those that were evaluated get the plainest marks: the others are in the figures of training only.
        evaluated = {self.origin(s["name"], s["sha256"]) for a in self.found.of(h.EVAL) for s in a.payload["saes"]}
        order = sorted(widths, key=lambda name: (name not in evaluated, widths[name], len(name), name))
        return {name: i for i, name in enumerate(order)}

    def series(self, name: str, sha256: str = "") -> int:
        """The colour, dash and marker of an SAE: the same in every figure."""
        return self._series.get(self.origin(name, sha256), 0)

    def meta_sha256(self, artifact: Artifact) -> str:
        """The hash of the meta-SAE that a meta record is about ('' if it cannot be told).

        It is no input of the record (those are its parents and what it was compared with): both are written by the
        same step, which is the last of their histories and lies in that of the meta-SAE's explanations.
        """
        step = last_entry(artifact)
        saes = [s for s in self.found.of(h.SAE) if last_entry(s).get("verb") == "meta"]
        same = [s.sha256 for s in saes if last_entry(s) == step]
        told = [e.sae_sha256 for e in self.explanations if step and step in e.artifact.header.history]
        beside = [s.sha256 for s in saes if s.label == artifact.label.removesuffix(".json") + ".st"]
        return next((s for s in [*same, *told, *beside] if s), "")
