"""SAE stitching: which latents of a large SAE are new to a small one, and the way from one SAE to the other.

Leask et al., arXiv 2502.04878, section 4. Latent l of SAE s fires with z = f^s_l(x), as the intact SAE s computes it,
whatever else is included: own encoder row, bias, threshold and pre-encoder bias.

    x̂ = α b0 + (1 − α) b1 + Σ_{l ∈ L0} z_l d0_l + Σ_{l ∈ L1} z_l d1_l,   α = |L0| / (|L0| + |L1|)          (eq. 5)
    large latent i is novel  ⇔  max_j cos(d1_i, d0_j) < theta, else a reconstruction latent                  (eq. 6)

The way from small (L0 everything, L1 empty) to large: first the novel latents enter, one a step; then the connected
components of the graph of cosines ≥ theta are swapped, one a step: all their large members in, all their small ones
out. The paper does not say where small latents without a partner go, and the way would never end at the large SAE
with them in: here they leave at the end, one a step, as components with an empty large side.
"""

from collections import Counter
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saetool.core.sae import RANKED, SAE, require_plain
from saetool.core.similarity import Similarity
from saetool.errors import ConfigError

ORDERS = ("random", "cosine", "effect", "index")
BIASES = ("eq5", "small", "large")


@dataclass(frozen=True)
class Partition:
    """Eq. 6 and the swap components at one theta. Latents whose decoder row is zero belong nowhere."""

    theta: float
    novel: Bool[Tensor, " n_large"]
    reconstruction: Bool[Tensor, " n_large"]
    unmatched: Bool[Tensor, " n_small"]
    """Small latents without an edge."""
    component_of_small: Int[Tensor, " n_small"]
    """Number of the component each small latent is swapped with; -1 for none."""
    component_of_large: Int[Tensor, " n_large"]
    sizes: Int[Tensor, "n_components 2"]
    """Small and large members of each component; both at least 1."""

    @property
    def n_components(self) -> int:
        return len(self.sizes)

    @property
    def novel_share(self) -> float:
        """Novel latents among the large ones that have a direction; NaN if none has."""
        n = int(self.novel.sum() + self.reconstruction.sum())
        return int(self.novel.sum()) / n if n else float("nan")

    def shapes(self) -> list[tuple[int, int, int]]:
        """(small members, large members, how many components), the most common first."""
        counts = Counter((a, b) for a, b in self.sizes.tolist())
        return [(a, b, n) for (a, b), n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]

    def largest(self, n: int) -> list[tuple[int, int]]:
        """The sizes of the ``n`` components with most members."""
        return sorted(((a, b) for a, b in self.sizes.tolist()), key=lambda s: (-s[0] - s[1], s))[:n]


def partition(found: Similarity, theta: float) -> Partition:
    """Novel and reconstruction latents, unmatched small latents and components at ``theta``, one of the cut-offs."""
    labels = found.labels[theta]
    of_small, of_large = labels[: found.n_small], labels[found.n_small :]
    n = int(labels.max()) + 1
    sizes = torch.stack([torch.bincount(of_small, minlength=n), torch.bincount(of_large, minlength=n)], dim=1)
    joined = (sizes > 0).all(dim=1)
    number = torch.where(joined, joined.cumsum(0) - 1, -1)
    reconstruction = joined[of_large]
    return Partition(
        theta=theta,
        novel=~reconstruction & ~found.zero_large,
        reconstruction=reconstruction,
        unmatched=~joined[of_small] & ~found.zero_small,
        component_of_small=number[of_small],
        component_of_large=number[of_large],
        sizes=sizes[joined],
    )


@dataclass(frozen=True)
class Path:
    """When each latent enters or leaves. State 0 is the small SAE, state ``n_steps`` the large one."""

    added_at: Int[Tensor, " n_large"]
    """Step at which the large latent enters, 1 … n_steps."""
    removed_at: Int[Tensor, " n_small"]
    """Step at which the small latent leaves."""
    n_add: int
    """Steps 1 … n_add add one novel latent each."""
    n_swap: int
    """The next n_swap steps swap one component each."""
    n_steps: int
    """The rest: large latents with a zero row enter (they count in L0), then small latents without a partner leave."""

    def included(self) -> tuple[Int[Tensor, " n_states"], Int[Tensor, " n_states"]]:
        """|L0| and |L1| in the states 0 … n_steps."""
        states = self.n_steps + 1
        left = torch.bincount(self.removed_at, minlength=states).cumsum(0)
        return len(self.removed_at) - left, torch.bincount(self.added_at, minlength=states).cumsum(0)

    def alpha(self) -> Float[Tensor, " n_states"]:
        """Eq. 5's α in the states 0 … n_steps, float64."""
        small, large = self.included()
        return small.double() / (small + large)


@dataclass(frozen=True)
class Deltas:
    """What each step would change the intact small SAE's MSE by if it were the only one (``core/effects.py``)."""

    added: Float[Tensor, " n_large"]
    swapped: Float[Tensor, " n_components"]
    removed: Float[Tensor, " n_small"]


