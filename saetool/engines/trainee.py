"""One SAE in training: parameters, Adam's moments, when each latent last fired."""

from dataclasses import replace

import torch
from torch import Tensor

from saetool.config import SPARSE, TrainConfig
from saetool.core.gradients import backward
from saetool.core.losses import Losses, Objective, Parameters
from saetool.core.sae import SAE, fold_decoder_norms, fold_scale, initial, prefix_of, unit_rows
from saetool.engines.processes import Processes
from saetool.engines.recipe import n_steps, steps_of

ROWS = 1024
"""Decoder rows projected at a time: so many stay in a core's cache between the passes."""


class Trainee:
    """One SAE in training."""

    def __init__(
        self,
        config: TrainConfig,
        d_in: int,
        center: Tensor,
        scale: float,
        device: str,
        processes: Processes = Processes(),
    ) -> None:
        """``config`` resolved; ``center`` [d_in] in raw units, the start of b_dec; ``scale`` of the inputs."""
        self.config, self.scale, self.processes = config, scale, processes
        self.steps_done = 0
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + config.latents)
        sae = initial(d_in, config.latents, config.arch, config.k, center.float() * scale, generator)
        tensors: dict[str, Tensor] = {
            "encoder": sae.W_enc.T.contiguous(),
            "b_enc": sae.b_enc,
            "W_dec": sae.W_dec,
            "b_dec": sae.b_dec,
        }
        if sae.threshold is not None:
            tensors["log_threshold"] = sae.threshold.log()
        if config.arch == "gated":
            tensors |= {"r_mag": torch.zeros(config.latents), "b_mag": torch.zeros(config.latents)}
        self.parameters = Parameters(**{name: t.to(device).requires_grad_() for name, t in tensors.items()})
        if config.freeze_decoder:
            self.parameters.W_dec.requires_grad_(False)
        self.adam = torch.optim.Adam(
            [p for p in self.parameters.named().values() if p.requires_grad],
            lr=config.lr or 0.0,
            betas=(config.beta1, config.beta2),
            fused=torch.device(device).type in ("cpu", "cuda"),
        )
        self.since_fired = torch.zeros(config.latents, dtype=torch.int64, device=device)
        self.mean_cut = torch.zeros(2, dtype=torch.float64)
        """Running Σ and weight of the batch cuts: their ratio is the mean, free of the start's bias."""
        self.objective = Objective(
            arch=config.arch,
            k=config.k,
            sparsity={"relu": config.l1, "gated": config.l1, "jumprelu": config.l0}.get(config.arch, 0.0),
            aux_alpha=config.aux_alpha if config.arch in SPARSE else 0.0,
            k_aux=config.k_aux or 0,
            aux_scale=config.aux_scale,
            bandwidth=config.bandwidth or 0.0,
            penalty=config.penalty,
            prefixes=config.prefixes or (config.latents,),
            bfloat16=config.dtype == "bf16",
        )
        self._cut = self._cut_hint = 0.0

    def step(self, x: Tensor) -> Losses:
        """One step of Adam on the scaled batch ``x`` (with several processes: on this one's rows of it)."""
        config, p = self.config, self.parameters
        total = n_steps(config)
        weight = min(1.0, (self.steps_done + 1) / max(steps_of(config.sparsity_warmup, total), 1))
        result = backward(p, x, self.objective, self.dead(), self._cut_hint, weight, self.processes.share())
        result = self._joined(result)
        if config.decoder_norm == "unit" and p.W_dec.grad is not None:
            _project_out(p.W_dec.grad, p.W_dec.detach())
        if config.clip:
            torch.nn.utils.clip_grad_norm_([t for t in p.named().values() if t.grad is not None], config.clip)
        for group in self.adam.param_groups:
            group["lr"] = (config.lr or 0.0) * _trapezoid(self.steps_done, total, config.warmup, config.decay)
        self.adam.step()
        if config.decoder_norm == "unit" and p.W_dec.requires_grad:
            with torch.no_grad():
                for rows in p.W_dec.split(ROWS):
                    rows.copy_(unit_rows(rows))
        self.since_fired += len(x) * self.processes.size
        self.since_fired[result.fired] = 0
        self.mean_cut = 0.99 * self.mean_cut + 0.01 * torch.tensor([result.cut, 1.0], dtype=torch.float64)
        # The next cut is near this one: as near as this one was to the last, as a rule. It only saves time (core/ops).
        self._cut_hint = max(0.99 * result.cut - 2 * abs(result.cut - self._cut), 0.0)
        self._cut = result.cut
        self.steps_done += 1
        return result

    def _joined(self, result: Losses) -> Losses:
        """Gradients and losses of the joint batch, from each process's share of them."""
        if self.processes.size == 1:
            return result
        self.processes.sum_(t.grad for t in self.parameters.named().values())
        numbers = torch.stack([result.loss, result.mse, result.sparsity, result.aux]).double()
        fired, active = result.fired.to(torch.int32), result.active.clone()
        self.processes.sum_([numbers, fired, active])
        loss, mse, sparsity, aux = numbers
        return Losses(loss, mse, sparsity, aux, fired > 0, active, result.cut)

    def dead(self) -> Tensor:
        """Latents that have not fired for ``dead_after`` tokens, bool [latents]."""
        return self.since_fired >= (self.config.dead_after or 0)

    def is_finite(self) -> bool:
        """Whether no parameter holds NaN or infinity."""
        return all(bool(p.detach().sum().isfinite()) for p in self.parameters.named().values())

    def resample(self, x: Tensor) -> int:
        """Give the dead latents of a relu SAE the directions of badly reconstructed rows of ``x``; how many.

        Bricken et al. 2023 (Towards Monosemanticity, appendix): rows are drawn with probability proportional to their
        squared error; the decoder row becomes the unit-norm centred row, the encoder row the same at 0.2 of the mean
        alive norm, b_enc 0, Adam's moments 0. The batch at hand takes the place of their 819,200 inputs.
        """
        dead = self.dead().nonzero().squeeze(1)
        if not len(dead):
            return 0
        p, processes = self.parameters, self.processes
        sae = replace(self._raw(), b_enc=p.b_enc.detach())
        with torch.no_grad():
            error = (x - sae.decode(sae.encode(x))).square().sum(1)
            joint = processes.gather(error) if processes.size > 1 else error
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.steps_done)
            chosen = torch.multinomial(joint.double().cpu(), min(len(dead), len(joint)), generator=generator)
            dead = dead[: len(chosen)]
            rows = x.new_zeros(len(chosen), x.shape[1])
            first = processes.rank * len(x)
            mine = (chosen >= first) & (chosen < first + len(x))
            rows[mine.to(x.device)] = x[(chosen[mine] - first).to(x.device)]
            processes.sum_([rows])
            directions = unit_rows(rows - p.b_dec)
            alive = ~self.dead()
            norm = p.encoder[alive].norm(dim=1).mean() if bool(alive.any()) else x.new_ones(())
            p.encoder[dead] = 0.2 * norm * directions
            p.W_dec[dead] = directions
            p.b_enc[dead] = 0.0
            for tensor in (p.encoder, p.W_dec, p.b_enc):
                for part in ("exp_avg", "exp_avg_sq"):
                    self.adam.state[tensor][part][dead] = 0.0
            self.since_fired[dead] = 0
        return len(dead)

    def _raw(self) -> SAE:
        """The SAE on scaled inputs, decoder norms as they are; its tensors are the parameters'."""
        p = {name: t.detach() for name, t in self.parameters.named().items()}
        W_enc, b_enc, threshold = p["encoder"].T, p["b_enc"], None
        if self.config.arch == "jumprelu":
            threshold = p["log_threshold"].exp()
        if self.config.arch == "gated":
            # relu(e^r u + b_mag) where u + b_gate > 0 is p = e^r u + b_mag where p > b_mag − e^r b_gate: a JumpReLU.
            gain = p["r_mag"].exp()
            W_enc, b_enc, threshold = W_enc * gain, p["b_mag"], p["b_mag"] - gain * b_enc
        if self.config.arch == "matryoshka":
            threshold = torch.full_like(b_enc, self.threshold)
        k = self.config.k if self.config.arch in SPARSE else None
        return SAE(W_enc, b_enc, p["W_dec"], p["b_dec"], threshold, self.config.arch, k, subtract_b_dec=True)

    @property
    def threshold(self) -> float:
        """The running mean of the batches' smallest kept values, in scaled units (0 before the first step)."""
        return float(self.mean_cut[0] / self.mean_cut[1].clamp_min(1e-300))

    def sae(self, width: int | None = None) -> SAE:
        """The SAE on raw inputs: scale and decoder norms folded in; of matryoshka, the prefix of ``width`` latents."""
        sae = self._raw().map(lambda t: t.cpu().clone().contiguous())
        if self.config.decoder_norm == "free":
            sae = fold_decoder_norms(sae)
        if width is not None and width < sae.d_sae:
            sae = prefix_of(sae, width)
        return fold_scale(sae, self.scale)

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, by name."""
        tensors = {
            "since_fired": self.since_fired,
            "mean_cut": self.mean_cut,
            "steps_done": torch.tensor([self.steps_done]),
        }
        for name, parameter in self.parameters.named().items():
            tensors[name] = parameter
            for part, value in self.adam.state.get(parameter, {}).items():
                tensors[f"adam.{part}.{name}"] = value if value.dim() else value.reshape(1)
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from ``state()``'s tensors."""
        with torch.no_grad():
            for name, parameter in self.parameters.named().items():
                parameter.copy_(tensors[name])
                if f"adam.step.{name}" in tensors:
                    self.adam.state[parameter] = {
                        "step": tensors[f"adam.step.{name}"].reshape(()).clone(),
                        "exp_avg": tensors[f"adam.exp_avg.{name}"].to(parameter.device),
                        "exp_avg_sq": tensors[f"adam.exp_avg_sq.{name}"].to(parameter.device),
                    }
        self.since_fired.copy_(tensors["since_fired"])
        self.mean_cut = tensors["mean_cut"].cpu().clone()
        self.steps_done = int(tensors["steps_done"])


def _project_out(gradient: Tensor, rows: Tensor) -> None:
    """Remove each row's gradient component along the row: the norm constraint's tangent (paper, appendix A.2)."""
    for g, w in zip(gradient.split(ROWS), rows.split(ROWS), strict=True):
        g.addcmul_((g * w).sum(1, keepdim=True), w, value=-1)


def _trapezoid(step: int, total: int, warmup: float, decay: float) -> float:
    """Learning-rate factor: up over the first ``warmup``, down to 0 over the last ``decay`` (shares, or steps)."""
    up = (step + 1) / max(steps_of(warmup, total), 1)
    down = (total - step) / max(steps_of(decay, total), 1)
    return min(1.0, up, down)
