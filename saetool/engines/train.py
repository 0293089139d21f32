"""Training: one stream of batches, any number of SAEs on it.

Each SAE of a ladder has its own parameters, optimizer and generator, and sees the same batches in the same order as
if it were alone; so its file has the bytes it would have had alone. The loop yields events and prints nothing.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from saetool.config import TrainConfig
from saetool.core.losses import Losses, Objective, Parameters, losses
from saetool.core.sae import SAE, fold_decoder_norms, fold_scale, initial, unit_rows
from saetool.errors import ConfigError, SaetoolError

UNIT_NORM = ("topk", "batchtopk", "jumprelu")
"""Architectures whose decoder rows are kept at unit norm while training (relu's are free, and folded on save)."""


class Batches(Protocol):
    """Where batches come from: ``batch(step, size)`` is a pure function of its arguments."""

    d_in: int

    def batch(self, step: int, size: int) -> Tensor: ...


@dataclass(frozen=True)
class Step:
    """Metrics of one SAE at one step, in raw units (scale undone)."""

    index: int
    """Which SAE of the ladder."""
    step: int
    """Steps done, this one included."""
    tokens: int
    loss: float
    """The loss that was minimised (on scaled inputs)."""
    mse: float
    """‖x − x̂‖² of the batch, summed over d, mean over tokens."""
    explained_variance: float
    """1 − Σ‖x − x̂‖² / Σ‖x − x̄‖², x̄ the batch mean."""
    l0: float
    aux: float
    dead: int
    """Latents that have not fired for ``dead_after`` tokens."""
    lr: float


@dataclass(frozen=True)
class Tick:
    """One step of all SAEs is done; ``step`` of them are."""

    step: int


def resolve(config: TrainConfig, d_in: int) -> TrainConfig:
    """``config`` with every derived value filled in. Raises ``ConfigError`` for values that cannot work."""
    if config.arch in ("topk", "batchtopk") and not 1 <= config.k <= config.latents:
        raise ConfigError(f"--k {config.k} with --latents {config.latents}: k must be between 1 and the width")
    for name in ("batch_size", "tokens", "latents"):
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be positive")
    for name in ("lr", "l1", "l0", "aux_alpha", "bandwidth"):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: a number of at least 0 is needed")
    if config.warmup + config.decay > 1:
        raise ConfigError("--warmup and --decay together exceed the run")
    tokens = n_steps(config) * config.batch_size
    return replace(
        config,
        lr=config.lr if config.lr is not None else 2e-4 * math.sqrt(16384 / config.latents),
        bandwidth=config.bandwidth if config.bandwidth is not None else 0.1,
        k_aux=config.k_aux if config.k_aux is not None else 2 ** round(math.log2(max(d_in / 2, 1))),
        dead_after=config.dead_after if config.dead_after is not None else min(10_000_000, tokens // 10),
    )


def n_steps(config: TrainConfig) -> int:
    return max(config.tokens // config.batch_size, 1)


def options_of(config: TrainConfig) -> dict[str, object]:
    """The options of a resolved config that this architecture uses: what key, header and log carry."""
    options = {name: getattr(config, name) for name in config.__dataclass_fields__}
    used_by = {
        "k": ("topk", "batchtopk"),
        "l1": ("relu",),
        "l0": ("jumprelu",),
        "bandwidth": ("jumprelu",),
        "sparsity_warmup": ("relu", "jumprelu"),
        "aux_alpha": ("topk", "batchtopk"),
        "k_aux": ("topk", "batchtopk"),
    }
    return {name: value for name, value in options.items() if config.arch in used_by.get(name, (config.arch,))}


class Trainee:
    """One SAE in training: parameters, Adam's moments, when each latent last fired."""

    def __init__(self, config: TrainConfig, d_in: int, mean: Tensor, scale: float, device: str) -> None:
        """``config`` resolved; ``mean`` [d_in] of the raw activations, the start of b_dec; ``scale`` of the inputs."""
        self.config = config
        self.scale = scale
        self.steps_done = 0
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + config.latents)
        sae = initial(d_in, config.latents, config.arch, config.k, mean.float() * scale, generator)
        log_threshold = None if sae.threshold is None else sae.threshold.log()
        tensors = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, log_threshold]
        self.parameters = Parameters(*(None if t is None else t.to(device).requires_grad_() for t in tensors))
        self.adam = torch.optim.Adam(
            self.parameters.named().values(),
            lr=config.lr or 0.0,
            betas=(config.beta1, config.beta2),
            fused=torch.device(device).type in ("cpu", "cuda"),
        )
        self.since_fired = torch.zeros(config.latents, dtype=torch.int64, device=device)
        self.objective = Objective(
            arch=config.arch,
            k=config.k,
            sparsity={"relu": config.l1, "jumprelu": config.l0}.get(config.arch, 0.0),
            aux_alpha=config.aux_alpha if config.arch in ("topk", "batchtopk") else 0.0,
            k_aux=config.k_aux or 0,
            bandwidth=config.bandwidth or 0.0,
        )
        self._cut_hint = 0.0

    def step(self, x: Tensor) -> Losses:
        """One step of Adam on the scaled batch ``x``."""
        config, p = self.config, self.parameters
        total = n_steps(config)
        lr = (config.lr or 0.0) * _trapezoid(self.steps_done, total, config.warmup, config.decay)
        weight = min(1.0, (self.steps_done + 1) / max(config.sparsity_warmup * total, 1))
        dead = self.dead()
        result = losses(p, x, self.objective, dead, self._cut_hint, weight)
        self.adam.zero_grad()
        result.loss.backward()
        self._constrain_gradient()
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        if config.arch in UNIT_NORM:
            with torch.no_grad():
                p.W_dec.copy_(unit_rows(p.W_dec))
        self.since_fired += len(x)
        self.since_fired[result.fired] = 0
        self._cut_hint = 0.9 * result.cut
        self.steps_done += 1
        return result

    def _constrain_gradient(self) -> None:
        """Remove each decoder row's gradient component along the row: the norm constraint's tangent (P A.2)."""
        W_dec = self.parameters.W_dec
        if self.config.arch in UNIT_NORM and W_dec.grad is not None:
            along = (W_dec.grad * W_dec.detach()).sum(1, keepdim=True)
            W_dec.grad -= along * W_dec.detach()

    def dead(self) -> Tensor:
        """Latents that have not fired for ``dead_after`` tokens, bool [latents]."""
        return self.since_fired >= (self.config.dead_after or 0)

    def sae(self) -> SAE:
        """The SAE on raw inputs: scale and decoder norms folded in, threshold in place of its logarithm."""
        p = {name: t.detach().cpu().clone() for name, t in self.parameters.named().items()}
        log_threshold = p.pop("log_threshold", None)
        k = self.config.k if self.config.arch in ("topk", "batchtopk") else None
        threshold = None if log_threshold is None else log_threshold.exp()
        sae = SAE(**p, threshold=threshold, arch=self.config.arch, k=k, subtract_b_dec=True)
        if self.config.arch not in UNIT_NORM:
            sae = fold_decoder_norms(sae)
        return fold_scale(sae, self.scale)

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, by name."""
        tensors = {"since_fired": self.since_fired, "steps_done": torch.tensor([self.steps_done])}
        for name, parameter in self.parameters.named().items():
            tensors[name] = parameter
            for part, value in self.adam.state.get(parameter, {}).items():
                tensors[f"adam.{part}.{name}"] = value if value.dim() else value.reshape(1)
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from ``state()``'s tensors."""
        with torch.no_grad():
            for name, parameter in self.parameters.named().items():
                parameter.copy_(tensors[name])
                self.adam.state[parameter] = {
                    "step": tensors[f"adam.step.{name}"].reshape(()).clone(),
                    "exp_avg": tensors[f"adam.exp_avg.{name}"].to(parameter.device),
                    "exp_avg_sq": tensors[f"adam.exp_avg_sq.{name}"].to(parameter.device),
                }
        self.since_fired.copy_(tensors["since_fired"])
        self.steps_done = int(tensors["steps_done"])


def _trapezoid(step: int, total: int, warmup: float, decay: float) -> float:
    """Learning-rate factor: up over the first ``warmup``·total steps, down to 0 over the last ``decay``·total."""
    up = (step + 1) / max(warmup * total, 1)
    down = (total - step) / max(decay * total, 1)
    return min(1.0, up, down)


def train(trainees: Sequence[Trainee], batches: Batches, *, log_every: int) -> Iterator[Step | Tick]:
    """Run all ``trainees`` to their end over the same batches.

    They share length and batch size. After a resume they may stand at different steps: each waits for its turn.
    At every ``Tick`` all states are whole: the time to save them. Raises ``SaetoolError`` when a loss is not finite.
    """
    config = trainees[0].config
    total = n_steps(config)
    for step in range(min(t.steps_done for t in trainees), total):
        x = batches.batch(step, config.batch_size)
        for index, trainee in enumerate(trainees):
            if trainee.steps_done != step:
                continue
            result = trainee.step(x)
            if (step + 1) % log_every == 0 or step + 1 == total:
                yield _metrics(index, trainee, x, result)
        yield Tick(step + 1)


def _metrics(index: int, trainee: Trainee, x: Tensor, result: Losses) -> Step:
    if not math.isfinite(float(result.loss.detach())):
        raise SaetoolError(
            f"the loss of the SAE with {trainee.config.latents} latents is {float(result.loss.detach())} "
            f"at step {trainee.steps_done}",
            "lower --lr; nothing was written",
        )
    mse = float(result.mse)
    return Step(
        index=index,
        step=trainee.steps_done,
        tokens=trainee.steps_done * len(x),
        loss=float(result.loss.detach()),
        mse=mse / trainee.scale**2,
        explained_variance=1 - mse / float((x - x.mean(0)).square().sum() / len(x)),
        l0=float(result.active) / len(x),
        aux=float(result.aux),
        dead=int(trainee.dead().sum()),
        lr=float(trainee.adam.param_groups[0]["lr"]),
    )
