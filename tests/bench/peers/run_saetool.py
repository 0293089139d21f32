"""saetool's trainer as a subject of `bench_train.py`. Inputs arrive scaled, so its own scale is 1."""

import numpy as np
import torch
from subject import Setting, serve
from torch import Tensor

from saetool.config import TrainConfig
from saetool.engines.train import Trainee, resolve


class Saetool:
    def __init__(self, setting: Setting) -> None:
        config = TrainConfig(
            arch=setting.arch,
            k=setting.k,
            latents=setting.latents,
            tokens=setting.steps * setting.batch,
            batch_size=setting.batch,
            lr=setting.lr,
            warmup=setting.warmup / setting.steps,
            decay=setting.decay / setting.steps,
            dead_after=setting.dead_after,
            normalize=False,
            seed=setting.seed,
        )
        mean = torch.from_numpy(np.load(setting.rows, mmap_mode="r").mean(0, dtype=np.float64))
        self._trainee = Trainee(resolve(config, setting.d_in), setting.d_in, mean, 1.0, setting.device)

    def step(self, x: Tensor) -> None:
        self._trainee.step(x)

    def weights(self) -> dict[str, Tensor]:
        sae = self._trainee.sae()
        return {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}


if __name__ == "__main__":
    serve(Saetool, ("saetool",))
