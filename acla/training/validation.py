"""Validation: PSNR of a network on the middle of every picture, by the task's protocol."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from acla.config import Task
from acla.data.datasets import Pictures
from acla.data.degradations import generator_for, pair
from acla.data.image import from_levels, middle
from acla.data.metrics import protocol_line, score_psnr
from acla.errors import DataError
from acla.models.backbones import Backbone

MIDDLE_SIDE = 256  # pixels of a picture's middle, at most
MIDDLE_GRID = 8  # of JPEG blocks and of the Bayer pattern


def validation_set(paths: Sequence[Path], task: Task, channels: int) -> Pictures:
    """The pictures to validate on, each tried once: a bad one must fail before the training and not
    after. Raises DataError and PictureError with the file."""
    pictures = Pictures(paths)
    for index, path in enumerate(paths):
        _, target = validation_pair(pictures, index, task, channels)
        try:
            score_psnr(target, target, task)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    return pictures


def validation_protocol(task: Task, channels: int) -> str:
    """What the PSNR of a validation is, in one line."""
    side = f"the middle of each picture, at most {MIDDLE_SIDE} × {MIDDLE_SIDE} pixels"
    return f"validation: {side}; {protocol_line(task, channels=channels)}"


def validation_pair(
    pictures: Pictures, index: int, task: Task, channels: int
) -> tuple[Tensor, Tensor]:
    """(input, target) [C,H,W] of a picture's middle."""
    path = pictures.paths[index]
    try:
        clean = middle(from_levels(pictures[index]), MIDDLE_SIDE, MIDDLE_GRID)
        return pair(clean, task, generator_for(path.stem), channels)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


@torch.no_grad()
def each_psnr(
    model: Backbone, pictures: Pictures, task: Task, device: torch.device, most: int | None = None
) -> list[float]:
    """PSNR in dB of each picture's middle, or of the first `most` pictures'."""
    was_training = model.training
    model.eval()
    psnr = []
    for index in range(len(pictures))[:most]:
        low, target = validation_pair(pictures, index, task, model.config.channels)
        restored = model(low.to(device).unsqueeze(0))[0].cpu()
        psnr.append(score_psnr(restored, target, task))
    model.train(was_training)
    return psnr


def by_set(psnr: Sequence[float], sets: Mapping[str, Sequence[Path]]) -> dict[str, float]:
    """Mean PSNR of the sets' pictures: val_psnr of all, and of several sets val_psnr_NAME each."""
    means = {"val_psnr": sum(psnr) / len(psnr)}
    if len(sets) > 1:
        means |= {f"val_psnr_{name}": mean for name, mean in means_by_set(psnr, sets).items()}
    return means


def means_by_set(psnr: Sequence[float], sets: Mapping[str, Sequence[Path]]) -> dict[str, float]:
    """Mean PSNR of the pictures of each set, of all sets in a row."""
    rest = iter(psnr)
    return {
        name: sum(itertools.islice(rest, len(paths))) / len(paths) for name, paths in sets.items()
    }
