"""dictionary_learning's trainers as subjects of `bench_train.py`: `update`, as its training loop calls it."""

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from subject import Setting, serve
from torch import Tensor

TRAINERS = {"batchtopk": BatchTopKTrainer, "topk": TopKTrainer}


class DictionaryLearning:
    def __init__(self, setting: Setting) -> None:
        self._trainer = TRAINERS[setting.arch](
            steps=setting.steps,
            activation_dim=setting.d_in,
            dict_size=setting.latents,
            k=setting.k,
            layer=0,
            lm_name="bench",
            lr=setting.lr,
            warmup_steps=setting.warmup,
            decay_start=setting.steps - setting.decay if setting.decay else None,
            seed=setting.seed,
            device=setting.device,
        )
        if setting.dead_after is not None:
            self._trainer.dead_feature_threshold = setting.dead_after
        self._step = 0

    def step(self, x: Tensor) -> None:
        self._trainer.update(self._step, x)
        self._step += 1

    def weights(self) -> dict[str, Tensor]:
        sae = self._trainer.ae
        return {
            "W_enc": sae.encoder.weight.T,
            "b_enc": sae.encoder.bias,
            "W_dec": sae.decoder.weight.T,
            "b_dec": sae.b_dec,
        }


if __name__ == "__main__":
    serve(DictionaryLearning, ("dictionary-learning",))
