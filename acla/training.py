"""What training and searching share: the run's folder, seeds, learning rates, losses,
validation."""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from acla.backbone import Backbone
from acla.checkpoint import ANEW, in_one_line, require_fitting, write_atomically
from acla.cli import finite
from acla.config import (
    Task,
    TrainConfig,
    flag_name,
    from_dict,
)
from acla.data import PatchSampler, Pictures
from acla.degrade import generator_for, pair
from acla.errors import NOT_VALID, AclaError, CheckpointError, DataError, UsageError
from acla.flags import as_flag, names_no_setting, override, override_length, task_from_flags
from acla.image import from_levels
from acla.protocol import line, score
from acla.restore import restore

VALIDATION_SIDE = 256  # pixels
NAMED = 16  # pictures, at most, that a message names
LEAST_MSE = 1e-8  # of values in 0..1: what is restored exactly has 80 dB in the loss


# The run's folder


def open_run(folder: Path, state: str, resume: bool) -> Path | None:
    """The state file of the run to go on with, or None for a run that begins. Raises UsageError
    where there is nothing to resume, or something that beginning would overwrite."""
    found = folder / state
    if resume and not found.is_file():
        raise UsageError(f"--resume: {folder} holds no {state}; leave --resume out to begin")
    if resume:
        return found
    if found.is_file():
        raise UsageError(
            f"{folder} already holds a run: --resume goes on with it, --out DIR begins another"
        )
    if (folder / "model.safetensors").is_file():
        raise UsageError(
            f"{folder} already holds a network, model.safetensors, that this run would overwrite: "
            "move it away, or begin elsewhere with --out DIR"
        )
    return None


def append_row(path: Path, row: dict) -> None:
    """Add one JSON row to a log; what is not finite becomes null."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row), allow_nan=False) + "\n")
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file
        raise


def drop_rows_after(path: Path, step: int) -> None:
    """Take back the rows that an interrupted run logged after its last checkpoint, and a row it
    wrote in part."""
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(text)["step"] <= step:
                kept.append(text + "\n")
    write_atomically(path, "".join(kept).encode())


def tensorboard() -> Any:
    """The class SummaryWriter. Raises UsageError where its package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            f"--log needs TensorBoard ({error}): pip install '.[log]', or leave --log out"
        ) from error
    return SummaryWriter


class Log:
    """A run's rows from step `start` on: JSON lines in a file, and curves for TensorBoard in
    `board`, where that is given."""

    def __init__(self, path: Path, start: int, board: Path | None = None):
        self.path = path
        drop_rows_after(path, start)
        self.board = tensorboard()(board, purge_step=start + 1) if board else None

    def add(self, row: dict) -> None:
        append_row(self.path, row)
        if self.board:
            for name, value in row.items():
                if name not in ("step", "seconds"):
                    self.board.add_scalar(name, value, row["step"])
            self.board.flush()


def digest(paths: Iterable[Path]) -> str:
    """A short fingerprint of a set: names and sizes of its files, so that a resumed run notices
    another set."""
    listed = ((path.name, os.path.getsize(path)) for path in paths)
    return hashlib.sha256(json.dumps(sorted(listed)).encode()).hexdigest()[:16]


def resumed_plan(kind: type, progress: dict, args: argparse.Namespace, path: Path) -> Any:
    """The plan [a dataclass of configurations] of an interrupted run, from its state in `path`.
    Flags may repeat it, and make it longer where the schedule allows that; any other change is
    refused. Raises CheckpointError, UsageError."""
    parts = {item.name: item.type for item in dataclasses.fields(kind)}
    try:
        plan = kind(
            **{name: from_dict(parts[name], part) for name, part in progress["plan"].items()}
        )
    except (*NOT_VALID, AttributeError, UsageError) as error:
        reason = in_one_line(error)
        raise CheckpointError(
            f"{path}: the plan inside is not valid or of another version: {reason}{ANEW}"
        ) from error
    for name, begun in progress["flags"].items():
        given = getattr(args, name, None)
        if given not in (None, begun):
            flag = "--lambda auto" if name == "auto" else f"--{flag_name(name)}"
            if begun is None:
                raise UsageError(f"--resume: the run was begun without {flag}: leave it out")
            raise UsageError(f"--resume: the run was begun with {flag} {begun}, not {given}")
    asked, task = task_from_flags(args), plan.task
    repeated = asked and asked.name == task.name and names_no_setting(args, task.name)
    if not repeated and asked not in (None, task):
        raise UsageError(f"--resume: the run is for {plan.task}, not for {asked}")
    for name in parts:
        before = getattr(plan, name)
        if name == "task":
            continue
        has_length = hasattr(before, "epoch_steps")
        after = override_length(before, args) if has_length else override(before, args)
        changed = [f for f in vars(before) if getattr(before, f) != getattr(after, f)]
        if (
            changed == ["steps"]
            and isinstance(before, TrainConfig)
            and after.steps >= progress["step"] + bool(progress.get("losses"))  # not yet validated
        ):
            plan = dataclasses.replace(plan, **{name: after})
        elif changed:
            flags = ", ".join(as_flag(f, getattr(before, f)) for f in changed)
            raise UsageError(f"--resume: the run goes on as it was begun, with {flags}")
    return plan


