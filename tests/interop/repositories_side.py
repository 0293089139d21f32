"""Libraries that are no packages: their ``sae.py`` or ``model.py`` is imported from a checkout. Needs torch alone.

``make DIR CHECKOUTS`` and ``check DIR CHECKOUTS``, where CHECKOUTS holds any of BatchTopK/, matryoshka_sae/ (both
github.com/bartbussmann) and sparse_autoencoder/ (github.com/openai).
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from data import BATCH, STEPS, D, F, K, batches, inputs, read_probe, write_answer, write_probe
from torch import Tensor

BASE = {"seed": 0, "act_size": D, "dict_size": F, "device": "cpu", "dtype": torch.float32, "l1_coeff": 0.0,
        "n_batches_to_dead": 20, "top_k": K, "top_k_aux": 8, "aux_penalty": 1 / 32, "bandwidth": 0.3,
        "batch_size": BATCH, "model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre",
        "input_unit_norm": True}  # fmt: skip
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "batchtopk": ("BatchTopK", "BatchTopKSAE", {"sae_type": "batchtopk"}),
    "topk": ("BatchTopK", "TopKSAE", {"sae_type": "topk", "input_unit_norm": False}),
    "vanilla": ("BatchTopK", "VanillaSAE", {"sae_type": "vanilla", "l1_coeff": 0.01}),
    "jumprelu": ("BatchTopK", "JumpReLUSAE", {"sae_type": "jumprelu", "l1_coeff": 0.001}),
    "matryoshka": (
        "matryoshka_sae",
        "GlobalBatchTopKMatryoshkaSAE",
        {"sae_type": "global-matryoshka-topk", "group_sizes": [F // 4, F // 4, F // 2]},
    ),
}


def module(checkouts: Path, repository: str, file: str) -> ModuleType | None:
    path = checkouts / repository / file
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location(f"checkout_{repository}", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def coded(sae: Any, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        if name == "matryoshka":
            sae.eval()
            z = sae.encode(x)
            return z, sae.decode(z)
        if name in ("vanilla", "topk", "batchtopk"):
            result = sae(x)
            return result["feature_acts"], result["sae_out"]
        result = sae(x)
        return result["feature_acts"], result["sae_out"]


def make(out: Path, checkouts: Path) -> None:
    for name, (repository, class_name, options) in KINDS.items():
        code = module(checkouts, repository, "sae.py")
        if code is None:
            continue
        cfg = {**BASE, **options}
        sae = getattr(code, class_name)(cfg)
        optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
        for _, x in zip(range(STEPS), batches(), strict=False):
            loss = sae(x)["loss"]
            optimizer.zero_grad()
            loss.backward()
            sae.make_decoder_weights_and_grad_unit_norm()
            optimizer.step()
        sae.make_decoder_weights_and_grad_unit_norm()
        folder = out / f"{repository}_{name}"
        folder.mkdir(parents=True)
        torch.save(sae.state_dict(), folder / "sae.pt")  # as their save_checkpoint does, which also calls wandb
        plain = {n: v if isinstance(v, (int, float, str, bool, type(None))) else str(v) for n, v in cfg.items()}
        (folder / "config.json").write_text(json.dumps(plain, indent=4))
        x = inputs()
        write_probe(folder, x, *coded(sae, x, name))
    _openai(out, checkouts)


def _openai(out: Path, checkouts: Path) -> None:
    code = module(checkouts, "sparse_autoencoder", "sparse_autoencoder/model.py")
    if code is None:
        return
    for name, activation, normalize in (("relu", torch.nn.ReLU(), False), ("topk", code.TopK(K), True)):
        torch.manual_seed(0)
        sae = code.Autoencoder(F, D, activation=activation, normalize=normalize)
        optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
        for _, x in zip(range(STEPS), batches(), strict=False):
            _, latents, recons = sae(x)
            loss = (recons - x).square().sum(1).mean() + (0.05 * latents.sum(1).mean() if name == "relu" else 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        folder = out / f"openai_{name}"
        folder.mkdir(parents=True)
        torch.save(sae.state_dict(), folder / "8.pt")
        loaded = code.Autoencoder.from_state_dict(torch.load(folder / "8.pt", weights_only=True), strict=False)
        x = inputs()
        with torch.no_grad():
            z, info = loaded.encode(x)
            write_probe(folder, x, z, loaded.decode(z, info))


def check(out: Path, checkouts: Path) -> None:
    code = module(checkouts, "BatchTopK", "sae.py")
    assert code is not None, f"no BatchTopK/sae.py in {checkouts}"
    classes = {"vanilla": "VanillaSAE", "topk": "TopKSAE", "batchtopk": "BatchTopKSAE", "jumprelu": "JumpReLUSAE"}
    for folder in sorted(p for p in out.iterdir() if p.is_dir()):
        cfg = {**BASE, **json.loads((folder / "config.json").read_text()), "dtype": torch.float32}
        sae = getattr(code, classes[cfg["sae_type"]])(cfg)
        sae.load_state_dict(torch.load(folder / "sae.pt", weights_only=True))
        write_answer(folder, *coded(sae, read_probe(folder)["x"], cfg["sae_type"]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
