"""One run of ``saetool train``: the SAEs in training, their checkpoints, logs and files."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from saetool.artifacts import container, train_log, writing
from saetool.artifacts import header as h
from saetool.artifacts import sae as sae_files
from saetool.commands.train_plan import Product
from saetool.commands.train_source import Source
from saetool.config import TrainConfig
from saetool.console import Console, Interruption
from saetool.engines import train as engine
from saetool.engines.processes import Processes
from saetool.engines.recipe import n_steps
from saetool.engines.trainee import Trainee
from saetool.errors import ArtifactError, BackendError, ConfigError


class Run:
    """The state of one training command."""

    label = "train"
    """What the progress bar says before the widths."""
    way_on = "the same command goes on from there, and with --export-partial it writes what there is"
    """What can be done after an interruption."""

    def __init__(
        self,
        console: Console,
        source: Source,
        products: Sequence[Product],
        processes: Processes,
        device: str,
        log: Path | None,
        tensorboard: Path | None,
    ) -> None:
        """``processes`` joined, and ``device`` this one's: the command joins and parts, it may have several runs."""
        self.processes, self.device = processes, device
        self.console = console if processes.leads else Console(quiet=True, as_json=console.as_json)
        self.source, self.log, self.tensorboard = source, log, tensorboard
        self.configs = list(dict.fromkeys(p.config for p in products))
        self.products = {config: [p for p in products if p.config == config] for config in self.configs}
        config = self.configs[0]
        if config.batch_size % self.processes.size:
            raise ConfigError(
                f"--batch-size {config.batch_size}: cannot be divided among {self.processes.size} processes",
                f"give a multiple of {self.processes.size}",
            )
        self.reader = source.rows(config.seed, self.device)
        statistics = self.reader.statistics
        if not statistics.mean_sq_norm > 0:
            raise ArtifactError(f"{source.name}: all activations are zero", "cache another hook")
        scale = (source.d_in / statistics.mean_sq_norm) ** 0.5 if config.normalize else 1.0
        self.reader.scale = scale
        starts = {"mean": statistics.mean, "geometric-median": statistics.geometric_median}
        center = starts.get(config.b_dec_init, torch.zeros(source.d_in))
        self.trainees = [Trainee(c, source.d_in, center, scale, self.device, self.processes) for c in self.configs]
        self.last: dict[int, engine.Step] = {}

    def checkpoint(self, config: TrainConfig) -> Path:
        """Beside the last (of a matryoshka: the widest) file that this config makes."""
        path = self.products[config][-1].path
        return path.with_name(path.name + ".ckpt.st")

    def _checkpoint_plan(self, config: TrainConfig) -> h.Plan:
        plan = self.products[config][-1].plan
        options = {name: value for name, value in plan.options.items() if name != "prefix"}
        return dataclasses.replace(plan, schema=h.CHECKPOINT, options=options)

    def save(self) -> None:
        """Write all checkpoints, unless one would keep what no run comes back from."""
        for trainee in self.trainees:
            if not trainee.is_finite():
                raise engine.diverged(trainee, "parameters that are not finite,")
        for trainee in self.trainees if self.processes.leads else []:
            writing.write_tensors(
                self.checkpoint(trainee.config), trainee.state(), self._checkpoint_plan(trainee.config).header()
            )

    def restore(self) -> int:
        """Load the checkpoints that fit; returns the steps that all SAEs have done."""
        for trainee in self.trainees:
            path = self.checkpoint(trainee.config)
            if path.exists():
                loaded = container.read_tensors(path, h.CHECKPOINT)
                if loaded.header.key == self._checkpoint_plan(trainee.config).key:
                    trainee.restore(loaded.tensors)
                    self.console.say(f"{path}: resuming at step {trainee.steps_done}")
            steps = self.processes.agree(trainee.steps_done)
            if steps != trainee.steps_done:
                raise ArtifactError(
                    f"{path}: one process resumes at step {steps}, another at {trainee.steps_done}",
                    "all processes must see the same folder",
                )
        return min(t.steps_done for t in self.trainees)

    def go(self, *, resume: bool, checkpoint_every: float, log_every: int | None) -> None:
        """Train to the end and write the SAEs. An interruption leaves checkpoints and raises KeyboardInterrupt."""
        count = f"{len(self.trainees)} SAE{'s' * (len(self.trainees) > 1)}"
        among = f", {self.processes.size} processes" if self.processes.size > 1 else ""
        rows, tokens = self.reader.n_rows, self.configs[0].tokens
        epochs = f"; {tokens:,} tokens are {tokens / rows:.1f} epochs" if tokens > rows else ""
        self.console.say(f"training {count} on {self.device}{among}, {rows:,} rows{epochs}")
        done = self.restore() if resume else 0
        total = n_steps(self.configs[0])
        started = saved = time.monotonic()
        label = f"{self.label} " + ",".join(str(c.latents) for c in self.configs)
        writer = self._tensorboard()
        with Interruption() as interruption, self.console.progress(label, total, "steps", done) as advance:
            for event in engine.train(self.trainees, self.reader, log_every=log_every or max(total // 200, 1)):
                if isinstance(event, engine.Step):
                    self.last[event.index] = event
                    self._log(event, time.monotonic() - started, writer)
                    continue
                last = self.last.get(0)
                advance(1, f"EV {last.explained_variance:.4f} L0 {last.l0:.1f} dead {last.dead}" if last else "")
                if self.processes.any(interruption.requested, self.device):
                    self.save()
                    self.console.say(f"stopped at step {event.step}; {self.way_on}")
                    raise KeyboardInterrupt
                due = time.monotonic() - saved >= checkpoint_every and event.step < total
                if self.processes.any(due, self.device) if self.processes.size > 1 else due:
                    self.save()
                    saved = time.monotonic()
        for i, trainee in enumerate(self.trainees):
            self._finish(trainee, self.last.get(i))

    def export_partial(self, *, overwrite: bool) -> None:
        """Write each checkpoint as an SAE of its own, ``NAME.stepN.st``; the run can still go on."""
        self.restore()
        missing = [self.checkpoint(t.config) for t in self.trainees if not t.steps_done]
        if missing:
            raise ArtifactError(f"{missing[0]}: no checkpoint of this run", "give the options of the interrupted run")
        for trainee in self.trainees:
            for product in self.products[trainee.config]:
                steps = trainee.steps_done
                path = product.path.with_name(f"{product.path.stem}.step{steps}{product.path.suffix}")
                plan = dataclasses.replace(product.plan, options={**product.plan.options, "stopped_at_step": steps})
                if writing.up_to_date(path, plan, overwrite=overwrite):
                    self.console.emit(container.read_header(path), path, h.sha256_file(path), {}, fresh=False)
                elif self.processes.leads:
                    self._write(trainee, dataclasses.replace(product, path=path, plan=plan), {})

    def _finish(self, trainee: Trainee, last: engine.Step | None) -> None:
        if not trainee.is_finite():
            raise engine.diverged(trainee, "parameters that are not finite,")
        metrics = dataclasses.asdict(last) if last else {}
        metrics.pop("index", None)
        for product in self.products[trainee.config] if self.processes.leads else []:
            self._write(trainee, product, metrics)
        if self.processes.leads:
            self.checkpoint(trainee.config).unlink(missing_ok=True)

    def _write(self, trainee: Trainee, product: Product, metrics: dict[str, Any]) -> None:
        sae = trainee.sae(product.width)
        config = {
            **product.plan.options,
            **sae_files.config_of(sae),
            "normalization": {"scale": trainee.scale, "folded": True},
            "train_metrics": h.finite(metrics),
        }
        if trainee.config.arch == "matryoshka":
            value = trainee.threshold / trainee.scale
            config["threshold"] = {
                "method": "running mean of the training batches' smallest kept values",
                "value": value,
            }
        model, seed = self.source.model(), trainee.config.seed
        header = product.plan.header(config=config, model=model, seed=seed, dtype="float32")
        sha256 = sae_files.save(product.path, sae, header)
        self.console.emit(header, product.path, sha256, metrics)

    def _log(self, step: engine.Step, seconds: float, writer: Any) -> None:
        config = self.configs[step.index]
        record = dataclasses.asdict(step)
        del record["index"]
        name = self.products[config][-1].path.name
        if writer is not None:
            for metric in train_log.NAMES:
                writer.add_scalar(f"{train_log.NAMES[metric]}/{name}", record[metric], step.step)
            writer.flush()
        if self.log is not None and self.processes.leads:
            record.update(sae=name, latents=config.latents, time=round(seconds, 3))
            saes = [p.path.name for c in self.configs for p in self.products[c]]
            train_log.append(self.log, record, saes, self.products[config][0].plan.inputs)

    def _tensorboard(self) -> Any:
        if self.tensorboard is None or not self.processes.leads:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise BackendError("--tensorboard needs the package tensorboard", "pip install tensorboard") from None
        return SummaryWriter(str(self.tensorboard))
