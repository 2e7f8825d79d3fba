"""A network in training: optimiser, moving averages, mixed precision, and one step of them all."""

import contextlib
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from acla import console
from acla.config import ModelConfig, TrainConfig
from acla.distributed import Processes
from acla.errors import AclaError, CheckpointError, UsageError
from acla.models.backbones import Backbone
from acla.models.factory import build_network
from acla.models.serialization import START_OVER
from acla.training.step_graph import CaptureError, StepGraph

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
EMA_DECAY = 0.999
LEAST_MSE = 1e-8  # of values in 0..1: an exact restoration has 80 dB in the loss
CPU = torch.device("cpu")
Parts = Mapping[str, nn.Module | torch.optim.Optimizer | None]


class Trainer:
    """A network with all that a training step changes. A step depends on its number, its patches
    and the configuration alone, so that a run resumed from `state` is equal to the bit.

    Raises UsageError for a number format that the device does not support."""

    def __init__(self, model: ModelConfig, config: TrainConfig, processes: Processes):
        self.config, self.processes, self.device = config, processes, processes.device
        require_amp(config, self.device)
        torch.manual_seed(config.seed)
        self.model = build_network(model).to(self.device).train()
        # Shares the parameters; states and files have the names of `model`.
        self.network = torch.compile(self.model) if config.compile else self.model
        self.optimizer = adam(parameter_groups(self.model, config), config.lr, self.device)
        scaled = config.amp and config.amp_dtype == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.averaged = None
        if config.ema:
            self.averaged = AveragedModel(self.model)
        self.parts: Parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "averaged": self.averaged,
        }
        self.rate: float | None = None  # of the last step
        self.graph: StepGraph | None = None
        if config.cuda_graph:
            if reason := self.why_no_graph():
                console.notice(f"--cuda-graph is left out: {reason}")
            else:
                self.graph = StepGraph(self.update, self.device)
        # Of the steps since `clear_statistics`, on the device: reading them would wait for it.
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []

    @property
    def result(self) -> Backbone:
        """The network to validate and to write: the averages, if they are on."""
        return self.averaged.module if self.averaged else self.model

    def lr(self, step: int) -> float:
        return halved(self.config.lr, step, self.config.lr_half_every)

    def why_no_graph(self) -> str | None:
        """None where a step can be a CUDA graph, else the reason why not."""
        if self.device.type != "cuda":
            return f"there are no CUDA graphs on a {self.device.type}"
        return "it is for one process" if self.processes.world > 1 else None

    def step(self, step: int, indices: Sequence[int], low: Tensor, target: Tensor) -> None:
        """One optimiser step on this process's patches [B,C,h,w] and [B,C,H,W], whose places in the
        whole batch are `indices` [B]; records the loss and the gradient's norm."""
        config = self.config
        inputs = [low, target]
        if config.mask_noise:
            inputs.append(image_seeds(config.seed, step, indices, device=self.device))
        if self.rate != self.lr(step):
            self.rate = self.lr(step)
            set_rate(self.optimizer, self.rate)
        try:
            loss, *norm = (self.graph or self.update)(*inputs)
        except CaptureError as error:
            console.notice(f"--cuda-graph is left out: {first_line(error)}")
            self.graph = None
            loss, *norm = self.update(*inputs)
        self.losses.append(loss)
        self.norms += norm
        if self.averaged:
            self.average()

    def update(
        self, low: Tensor, target: Tensor, seeds: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Change the weights by one step on patches [B,C,h,w], targets [B,C,H,W] and seeds [B] of
        the masks' noise; returns the loss and, with clipping, the gradient's norm."""
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)
        with compiling(config.compile), fastest_convolutions():
            short = AMP_TYPES[config.amp_dtype]
            with torch.autocast(self.device.type, short, enabled=config.amp):
                restored = self.network(low, seeds, config.mask_temperature)
            loss = restoration_loss(config.loss, restored, target)
            self.scaler.scale(loss).backward()
        self.processes.mean_gradients(self.model.parameters())
        norms = []
        if config.clip:
            self.scaler.unscale_(self.optimizer)
            norms = [torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), *norms

    @torch.no_grad()
    def average(self) -> None:
        """Move the averages towards the weights, the first time onto them. (`update_parameters`
        copies the count of steps to the device, which waits for it.)"""
        count = self.averaged.n_averaged  # on the CPU
        averages, weights = (list(m.parameters()) for m in (self.averaged.module, self.model))
        if count:
            torch._foreach_lerp_(averages, weights, ema_share(count))
        else:
            torch._foreach_copy_(averages, weights)
        count += 1

    def statistics(self) -> tuple[list[float], list[float]]:
        """The losses of the steps since the last validation, over all processes, and, with
        clipping, the gradients' norms before it, if finite: the scaler skips the others."""
        losses = self.processes.mean(torch.stack(self.losses)).tolist() if self.losses else []
        norms = torch.stack(self.norms).tolist() if self.norms else []
        return losses, [norm for norm in norms if math.isfinite(norm)]

    def clear_statistics(self) -> None:
        self.losses, self.norms = [], []

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set parameters by name, of the averages too; parameters not listed keep their
        initialisation."""
        for model in (self.model, self.averaged.module if self.averaged else None):
            if model is not None:
                model.load_state_dict({**model.state_dict(), **weights})

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What resuming needs: tensors by name and JSON values."""
        statistics = {
            "losses": [loss.item() for loss in self.losses],
            "norms": [norm.item() for norm in self.norms],
        }
        return state_tensors(self.parts), {"scaler": self.scaler.state_dict(), **statistics}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any], path: Path) -> None:
        """Set what `state` returned, read from `path`. Raises CheckpointError."""
        load_state_tensors(self.parts, tensors, path)
        self.rate = None
        try:
            self.scaler.load_state_dict(values["scaler"])
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"{path}: holds the gradient scaler of another run{START_OVER}"
            ) from error
        self.losses, self.norms = (
            [torch.tensor(value, device=self.device) for value in values.get(name, ())]
            for name in ("losses", "norms")
        )


