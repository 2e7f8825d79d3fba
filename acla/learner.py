"""A network that learns: its optimiser, averages, number format, and one step of them."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from acla import training
from acla.backbone import Backbone
from acla.checkpoint import ANEW
from acla.config import ModelConfig, TrainConfig
from acla.errors import AclaError, CheckpointError, UsageError
from acla.networks import build_network
from acla.processes import Processes

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
EMA_DECAY = 0.999


class Learner:
    """A network with all that a step of training changes. A step depends on its number, its patches
    and the configuration alone, so that a run resumed from `pack` goes on to the bit.

    Raises UsageError for a number format that the device has no use for."""

    def __init__(self, model: ModelConfig, how: TrainConfig, processes: Processes):
        self.how, self.processes, self.device = how, processes, processes.device
        require_amp(how, self.device)
        torch.manual_seed(how.seed)
        self.model = build_network(model).to(self.device).train()
        # Shares the parameters; the names of `model` are those that are kept.
        self.network = torch.compile(self.model) if how.compile else self.model
        self.optimizer = training.adam(parameter_groups(self.model, how), how.rate)
        # Finds the factor that fp16's gradients need, and leaves out the steps where it was too
        # large.
        scaled = how.amp and how.amp_dtype == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.averaged = None
        if how.ema:
            self.averaged = AveragedModel(self.model, avg_fn=moving_average)
        self.parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "averaged": self.averaged,
        }
        # Of the steps since `met`, on the device: reading them would wait for it.
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []

    def begin_with(self, weights: Mapping[str, Tensor]) -> None:
        """Take over weights by their names, into the averages too; what is not named stays new."""
        for model in (self.model, self.averaged.module if self.averaged else None):
            if model is not None:
                model.load_state_dict({**model.state_dict(), **weights})

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What resuming needs: tensors by name and JSON values."""
        met = {
            name: [value.item() for value in values]
            for name, values in (("losses", self.losses), ("norms", self.norms))
        }
        return training.pack(self.parts), {"scaler": self.scaler.state_dict(), **met}

    def unpack(self, tensors: dict[str, Tensor], values: dict[str, Any], path: Path) -> None:
        """Take over what `pack` gave, read from `path`. Raises CheckpointError."""
        training.unpack(self.parts, tensors, path)
        own, given = self.scaler.state_dict(), values["scaler"]
        if given.keys() != own.keys() or not all(same_kind(given[name], own[name]) for name in own):
            raise CheckpointError(f"{path}: holds the gradient scaler of another run{ANEW}")
        self.scaler.load_state_dict(given)
        self.losses, self.norms = (
            [torch.tensor(value, device=self.device) for value in values.get(name, ())]
            for name in ("losses", "norms")
        )

    @property
    def result(self) -> Backbone:
        """The network to validate and to write: the averages where they are kept."""
        return self.averaged.module if self.averaged else self.model

    def rate(self, step: int) -> float:
        return training.halved(self.how.rate, step, self.how.halve)

    def step(self, step: int, indices: Sequence[int], low: Tensor, target: Tensor) -> None:
        """One optimiser step on this process's patches [B,C,h,w] and [B,C,H,W], whose places in the
        whole batch are `indices` [B]; notes the loss and the gradient's norm."""
        how = self.how
        seeds = training.image_seeds(how.seed, step, indices).to(self.device)
        training.set_rate(self.optimizer, self.rate(step))
        self.optimizer.zero_grad(set_to_none=True)
        with compiling(how.compile):
            short = AMP_TYPES[how.amp_dtype]
            with torch.autocast(self.device.type, short, enabled=how.amp):
                restored = self.network(low, seeds, how.mask_temperature)
            loss = training.restoration_loss(how.loss, restored, target)
            self.scaler.scale(loss).backward()
        self.losses.append(loss.detach())
        self.processes.mean_gradients(self.model.parameters())
        if how.clip:
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), how.clip)
            self.norms.append(norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged:
            self.averaged.update_parameters(self.model)

    def met(self) -> tuple[list[float], list[float]]:
        """The losses of the steps since the last call, over all processes, and, where gradients are
        clipped, their norms before, but for those that are not finite: the scaler left them out."""
        losses = self.processes.mean(torch.stack(self.losses)).tolist()
        norms = torch.stack(self.norms).tolist() if self.norms else []
        self.losses, self.norms = [], []
        return losses, [norm for norm in norms if math.isfinite(norm)]


def parameter_groups(model: Backbone, how: TrainConfig) -> list[dict[str, Any]]:
    """What learns, for the optimiser: offsets and weights of keys have a rate of their own where
    one is asked for."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    points = [p for n, p in named if ".points." in n]
    if how.offset_rate == 1 or not points:
        return [{"params": [p for _, p in named]}]
    others = [p for n, p in named if ".points." not in n]
    return [{"params": others}, {"params": points, "factor": how.offset_rate}]


def same_kind(given: Any, own: float) -> bool:
    """Whether a value can stand for one of a scaler: of its type, and not below 0."""
    most = 2**31 if type(own) is int else math.inf
    return type(given) is type(own) and 0 <= given < most


def require_amp(how: TrainConfig, device: torch.device) -> None:
    """Refuse a number format that the device has no use for. Raises UsageError."""
    if how.amp_dtype == "fp16" and device.type != "cuda":
        raise UsageError(
            f"--amp-dtype fp16 is for GPUs; on a {device.type} it saves nothing and overflows: "
            "leave it out, for bf16"
        )


@contextlib.contextmanager
def compiling(asked: bool) -> Iterator[None]:
    """Where the network is compiled, name the flag in whatever fails in it. Raises AclaError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not asked:
            raise
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise AclaError(
            f"--compile: torch.compile failed on this network or machine ({reason}); leave "
            "--compile out, or see to its compiler"
        ) from error


def moving_average(average: Tensor, current: Tensor, count: Tensor) -> Tensor:
    """Exponential moving average of weights, decay 0.999; shorter at first, so that the start is
    forgotten. `count` stays a tensor: reading it would wait for the device."""
    share = (9 / (10 + count)).clamp(min=1 - EMA_DECAY)
    return average.lerp(current, share.to(average.dtype))
