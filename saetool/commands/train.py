"""``saetool train``: activations → SAEs."""

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.artifacts.cache import TRAIN, Cache, open_cache
from saetool.config import TrainConfig
from saetool.console import Console, Interruption
from saetool.errors import ArtifactError, ConfigError
from saetool.options import (
    DebugFlag,
    Device,
    DryRun,
    Json,
    Log,
    Overwrite,
    Quiet,
    Resume,
    Seed,
    parse_count,
    parse_counts,
    resolve_device,
)

if TYPE_CHECKING:
    from saetool.engines.train import Step

ARCHITECTURES = ("batchtopk", "topk", "relu", "jumprelu")
SAES, OPTIMIZER = "The SAE", "Optimisation"


def train(
    acts: Annotated[Path, typer.Argument(help="The activation cache.")] = Path("acts"),
    arch: Annotated[
        str, typer.Option(help="batchtopk, topk, relu (L1) or jumprelu.", rich_help_panel=SAES)
    ] = TrainConfig.arch,
    latents: Annotated[
        str, typer.Option(help="Width; several (768,1536) train a ladder at once.", rich_help_panel=SAES)
    ] = str(TrainConfig.latents),
    k: Annotated[
        int, typer.Option(help="Active latents per token (batchtopk, topk).", rich_help_panel=SAES)
    ] = TrainConfig.k,
    l1: Annotated[
        float, typer.Option(help="λ of relu, on inputs with E‖x‖² = d.", rich_help_panel=SAES)
    ] = TrainConfig.l1,
    l0: Annotated[
        float, typer.Option(help="λ of jumprelu, on inputs with E‖x‖² = d.", rich_help_panel=SAES)
    ] = TrainConfig.l0,
    bandwidth: Annotated[
        float | None, typer.Option(help="Kernel width of jumprelu.", show_default="0.1", rich_help_panel=SAES)
    ] = None,
    normalize: Annotated[
        bool,
        typer.Option(
            "--normalize/--no-normalize", help="Scale inputs to E‖x‖² = d (folded on save).", rich_help_panel=SAES
        ),
    ] = TrainConfig.normalize,
    tokens: Annotated[
        str, typer.Option(help="Length of the run in tokens: 500k, 8M.", rich_help_panel=OPTIMIZER)
    ] = "8M",
    batch_size: Annotated[
        int, typer.Option(help="Tokens per step.", rich_help_panel=OPTIMIZER)
    ] = TrainConfig.batch_size,
    lr: Annotated[
        float | None,
        typer.Option(help="Adam's learning rate.", show_default="2e-4·√(16384/latents)", rich_help_panel=OPTIMIZER),
    ] = None,
    warmup: Annotated[
        float, typer.Option(help="Share of the steps with rising lr.", rich_help_panel=OPTIMIZER)
    ] = TrainConfig.warmup,
    decay: Annotated[
        float, typer.Option(help="Share of the steps, at the end, with falling lr.", rich_help_panel=OPTIMIZER)
    ] = TrainConfig.decay,
    aux_alpha: Annotated[
        float, typer.Option(help="Weight of AuxK (batchtopk, topk).", rich_help_panel=OPTIMIZER)
    ] = TrainConfig.aux_alpha,
    k_aux: Annotated[
        int | None,
        typer.Option(help="Dead latents AuxK uses.", show_default="power of 2 near d/2", rich_help_panel=OPTIMIZER),
    ] = None,
    dead_after: Annotated[
        str | None,
        typer.Option(
            help="Tokens without firing until a latent is dead.",
            show_default="10M or a tenth of the run",
            rich_help_panel=OPTIMIZER,
        ),
    ] = None,
    out: Annotated[
        str,
        typer.Option("-o", "--out", help="The SAE; {latents} in it is the width.", rich_help_panel="Files"),
    ] = "sae.st",
    log: Log = None,
    overwrite: Overwrite = False,
    checkpoint_every: Annotated[
        float, typer.Option(help="Seconds between checkpoints (OUT.ckpt.st).", rich_help_panel="Running")
    ] = 60.0,
    resume: Resume = True,
    seed: Seed = TrainConfig.seed,
    device: Device = "auto",
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: DebugFlag = False,
) -> None:
    """Train sparse autoencoders on the train split of a cache.

    Several widths share one read of the data; each file equals the one trained alone.

    Example: saetool train acts --arch batchtopk --k 32 --latents 768,1536 -o 'sae-{latents}.st'
    """
    if arch not in ARCHITECTURES:
        raise ConfigError(f"--arch {arch}: unknown", f"one of {', '.join(ARCHITECTURES)}")
    widths = parse_counts(latents, "--latents")
    paths = output_paths(out, widths)
    base = TrainConfig(
        arch=arch,
        k=k,
        tokens=parse_count(tokens, "--tokens"),
        batch_size=batch_size,
        lr=lr,
        warmup=warmup,
        decay=decay,
        l1=l1,
        l0=l0,
        bandwidth=bandwidth,
        aux_alpha=aux_alpha,
        k_aux=k_aux,
        dead_after=None if dead_after is None else parse_count(dead_after, "--dead-after"),
        normalize=normalize,
        seed=seed,
    )
    console = Console(quiet=quiet, as_json=json_)
    cache = open_cache(acts)
    from saetool.engines.train import n_steps, options_of, resolve

    configs = [resolve(dataclasses.replace(base, latents=width), cache.d_in) for width in widths]
    plans = [h.Plan("train", h.SAE, options_of(c), [cache.as_input()], [cache.header]) for c in configs]
    if dry_run:
        console.plan(
            {
                "input": f"{acts}: {cache.rows(TRAIN):,} rows of {cache.d_in}",
                "steps": n_steps(base),
                "epochs": round(base.tokens / max(cache.rows(TRAIN), 1), 2),
                **{str(path): json.dumps(dict(plan.options)) for path, plan in zip(paths, plans, strict=True)},
                "parameters_and_optimizer_bytes": sum(2 * cache.d_in * w * 12 for w in widths),
            }
        )
        return
    wanted = []
    for path, plan in zip(paths, plans, strict=True):
        if container.up_to_date(path, plan, overwrite=overwrite):
            console.emit(container.read_header(path), path, h.sha256_file(path), _metrics(path), fresh=False)
        else:
            wanted.append((path, plan))
    if wanted:
        chosen = [c for c, p in zip(configs, plans, strict=True) if any(p is q for _, q in wanted)]
        run = _Run(console, cache, wanted, chosen, resolve_device(device), log)
        run.go(resume=resume, checkpoint_every=checkpoint_every)


