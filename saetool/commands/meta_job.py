"""One ``saetool meta``: parents → rows → trainings → records and files."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saetool.artifacts import cache as cache_files
from saetool.artifacts import container, writing
from saetool.artifacts import header as h
from saetool.artifacts import sae as sae_files
from saetool.artifacts.cache import TRAIN, Cache
from saetool.artifacts.sae import SAEFile
from saetool.commands import meta_graph, meta_table
from saetool.commands.checks import check_encodes, check_site, check_split
from saetool.commands.meta_run import Trainings
from saetool.commands.train_plan import Product
from saetool.config import META_PRESETS, MetaConfig, TrainConfig
from saetool.console import Console
from saetool.core import meta as core
from saetool.core.meta_baselines import nearest_rows
from saetool.engines import firings
from saetool.engines import meta as engine
from saetool.engines import meta_record as record
from saetool.engines.processes import join
from saetool.engines.recipe import n_steps, options_of
from saetool.errors import ArtifactError, ConfigError

NULLS = (("random_directions", core.random_rows), ("shuffled_coordinates", core.shuffled_rows))
"""The controls: rows of the same shape with no structure, and with that of single coordinates."""


@dataclass(frozen=True)
class Output:
    """One meta-SAE to make."""

    path: Path
    plan: h.Plan
    config: TrainConfig

    @property
    def record_path(self) -> Path:
        return self.path if str(self.path) == "-" else self.path.with_suffix(".json")

    @property
    def record_plan(self) -> h.Plan:
        return dataclasses.replace(self.plan, schema=h.META)


@dataclass
class Job:
    """What was asked for."""

    console: Console
    settings: MetaConfig
    """Shared by the grid."""
    grid: Sequence[MetaConfig]
    saes: Sequence[Path]
    compare: Sequence[Path]
    acts: Path | None
    preset: str | None
    controls: bool
    out: Path

    @cached_property
    def files(self) -> list[SAEFile]:
        files = [sae_files.load(path) for path in self.saes]
        self._same_width(files)
        seen: set[str] = set()
        for file in files:
            if file.sha256 in seen:
                raise ConfigError(f"{file.name}: given twice", "each of its rows would count double")
            seen.add(file.sha256)
        return files

    @cached_property
    def pool(self) -> list[SAEFile]:
        """The SAEs to compare with. Parents among them are left out: their rows are what is explained."""
        files = [sae_files.load(path) for path in self.compare]
        self._same_width([self.files[0], *files])
        return [file for file in files if not self._is_parent(file)]

    def _is_parent(self, file: SAEFile) -> bool:
        """Whether the decoder is a parent's (before and after a threshold it is the same)."""
        for parent in self.files:
            if torch.equal(file.sae.W_dec, parent.sae.W_dec):
                self.console.say(
                    f"{file.name} has the rows of {parent.name}, which are explained: left out of --compare"
                )
                return True
        return False

    @cached_property
    def cache(self) -> Cache | None:
        return None if self.acts is None else cache_files.open_cache(self.acts)

    def _same_width(self, files: Sequence[SAEFile]) -> None:
        for file in files:
            if file.d_in != files[0].d_in:
                raise ArtifactError(
                    f"{file.name}: its rows have width {file.d_in}, and those of {files[0].name} {files[0].d_in}",
                    "SAEs of one site are needed",
                )

    def outputs(self, n_rows: int) -> list[Output]:
        """The files to make from ``n_rows`` rows, each with its key."""
        inputs = [file.as_input("parent") for file in self.files]
        inputs += [file.as_input("compare") for file in self.pool]
        if self.cache is not None:
            inputs.append(self.cache.as_input())
        parents = [file.header for file in self.files]
        made = []
        for settings in self.grid:
            config = engine.training_config(settings, n_rows, self.files[0].d_in)
            options: dict[str, Any] = {**options_of(config), "controls": self.controls}
            for name in ("min_rate", "weighted", "replacement"):
                if getattr(settings, name) not in (None, False):
                    options[name] = getattr(settings, name)
            name = str(self.out).replace("{latents}", str(config.latents)).replace("{k}", str(config.k))
            made.append(Output(Path(name), h.Plan("meta", h.SAE, options, inputs, parents), config))
        paths = [path for o in made for path in dict.fromkeys((str(o.path), str(o.record_path)))]
        if len(set(paths)) < len(paths) or any(o.path.suffix == ".json" for o in made):
            raise ConfigError(f"-o {self.out}: an SAE and its record NAME.json would be one file", "-o NAME.st")
        return made

    def dry(self) -> dict[str, Any]:
        """What would be done."""
        n_rows = sum(len(core.decoder_rows(file.sae).rows) for file in self.files)
        outputs = self.outputs(n_rows)
        first, recipe = outputs[0].config, META_PRESETS.get(self.preset or "")
        return {
            "rows": n_rows,
            **({"rows_left_out": "known once firing is counted"} if self.settings.min_rate is not None else {}),
            **({"preset": f"{self.preset}: {recipe.source}", "differs": recipe.differs} if recipe else {}),
            "latents": first.latents if len(outputs) == 1 else [o.config.latents for o in outputs],
            "k": first.k if len(outputs) == 1 else [o.config.k for o in outputs],
            "steps": n_steps(first),
            "batch_size": first.batch_size,
            "lr": first.lr,
            "output": ", ".join(str(o.path) for o in outputs),
        }

    def go(
        self,
        *,
        device: str,
        log: Path | None,
        graph: Path | None,
        overwrite: bool,
        resume: bool,
        checkpoint_every: float,
    ) -> None:
        """Make what is not there yet. Under torchrun: each batch's rows are parted among the processes."""
        processes, device = join(device, tensors=True)
        self.console = self.console if processes.leads else Console(quiet=True)
        if graph is not None:
            writing.check_target(graph)
        parents, weights = self._parents(device)
        outputs = self.outputs(sum(len(parent.rows.rows) for parent in parents))
        wanted, payloads = [], []
        for output in outputs:
            there = writing.up_to_date(output.path, output.plan, overwrite=overwrite)
            piped = str(output.path) == "-"
            if not piped and writing.up_to_date(output.record_path, output.record_plan, overwrite=overwrite) and there:
                header, payload = container.read_header(output.path), container.read_json(output.record_path)[1]
                if processes.leads:
                    summary = meta_table.summary(payload)
                    self.console.emit(header, output.path, h.sha256_file(output.path), summary, fresh=False)
                payloads.append(payload)
            else:
                wanted.append(output)
        if wanted and graph is not None and graph.exists() and not overwrite:
            raise ArtifactError(f"{graph}: exists and is another graph", "pass --overwrite to replace it")
        if wanted:
            first = wanted[0].plan
            trainings = Trainings(
                self.console, processes, device, log, resume, checkpoint_every, list(first.inputs), list(first.parents)
            )
            payloads += self._make(trainings, wanted, parents, weights)
            trainings.done()
        if len(outputs) > 1 and processes.leads:
            meta_table.sweep(self.console, payloads)
        if graph is not None and processes.leads:
            meta_graph.write(graph, payloads[0], overwrite=overwrite)
        processes.leave()

    def _parents(self, device: str) -> tuple[list[record.Parent], Tensor | None]:
        """The rows used of each parent, and their weights."""
        parents, weights = [], []
        for file in self.files:
            rows = core.decoder_rows(file.sae)
            keep = torch.ones(len(rows.rows), dtype=torch.bool)
            if self.cache is not None:
                rate = self._rates(file, device)[rows.latents]
                if self.settings.min_rate is not None:
                    keep = rate > self.settings.min_rate
                if self.settings.weighted:
                    weights.append(rate[keep])
            zero, rare = file.sae.d_sae - len(rows.rows), int((~keep).sum())
            if not keep.any():
                raise ArtifactError(f"{file.name}: no latent fires on more than {self.settings.min_rate} of the tokens")
            parents.append(record.Parent(file.name, file.sha256, file.sae.d_sae, rows.of(keep), zero, rare))
        joined = torch.cat(weights) if weights else None
        if joined is not None and not joined.sum() > 0:
            raise ArtifactError(f"{self.files[0].name}: none of its latents fires on {self.acts}")
        return parents, joined

    def _rates(self, file: SAEFile, device: str) -> Tensor:
        """The share of the train split's tokens on which each latent fires."""
        assert self.cache is not None
        check_site(file, self.cache, self.console)
        check_encodes(file, "count its firing")
        check_split(self.cache, TRAIN)
        n = self.cache.rows(TRAIN)
        with self.console.progress(f"firing of {file.name}", n, "rows") as advance:
            counts = firings.count(file.sae, self.cache, [TRAIN], device, advance)
        return torch.from_numpy(counts).double() / n

    def _make(
        self,
        trainings: Trainings,
        outputs: Sequence[Output],
        parents: Sequence[record.Parent],
        weights: Tensor | None,
    ) -> list[dict[str, Any]]:
        """Train everything and write each output; the records' payloads, in the process that leads."""
        rows, seed = record.joined(parents), self.settings.seed
        drawn = torch.ones(len(rows)) if self.settings.replacement and weights is None else weights
        label = "meta " + ",".join(parent.name for parent in parents)
        trained = trainings.train(label, rows, drawn, self._products(outputs), log=trainings.log)
        nulls: dict[str, tuple[Tensor, dict[TrainConfig, engine.Trained]]] = {}
        for name, make in NULLS if self.controls else ():
            null = make(rows, torch.Generator().manual_seed(seed + 1))
            nulls[name] = null, trainings.train(f"control: {name}", null, drawn, self._products(outputs, name))
        pool = [self._compared(file) for file in self.pool]
        payloads = []
        for output in outputs:
            config = output.config
            bars = self._bars(trainings, output, trained[config].sae, rows, drawn, pool)
            if not trainings.processes.leads:
                continue
            payload = record.payload(parents, trained[config], config, pool, bars, weights)
            payload["preset"] = self.preset
            payload["controls"] = [record.control(n, found[config], null) for n, (null, found) in nulls.items()]
            payload = h.finite(payload)
            self._write(output, trained[config], payload)
            payloads.append(payload)
        return payloads

    def _products(
        self, outputs: Sequence[Output], training: str | None = None, *, frozen: bool = False
    ) -> list[Product]:
        """The outputs as the trainer's products; ``training`` tells apart what a command trains besides them."""
        products = []
        for output in outputs:
            options = {**output.plan.options, **({"training": training} if training else {})}
            plan = dataclasses.replace(output.plan, options=options)
            config = dataclasses.replace(output.config, freeze_decoder=frozen)
            products.append(Product(output.path, plan, config, config.latents))
        return products

    def _compared(self, file: SAEFile) -> record.Compared:
        return record.Compared(file.name, file.sha256, core.decoder_rows(file.sae).rows)

    def _bars(
        self,
        trainings: Trainings,
        output: Output,
        meta: core.SAE,
        rows: Tensor,
        drawn: Tensor | None,
        pool: Sequence[record.Compared],
    ) -> record.Bars:
        """Decoders to put in the meta-SAE's place, and the encoders trained for them from the meta-SAE's."""

        def tuned(name: str, directions: Tensor) -> engine.Trained:
            (product,) = self._products([output], name, frozen=True)
            start = core.with_decoder(meta, directions)
            label = f"encoder for {name.replace('_', ' ')}"
            return trainings.train(label, rows, drawn, [product], start=start)[product.config]

        generator = torch.Generator().manual_seed(self.settings.seed + 3)
        random = core.random_rows(meta.W_dec, generator)
        nearest = nearest_tuned = None
        if pool:
            directions = torch.cat([one.rows for one in pool])
            nearest = directions[nearest_rows(meta.W_dec, directions)]
            nearest_tuned = tuned("nearest_sae_latents", nearest)
        random_tuned = tuned("random_decoder", random) if self.controls else None
        return record.Bars(nearest, nearest_tuned, random, random_tuned)

    def _write(self, output: Output, trained: engine.Trained, payload: dict[str, Any]) -> None:
        parent, seed = self.files[0], self.settings.seed
        site = {
            "id": parent.header.model.get("id"),
            "hook_name": "decoder",
            "hf_hook_name": "decoder",
            "width": parent.sae.d_in,
            "parent_sha256": parent.sha256,
        }
        estimate = trained.estimate
        facts = {
            "method": "mean-min",
            "value": payload["threshold"],
            "standard_error": estimate.standard_error,
            "standard_error_from": "200 resamples of the rows" if estimate.n_batches == 1 else "batches",
            "n_batches": estimate.n_batches,
            "asked_l0": output.config.k,
        }
        config = {**output.plan.options, **sae_files.config_of(trained.sae), "hook": "decoder", "threshold": facts}
        if self.preset:
            config["preset"] = self.preset
        header = output.plan.header(config=config, model=site, seed=seed, dtype="float32")
        if str(output.path) != "-":
            about = output.record_plan.header(model=site, seed=seed, dtype="float32")
            writing.write_json(output.record_path, about, payload)
        sha256 = sae_files.save(output.path, trained.sae, header)
        meta_table.show(self.console, payload)
        self.console.emit(header, output.path, sha256, meta_table.summary(payload))
