"""saetool's evaluation beside SAELens' own, on the same SAE, activations, model and tokens.

    python tests/bench/compare_eval.py SAE.st CACHE [--venv FOLDER] [--rows 16384]

Reconstruction: the rows of the cache's held-out split, given to SAELens' `get_sparsity_and_variance_metrics` by a
stand-in for its model. Cross-entropy and KL: a random GPT-2 of two blocks, run by `transformers` for saetool and by
TransformerLens with the same weights for SAELens' `get_downstream_reconstruction_metrics`, on the same random tokens,
all positions spliced. sae-lens is installed in an environment of its own (`--venv`, made if it is not there).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REQUIREMENT = "sae-lens==6.54.12"
TOLERANCE = 1e-3
PEER = r'''
import json, sys, torch
from safetensors.torch import load_file
from sae_lens.evals import get_downstream_reconstruction_metrics, get_sparsity_and_variance_metrics
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2LMHeadModel

folder = sys.argv[1]
data = load_file(f"{folder}/data.st")
HOOK = "blocks.0.hook_resid_post"

def sae(prefix):
    d_in, d_sae = data[prefix + "W_enc"].shape
    made = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, dtype="float32", device="cpu",
        apply_b_dec_to_input=True, metadata=SAEMetadata(hook_name=HOOK)))
    state = {n: data[prefix + n] for n in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    made.load_state_dict(state)
    return made.eval()

class Store:
    def __init__(self, batches): self.batches = iter(batches)
    def get_batch_tokens(self, n): return next(self.batches)

class Stored:
    """Stands in for a model: its activations at the hook are the cache's rows of that number."""
    def run_with_cache(self, tokens, **_): return None, {HOOK: data["x"][tokens]}

common = dict(activation_scaler=ActivationScaler(), eval_batch_size_prompts=1, model_kwargs={}, ignore_tokens=None)
numbers = torch.arange(len(data["x"]))[None]
found, _ = get_sparsity_and_variance_metrics(sae("real."), Stored(), Store([numbers]), n_batches=1,
    compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
    compute_featurewise_density_statistics=True, **common)
hf = GPT2LMHeadModel.from_pretrained(f"{folder}/model").eval()
c = hf.config
cfg = HookedTransformerConfig(n_layers=c.n_layer, d_model=c.n_embd, n_ctx=c.n_positions, n_heads=c.n_head,
    d_head=c.n_embd // c.n_head, d_mlp=4 * c.n_embd, d_vocab=c.vocab_size, act_fn="gelu_new",
    normalization_type="LN", eps=c.layer_norm_epsilon, device="cpu")
lens = HookedTransformer(cfg)
lens.load_and_process_state_dict(convert_gpt2_weights(hf, cfg), fold_ln=False, center_writing_weights=False,
    center_unembed=False, fold_value_biases=False)
found |= get_downstream_reconstruction_metrics(sae("tiny."), lens, activation_store=Store(data["ids"].split(4)),
    compute_kl=True, compute_ce_loss=True, n_batches=len(data["ids"].split(4)), **common)
print(json.dumps(found))
'''


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sae", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--venv", type=Path, default=Path("sae-lens-env"))
    parser.add_argument("--rows", type=int, default=16_384)
    args = parser.parse_args()
    python = args.venv / "bin" / "python"
    if not python.exists():
        venv.create(args.venv, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", REQUIREMENT], check=True)
    with tempfile.TemporaryDirectory() as folder:
        ours = measured(args.sae, args.cache, args.rows, Path(folder))
        done = subprocess.run([python, "-c", PEER, folder], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    theirs = json.loads(done.stdout.splitlines()[-1])
    print(f"{'metric':<32} {'saetool':>14} {REQUIREMENT:>18} {'relative':>10}")
    worst = 0.0
    for name, mine in ours.items():
        off = abs(mine - theirs[name]) / max(abs(theirs[name]), 1e-12)
        worst = max(worst, off)
        print(f"{name:<32} {mine:>14.7g} {theirs[name]:>18.7g} {off:>10.1e}")
    print(f"largest difference {worst:.1e} (allowed {TOLERANCE})")
    sys.exit(worst > TOLERANCE)


def measured(sae_path: Path, cache_path: Path, n_rows: int, folder: Path) -> dict[str, float]:
    """saetool's numbers, and in ``folder`` what SAELens needs for its own."""
    import torch
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    from saetool.artifacts import sae as sae_files
    from saetool.artifacts.cache import HELDOUT, open_cache
    from saetool.core.sae import SAE, unit_rows
    from saetool.engines.evaluate import reconstruct, rows
    from saetool.engines.loss_recovered import Contexts, measure
    from saetool.engines.model import LanguageModel
    from saetool.engines.source import capture, find_site

    cache, real = open_cache(cache_path), sae_files.load(sae_path).sae
    assert real.threshold is not None
    assert real.subtract_b_dec
    x = torch.cat([part.acts for part in rows(cache, HELDOUT, 4096, n_rows, "cpu")])
    *_, found = reconstruct([real], cache, HELDOUT, 512, limit=n_rows)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder / "model")
    lm = LanguageModel(model, None, {"id": "random"})
    site = find_site(model, "blocks.0.hook_resid_post")
    ids = torch.randint(300, (16, 64))
    acts = capture(lm, site, ids).reshape(-1, 64)
    directions = unit_rows(torch.randn(256, 64))
    tiny = SAE(
        directions.T.contiguous(), torch.zeros(256), directions, acts.mean(0), torch.full((256,), 1.0), "jumprelu", None
    )
    whole = torch.ones(ids.shape, dtype=torch.bool)
    data = Contexts(ids, whole, torch.arange(16)[:, None].expand_as(ids).contiguous())
    *_, losses = measure(lm, site, [tiny], data, acts.mean(0), 4)
    tensors = {"x": x, "ids": ids}
    for prefix, sae in (("real.", real), ("tiny.", tiny)):
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
            tensors[prefix + name] = getattr(sae, name).contiguous()
    save_file(tensors, folder / "data.st")
    quality, ce = vars(found[0].quality), vars(losses[0].values)
    names = ("l0", "l1", "mse", "explained_variance", "explained_variance_legacy", "cossim")
    names += ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias")
    same = {name: quality[name] for name in names}
    same |= {name: ce[name] for name in ("ce_loss_without_sae", "ce_loss_with_sae", "kl_div_with_sae")}
    for kind in ("ce_loss", "kl_div"):
        same[f"{kind}_with_ablation"] = ce[f"{kind}_with_zero_ablation"]
        same[f"{kind}_score"] = ce[f"{kind}_score_zero"]
    return same


if __name__ == "__main__":
    main()
