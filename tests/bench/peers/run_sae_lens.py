"""SAELens' trainer as a subject of `bench_train.py`: `SAETrainer.step` as its `fit` calls it, without log and bar."""

from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from subject import Setting, serve
from torch import Tensor

CLASSES = {
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
}


class SAELens:
    def __init__(self, setting: Setting) -> None:
        sae_class, config_class = CLASSES[setting.arch]
        sae = sae_class(config_class(d_in=setting.d_in, d_sae=setting.latents, k=setting.k, device=setting.device))
        lr = SAETrainerConfig.lr if setting.lr is None else setting.lr
        window = SAETrainerConfig.dead_feature_window
        config = SAETrainerConfig(
            total_training_samples=setting.steps * setting.batch,
            train_batch_size_samples=setting.batch,
            lr=lr,
            lr_end=lr / 10,  # what its runner fills in; without effect on the constant schedule
            lr_warm_up_steps=setting.warmup,
            lr_decay_steps=setting.decay,
            device=setting.device,
            dead_feature_window=window if setting.dead_after is None else setting.dead_after // setting.batch,
        )
        self._trainer = SAETrainer(config, sae, data_provider=iter(()))

    def step(self, x: Tensor) -> None:
        self._trainer.maybe_reset_sparsity()
        self._trainer.step(x)
        self._trainer.n_training_steps += 1

    def weights(self) -> dict[str, Tensor]:
        """Decoder norms folded, as on saving: activations are selected after multiplication by them."""
        sae = self._trainer.sae
        norms = sae.W_dec.norm(dim=1)
        return {
            "W_enc": sae.W_enc * norms,
            "b_enc": sae.b_enc * norms,
            "W_dec": sae.W_dec / norms[:, None],
            "b_dec": sae.b_dec,
        }


if __name__ == "__main__":
    serve(SAELens, ("sae-lens",))
