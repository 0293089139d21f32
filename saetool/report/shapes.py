"""What a record must hold for the page to be made from it, and a check that says what is wrong with one.

A shape is a type or tuple of types, ``[shape]`` for a list, ``{name: shape}`` for an object with at least these
fields, or ``Maybe(shape)`` where null is allowed.
"""

from dataclasses import dataclass
from typing import Any

from saetool.artifacts import header as h


@dataclass(frozen=True)
class Maybe:
    """Null, a missing field (unless it is ``required``), or ``shape``."""

    shape: Any
    required: bool = False


@dataclass(frozen=True)
class Each:
    """An object whose fields, whatever their names, all have ``shape``."""

    shape: Any


INT = int
NUMBER = Maybe((int, float))  # undefined numbers are written as null
STATED = Maybe((int, float), required=True)  # undefined is allowed, unsaid is not
TEXT = str
HISTOGRAM = {"edges": [(int, float)], "counts": [(int, float)]}

EVAL = {
    "split": TEXT,
    "n_tokens": INT,
    "saes": [
        {
            "name": TEXT,
            "sha256": TEXT,
            "arch": TEXT,
            "d_sae": INT,
            "k": NUMBER,
            "metrics": Each(NUMBER),
            "by": Maybe(
                Each({"ids": [INT], "n": [INT], "mse": Maybe([NUMBER]), "explained_variance": Maybe([NUMBER])})
            ),
            "density": Maybe({"log10_edges": [(int, float)], "counts": [(int, float)]}),
            "ce": Maybe(Each(NUMBER)),
            "intervals": Maybe(Each([(int, float)])),
            "recovery_bound": Maybe(Each(NUMBER)),
        }
    ],
}

_DATA = {
    "split": TEXT,
    "n_tokens": INT,
    "mse_small": NUMBER,
    "mse_large": NUMBER,
    "l0_small": NUMBER,
    "l0_large": NUMBER,
    "alive": Maybe(Each(NUMBER)),
    "path_end_error": Maybe(Each(NUMBER)),
    "effects": Maybe({"delta_mse": [NUMBER]}),
    "auc": NUMBER,
    "best_theta": NUMBER,
    "roc": Maybe({"false_positive": [(int, float)], "true_positive": [(int, float)], "theta": Maybe([NUMBER])}),
    "swaps": Maybe({"delta_mse": [NUMBER], "delta_l0": [NUMBER], "median_mse": NUMBER, "median_l0": NUMBER}),
    "cumulative": Maybe({name: [INT] for name in ("n_novel", "n_reconstruction")} | {"novel": [[NUMBER]]}),
    "latent_scaling": Maybe({"error": [NUMBER]}),
    "activation_cosine": Maybe({"values": [NUMBER], "r2": NUMBER, "n": NUMBER}),
    "firing_errors": Maybe({f"mean_of_{group}": Maybe(Each(NUMBER)) for group in ("novel", "reconstruction")}),
    "ce": Maybe([Each(NUMBER)]),
    "groups": Maybe([Each(NUMBER)]),
    "path": Maybe(
        {
            "order": Maybe(TEXT),
            "bias": Maybe(TEXT),
            "n_add_steps": INT,
            "n_swap_steps": NUMBER,
            "mse": [NUMBER],
            "l0": [NUMBER],
            "n_latents": [INT],
        }
    ),
}

STITCH = {
    "theta": (int, float),
    "bias_exchange": Maybe({"saes": [TEXT], "mse": [[NUMBER]], "b_dec_cosine": [[NUMBER]]}),
    "saes": [{"name": TEXT, "sha256": TEXT, "d_sae": INT}],
    "pairs": [
        {
            "small": TEXT,
            "large": TEXT,
            "small_sha256": TEXT,
            "large_sha256": TEXT,
            "n_small": INT,
            "n_large": INT,
            "novel": INT,
            "reconstruction": INT,
            "novel_share": STATED,
            "reconstruction_share": STATED,
            "unmatched_small": INT,
            "components": INT,
            "component_shapes": [[INT]],
            "nearest": Maybe([NUMBER]),
            "max_cosine": {"mean": STATED, "median": STATED, "values": [NUMBER]},
            "edges": Maybe([[(int, float)]]),
            "sweep": Maybe([Each(NUMBER)]),
            "null": Maybe(Each(NUMBER)),
            "null_shuffled": Maybe(Each(NUMBER)),
            "matching": Maybe(dict),
            "data": Maybe(_DATA),
        }
    ],
}

