"""Several processes, started by ``torchrun``, on one piece of work.

In ``cache`` each computes other shards. In ``train`` each holds an equal part of a batch's rows, and all hold the same
weights.
"""

import atexit
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from saetool.core.losses import Share
from saetool.errors import ConfigError


@dataclass(frozen=True)
class Processes:
    """This process, number ``rank`` of ``size``. With one, every method is the identity."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that talks, locks and writes what all have made."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    def agree(self, value: Any) -> Any:
        """The leader's ``value``, everywhere."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, flag: bool, device: str) -> bool:
        """Whether ``flag`` is set in any process."""
        if self.size == 1:
            return flag
        total = torch.tensor([int(flag)], device=device)
        dist.all_reduce(total)
        return bool(total)

    def part(self, x: Tensor) -> Tensor:
        """This process's rows of a joint batch: the ``rank``-th of ``size`` equal slices."""
        n = len(x) // self.size
        return x[self.rank * n : (self.rank + 1) * n]

    def share(self) -> Share:
        """What the losses need to know: the number of parts, and how to join values of all of them."""
        return Share(self.size, self.gather if self.size > 1 else None)

    def gather(self, values: Tensor) -> Tensor:
        """The 1-D ``values`` of all processes, in the order of ranks; their lengths may differ."""
        lengths = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(values)], device=values.device))
        longest = max(int(n) for n in lengths)
        padded = values.new_zeros(longest)
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])

    def sum_(self, tensors: Iterable[Tensor | None]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.size > 1:
            for tensor in tensors:
                if tensor is not None:
                    dist.all_reduce(tensor)

    def leave(self) -> None:
        """Part from the others; again, do nothing."""
        if self.size > 1 and dist.is_initialized():
            # The group's threads may still hold tensors of the last exchange, and need the interpreter to free them.
            # Its end waits for its threads and, in some versions of torch, keeps the interpreter meanwhile.
            time.sleep(0.2)
            dist.destroy_process_group()


def join(device: str = "cpu", *, tensors: bool = False) -> tuple[Processes, str]:
    """Join the processes that ``torchrun`` started, if it did; and this one's device (cuda:LOCAL_RANK on GPUs).

    ``tensors``: whether tensors of that device are exchanged; small facts alone go by gloo whatever the device.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
        return Processes(), device
    if device == "mps":
        raise ConfigError("--device mps with several processes: there is one such device", "run it without torchrun")
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # The functions of torch.distributed.nn have the group of all as a default argument. Imported later, by the first
    # optimizer, they would keep it and its threads beyond `leave`; and a thread of it that meets the interpreter's end
    # aborts the process.
    import_module("torch.distributed.nn")
    backend = "nccl" if tensors and device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=7))  # one may wait long for the slowest
    processes = Processes(dist.get_rank(), dist.get_world_size())
    if backend == "gloo":
        atexit.register(processes.leave)  # who fails or is interrupted leaves, too
    return processes, device
