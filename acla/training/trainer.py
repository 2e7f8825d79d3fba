"""A network that learns: its optimiser, averages, number format, and one step of them."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from acla.config import ModelConfig, TrainConfig
from acla.distributed import Processes
from acla.errors import AclaError, CheckpointError, UsageError
from acla.models.backbones import Backbone
from acla.models.factory import build_network
from acla.models.serialization import ANEW, require_fitting

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
        self.optimizer = adam(parameter_groups(self.model, how), how.lr)
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
        return pack(self.parts), {"scaler": self.scaler.state_dict(), **met}

    def unpack(self, tensors: dict[str, Tensor], values: dict[str, Any], path: Path) -> None:
        """Take over what `pack` gave, read from `path`. Raises CheckpointError."""
        unpack(self.parts, tensors, path)
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

    def lr(self, step: int) -> float:
        return halved(self.how.lr, step, self.how.lr_half_every)

    def step(self, step: int, indices: Sequence[int], low: Tensor, target: Tensor) -> None:
        """One optimiser step on this process's patches [B,C,h,w] and [B,C,H,W], whose places in the
        whole batch are `indices` [B]; notes the loss and the gradient's norm."""
        how = self.how
        seeds = image_seeds(how.seed, step, indices).to(self.device)
        set_rate(self.optimizer, self.lr(step))
        self.optimizer.zero_grad(set_to_none=True)
        with compiling(how.compile):
            short = AMP_TYPES[how.amp_dtype]
            with torch.autocast(self.device.type, short, enabled=how.amp):
                restored = self.network(low, seeds, how.mask_temperature)
            loss = restoration_loss(how.loss, restored, target)
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
    if how.offset_lr_mult == 1 or not points:
        return [{"params": [p for _, p in named]}]
    others = [p for n, p in named if ".points." not in n]
    return [{"params": others}, {"params": points, "factor": how.offset_lr_mult}]


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


LEAST_MSE = 1e-8  # of values in 0..1: what is restored exactly has 80 dB in the loss


def pack(parts: dict[str, nn.Module | torch.optim.Optimizer | None]) -> dict[str, Tensor]:
    """The tensors of modules and optimisers under one name each: '<part>.<name>'."""
    tensors = {}
    for prefix, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            for i, entry in part.state_dict()["state"].items():
                tensors |= {f"{prefix}.{i}.{name}": tensor for name, tensor in entry.items()}
        elif part is not None:
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in part.state_dict().items()}
    return tensors


def unpack(
    parts: dict[str, nn.Module | torch.optim.Optimizer | None],
    tensors: dict[str, Tensor],
    path: Path,
) -> None:
    """Give modules and optimisers back what `pack` took, all of it. Raises CheckpointError."""
    require_fitting(like_packed(parts, tensors), tensors, path, ANEW)
    for prefix, part in parts.items():
        own = {
            n.removeprefix(f"{prefix}."): t
            for n, t in tensors.items()
            if n.startswith(f"{prefix}.")
        }
        if isinstance(part, torch.optim.Optimizer):
            entries: dict[int, dict[str, Tensor]] = {}
            for name, tensor in own.items():
                i, field = name.split(".")
                entries.setdefault(int(i), {})[field] = tensor
            if not all(entry["step"] >= 1 for entry in entries.values()):
                raise CheckpointError(f"{path}: {prefix} counts steps from below 1{ANEW}")
            part.load_state_dict({**part.state_dict(), "state": entries})
        elif part is not None:
            part.load_state_dict(own)


def like_packed(
    parts: dict[str, nn.Module | torch.optim.Optimizer | None], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Names, shapes and types that `pack` gives the parts: of Adam, for those parameters that
    `tensors` names, for it keeps nothing of one that it has not stepped."""
    optimizers = {k: part for k, part in parts.items() if isinstance(part, torch.optim.Optimizer)}
    like = pack({prefix: part for prefix, part in parts.items() if prefix not in optimizers})
    named = {name.rpartition(".")[0] for name in tensors}
    for prefix, optimizer in optimizers.items():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, parameter in enumerate(parameters):
            if f"{prefix}.{i}" in named:
                own = {"step": torch.tensor(0.0), "exp_avg": parameter, "exp_avg_sq": parameter}
                like |= {f"{prefix}.{i}.{name}": tensor for name, tensor in own.items()}
    return like


# Seeds and rates


def image_seeds(seed: int, step: int, indices: Sequence[int], stream: int = 0) -> Tensor:
    """One seed [B] int64 for the mask noise of each patch, a function of (seed, stream, step,
    index) alone."""
    return torch.tensor([draw_seed(seed, 2, stream, step, index) for index in indices])


def gate_seed(seed: int, step: int, stream: int = 0) -> int:
    """The seed of a step's insert-position gates: the same for every patch and process."""
    return draw_seed(seed, 3, stream, step)


def draw_seed(*key: int) -> int:
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return int(state.view(np.int64)[0])


def halved(rate: float, step: int, every: int) -> float:
    """The training schedule: halved after every `every` steps (Section 4.1)."""
    return rate * 0.5 ** (step // every)


def cosine(rate: float, step: int, steps: int) -> float:
    """The search's schedule: from `rate` to 0 along half a cosine (Section 4.1)."""
    return rate * 0.5 * (1 + np.cos(np.pi * step / steps))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate; a group of parameters may have a factor of its own on it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1)


def adam(parameters: Iterable[nn.Parameter] | list[dict], rate: float) -> torch.optim.Adam:
    """Adam as the paper sets it: β 0.9 and 0.999, ε 1e-8. parameters: all, or groups, which may
    have a `factor` on the rate."""
    return torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.999), eps=1e-8)


# Losses and validation


def restoration_loss(kind: str, restored: Tensor, target: Tensor) -> Tensor:
    """L1 or MSE of pictures [B,C,H,W] in 0..1, taken on 0..255 values (Eq. 14's λ is for that
    range), or minus the mean of their PSNR in dB, which weighs every picture as scores do."""
    error = (restored.float() - target) * 255
    match kind:
        case "l1":
            return error.abs().mean()
        case "mse":
            return error.square().mean()
    mse = error.square().mean((1, 2, 3)) / 255**2
    return 10 * (mse + LEAST_MSE).log10().mean()