def path(
    found: Similarity, parts: Partition, order: str, generator: torch.Generator, deltas: Deltas | None = None
) -> Path:
    """The way from small to large at ``parts.theta``.

    Within each phase: ``random``; ``cosine``, ascending largest cosine (of a component: of its members), so that the
    newest come first; ``effect``, ascending ``deltas`` (required), so that what helps most comes first; ``index``,
    ascending (of a component: of its first large member).
    """
    if order == "effect" and deltas is None:
        raise ConfigError("order effect needs the effects, and they are measured on activations", "give --acts DIR")
    n_large, n_small = len(parts.novel), len(parts.unmatched)
    added_at = torch.zeros(n_large, dtype=torch.int64)
    removed_at = torch.zeros(n_small, dtype=torch.int64)
    step = 0

    def ranks(cosine: Tensor, first: Tensor, delta: Tensor | None) -> Tensor:
        """Step of each item of a phase: its place in the order, counted on from the steps taken so far."""
        match order:
            case "random":
                sequence = torch.randperm(len(first), generator=generator)
            case "cosine":
                sequence = torch.sort(cosine, stable=True).indices
            case "effect":
                assert delta is not None
                sequence = torch.sort(delta, stable=True).indices
            case "index":
                sequence = torch.sort(first, stable=True).indices
            case _:
                raise ConfigError(f"order {order}: unknown", f"one of {', '.join(ORDERS)}")
        place = torch.empty_like(sequence)
        place[sequence] = torch.arange(step + 1, step + 1 + len(first))
        return place

    def alone(latents: Tensor, cosines: Tensor, delta: Tensor | None) -> Tensor:
        return ranks(cosines[latents], latents.nonzero().squeeze(1), None if delta is None else delta[latents])

    added, swapped, removed = (deltas.added, deltas.swapped, deltas.removed) if deltas else (None, None, None)
    added_at[parts.novel] = alone(parts.novel, found.max_cosine, added)
    step += int(parts.novel.sum())
    of_large, of_small = parts.component_of_large, parts.component_of_small
    members = parts.reconstruction.nonzero().squeeze(1)
    empty = torch.full((parts.n_components,), -2.0, dtype=torch.float64)
    closest = empty.scatter_reduce(0, of_large[members], found.max_cosine[members], "amax")
    first = torch.full((parts.n_components,), n_large).scatter_reduce(0, of_large[members], members, "amin")
    at = ranks(closest, first, swapped)
    added_at[members] = at[of_large[members]]
    removed_at[of_small >= 0] = at[of_small[of_small >= 0]]
    step += parts.n_components
    for when, latents, cosines, delta in (
        (added_at, found.zero_large, found.max_cosine, added),
        (removed_at, parts.unmatched | found.zero_small, found.max_cosine_of_small, removed),
    ):
        when[latents] = alone(latents, cosines, delta)
        step += int(latents.sum())
    return Path(added_at, removed_at, int(parts.novel.sum()), parts.n_components, step)


@dataclass(frozen=True)
class Included:
    """Which latents a stitched SAE is made of."""

    small: Bool[Tensor, " n_small"]
    large: Bool[Tensor, " n_large"]

    @property
    def alpha(self) -> float:
        """Eq. 5's share of the small SAE's b_dec."""
        n_small, n_large = int(self.small.sum()), int(self.large.sum())
        return n_small / (n_small + n_large)


def included_at(way: Path, step: int) -> Included:
    """The state of ``way`` after ``step`` steps. Raises ``ConfigError`` unless there is such a step."""
    if not 0 <= step <= way.n_steps:
        raise ConfigError(f"step {step}: the path has the steps 0 (small) to {way.n_steps} (large)")
    return Included(way.removed_at > step, way.added_at <= step)


@torch.no_grad()
def stitched(small: SAE, large: SAE, included: Included, bias: str) -> SAE:
    """The ``included`` latents as one ordinary SAE (eq. 5), those of the small one first.

    ``bias``: eq. 5's α, or the small or the large SAE's b_dec. Each latent keeps its own encoder: the pre-encoder
    bias goes into b_enc (b_enc − b_dec W_enc), and nothing is subtracted any more. Every latent gets a threshold, so
    latents that are selected by rank (topk) cannot take part: raises ``ConfigError``.
    """
    if bias not in BIASES:
        raise ConfigError(f"bias {bias}: unknown", f"one of {', '.join(BIASES)}")
    if not (included.small.any() or included.large.any()):
        raise ConfigError("a stitched SAE needs at least one latent")
    one, two = _absolute(small), _absolute(large)
    alpha = {"eq5": included.alpha, "small": 1.0, "large": 0.0}[bias]
    assert one.threshold is not None and two.threshold is not None
    return SAE(
        W_enc=torch.cat([one.W_enc[:, included.small], two.W_enc[:, included.large]], dim=1),
        b_enc=torch.cat([one.b_enc[included.small], two.b_enc[included.large]]),
        W_dec=torch.cat([one.W_dec[included.small], two.W_dec[included.large]]),
        b_dec=(alpha * small.b_dec.double() + (1 - alpha) * large.b_dec.double()).to(small.b_dec.dtype),
        threshold=torch.cat([one.threshold[included.small], two.threshold[included.large]]),
        arch="jumprelu",
        k=None,
        subtract_b_dec=False,
    )


def _absolute(sae: SAE) -> SAE:
    """The same encoder with nothing subtracted from its input and a threshold for every latent."""
    require_plain(sae, "a stitched SAE")
    if sae.inference in RANKED:
        raise ConfigError(
            f"latents of a {sae.inference} SAE without a threshold cannot be put into another SAE",
            "estimate one first: saetool threshold SAE.st -o SAE.threshold.st",
        )
    b_enc = sae.b_enc
    if sae.subtract_b_dec:
        b_enc = (b_enc.double() - sae.b_dec.double() @ sae.W_enc.double()).to(b_enc.dtype)
    threshold = torch.zeros_like(b_enc) if sae.threshold is None else sae.threshold
    return replace(sae, b_enc=b_enc, threshold=threshold, subtract_b_dec=False)
