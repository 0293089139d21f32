"""In sparsify's environment: ``make DIR`` and ``check DIR``, as in saelens_side.py."""

import json
import sys
from pathlib import Path

import torch
from data import STEPS, D, F, K, batches, inputs, read_probe, write_answer, write_probe
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

KINDS = {
    "layers.5": {"num_latents": F, "k": K},
    "layers.5.mlp": {"expansion_factor": 2, "k": K},  # num_latents 0: use the expansion factor
    "h.3": {"num_latents": F, "k": K, "normalize_decoder": False, "multi_topk": True},
    "groupmax/layers.5": {"num_latents": F, "k": K, "activation": "groupmax"},
    "transcoder/layers.5": {"num_latents": F, "k": K, "transcode": True, "skip_connection": True},
}


def answer(coder: SparseCoder, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        top = coder.encode(x)
        z = torch.zeros(len(x), coder.num_latents).scatter_(1, top.top_indices, top.top_acts)
        return z, coder.decode(top.top_acts, top.top_indices)


def make(out: Path) -> None:
    for name, options in KINDS.items():
        torch.manual_seed(0)
        coder = SparseCoder(D, SparseCoderConfig(**options))
        optimizer = torch.optim.Adam(coder.parameters(), lr=3e-3)
        for _, x in zip(range(STEPS), batches(), strict=False):
            result = coder(x)
            optimizer.zero_grad()
            (result.fvu + result.multi_topk_fvu / 8).backward()
            optimizer.step()
            if coder.cfg.normalize_decoder:
                coder.set_decoder_norm_to_unit_norm()
        folder = out / name
        coder.save_to_disk(folder)
        loaded = SparseCoder.load_from_disk(folder)
        x = inputs()
        write_probe(folder, x, *answer(loaded, x))
    (out / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-160m", "ctx_len": 128}))


def check(out: Path) -> None:
    for folder in sorted(p for p in out.iterdir() if p.is_dir()):
        write_answer(folder, *answer(SparseCoder.load_from_disk(folder), read_probe(folder)["x"]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
