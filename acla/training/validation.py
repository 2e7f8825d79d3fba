"""What training and searching share: the run's folder, seeds, learning rates, losses,
validation."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from acla.config import Task
from acla.data.datasets import Pictures
from acla.data.degradations import generator_for, pair
from acla.data.image import from_levels
from acla.data.metrics import protocol_line, score
from acla.errors import DataError
from acla.models.backbones import Backbone

VALIDATION_SIDE = 256  # pixels


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
    return f"validation: {side}; {protocol_line(task, channels=channels)}"


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
        with torch.no_grad():
            restored = model(low.to(device).unsqueeze(0))[0].cpu()
        found.append(score(restored, high, task)[0])
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
