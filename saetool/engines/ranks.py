"""Several processes, started by ``torchrun``, that share one piece of work."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any


@dataclass(frozen=True)
class Ranks:
    """This process among all: number ``rank`` of ``world``."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """Number of this process on its machine."""

    @property
    def leads(self) -> bool:
        """Whether this is the process that talks, locks and finishes."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()

    def agree(self, value: Any) -> Any:
        """The leader's ``value``, everywhere."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def leave(self) -> None:
        if self.world > 1:
            import torch.distributed as dist

            dist.destroy_process_group()


def join() -> Ranks:
    """Join the others, if ``torchrun`` started this process; alone otherwise."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        return Ranks()
    import torch.distributed as dist

    # Only small facts are exchanged, so gloo does on every device. A process may wait long for the slowest one.
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    return Ranks(dist.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0")))
