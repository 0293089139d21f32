"""The sparse autoencoder.

    p  = (x − [c] b_dec) W_enc + b_enc        [c]: whether b_dec is subtracted before the encoder
    z  = activation(p)                        relu | topk | batchtopk | jumprelu (core/activations.py)
    x̂  = z W_dec + b_dec

An SAE trained on inputs that were normalised token by token (``normalization``, core/normalization.py) is given the
raw x all the same: encode normalises it, decode undoes that. No weights can hold such a step, so it is not folded.

At inference a BatchTopK SAE with a ``threshold`` is a JumpReLU SAE (eq. 8 of Leask et al., arXiv 2502.04878):
z = p · 1[p > θ]. Tensor names and orientation are SAELens'.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from saetool.core import activations
from saetool.core.normalization import NORMALIZATIONS, normalize, restore
from saetool.errors import ConfigError

RANKED = ("topk", "batchtopk", "matryoshka", "groupmax", "matching_pursuit")
"""Ways to encode in which a latent's activation depends on the other latents: these cannot be put into another SAE."""


@dataclass(frozen=True)
class SAE:
    """Weights and the few facts needed to apply them. Immutable: what changes them returns a new one."""

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    threshold: Float[Tensor, " d_sae"] | None
    """θ of each latent; where present, z = p · 1[p > θ] whatever ``arch`` says."""
    arch: str
    """How it was trained, one of ``config.ARCHITECTURES``, or of ``config.FOREIGN_ARCHITECTURES`` by another library. A
    gated SAE is a JumpReLU with its ``threshold``."""
    k: int | None
    """Active latents per token, for topk, batchtopk and a whole matryoshka; groups of latents for groupmax."""
    subtract_b_dec: bool = True
    """Whether b_dec is subtracted from the input before the encoder."""
    normalization: str = "none"
    """What is done to each token before the encoder and undone after the decoder: one of ``NORMALIZATIONS``."""
    pursuit: activations.Pursuit | None = None
    """For matching_pursuit, whose W_enc is W_decᵀ and whose encoder is a loop."""

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def inference(self) -> str:
        """The activation used to encode: jumprelu where there is a threshold, else the architecture's own."""
        return "jumprelu" if self.threshold is not None else self.arch

    def map(self, function: Callable[[Tensor], Tensor]) -> "SAE":
        """The same SAE with ``function`` applied to each tensor (a device, a dtype)."""
        return replace(
            self,
            **{
                name: None if tensor is None else function(tensor)
                for name, tensor in (
                    (name, getattr(self, name)) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
                )
            },
        )

    def pre_activations(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """p = (x − [c] b_dec) W_enc + b_enc, of the normalised x."""
        x = normalize(x, self.normalization)
        if self.subtract_b_dec:
            x = x - self.b_dec
        return torch.addmm(self.b_enc, x, self.W_enc)

    def encode(self, x: Float[Tensor, "n d_in"], *, batch: bool = False) -> Float[Tensor, "n d_sae"]:
        """z, each row on its own.

        A BatchTopK SAE without a threshold has no such encoding; ``batch=True`` asks for the training-time one,
        which selects among all rows of ``x`` together (so the result depends on the batch).
        """
        if self.inference == "matching_pursuit":
            assert self.pursuit is not None
            x = normalize(x, self.normalization)
            return activations.matching_pursuit(x - self.b_dec if self.subtract_b_dec else x, self.W_dec, self.pursuit)
        p = self.pre_activations(x)
        if batch and self.arch in ("batchtopk", "matryoshka") and self.k is not None:
            return activations.batch_topk(p, self._k())
        match self.inference:
            case "jumprelu":
                assert self.threshold is not None
                return activations.jumprelu(p, self.threshold)
            case "topk":
                return activations.topk(p, self._k())
            case "groupmax":
                return activations.groupmax(p, self._k())
            case "relu":
                return p.relu()
            case _:
                raise ConfigError(
                    "a BatchTopK SAE without a threshold cannot encode single tokens",
                    "estimate one first: saetool threshold SAE.st -o SAE.threshold.st",
                )

    def decode(self, z: Float[Tensor, "n d_sae"], x: Float[Tensor, "n d_in"] | None = None) -> Float[Tensor, "n d_in"]:
        """x̂ = z W_dec + b_dec; an SAE that normalises each token needs its input ``x`` to undo that."""
        if self.normalization == "none":
            return torch.addmm(self.b_dec, z, self.W_dec)
        if x is None:
            raise ConfigError(
                f"an SAE with {self.normalization} normalisation cannot decode without the input",
                "its reconstruction depends on the mean and scale of each token",
            )
        return restore(torch.addmm(self.b_dec, z, self.W_dec), x, self.normalization)

    def _k(self) -> int:
        assert self.k is not None
        return self.k


def require_plain(sae: SAE, what: str) -> None:
    """Raise ``ConfigError`` if ``sae`` normalises each token: ``what`` needs x̂ to be linear in z."""
    if sae.normalization != "none":
        raise ConfigError(
            f"{what} needs decoders that add up, and an SAE with {sae.normalization} normalisation rescales each token",
            "use an SAE trained without it; cosines of its decoder rows, eval and autointerp work as they are",
        )


def fold_scale(sae: SAE, scale: float) -> SAE:
    """The SAE on raw inputs that equals ``sae`` on inputs multiplied by ``scale``.

    For x_norm = x·c: b_enc' = b_enc/c, b_dec' = b_dec/c, θ' = θ/c, weights unchanged, with or without [c]; then
    z' = z/c and x̂' = x̂/c (Gemma Scope, arXiv 2408.05147, appendix A).
    """
    return replace(
        sae,
        b_enc=sae.b_enc / scale,
        b_dec=sae.b_dec / scale,
        threshold=None if sae.threshold is None else sae.threshold / scale,
    )


def fold_decoder_norms(sae: SAE) -> SAE:
    """The same function with unit decoder rows: W_enc·‖d‖, b_enc·‖d‖, θ·‖d‖, d/‖d‖ for each latent.

    Exact for relu and jumprelu, and for topk only where all norms are equal (selection is by z, which is rescaled);
    so other norms than 1 are refused for topk and batchtopk without a threshold. Zero rows are left as they are.
    """
    norms = sae.W_dec.norm(dim=1)
    if sae.inference in RANKED:
        if not torch.allclose(norms, torch.ones_like(norms), atol=1e-3):
            raise ConfigError(f"decoder norms of a {sae.inference} SAE cannot be folded: selection would change")
        norms = torch.ones_like(norms)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    return replace(
        sae,
        W_enc=sae.W_enc * norms,
        b_enc=sae.b_enc * norms,
        W_dec=sae.W_dec / norms[:, None],
        threshold=None if sae.threshold is None else sae.threshold * norms,
    )


def prefix_of(sae: SAE, width: int) -> SAE:
    """The first ``width`` latents of a matryoshka SAE. They fire as in the whole, so they need its threshold."""
    if sae.threshold is None:
        raise ConfigError("a prefix of an SAE without a threshold would select other latents than the whole")
    return replace(
        sae,
        W_enc=sae.W_enc[:, :width].contiguous(),
        b_enc=sae.b_enc[:width].contiguous(),
        W_dec=sae.W_dec[:width].contiguous(),
        threshold=sae.threshold[:width].contiguous(),
        k=None,
    )


def unit_rows(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows divided by their L2 norm; a zero row stays zero (its cosine with anything is then 0, never NaN)."""
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def initial(
    d_in: int, d_sae: int, arch: str, k: int | None, b_dec: Float[Tensor, " d_in"], generator: torch.Generator
) -> SAE:
    """A fresh SAE: random unit decoder rows, W_enc = W_decᵀ, b_enc = 0 (Gao et al. 2024, appendix A.1).

    jumprelu starts at θ = 1, as the BatchTopK authors' code does on inputs with ‖x‖² = d: from 0.1 the L0 of a short
    run hardly depended on λ (52 and 50 active latents at λ = 4 and 10; from 1: 13 and 7 at 1.5 and 4).
    """
    rows = torch.randn(d_sae, d_in, generator=generator, dtype=torch.float32)
    W_dec = unit_rows(rows)
    threshold = torch.ones(d_sae) if arch == "jumprelu" else None
    return SAE(
        W_enc=W_dec.T.contiguous().clone(),
        b_enc=torch.zeros(d_sae),
        W_dec=W_dec,
        b_dec=b_dec.to(torch.float32).clone(),
        threshold=threshold,
        arch=arch,
        k=k,
        subtract_b_dec=True,
    )


def check_shapes(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise ``ConfigError`` unless the shapes of W_enc, b_enc, W_dec, b_dec and threshold (if there) agree."""
    if tensors["W_enc"].dim() != 2:
        raise ConfigError(f"{where}: W_enc has shape {tuple(tensors['W_enc'].shape)}, a matrix expected")
    d_in, d_sae = tensors["W_enc"].shape
    shapes = {"b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,), "threshold": (d_sae,)}
    for name, shape in shapes.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise ConfigError(f"{where}: {name} has shape {tuple(tensors[name].shape)}, {shape} expected")


def check(sae: SAE, where: str) -> None:
    """Raise ``ConfigError`` unless values are finite and k fits."""
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        if not math.isfinite(float(getattr(sae, name).abs().max())):
            raise ConfigError(f"{where}: {name} holds NaN or infinity")
    if sae.normalization not in NORMALIZATIONS:
        raise ConfigError(f"{where}: input normalisation {sae.normalization!r} is unknown")
    if sae.inference == "groupmax" and not (sae.k and sae.k >= 1 and sae.d_sae % sae.k == 0):
        raise ConfigError(f"{where}: {sae.k} groups of {sae.d_sae} latents")
    if sae.inference == "matching_pursuit" and not (sae.pursuit and sae.pursuit.max_iterations >= 1):
        raise ConfigError(f"{where}: a matching pursuit without the number of its steps")
    if sae.inference in ("topk", "batchtopk") and not (sae.k and 1 <= sae.k <= sae.d_sae):
        raise ConfigError(f"{where}: k={sae.k} with {sae.d_sae} latents")
