"""Several processes, as torchrun starts them: rank, device, and means over all of them."""

import datetime
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acla.errors import UsageError

# One process may score pictures alone while the others wait.
PATIENCE = datetime.timedelta(hours=12)


@dataclass(frozen=True)
class Processes:
    """Process `rank` of `world`, with its device. Every process computes the same weights from its
    share of the batch; the first one writes."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def __str__(self) -> str:
        several = f", {self.world} processes" if self.world > 1 else ""
        return f"{self.device}{several}"

    @property
    def first(self) -> bool:
        return self.rank == 0

    def require_share(self, batch: int) -> None:
        """Refuse a batch that does not divide among the processes. Raises UsageError."""
        if batch % self.world:
            raise UsageError(
                f"--batch-size {batch} does not divide among {self.world} processes: "
                "give a multiple"
            )

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes; no gradient flows through it."""
        if self.world == 1:
            return tensor.detach()
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / self.world

    def mean_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over all processes. The same parameters must have one
        in each, as they have where all draw the same gates."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.world > 1 and gradients:
            for gradient, mean in zip(gradients, self.mean_of_each(gradients), strict=True):
                gradient.copy_(mean)

    def mean_of_each(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """`mean` of one or more tensors, by one exchange."""
        flat = self.mean(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def wait(self) -> None:
        """Wait for every process."""
        if self.world > 1:
            dist.barrier()

    def all_rows(self, rows: dict) -> list[dict]:
        """The rows of every process, in the order of their ranks."""
        shares: list[dict] = [rows]
        if self.world > 1:
            shares = [{}] * self.world
            dist.all_gather_object(shares, rows)
        return shares

    def leave(self) -> None:
        """Leave the process group; no collective call may follow."""
        if self.world > 1:
            dist.destroy_process_group()


def join(device: torch.device) -> Processes:
    """Join torchrun's processes, each on its own GPU (NCCL) or a CPU (gloo); without any, alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Processes(device)
    backend = "gloo"
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    return Processes(device, dist.get_rank(), dist.get_world_size())


def means(processes: Processes, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor with the value of its mean over all processes and the gradient of its own share:
    averaged gradients of any function of these are the gradients of the function of the mean."""
    if processes.world == 1 or not tensors:
        return list(tensors)
    each = processes.mean_of_each(tensors)
    return [own + (mean - own.detach()) for own, mean in zip(tensors, each, strict=True)]