def require_same_data(progress: dict, data: dict[str, str]) -> None:
    """Refuse to go on with other pictures than the run began with. Raises DataError."""
    changed = [name for name in data if progress["data"].get(name) != data[name]]
    if changed:
        raise DataError(
            f"--resume: the pictures for {' and '.join(changed)} are not those the run began with: "
            "restore them (see --data), or begin anew with --out DIR"
        )


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


def require_finite(loss: float, first: int, last: int, folder: Path) -> None:
    """Stop a run whose loss diverged, before its weights are written. Raises AclaError."""
    if not np.isfinite(loss):
        raise AclaError(
            f"the loss is {loss} between steps {first} and {last}; the checkpoint in {folder} is "
            "from before: lower --rate and begin anew with --out DIR"
        )


def require_finite_steps(
    losses: Sequence[float], psnr: float | None, done: int, sampler: PatchSampler, kept: str
) -> None:
    """Stop a run where the loss of one of its last steps, up to `done`, or the validation after
    them, if there was one, diverged. Raises AclaError with the first such step, counted from 1, the
    patches that made it, counted from 0 through the run, their pictures, and `kept`, the last good
    checkpoint."""
    bad = [i for i, loss in enumerate(losses) if not np.isfinite(loss)]
    if not bad and (psnr is None or not np.isnan(psnr)):
        return
    step = done - len(losses) + bad[0] if bad else done - 1
    what = (
        f"the loss is {losses[bad[0]]}" if bad else f"the validation is {psnr} after a finite loss"
    )
    names = sampler.names(step)
    shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if names[NAMED:] else "")
    first = step * sampler.size
    raise AclaError(
        f"{what} in step {step + 1}, patches {first} to {first + sampler.size - 1}, of {shown}; "
        f"the last good checkpoint is {kept}: lower --rate, or --clip the gradient, and begin anew "
        "with --out DIR"
    )


def validation_set(paths: Sequence[Path], task: Task, channels: int) -> Pictures:
    """The pictures to validate on, each tried once, so that a bad one is found before the training
    and not after. Raises DataError and PictureError, which name the file."""
    pictures = Pictures(paths)
    for index, path in enumerate(paths):
        _, target = validation_pair(pictures, index, task, channels)
        try:
            score(target, target, task)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    return pictures


def validation_protocol(task: Task, channels: int) -> str:
    """What the PSNR of a validation is, in one line."""
    side = f"the middle of each picture, at most {VALIDATION_SIDE} × {VALIDATION_SIDE} pixels"
    return f"validation: {side}; {line(task, channels=channels)}"


def validation_pair(
    pictures: Pictures, index: int, task: Task, channels: int
) -> tuple[Tensor, Tensor]:
    """The input and the target that the middle of a picture makes."""
    path = pictures.paths[index]
    try:
        clean = middle(from_levels(pictures[index]))
        return pair(clean, task, generator_for(path.stem), channels)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def each_psnr(
    model: Backbone, pictures: Pictures, task: Task, device: torch.device, most: int | None = None
) -> list[float]:
    """Validation: PSNR in dB over the middle (at most 256 × 256) of each picture, or of the first
    `most`, by the task's protocol."""
    was_training = model.training
    model.eval()
    found = []
    for index in range(len(pictures))[:most]:
        low, high = validation_pair(pictures, index, task, model.config.channels)
        found.append(score(restore(model, low.to(device)).cpu(), high, task)[0])
    model.train(was_training)
    return found


def by_set(psnr: Sequence[float], sets: Mapping[str, Sequence[Path]]) -> dict[str, float]:
    """Means of the PSNR of the pictures of several sets, one set's after the other's: val_psnr of
    all, and where there is more than one set, val_psnr_NAME of each."""
    means, rest = {"val_psnr": sum(psnr) / len(psnr)}, list(psnr)
    for name, paths in sets.items() if len(sets) > 1 else ():
        own, rest = rest[: len(paths)], rest[len(paths) :]
        means[f"val_psnr_{name}"] = sum(own) / len(own)
    return means


def middle(picture: Tensor) -> Tensor:
    """The middle of [C,H,W], cut on the grid of JPEG blocks and of the Bayer pattern."""
    top, left = ((max(0, side - VALIDATION_SIDE) // 2) // 8 * 8 for side in picture.shape[1:])
    return picture[:, top : top + VALIDATION_SIDE, left : left + VALIDATION_SIDE]