META = {
    "parent": {"name": TEXT, "sha256": TEXT},
    "n_rows": INT,
    "k": (int, float),
    "d_sae": INT,
    "variance_explained": {"threshold_mode": STATED, "train_mode": STATED},
    "controls": Maybe([{"name": TEXT, "variance_explained": STATED}]),
    "max_cosine": Maybe(Each(HISTOGRAM)),
    "bars": Maybe([{"name": TEXT, "variance_explained": NUMBER, "mse_mean": NUMBER, "mean_active": NUMBER}]),
    "meta_latents": Maybe({"n_members": [INT]}),
    "compare": Maybe(
        {
            "comparable": Maybe(TEXT),
            "pool": Maybe([{"name": TEXT, "directions": NUMBER}]),
            "shared_edges": Maybe(Each(NUMBER)),
        }
    ),
    "parents": Maybe([{"name": TEXT, "d_sae": INT, "rows_by_active": Maybe([INT]), "left_out": Maybe(Each(NUMBER))}]),
    "decompositions": Maybe({"latents": [INT], "indices": [[INT]], "weights": [[(int, float)]]}),
}

TRAIN_LOG = [
    {"sae": TEXT, "step": INT, "latents": NUMBER, "tokens": NUMBER, "loss": NUMBER, "mse": NUMBER, "l0": NUMBER}
    | {"dead": NUMBER, "explained_variance": NUMBER, "aux": NUMBER, "lr": NUMBER, "time": NUMBER}
]
EXPLANATIONS = [
    {
        "latent": INT,
        "status": TEXT,
        "description": Maybe(TEXT),
        "density": NUMBER,
        "max_act": NUMBER,
        "windows": Maybe([INT]),
        "members": Maybe([[(int, float)]]),
        "scores": Maybe(Each(Maybe(dict))),
    }
]
RUN_LOG = [
    {name: NUMBER for name in ("calls", "kept", "prompt_tokens", "output_tokens", "cost")}
    | {"failures": Maybe(Each(NUMBER))}
]
HEADER = {
    "config": {"threshold": Maybe((dict, int, float, str))},
    "model": dict,
    "inputs": [{"role": TEXT, "name": TEXT, "sha256": TEXT, "schema": TEXT}],
    "history": [{"verb": TEXT, "options": dict}],
}
_THRESHOLD = {
    "method": Maybe(TEXT),
    "value": NUMBER,
    "standard_error": NUMBER,
    "relative_error": NUMBER,
    "n_batches": NUMBER,
    "batch_size": NUMBER,
    "asked_l0": NUMBER,
    "l0_estimation": NUMBER,
    "l0_heldout": NUMBER,
    "l0_heldout_standard_error": NUMBER,
    "explained_variance_heldout": NUMBER,
    "explained_variance_heldout_batch_selection": NUMBER,
    "values": Maybe(Each(NUMBER)),
    "minima": Maybe([NUMBER]),
}

CACHE = {
    "splits": Maybe(Each(Each(NUMBER))),
    "statistics": Maybe(Each(NUMBER)),
    "shards": Maybe([{"bytes": NUMBER}]),
    "profile": Maybe(
        {
            "sample_rows": NUMBER,
            "distinct_tokens": NUMBER,
            "norm_quantiles": Maybe([[NUMBER]]),
            "outlier_dims": Maybe([Each(NUMBER)]),
            "top_tokens": Maybe([[(int, str)]]),
        }
    ),
}
SHAPES = {
    h.CACHE: CACHE,
    h.EVAL: EVAL,
    h.STITCH: STITCH,
    h.META: META,
    h.TRAIN_LOG: TRAIN_LOG,
    h.EXPLANATIONS: EXPLANATIONS,
    h.RUN_LOG: RUN_LOG,
}


