"""What ``explanations@1`` holds of a meta-SAE: labels of its latents, and the multiple choice."""

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from saetool.core.ngram import describe
from saetool.core.scoring import wilson
from saetool.engines import choice
from saetool.engines.choice import Label, Questions
from saetool.engines.meta_base import Base
from saetool.engines.meta_labels import Judged


@dataclass(frozen=True)
class Chosen:
    """All that was found of a meta-SAE."""

    z: Float[np.ndarray, "n_parent n_meta"]
    labels: Sequence[Label]
    questions: Questions
    judged: Judged | None
    """None: the tables of tokens are the labels and the judge."""

    @property
    def failures(self) -> dict[int, str]:
        """Why meta-latents got no label from the model."""
        if self.judged is None:
            return {}
        return {one.latent: why for one, (_, why) in zip(self.labels, self.judged.labels, strict=True) if why}

    def counts(self) -> dict[str, Any]:
        """How many meta-latents were asked for and labelled; skipped or failed for which reason."""
        failures = self.failures
        done = sum(one.reason is None and one.latent not in failures for one in self.labels)
        skipped = {name: sum(one.reason == name for one in self.labels) for name in ("dead", "unlabelled")}
        failed = dict(sorted(collections.Counter(failures.values()).items()))
        return {"requested": len(self.labels), "explained": done, "scored": done, "skipped": skipped, "failed": failed}

    def missing(self) -> tuple[int, int]:
        """Answers (labels, and choices but for the control's) that did not come; how many were asked for."""
        unanswered = 0 if self.judged is None else int((~self.judged.valid).sum())
        explained = sum(one.reason is None for one in self.labels) - len(self.failures)
        return unanswered + len(self.failures), len(self.questions.latent) + explained

    def summary(self) -> dict[str, Any]:
        """Accuracy with Wilson's interval, the control's, chance, and how many questions were ties."""
        questions, judged = self.questions, self.judged
        valid = np.ones(len(questions.latent), dtype=bool) if judged is None else judged.valid
        has_control = (questions.control_latent >= 0) & (True if judged is None else judged.control_valid)
        points, n = float(questions.answers.points[valid].sum()), int(valid.sum())
        control, n_control = float(questions.control.points[has_control].sum()), int(has_control.sum())
        out = {
            "n": n,
            "n_missing": int((~valid).sum()),
            "accuracy": points / n if n else None,
            "wilson95": wilson(points, n),
            "chance": 1 / questions.options.shape[1],
            "ties": int((questions.answers.chosen[valid] < 0).sum()),
            "unexplained": questions.n_unexplained,
            "control_n": n_control,
            "control_accuracy": control / n_control if n_control else None,
            "control_wilson95": wilson(control, n_control),
            "control_ties": int((questions.control.chosen[has_control] < 0).sum()),
        }
        return {"choice": out if judged is None else out | {"floor_accuracy": judged.floor}}

    def asked(self) -> dict[str, Any]:
        """Every question with its options, the right one, and the chosen one (None: a tie, or no answer)."""
        questions = self.questions
        return {
            "latent": questions.latent.tolist(),
            "options": questions.options.tolist(),
            "right": questions.right.tolist(),
            "chosen": _known(questions.answers.chosen),
            "control_latent": _known(questions.control_latent),
            "control_chosen": _known(questions.control.chosen),
        }

    def records(self, explainer: str, base: Base) -> list[dict[str, Any]]:
        """One record per meta-latent asked for."""
        answered = None if self.judged is None else self.judged.valid
        correct, n = choice.by_meta_latent(self.z, self.questions, answered)
        chance = 1 / self.questions.options.shape[1]
        said = self.judged.labels if self.judged is not None else [(None, None)] * len(self.labels)
        return [
            _record(
                one,
                explainer,
                label,
                base,
                {"correct": float(correct[one.latent]), "n": int(n[one.latent]), "chance": chance},
            )
            for one, label in zip(self.labels, said, strict=True)
        ]


def _known(numbers: np.ndarray) -> list[int | None]:
    return [None if i < 0 else i for i in numbers.tolist()]


def strings(labels: Sequence[Label], base: Base) -> dict[str, str]:
    """Of every token id that a label's table names."""
    return {str(entry.token): base.text(entry.token) for one in labels for entry in one.table}


def _record(
    one: Label, explainer: str, label: tuple[str | None, str | None], base: Base, score: Mapping[str, Any]
) -> dict[str, Any]:
    said, failure = label
    table = describe(one.table, base.text) if one.table else None
    return {
        "latent": one.latent,
        "status": "skipped" if one.reason else "failed" if failure else "scored" if score["n"] else "explained",
        "reason": one.reason or failure,
        "description": table if explainer == "ngram" else said,
        "explainer": explainer,
        "table": [list(entry) for entry in one.table] or None,
        "members": [list(member) for member in one.members],
        "n_members": one.n_members,
        "density": one.n_members / base.parents.n,
        "max_act": one.max_act,
        "windows": None,
        "scores": {"choice": score} if score["n"] else {},
    }