def parameter_groups(model: Backbone, config: TrainConfig) -> list[dict[str, Any]]:
    """The trained parameters by learning rate: the attention's offsets and weights may have a
    factor on it."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    points = [p for n, p in named if ".points." in n]
    if config.offset_lr_mult == 1 or not points:
        return [{"params": [p for _, p in named]}]
    others = [p for n, p in named if ".points." not in n]
    return [{"params": others}, {"params": points, "factor": config.offset_lr_mult}]


def require_amp(config: TrainConfig, device: torch.device) -> None:
    """Refuse a number format that the device does not support. Raises UsageError."""
    if config.amp_dtype == "fp16" and device.type != "cuda":
        raise UsageError(
            f"--amp-dtype fp16 is for GPUs; on a {device.type} it saves nothing and overflows: "
            "leave it out, for bf16"
        )


@contextlib.contextmanager
def compiling(compiled: bool) -> Iterator[None]:
    """Name the flag in any failure of a compiled network. Raises AclaError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not compiled:
            raise
        raise AclaError(
            f"--compile: torch.compile failed on this network or machine ({first_line(error)}); "
            "leave --compile out, or mend its compiler"
        ) from error


@contextlib.contextmanager
def fastest_convolutions() -> Iterator[None]:
    """On a GPU, convolutions by the kernel that is fastest when tried: patches have one size."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def ema_share(count: Tensor) -> float:
    """The share of the new weights in their exponential moving average after `count` steps: 0.001
    (decay 0.999), larger at first, so that the averages forget the initialisation."""
    return (9 / (10 + count)).clamp(min=1 - EMA_DECAY).item()


# State


def state_tensors(parts: Parts) -> dict[str, Tensor]:
    """The tensors of modules and optimisers under one name each: '<part>.<name>'."""
    tensors = {}
    for prefix, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            for i, entry in part.state_dict()["state"].items():
                tensors |= {f"{prefix}.{i}.{name}": tensor for name, tensor in entry.items()}
        elif part is not None:
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in part.state_dict().items()}
    return tensors


def load_state_tensors(parts: Parts, tensors: dict[str, Tensor], path: Path) -> None:
    """Set modules and optimisers to all that `state_tensors` returned, read from `path`. Raises
    CheckpointError."""
    try:
        for prefix, part in parts.items():
            start = f"{prefix}."
            own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            if isinstance(part, torch.optim.Optimizer):
                entries: dict[int, dict[str, Tensor]] = {}
                for name, tensor in own.items():
                    i, field = name.split(".")
                    entries.setdefault(int(i), {})[field] = tensor
                part.load_state_dict({**part.state_dict(), "state": entries})
            elif part is not None:
                part.load_state_dict(own)
        if unknown := tensors.keys() ^ state_tensors(parts).keys():
            raise ValueError(f"unknown {min(unknown)}")
    except (RuntimeError, ValueError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise CheckpointError(f"{path}: not a state of this run: {reason}{START_OVER}") from error


# Seeds and rates


def image_seeds(
    seed: int, step: int, indices: Sequence[int], stream: int = 0, device: torch.device = CPU
) -> Tensor:
    """One seed [B] int64 for the mask noise of each patch, a function of (seed, stream, step,
    index) alone; on `device`, without waiting for its work."""
    seeds = [draw_seed(seed, 2, stream, step, index) for index in indices]
    return torch.tensor(seeds, pin_memory=device.type == "cuda").to(device, non_blocking=True)


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
        own = rate * group.get("factor", 1)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


def adam(
    parameters: Iterable[nn.Parameter] | list[dict], rate: float, device: torch.device = CPU
) -> torch.optim.Adam:
    """Adam as the paper sets it: β 0.9 and 0.999, ε 1e-8. parameters: all, or groups, which may
    have a `factor` on the rate. On a GPU in one launch, with the rate where a CUDA graph reads it.
    """
    options: dict[str, Any] = {"lr": rate}
    if device.type == "cuda":
        groups = [g if isinstance(g, dict) else {"params": [g]} for g in parameters]
        parameters = [{**g, "lr": torch.tensor(rate, device=device)} for g in groups]
        options |= {"fused": True, "capturable": True}
    return torch.optim.Adam(parameters, betas=(0.9, 0.999), eps=1e-8, **options)


# Loss


def restoration_loss(kind: str, restored: Tensor, target: Tensor) -> Tensor:
    """L1 or MSE of pictures [B,C,H,W] in 0..1, computed on 0..255 values (the range of Eq. 14's λ),
    or minus the mean of their PSNR in dB, which weighs every picture as scores do."""
    error = (restored.float() - target) * 255
    match kind:
        case "l1":
            return error.abs().mean()
        case "mse":
            return error.square().mean()
    mse = error.square().mean((1, 2, 3)) / 255**2
    return 10 * (mse + LEAST_MSE).log10().mean()
