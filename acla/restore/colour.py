"""From a photo to a network's input, and from its output to a photo.

A network of one channel sees Y; a colour photo keeps its Cb and Cr. JPEG networks see the Y that
the file holds (full range), which was quantised; the others were trained on MATLAB's. Networks of
three channels see RGB; what they make of a JPEG's becomes Y, Cb, Cr again.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from acla.config import Task
from acla.data import image
from acla.data.degradations import mosaic
from acla.data.jpeg import Cells, projected
from acla.errors import CheckpointError, PictureError
from acla.models.serialization import Checkpoint
from acla.restore import photo
from acla.restore.inference import strips, within_memory
from acla.restore.photo import Photo


def planes(levels: np.ndarray) -> Tensor:
    """Levels [H, W, C] as a float32 picture [C, H, W] in 0..1."""
    return image.from_levels(levels.transpose(2, 0, 1))


def full_luma(levels: np.ndarray, ycc: bool) -> Tensor:
    """Y in full range [1, H, W] of colour levels [H, W, 3]."""
    return planes(levels[:, :, :1]) if ycc else image.to_full(image.luma(planes(levels)))


@dataclass
class NetworkInput:
    """The picture [channels, H, W] in 0..1 that a network sees of a photo, gray as it is. Its parts
    are made when they are read, so that no whole photo lies in float32."""

    photo: Photo
    task: Task
    channels: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, *self.photo.levels.shape[:2]

    def __getitem__(self, part: tuple[slice, slice, slice]) -> Tensor:
        levels, ycc = self.photo.levels[part[1:]], self.photo.ycc
        if levels.shape[2] == 1 or self.channels == 3:
            picture = planes(levels)
            picture = image.ycc_to_rgb(picture).clamp_(0, 1) if ycc else picture
            return image.to_rgb(picture) if self.channels == 3 else picture
        y = full_luma(levels, ycc)
        return y if self.task.name == "car" else image.to_studio(y)


def output_levels(
    answer: Tensor, colour: np.ndarray, ycc: bool, task: Task, jpeg: bool
) -> np.ndarray:
    """Levels [H, W, 1 or 3], rounded once, of a network's answer [C, H, W].

    colour: the photo's levels there, at the answer's size: one channel makes the answer gray, three
    give a lone Y its colour. ycc: they, and an answer of three channels, are Y, Cb, Cr, and stay so
    for a `jpeg`, else become RGB.
    """
    if colour.shape[2] == 1:
        levels = image.to_levels(answer.mean(0, keepdim=True), colour.dtype)
    elif len(answer) == 3 and not ycc:
        levels = image.to_levels(answer, colour.dtype)
    else:
        y = answer if task.name == "car" else image.to_full(answer)
        if ycc:
            own = y if len(y) == 3 else torch.cat([y, planes(colour[:, :, 1:])])
            levels = image.to_levels(own if jpeg else image.ycc_to_rgb(own), colour.dtype)
        else:
            # Adding to R, G and B alike moves Y by as much and leaves Cb and Cr
            levels = image.to_levels(planes(colour) + (y - full_luma(colour, False)), colour.dtype)
    return levels[:, :, None] if levels.ndim == 2 else levels


# A photo through a network


def restore_photo(
    source: Photo,
    network: Checkpoint,
    tile: int | None = None,
    ensemble: bool = False,
    jpeg: bool = False,
    advance: Callable[[float], object] = float,
    smaller_tiles: bool = True,
    cells: Cells | None = None,
) -> Photo:
    """The restored photo, with everything that the source carries.

    jpeg: it will be written as one, so that a JPEG's own Y, Cb, Cr stay what they are. advance:
    called with the share done, 0..1, after each tile. smaller_tiles: go on with smaller ones when
    memory runs out. cells: those of a JPEG, which the answer is projected onto; chroma stays as it
    is where they are of Y alone. Raises CheckpointError for an answer that is not finite.
    """
    config, task = network.config, network.task
    picture = NetworkInput(source, task, config.channels)
    around = photo.resized(source, config.scale)

    def whole(tile: int | None) -> np.ndarray:
        levels = np.empty_like(around.levels)
        rows = strips(network.model, picture, tile, ensemble, advance)
        if source.ycc and config.channels == 3:
            rows = map(image.rgb_to_ycc, rows)
        if cells and config.channels == 3:
            rows = (known(strip, source, cells) for strip in rows)
        rows = projected(rows, cells, picture.shape[1]) if cells else rows
        top = 0
        for strip in rows:
            if not torch.isfinite(strip).all():
                raise CheckpointError("the network's output is not finite")
            part = slice(top, top + strip.shape[1])
            levels[part] = output_levels(strip, around.levels[part], around.ycc, task, jpeg)
            top = part.stop
        return levels

    levels = within_memory(whole, tile, picture) if smaller_tiles else whole(tile)
    return dataclasses.replace(around, levels=levels, ycc=source.ycc and jpeg)


def known(answer: Tensor, source: Photo, cells: Cells) -> Tensor:
    """The planes of an answer [3, H, W] whose cells are known; a gray photo's as gray."""
    gray = source.levels.shape[2] == 1
    return answer.mean(0, keepdim=True) if gray else answer[: len(cells.planes)]


def check_mosaic(source: Photo, task: Task) -> None:
    """Refuse an ordinary photo where a Bayer mosaic is wanted. Raises PictureError."""
    if task.name != "demosaic":
        return
    stored = torch.from_numpy(np.array(source.levels, np.int32)).permute(2, 0, 1)
    if len(stored) != 3 or not torch.equal(mosaic(stored), stored):
        raise PictureError(
            "an ordinary photo; a demosaicing network wants a Bayer mosaic (G R over B G, missing "
            "samples zero) as evaluate.py --save-inputs writes it"
        )
