"""sparsify's TopK as a subject of `bench_train.py`.

Its trainer is one loop around a language model, so what that loop does for each batch of activations is spelt out here
in its order (sparsify/trainer.py, `fit`): decoder norms, forward, backward, dead counters, projection, optimizer.
`arch` is the optimizer: signum (its default, schedule-free) or adam. AuxK is off, as by default; a batch is in tokens.
"""

import torch
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from subject import Setting, serve
from torch import Tensor


class Sparsify:
    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._sae = SparseCoder(
            setting.d_in, SparseCoderConfig(num_latents=setting.latents, k=setting.k), setting.device, torch.float32
        )
        scale = (setting.latents / 2**14) ** 0.5
        self._schedule = None
        if setting.arch == "adam":
            self._optimizer = torch.optim.Adam(self._sae.parameters(), lr=setting.lr or 2e-4 / scale)
            self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._factor)
        else:
            signum = SignSGD(self._sae.parameters(), lr=setting.lr or 5e-3 / scale)
            self._optimizer = ScheduleFreeWrapper(signum, momentum=0.95)
            self._optimizer.train()
        self._since_fired = torch.zeros(setting.latents, dtype=torch.long, device=setting.device)
        self._fired = torch.zeros(setting.latents, dtype=torch.bool, device=setting.device)
        self._steps = 0

    def _factor(self, step: int) -> float:
        setting = self._setting
        up = (step + 1) / max(setting.warmup, 1)
        down = (setting.steps - step) / max(setting.decay, 1)
        return min(1.0, up, down)

    def step(self, x: Tensor) -> None:
        sae = self._sae
        if self._steps == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        total_variance = (x - x.mean(0)).pow(2).sum()
        out = sae(x=x, y=x, dead_mask=None, total_variance=total_variance)
        self._fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + 0.0 * out.auxk_loss + out.multi_topk_fvu / 8).backward()  # both off; the sum is fit's
        sae.remove_gradient_parallel_to_decoder_directions()
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._schedule is not None:
            self._schedule.step()
        with torch.no_grad():
            self._since_fired += len(x)
            self._since_fired[self._fired] = 0
            self._fired.zero_()
        self._steps += 1

    def weights(self) -> dict[str, Tensor]:
        if isinstance(self._optimizer, ScheduleFreeWrapper):
            self._optimizer.eval()
        sae = self._sae
        return {
            "W_enc": sae.encoder.weight.T,
            "b_enc": sae.encoder.bias,
            "W_dec": sae.W_dec,
            "b_dec": sae.b_dec,
        }


if __name__ == "__main__":
    serve(Sparsify, ("eai-sparsify",))
