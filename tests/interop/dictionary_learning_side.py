"""In dictionary_learning's environment: ``make DIR`` and ``check DIR``, as in saelens_side.py."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from data import STEPS, D, F, K, batches, inputs, read_probe, write_answer, write_probe
from dictionary_learning.dictionary import AutoEncoderNew
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary

SOON = {"warmup_steps": 20}
KINDS = {
    "standard": (StandardTrainer, {**SOON, "lr": 3e-3, "l1_penalty": 0.05, "sparsity_warmup_steps": 50}),
    "standard_april": (StandardTrainerAprilUpdate, {**SOON, "lr": 3e-3, "sparsity_warmup_steps": 50}),
    "standard_new": (
        StandardTrainerAprilUpdate,
        {**SOON, "lr": 3e-3, "sparsity_warmup_steps": 50, "dict_class": AutoEncoderNew},
    ),
    "p_anneal": (PAnnealTrainer, {**SOON, "lr": 3e-3, "anneal_start": 100, "p_end": 0.5, "sparsity_warmup_steps": 50}),
    "gated": (GatedSAETrainer, {**SOON, "lr": 3e-3, "l1_penalty": 0.05, "sparsity_warmup_steps": 50}),
    "topk": (TopKTrainer, {**SOON, "lr": 3e-3, "k": K, "threshold_start_step": 100}),
    "topk_square": (TopKTrainer, {**SOON, "lr": 3e-3, "k": K, "threshold_start_step": 100, "dict_size": D}),
    "batchtopk": (BatchTopKTrainer, {**SOON, "lr": 3e-3, "k": K, "threshold_start_step": 100}),
    "batchtopk_short": (BatchTopKTrainer, {**SOON, "lr": 3e-3, "k": K}),  # 600 steps: the threshold is never set
    "matryoshka": (
        MatryoshkaBatchTopKTrainer,
        {**SOON, "lr": 3e-3, "k": K, "threshold_start_step": 100, "group_fractions": [0.25, 0.25, 0.5]},
    ),
    "jumprelu": (
        JumpReluTrainer,
        {**SOON, "lr": 3e-3, "bandwidth": 0.1, "target_l0": float(K), "sparsity_warmup_steps": 50},
    ),
}


class Buffer:
    """Batches, with the configuration that their activation buffers have."""

    def __init__(self) -> None:
        self.config = {"d_submodule": D, "io": "out", "n_ctxs": 100, "ctx_len": 128, "refresh_batch_size": 8}

    def __iter__(self) -> Iterator[torch.Tensor]:
        return batches()


def make(out: Path) -> None:
    for name, (trainer, options) in KINDS.items():
        base = {"steps": STEPS, "activation_dim": D, "dict_size": F, "layer": 8, "lm_name": "EleutherAI/pythia-160m",
                "device": "cpu", "seed": 0, "submodule_name": "resid_post_layer_8"}  # fmt: skip
        config = {"trainer": trainer, **base, **options}
        trainSAE(Buffer(), [config], STEPS, save_dir=str(out / f"run_{name}"), device="cpu")
        folder = out / name
        shutil.move(out / f"run_{name}" / "trainer_0", folder)
        shutil.rmtree(out / f"run_{name}")
        said = json.loads((folder / "config.json").read_text())
        x = inputs()
        with torch.no_grad():
            if name == "standard_new":  # its trainer writes AutoEncoder whatever the class is
                loaded = AutoEncoderNew.from_pretrained(folder / "ae.pt")
            else:
                loaded = load_dictionary(str(folder), "cpu")[0]
            whole = float(getattr(loaded, "threshold", torch.zeros(1)).min()) < 0 and "BatchTopK" in str(said)
            z = loaded.encode(x, use_threshold=False) if whole else loaded.encode(x)
            write_probe(folder, x, z, loaded.decode(z))


def check(out: Path) -> None:
    for folder in sorted(p for p in out.iterdir() if p.is_dir()):
        loaded = load_dictionary(str(folder), "cpu")[0]
        with torch.no_grad():
            z = loaded.encode(read_probe(folder)["x"])
            write_answer(folder, z, loaded.decode(z))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
