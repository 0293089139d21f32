"""Explanations in the form that Neuronpedia imports: one JSON object a latent, with its scores and top activations."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from saetool.engines.scores import DETECT, FUZZ, SIMULATE, Scored
from saetool.engines.windows import ROLES

TYPE_NAMES = {"ngram": "saetool_ngram", "llm": "saetool_top_random"}
SCORE_TYPES = {SIMULATE: "saetool_simulation", DETECT: "saetool_detection", FUZZ: "saetool_fuzzing"}


def neuronpedia(
    scored: Sequence[Scored],
    string: Callable[[int], str],
    *,
    model: Mapping[str, Any],
    sae_name: str,
    explainer: str,
    explanation_model: str,
    scorer_model: str,
) -> list[dict[str, Any]]:
    """One object per latent that has an explanation, in latent order.

    ``layer`` is the source's name there: hook point and SAE file, which an import renames.
    """
    source = "-".join(str(p) for p in (model.get("hook_name"), sae_name.removesuffix(".st")) if p)
    out = []
    for one in sorted(scored, key=lambda s: s.explained.latent):
        assert one.explained.explanation is not None
        place = {"modelId": str(model.get("id", "")), "layer": source, "index": str(one.explained.latent)}
        scores = [
            {
                "value": score.value,
                "explanationScoreTypeName": SCORE_TYPES[name],
                "explanationScoreModelName": scorer_model,
                "jsonDetails": json.dumps(vars(score.details), sort_keys=True),
            }
            for name, score in one.scores.items()
            if name in SCORE_TYPES and score.value is not None
        ]
        out.append(
            place
            | {
                "description": one.explained.explanation.description,
                "typeName": TYPE_NAMES.get(explainer, explainer),
                "explanationModelName": explanation_model,
                "authorId": None,
                "notes": None,
                "scores": scores,
                "activations": [place | a for a in _activations(one, string)],
            }
        )
    return out


def _activations(one: Scored, string: Callable[[int], str]) -> list[dict[str, Any]]:
    """The windows with the largest activations, with the range of activations that they are of."""
    windows = one.explained.windows
    assert windows is not None
    tops = [i for i, role in enumerate(windows.role.tolist()) if ROLES[role].endswith("_top")]
    out = []
    for i in tops:
        n = int(windows.lengths[i])
        values = windows.acts[i, :n]
        at = int(np.argmax(values))
        out.append(
            {
                "tokens": [string(int(t)) for t in windows.tokens[i, :n]],
                "values": [float(v) for v in values],
                "maxValue": float(values[at]),
                "minValue": float(values.min()),
                "maxValueTokenIndex": at,
                "binMin": None,
                "binMax": None,
            }
        )
    return sorted(out, key=lambda a: -a["maxValue"])
