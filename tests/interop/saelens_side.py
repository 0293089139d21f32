"""In SAELens' environment: ``make DIR`` trains tiny SAEs with its code and saves them with its code, ``check DIR``
loads exported folders with its code and answers, ``others DIR`` tries its own loaders on other libraries' folders.
"""

import json
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from data import BATCH, STEPS, D, F, K, batches, inputs, read_probe, rows, write_answer, write_probe
from sae_lens import (
    SAE,
    AbsTopKTrainingSAE,
    AbsTopKTrainingSAEConfig,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatchingPursuitTrainingSAE,
    MatchingPursuitTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer


def kinds() -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    jump = {"l0_coefficient": 0.02, "jumprelu_bandwidth": 0.5, "jumprelu_init_threshold": 0.3}
    standard = (StandardTrainingSAE, StandardTrainingSAEConfig)
    topk = (TopKTrainingSAE, TopKTrainingSAEConfig)
    return {
        "standard": (*standard, {"l1_coefficient": 0.1}),
        "standard_square": (*standard, {"l1_coefficient": 0.02, "d_sae": D}),
        "standard_no_b_dec": (*standard, {"l1_coefficient": 0.1, "apply_b_dec_to_input": False}),
        "standard_layer_norm": (*standard, {"l1_coefficient": 0.05, "normalize_activations": "layer_norm"}),
        "gated": (GatedTrainingSAE, GatedTrainingSAEConfig, {"l1_coefficient": 0.1}),
        "topk": (*topk, {"k": K}),
        "topk_plain": (*topk, {"k": K, "rescale_acts_by_decoder_norm": False}),
        "topk_constant_norm": (*topk, {"k": K, "normalize_activations": "constant_norm_rescale"}),
        "abstopk": (AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig, {"k": K}),
        "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, jump),
        "jumprelu_scaled": (
            JumpReLUTrainingSAE,
            JumpReLUTrainingSAEConfig,
            {**jump, "normalize_activations": "expected_average_only_in"},
        ),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": K}),
        "matryoshka_batchtopk": (
            MatryoshkaBatchTopKTrainingSAE,
            MatryoshkaBatchTopKTrainingSAEConfig,
            {"k": K, "matryoshka_widths": [F // 4, F // 2, F]},
        ),
        "matching_pursuit": (MatchingPursuitTrainingSAE, MatchingPursuitTrainingSAEConfig, {"max_iterations": K}),
    }


def metadata() -> SAEMetadata:
    return SAEMetadata(
        model_name="gpt2", hook_name="blocks.8.hook_resid_pre", hf_hook_name="transformer.h.7", context_size=128
    )


def make(out: Path) -> None:
    for name, (sae_class, config_class, options) in kinds().items():
        torch.manual_seed(0)
        sae = sae_class(config_class(**{"d_in": D, "d_sae": F, "metadata": metadata(), **options}))
        config = SAETrainerConfig(
            total_training_samples=STEPS * BATCH,
            train_batch_size_samples=BATCH,
            lr=3e-3,
            lr_end=3e-4,
            n_batches_for_norm_estimate=20,
        )
        trainer = SAETrainer(cfg=config, sae=sae, data_provider=batches())
        trained = trainer.fit()
        folder = out / name
        folder.mkdir(parents=True)
        trained.save_inference_model(folder)
        loaded = SAE.load_from_disk(folder)
        x = inputs()
        with torch.no_grad():
            z = loaded.encode(x)
            write_probe(folder, x, z, loaded.decode(z))
        if name == "batchtopk":  # a training checkpoint, whose selection is over the batch
            checkpoint = out / "batchtopk_checkpoint"
            trained.save_model(checkpoint)
            with torch.no_grad():
                z = trained.encode(x)
                write_probe(checkpoint, x, z, trained.decode(z))
            _threshold_from_scratch(out / "batchtopk_short", name)


def _threshold_from_scratch(folder: Path, name: str) -> None:
    """A short run, whose running threshold is far from the one that gives k (its average starts at 0)."""
    sae_class, config_class, options = kinds()[name]
    torch.manual_seed(0)
    sae = sae_class(config_class(**{"d_in": D, "d_sae": F, "metadata": metadata(), **options}))
    config = SAETrainerConfig(total_training_samples=100 * BATCH, train_batch_size_samples=BATCH, lr=3e-3, lr_end=3e-4)
    trained = SAETrainer(cfg=config, sae=sae, data_provider=batches()).fit()
    trained.save_inference_model(folder)
    loaded = SAE.load_from_disk(folder)
    x = inputs()
    with torch.no_grad():
        z = loaded.encode(x)
        write_probe(folder, x, z, loaded.decode(z))
        l0 = float((loaded.encode(rows(4096, 12345)) > 0).float().sum(1).mean())
    print(f"SAELens batchtopk after 100 steps: asked L0 {K}, inference L0 {l0:.2f}", file=sys.stderr)


def check(out: Path) -> None:
    for folder in sorted(p for p in out.iterdir() if p.is_dir()):
        sae = SAE.load_from_disk(folder)
        with torch.no_grad():
            z = sae.encode(read_probe(folder)["x"])
            write_answer(folder, z, sae.decode(z))


def others(out: Path) -> None:
    """SAELens' loaders for sparsify (from disk) and dictionary_learning (from the hub, pointed at local files)."""
    results = {}
    for folder in sorted(p for p in out.iterdir() if p.is_dir()):
        try:
            if (folder / "sae.safetensors").is_file():
                place = out / "named" / "layers.5"  # its loader takes the layer from the folder's name
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(folder, place)
                sae = SAE.load_from_disk(place, converter=loaders.sparsify_disk_loader, dtype="float32")
            else:
                loaders.hf_hub_download = lambda repo_id, filename, **_: f"{repo_id}/{filename}"
                cfg, state, _ = loaders.dictionary_learning_sae_huggingface_loader_1(str(out), folder.name, "cpu")
                cfg = loaders.handle_config_defaulting(cfg)
                sae_class = SAE.get_sae_class_for_architecture(cfg["architecture"])
                sae = sae_class(SAE.get_sae_config_class_for_architecture(cfg["architecture"]).from_dict(cfg))
                sae.load_state_dict(state)
            probe = read_probe(folder)
            with torch.no_grad():
                z = sae.encode(probe["x"])
                results[folder.name] = [
                    float((z - probe["z"]).abs().max()),
                    float((sae.decode(z) - probe["x_hat"]).abs().max()),
                ]
        except Exception as error:  # whatever stops their loader is the result
            print(traceback.format_exc(limit=-2), file=sys.stderr)
            results[folder.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"
    shutil.rmtree(out / "named", ignore_errors=True)
    (out / "saelens_reads.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"make": make, "check": check, "others": others}[sys.argv[1]](Path(sys.argv[2]))
