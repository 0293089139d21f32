"""``saetool meta --edit``: an SAE with decoder rows changed through its meta-SAE."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saetool.artifacts import container, writing
from saetool.artifacts import header as h
from saetool.artifacts import sae as sae_files
from saetool.console import Console
from saetool.core.meta_edit import Edit, edit
from saetool.errors import ArtifactError, ConfigError


def parse_edit(text: str) -> Edit:
    """``LATENT:META=VALUE``; LATENT may be ``*`` for every latent."""
    left, _, value = text.partition("=")
    latent, _, meta = left.partition(":")
    try:
        found = Edit(None if latent.strip() == "*" else int(latent), int(meta), float(value))
    except ValueError:
        found = None
    if found is None or not math.isfinite(found.value):
        raise ConfigError(f"--edit {text}: not LATENT:META=VALUE", "such as --edit 17:3=0, or '*:3=0' for all latents")
    return found


def _still_true(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a header says of an SAE whose decoder is another now: not how well it reconstructs."""
    kept = {name: value for name, value in config.items() if name != "train_metrics"}
    if isinstance(facts := kept.get("threshold"), dict):
        kept["threshold"] = {n: value for n, value in facts.items() if not n.startswith("explained_variance")}
    return kept


def run(
    console: Console,
    parent_path: Path,
    meta_path: Path,
    texts: Sequence[str],
    out: Path,
    *,
    rebuild: bool,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Write the edited SAE to ``out``."""
    edits = [parse_edit(text) for text in texts]
    parent, meta = sae_files.load(parent_path), sae_files.load(meta_path)
    wanted = meta.meta_parents()
    if parent.sha256 not in [item["sha256"] for item in wanted]:
        raise ArtifactError(
            f"{parent_path}: not the SAE that {meta_path} was made from (sha256 {parent.sha256[:12]}…, "
            f"{' or '.join(item['sha256'][:12] + '…' for item in wanted)} expected)",
            f"give the {' or the '.join(item['name'] for item in wanted)} of that time",
        )
    options = {"edits": [[e.latent, e.meta, e.value] for e in edits], "rebuild": rebuild}
    inputs = [parent.as_input("sae"), meta.as_input("meta")]  # "parent" is whose rows an SAE was trained on
    plan = h.Plan("meta", h.SAE, options, inputs, [parent.header, meta.header])
    edited = edit(parent.sae, meta.sae, edits, rebuild=rebuild)
    facts = {"changed": len(edited.changed), "mean_cosine": edited.mean_cosine}
    if dry_run:
        console.plan({"edits": list(texts), "rows_changed": len(edited.changed), "output": str(out)})
        return
    if writing.up_to_date(out, plan, overwrite=overwrite):
        console.emit(container.read_header(out), out, h.sha256_file(out), facts, fresh=False)
        return
    if not edited.changed:
        console.say("warning: no row changes: the edits say what the meta-activations are already")
    config = {**_still_true(parent.header.config), **sae_files.config_of(edited.sae), "edited": {**options, **facts}}
    header = plan.header(config=config, model=parent.header.model, seed=parent.header.seed, dtype="float32")
    sha256 = sae_files.save(out, edited.sae, header)
    console.say(f"{len(edited.changed)} rows changed; mean cosine to what they were {edited.mean_cosine:.4f}")
    console.emit(header, out, sha256, facts)
