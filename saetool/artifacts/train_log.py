"""The training log: JSON lines, a header first, then one record per SAE and logged step, in SAELens' metric names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saetool.artifacts import container
from saetool.artifacts import header as h

NAMES = {
    "loss": "losses/overall_loss",
    "mse": "losses/mse_loss",
    "aux": "losses/auxiliary_reconstruction_loss",
    "explained_variance": "metrics/explained_variance",
    "l0": "metrics/l0",
    "dead": "sparsity/dead_features",
    "tokens": "details/n_training_samples",
    "lr": "details/current_learning_rate",
}
"""Our name → the log's. ``sae``, ``latents``, ``step`` and ``time`` (seconds) keep theirs."""
_OURS = {theirs: ours for ours, theirs in NAMES.items()}


def append(path: Path, record: Mapping[str, Any], saes: Sequence[str], inputs: Sequence[h.Input]) -> None:
    """Append one record, after a header if the file is new. Numbers that are not finite become null."""
    fresh = not path.exists()
    line = {NAMES.get(name, name): value for name, value in record.items()}
    with open(path, "a") as file:
        if fresh:
            plan = h.Plan("train", h.TRAIN_LOG, {"saes": list(saes)}, inputs)
            file.write(h.canonical({container.METADATA_KEY: plan.header().to_json()}) + "\n")
        file.write(h.canonical(h.finite(line)) + "\n")


def ours(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record in this program's metric names (which logs before @2 have)."""
    return {_OURS.get(name, name): value for name, value in record.items()}
