"""``saetool meta``: an SAE on the decoder directions of another SAE."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saetool.artifacts import container
from saetool.artifacts import header as h
from saetool.config import MetaConfig
from saetool.console import Console
from saetool.errors import ConfigError
from saetool.options import DebugFlag, Device, DryRun, Json, Overwrite, Quiet, Seed, resolve_device

if TYPE_CHECKING:
    from torch import Tensor

    from saetool.config import TrainConfig
    from saetool.core.meta import Rows
    from saetool.core.sae import SAE
    from saetool.engines.meta import Trained


def meta(
    sae: Annotated[Path, typer.Argument(help="The parent SAE (- reads standard input).")],
    latents: Annotated[
        int | None, typer.Option(help="Meta-latents.", show_default="3/64 of the width")
    ] = MetaConfig.latents,
    k: Annotated[int, typer.Option(help="Active meta-latents per row, on average.")] = MetaConfig.k,
    steps: Annotated[int, typer.Option(help="Training steps.")] = MetaConfig.steps,
    batch_size: Annotated[int, typer.Option(help="Rows per step (all, if fewer).")] = MetaConfig.batch_size,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = MetaConfig.lr,
    controls: Annotated[
        bool, typer.Option("--controls/--no-controls", help="Train on random and shuffled rows as well.")
    ] = True,
    out: Annotated[Path, typer.Option("-o", "--out", help="The meta-SAE; its record goes beside it, as .json.")] = Path(
        "meta.st"
    ),
    overwrite: Overwrite = False,
    seed: Seed = MetaConfig.seed,
    device: Device = "auto",
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: DebugFlag = False,
) -> None:
    """Train a meta-SAE: which smaller set of directions are an SAE's latents made of?

    Writes an ordinary SAE file, and a record with variance explained, controls and each latent's decomposition.

    Example: saetool meta sae-1536.st --k 4 -o meta.st
    """
    from saetool.artifacts import sae as sae_files
    from saetool.core.meta import decoder_rows
    from saetool.engines.meta import training_config
    from saetool.engines.recipe import options_of

    for name, value in (("latents", latents), ("k", k), ("steps", steps), ("batch-size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: must be positive")
    console = Console(quiet=quiet, as_json=json_)
    parent = sae_files.load(sae)
    rows = decoder_rows(parent.sae)
    settings = MetaConfig(latents=latents, k=k, steps=steps, batch_size=batch_size, lr=lr, seed=seed)
    config = training_config(settings, len(rows.rows), parent.sae.d_in)
    plan = h.Plan(
        "meta", h.SAE, {**options_of(config), "controls": controls}, [parent.as_input("parent")], [parent.header]
    )
    record = dataclasses.replace(plan, schema=h.META)
    record_path = out if str(out) == "-" else out.with_suffix(".json")
    if dry_run:
        console.plan({"rows": len(rows.rows), "latents": config.latents, "steps": steps, "output": str(out)})
        return
    current = container.up_to_date(out, plan, overwrite=overwrite)
    if str(out) != "-" and container.up_to_date(record_path, record, overwrite=overwrite) and current:
        header, payload = container.read_json(record_path)
        console.emit(container.read_header(out), out, h.sha256_file(out), _summary(payload), fresh=False)
        return
    where = resolve_device(device)
    trained = _train(console, f"meta {parent.name}", rows.rows, config, where)
    payload = _payload(parent.name, parent.sha256, parent.sae, rows, trained, config)
    payload["controls"] = _controls(console, rows.rows, config, where) if controls else []
    site = {
        "id": parent.header.model.get("id"),
        "hook_name": "decoder",
        "hf_hook_name": "decoder",
        "width": parent.sae.d_in,
        "parent_sha256": parent.sha256,
    }
    facts = {"value": payload["threshold"], "n_batches": trained.estimate.n_batches, "asked_l0": k}
    header = plan.header(
        config={**plan.options, **sae_files.config_of(trained.sae), "hook": "decoder", "threshold": facts},
        model=site,
        seed=seed,
        dtype="float32",
    )
    if str(out) != "-":
        container.write_json(record_path, record.header(model=site, seed=seed, dtype="float32"), payload)
    sha256 = sae_files.save(out, trained.sae, header)
    _table(console, payload)
    console.emit(header, out, sha256, _summary(payload))


def _train(console: Console, label: str, rows: "Tensor", config: "TrainConfig", where: str) -> "Trained":
    from saetool.engines import meta as engine
    from saetool.engines.recipe import n_steps

    result: Trained | None = None
    with console.progress(label, n_steps(config), "steps") as advance:
        for event in engine.train(rows, config, device=where):
            if isinstance(event, engine.Trained):
                result = event
            else:
                advance()
    assert result is not None
    return result


def _controls(console: Console, rows: "Tensor", config: "TrainConfig", where: str) -> list[dict[str, Any]]:
    import torch

    from saetool.core.meta import explain, random_rows, shuffled_rows

    results = []
    for name, make in (("random_directions", random_rows), ("shuffled_coordinates", shuffled_rows)):
        null = make(rows, torch.Generator().manual_seed(config.seed + 1))
        result = explain(_train(console, f"control: {name}", null, config, where).sae, null)
        results.append({"name": name, **dataclasses.asdict(result)})
    return results


def _payload(
    name: str, sha256: str, parent: "SAE", rows: "Rows", trained: "Trained", config: "TrainConfig"
) -> dict[str, Any]:
    from saetool.core.meta import cosine_histogram, decompose, explain
    from saetool.core.similarity import max_cosine_to_others, similarity

    def histogram(maxima: "Tensor") -> dict[str, Any]:
        edges, counts, mean = cosine_histogram(maxima)
        return {"edges": edges, "counts": counts, "mean": mean}

    at, batch = explain(trained.sae, rows.rows), explain(trained.sae, rows.rows, batch=True)
    parts = decompose(trained.sae, rows)
    return {
        "parent": {"name": name, "sha256": sha256, "d_sae": parent.d_sae},
        "n_rows": len(rows.rows),
        "k": config.k,
        "d_sae": config.latents,
        "threshold": float(trained.sae.threshold[0]) if trained.sae.threshold is not None else None,
        "variance_explained": {
            "threshold_mode": at.variance_explained,
            "train_mode": batch.variance_explained,
        },
        "mean_active": at.mean_active,
        "dead": at.dead,
        "unexplained_rows": at.unexplained_rows,
        "max_cosine": {
            "within": histogram(max_cosine_to_others(trained.sae.W_dec)),
            "to_parent": histogram(similarity(rows.rows, trained.sae.W_dec, theta=1.0).max_cosine),
        },
        "decompositions": {
            "latents": [latent for latent, _, _ in parts],
            "indices": [indices for _, indices, _ in parts],
            "weights": [[round(w, 6) for w in weights] for _, _, weights in parts],
        },
    }


def _summary(payload: dict[str, Any]) -> dict[str, Any]:
    names = ("variance_explained", "mean_active", "dead", "unexplained_rows", "threshold", "controls")
    return {name: payload[name] for name in names}


def _table(console: Console, payload: dict[str, Any]) -> None:
    explained = payload["variance_explained"]
    lines = [
        ["decoder rows, threshold", f"{explained['threshold_mode']:.4f}", f"{payload['mean_active']:.2f}"],
        ["decoder rows, batch selection", f"{explained['train_mode']:.4f}", str(payload["k"])],
    ]
    lines += [
        [f"control: {c['name']}", f"{c['variance_explained']:.4f}", f"{c['mean_active']:.2f}"]
        for c in payload["controls"]
    ]
    title = f"{payload['d_sae']} meta-latents on {payload['n_rows']} rows, {payload['dead']} dead"
    console.table(title, ["rows", "variance explained", "mean active"], lines)