def wrong(value: Any, shape: Any, where: str = "") -> str | None:
    """In a few words what of ``value`` does not fit ``shape``; None if all does."""
    if isinstance(shape, Maybe):
        return None if value is None else wrong(value, shape.shape, where)
    at = where or "the record"
    if isinstance(shape, Each):
        if not isinstance(value, dict):
            return f"{at} is not an object"
        shape = dict.fromkeys(value, shape.shape)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{at} is not an object"
        for name, inner in shape.items():
            inside = f"{where}.{name}" if where else name
            if name not in value and not (isinstance(inner, Maybe) and not inner.required):
                return f"{inside} is missing"
            if found := wrong(value.get(name), inner, inside):
                return found
        return None
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{at} is not a list"
        for i, item in enumerate(value):
            if found := wrong(item, shape[0], f"{where}[{i}]"):
                return found
        return None
    if isinstance(value, bool) or not isinstance(value, shape):
        return f"{at} has the wrong type"
    return None


def mismatch(header: h.Header, payload: Any) -> str | None:
    """What is wrong with an artifact's header or payload, in a few words; None if the page can be made from it."""
    schema = header.schema
    if found := wrong(header.to_json(), HEADER):
        return f"header: {found}"
    threshold = header.config.get("threshold")
    if schema == h.SAE and isinstance(threshold, dict) and (found := wrong(threshold, _THRESHOLD, "threshold")):
        return f"header: {found}"
    if schema in SHAPES and (found := wrong(payload, SHAPES[schema])):
        return found
    if schema == h.STITCH:
        for i, pair in enumerate(payload["pairs"]):
            if found := _pair_mismatch(pair):
                return f"pairs[{i}].{found}"
    profile = payload.get("profile") or {} if schema == h.CACHE else {}
    if any(len(q) != 2 for q in profile.get("norm_quantiles") or []):
        return "profile.norm_quantiles holds something else than [share, norm]"
    if any([type(v) for v in t] != [int, str, int] for t in profile.get("top_tokens") or []):
        return "profile.top_tokens holds something else than [id, text, rows]"
    if schema == h.STITCH and (found := payload.get("bias_exchange")):
        n = len(found["saes"])
        if any(len(rows) != n or any(len(row) != n for row in rows) for rows in (found["mse"], found["b_dec_cosine"])):
            return "bias_exchange is not square"
    if schema == h.META and (parts := payload.get("decompositions")):
        sizes = [len(parts["latents"]), len(parts["indices"]), len(parts["weights"])]
        rows = zip(parts["indices"], parts["weights"], strict=False)
        if len(set(sizes)) > 1 or any(len(a) != len(b) for a, b in rows):
            return "decompositions: latents, indices and weights differ in length"
    return None


def _pair_mismatch(pair: dict[str, Any]) -> str | None:
    if len(pair["max_cosine"]["values"]) != pair["n_large"]:
        return "max_cosine.values has not one value a latent"
    if any(len(shape) != 3 for shape in pair["component_shapes"]):
        return "component_shapes holds something else than [small, large, count]"
    if any(len(edge) != 3 for edge in pair.get("edges") or []):
        return "edges holds something else than [small, large, cosine]"
    data = pair.get("data") or {}
    if (effects := data.get("effects")) and len(effects["delta_mse"]) != pair["n_large"]:
        return "data.effects.delta_mse has not one value a latent"
    steps = len((data.get("path") or {}).get("n_latents") or [])
    if any(not 0 <= (c.get("step") or 0) < steps for c in data.get("ce") or []):
        return "data.ce names a step that the path does not have"
    if path := data.get("path"):
        sizes = {len(path["mse"]), len(path["l0"]), len(path["n_latents"])}
        if len(sizes) > 1:
            return "data.path: mse, l0 and n_latents differ in length"
    return None
