"""Normalisation of each token by its own statistics, which no weights can hold.

per_token       n(x) = (x − mean x) / (std x + 1e-5), std over the d entries with d − 1 in the denominator;
                undone by y · std x + mean x
                (the BatchTopK authors' input_unit_norm, OpenAI's LN, SAELens' layer_norm)
per_token_norm  n(x) = x √d / ‖x‖; undone by y ‖x‖ / √d
                (SAELens' constant_norm_rescale, Llamascopium's token-wise)
"""

from jaxtyping import Float
from torch import Tensor

from saetool.errors import ConfigError

NORMALIZATIONS = ("none", "per_token", "per_token_norm")
_EPSILON = 1e-5


def normalize(x: Float[Tensor, "n d"], kind: str) -> Float[Tensor, "n d"]:
    """n(x) of each row."""
    match kind:
        case "none":
            return x
        case "per_token":
            centred = x - x.mean(dim=1, keepdim=True)
            return centred / (x.std(dim=1, keepdim=True) + _EPSILON)
        case "per_token_norm":
            return x * (x.shape[1] ** 0.5 / x.norm(dim=1, keepdim=True).clamp_min(1e-30))  # a zero row stays zero
    raise ConfigError(f"input normalisation {kind!r} is unknown", f"one of {', '.join(NORMALIZATIONS)}")


def restore(y: Float[Tensor, "n d"], x: Float[Tensor, "n d"], kind: str) -> Float[Tensor, "n d"]:
    """``y``, in the units of n(x), in those of ``x`` again."""
    match kind:
        case "none":
            return y
        case "per_token":
            return y * x.std(dim=1, keepdim=True) + x.mean(dim=1, keepdim=True)
        case "per_token_norm":
            return y * (x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5)
    raise ConfigError(f"input normalisation {kind!r} is unknown", f"one of {', '.join(NORMALIZATIONS)}")
