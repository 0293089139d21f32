"""Training: one stream of batches, any number of SAEs on it.

Each SAE of a ladder has its own parameters, optimizer and generator, and sees the same batches in the same order as
if it were alone; so its file has the bytes it would have had alone. The loop yields events and prints nothing.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from saetool.core.losses import Losses
from saetool.engines.recipe import n_steps, steps_of
from saetool.engines.trainee import Trainee
from saetool.errors import SaetoolError

DIVERGED = 100.0
"""Error, in units of the batch's variance, that no run comes back from (after the learning rate's warm-up)."""


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


def train(trainees: Sequence[Trainee], batches: Batches, *, log_every: int) -> Iterator[Step | Tick]:
    """Run all ``trainees`` to their end over the same batches.

    They share length and batch size. After a resume they may stand at different steps: each waits for its turn.
    At every ``Tick`` all states are whole: the time to save them. Raises ``SaetoolError`` when a run has diverged.
    """
    config, processes = trainees[0].config, trainees[0].processes
    total = n_steps(config)
    resample_every = config.resample // config.batch_size
    for step in range(min(t.steps_done for t in trainees), total):
        x = processes.part(batches.batch(step, config.batch_size))
        for index, trainee in enumerate(trainees):
            if trainee.steps_done != step:
                continue
            result = trainee.step(x)
            logged = (step + 1) % log_every == 0 or step + 1 == total
            if logged or x.device.type == "cpu":  # reading a number makes a GPU wait
                _check(trainee, x, result)
            if logged:
                yield _metrics(index, trainee, x, result)
            if resample_every and (step + 1) % resample_every == 0 and step + 1 < total:
                trainee.resample(x)
        yield Tick(step + 1)


def diverged(trainee: Trainee, what: str) -> SaetoolError:
    """The error of a run that cannot go on."""
    return SaetoolError(
        f"step {trainee.steps_done}: {what} of the SAE with {trainee.config.latents} latents",
        "lower --lr, or lengthen the --warmup of train; the last checkpoint, if one was written, is from before",
    )


def _check(trainee: Trainee, x: Tensor, result: Losses) -> None:
    """Raise ``SaetoolError`` if the loss is not finite, or the error so large that the run has diverged."""
    loss, config = float(result.loss), trainee.config
    if not math.isfinite(loss):
        raise diverged(trainee, f"a loss of {loss}")
    started = trainee.steps_done > max(steps_of(config.warmup, n_steps(config)), 100)
    if started and float(result.mse) > DIVERGED * float(x.square().sum() / len(x)):
        raise diverged(trainee, f"a loss of {loss:.3g}, an error {DIVERGED:.0f} times its input")


def _metrics(index: int, trainee: Trainee, x: Tensor, result: Losses) -> Step:
    n = len(x) * trainee.processes.size
    sums = torch.cat([x.sum(0), x.square().sum().reshape(1)]).double()
    trainee.processes.sum_([sums])
    variance = float(sums[-1] / n - (sums[:-1] / n).square().sum())
    mse = float(result.mse)
    return Step(
        index=index,
        step=trainee.steps_done,
        tokens=trainee.steps_done * n,
        loss=float(result.loss),
        mse=mse / trainee.scale**2,
        explained_variance=1 - mse / variance if variance > 0 else math.nan,
        l0=float(result.active) / n,
        aux=float(result.aux),
        dead=int(trainee.dead().sum()),
        lr=float(trainee.adam.param_groups[0]["lr"]),
    )