def output_paths(out: str, widths: list[int]) -> list[Path]:
    """One path a width: ``{latents}`` replaced. Raises ``ConfigError`` if several widths would share a file."""
    paths = [Path(out.replace("{latents}", str(width))) for width in widths]
    if len(set(paths)) != len(paths):
        raise ConfigError(f"-o {out}: {len(widths)} widths need {{latents}} in the name", "-o 'sae-{latents}.st'")
    return paths


def _metrics(path: Path) -> dict[str, Any]:
    return dict(container.read_header(path).config.get("train_metrics", {}))


class _Run:
    """The state of one training command: trainees, their checkpoints and the log."""

    def __init__(
        self,
        console: Console,
        cache: Cache,
        wanted: list[tuple[Path, h.Plan]],
        configs: list[TrainConfig],
        device: str,
        log: Path | None,
    ) -> None:
        from saetool.engines.reader import Reader
        from saetool.engines.train import Trainee

        self.console, self.cache, self.log = console, cache, log
        self.paths = [path for path, _ in wanted]
        self.plans = [plan for _, plan in wanted]
        config = configs[0]
        mean_sq_norm = cache.statistics["mean_sq_norm"]
        if not mean_sq_norm > 0:
            raise ArtifactError(f"{cache.path}: all activations are zero", "cache another hook")
        scale = (cache.d_in / mean_sq_norm) ** 0.5 if config.normalize else 1.0
        self.reader = Reader(cache, TRAIN, seed=config.seed, device=device, scale=scale)
        mean = cache.moments()["mean"]
        self.trainees: list[Trainee] = [Trainee(c, cache.d_in, mean, scale, device) for c in configs]
        self.last: dict[int, Step] = {}
        console.say(f"training {len(configs)} SAE{'s' * (len(configs) > 1)} on {device}, {self.reader.n_rows:,} rows")

    def checkpoint(self, i: int) -> Path:
        return self.paths[i].with_name(self.paths[i].name + ".ckpt.st")

    def _checkpoint_plan(self, i: int) -> h.Plan:
        return dataclasses.replace(self.plans[i], schema=h.CHECKPOINT)

    def save(self) -> None:
        """Write every unfinished SAE's checkpoint."""
        for i, trainee in enumerate(self.trainees):
            container.write_tensors(self.checkpoint(i), trainee.state(), self._checkpoint_plan(i).header())

    def restore(self) -> int:
        """Load the checkpoints that fit; returns the steps that all SAEs have done."""
        for i, trainee in enumerate(self.trainees):
            path = self.checkpoint(i)
            if not path.exists():
                continue
            loaded = container.read_tensors(path, h.CHECKPOINT)
            if loaded.header.key == self._checkpoint_plan(i).key:
                trainee.restore(loaded.tensors)
                self.console.say(f"{path}: resuming at step {trainee.steps_done}")
        return min(t.steps_done for t in self.trainees)

    def go(self, *, resume: bool, checkpoint_every: float) -> None:
        from saetool.engines import train as engine

        done = self.restore() if resume else 0
        total = engine.n_steps(self.trainees[0].config)
        started = saved = time.monotonic()
        label = "train " + ",".join(str(t.config.latents) for t in self.trainees)
        with Interruption() as interruption, self.console.progress(label, total, "steps", done) as advance:
            for event in engine.train(self.trainees, self.reader, log_every=max(total // 200, 1)):
                if isinstance(event, engine.Step):
                    self.last[event.index] = event
                    self._log(event, time.monotonic() - started)
                    continue
                last = self.last.get(0)
                advance(1, f"EV {last.explained_variance:.4f} L0 {last.l0:.1f} dead {last.dead}" if last else "")
                if interruption.requested:
                    self.save()
                    self.console.say(f"stopped at step {event.step}; the same command goes on from there")
                    raise KeyboardInterrupt
                if time.monotonic() - saved >= checkpoint_every and event.step < total:
                    self.save()
                    saved = time.monotonic()
        for i in range(len(self.trainees)):
            self._finish(i)

    def _finish(self, i: int) -> None:
        from saetool.artifacts import sae as sae_files

        trainee, plan, path = self.trainees[i], self.plans[i], self.paths[i]
        sae = trainee.sae()
        metrics = dataclasses.asdict(self.last[i]) if i in self.last else {}
        metrics.pop("index", None)
        config = {
            **plan.options,
            **sae_files.config_of(sae),
            "normalization": {"scale": trainee.scale, "folded": True},
            "train_metrics": metrics,
        }
        header = plan.header(config=config, model=self.cache.header.model, seed=trainee.config.seed, dtype="float32")
        sha256 = sae_files.save(path, sae, header)
        self.checkpoint(i).unlink(missing_ok=True)
        self.console.emit(header, path, sha256, metrics)

    def _log(self, step: "Step", seconds: float) -> None:
        if self.log is None:
            return
        fresh = not self.log.exists()
        record = dataclasses.asdict(step)
        i = record.pop("index")
        record.update(sae=self.paths[i].name, latents=self.trainees[i].config.latents, time=round(seconds, 3))
        with open(self.log, "a") as file:
            if fresh:
                plan = h.Plan("train", h.TRAIN_LOG, {"saes": [p.name for p in self.paths]}, self.plans[0].inputs)
                file.write(h.canonical({container.METADATA_KEY: plan.header().to_json()}) + "\n")
            file.write(h.canonical(h.finite(record)) + "\n")
