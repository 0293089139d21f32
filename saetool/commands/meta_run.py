"""The trainings of one ``saetool meta``: meta-SAEs, their controls, replaced decoders with a new encoder.

Each training is a ``train`` run with a checkpoint of its own, kept until the command has written its files: after an
interruption the same command goes on in the training that it was in.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saetool.artifacts import header as h
from saetool.commands.train_plan import Product
from saetool.commands.train_run import Run
from saetool.config import TrainConfig
from saetool.console import Console
from saetool.core.sae import SAE
from saetool.engines import meta as engine
from saetool.engines import train as trainer
from saetool.engines.processes import Processes
from saetool.engines.trainee import Trainee


@dataclass(frozen=True)
class RowSource:
    """Decoder rows as the trainer's source of data."""

    name: str
    rows_: Tensor
    weights: Tensor | None
    inputs: list[h.Input]
    parents: list[h.Header]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def d_in(self) -> int:
        return self.rows_.shape[1]

    def n_rows(self) -> int:
        return len(self.rows_)

    def model(self) -> dict[str, Any]:
        return {}

    def rows(self, seed: int, device: str) -> engine.RowBatches:
        return engine.RowBatches(self.rows_.to(device), seed=seed, weights=self.weights)


class Training(Run):
    """A run whose SAEs are handed on, not written; its checkpoints stay until ``done``."""

    way_on = "the same command goes on from there"

    def __init__(
        self,
        console: Console,
        source: RowSource,
        products: Sequence[Product],
        processes: Processes,
        device: str,
        log: Path | None,
    ) -> None:
        super().__init__(console, source, products, processes, device, log, None)
        self.label = source.name
        self.saes: dict[TrainConfig, SAE] = {}
        self._piped = str(products[0].path) == "-"
        if self._piped:
            self.way_on = "nothing is kept of a run into a pipe"

    def checkpoint(self, config: TrainConfig) -> Path:
        product = self.products[config][-1]
        what = product.plan.options.get("training")
        ending = f".{what}.ckpt.st" if what else ".ckpt.st"
        return product.path.with_name(product.path.name + ending)

    def save(self) -> None:
        if not self._piped:
            super().save()

    def restore(self) -> int:
        return 0 if self._piped else super().restore()

    def start_from(self, config: TrainConfig, sae: SAE) -> None:
        """Begin with the weights of ``sae`` (on raw rows)."""
        trainee = next(t for t in self.trainees if t.config == config)
        with torch.no_grad():
            p, scale = trainee.parameters, trainee.scale
            p.encoder.copy_(sae.W_enc.T)
            p.b_enc.copy_(sae.b_enc * scale)
            p.W_dec.copy_(sae.W_dec)
            p.b_dec.copy_(sae.b_dec * scale)

    def _finish(self, trainee: Trainee, last: trainer.Step | None) -> None:
        if not trainee.is_finite():
            raise trainer.diverged(trainee, "parameters that are not finite,")
        self.saes[trainee.config] = trainee.sae()
        if trainee is self.trainees[-1]:
            self.save()

    def done(self) -> None:
        """Remove the checkpoints."""
        if self.processes.leads:
            for config in self.configs:
                self.checkpoint(config).unlink(missing_ok=True)


@dataclass
class Trainings:
    """All trainings of one command."""

    console: Console
    processes: Processes
    device: str
    log: Path | None
    resume: bool
    checkpoint_every: float
    inputs: list[h.Input]
    parents: list[h.Header]
    runs: list[Training] = dataclasses.field(default_factory=list)

    def train(
        self,
        label: str,
        rows: Tensor,
        weights: Tensor | None,
        products: Sequence[Product],
        start: SAE | None = None,
        log: Path | None = None,
    ) -> dict[TrainConfig, engine.Trained]:
        """Train ``products`` on ``rows``, from ``start`` if given; SAEs with thresholds by configuration."""
        source = RowSource(label, rows, weights, self.inputs, self.parents)
        run = Training(self.console, source, products, self.processes, self.device, log)
        self.runs.append(run)
        if start is not None:
            run.start_from(run.configs[0], start)
        run.go(resume=self.resume, checkpoint_every=self.checkpoint_every, log_every=None)
        batches = {c: engine.RowBatches(rows, seed=c.seed, weights=weights) for c in run.configs}
        return {c: engine.finish(run.saes[c], batches[c], c) for c in run.configs}

    def done(self) -> None:
        for run in self.runs:
            run.done()
