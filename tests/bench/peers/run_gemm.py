"""The encoder's matrix product alone, `x @ W_enc`: the floor of a training step with a dense encoder."""

import torch
from subject import Setting, serve
from torch import Tensor


class Gemm:
    """``arch`` is the dtype; the conversion of x to it is not timed, only the product and its allocation."""

    def __init__(self, setting: Setting) -> None:
        self._dtype = getattr(torch, setting.arch)
        W_enc = torch.randn(setting.d_in, setting.latents) / setting.d_in**0.5
        self._W_enc = W_enc.to(setting.device, self._dtype)
        self._x = torch.randn(setting.batch, setting.d_in).to(setting.device, self._dtype)

    def step(self, x: Tensor) -> None:
        if self._dtype is torch.float32:
            self._x = x
        self._x @ self._W_enc

    def weights(self) -> dict[str, Tensor]:
        raise NotImplementedError("nothing is trained here")


if __name__ == "__main__":
    serve(Gemm, ())
