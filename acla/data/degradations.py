"""Degradations of a picture: bicubic shrinking, noise, JPEG, the Bayer mosaic.

Pure functions of pictures [C, H, W] in 0..1.
"""

import functools
import hashlib
import io
import math
import os

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from acla.config import Task
from acla.data.image import fit_channels, from_levels, round_8bit, to_levels
from acla.errors import DataError

JPEG_BLOCK = {1: 8, 3: 16}  # by channels: chroma blocks cover 16 pixels of a picture
# Low-quality pixels: the antialiased cubic kernel reaches two of them to each side.
SHRINK_REACH = 2


def generator_for(name: str, seed: int = 0) -> torch.Generator:
    """A generator that a picture's name and a seed determine, on every machine, in any order."""
    digest = hashlib.sha256(os.fsencode(f"{seed}/{name}")).digest()  # a name may be any bytes
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# Bicubic resampling as MATLAB's imresize does it


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = −0.5."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


@functools.lru_cache(maxsize=64)
def taps(length: int, out_length: int) -> tuple[Tensor, Tensor]:
    """(index, weight), int64 and float64 [T, out_length]: what output pixels read along a side.

    Shrinking widens the kernel by the factor (antialiasing); indices beyond the edge are mirrored:
    1..n, n..1.
    """
    ratio = out_length / length
    stretch = min(ratio, 1.0)
    reach = 2 / stretch
    centre = (np.arange(out_length) + 0.5) / ratio - 0.5
    first = np.floor(centre - reach)
    index = first + np.arange(math.ceil(2 * reach) + 2)[:, None]
    weight = stretch * cubic(stretch * (centre - index))
    weight /= weight.sum(0)
    mirrored = index.astype(np.int64) % (2 * length)
    mirrored = np.where(mirrored < length, mirrored, 2 * length - 1 - mirrored)
    used = (weight != 0).any(1)
    return torch.from_numpy(mirrored[used]), torch.from_numpy(weight[used])


def resize_rows(levels: Tensor, out_length: int) -> Tensor:
    """Resample the second last axis: [..., H, W] → [..., out_length, W], float64."""
    index, weight = taps(levels.shape[-2], out_length)
    out = levels.index_select(-2, index[0]).mul_(weight[0, :, None])
    for i, w in zip(index[1:], weight[1:], strict=True):
        out.addcmul_(levels.index_select(-2, i), w[:, None])
    return out


def bicubic(image: Tensor, height: int, width: int, rounded: bool) -> Tensor:
    """MATLAB's imresize of [..., H, W] in 0..1.

    a = −0.5, antialiased when shrinking, height first, then width. `rounded`: to 8 bit before and
    after each of the two passes, as for an 8-bit picture, else neither rounded nor clipped.
    """

    def settle(levels: Tensor) -> Tensor:
        return (levels + 0.5).floor_().clamp_(0, 255) if rounded else levels  # halves go up

    levels = settle(image.double() * 255)
    levels = settle(resize_rows(levels, height))
    levels = settle(resize_rows(levels.mT.contiguous(), width)).mT
    return (levels / 255).to(image.dtype).contiguous()


def shrink(image: Tensor, scale: int) -> Tensor:
    """The input of super-resolution: [..., H, W] → [..., H/scale, W/scale] on the 8-bit grid.

    H and W must be multiples of the scale (crop_to_multiple).
    """
    height, width = image.shape[-2:]
    if height % scale or width % scale:
        raise ValueError(f"{height}×{width} pixels are no multiple of the scale {scale}")
    return bicubic(image, height // scale, width // scale, rounded=True)


def enlarge(image: Tensor, scale: int) -> Tensor:
    """Bicubic enlargement of [..., h, w] by a whole factor, neither rounded nor clipped."""
    return bicubic(image, image.shape[-2] * scale, image.shape[-1] * scale, rounded=False)


def crop_to_multiple(image: Tensor, scale: int) -> Tensor:
    """Cut [..., H, W] bottom and right so that both sides are multiples of the scale.

    Raises DataError if nothing is left.
    """
    height, width = (side - side % scale for side in image.shape[-2:])
    if not height or not width:
        size = "×".join(map(str, image.shape[-2:]))
        raise DataError(f"a picture of {size} pixels is smaller than the scale {scale}")
    return image[..., :height, :width]


# The other degradations


def add_noise(clean: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """clean [C, H, W] plus Gaussian noise; sigma in 8-bit levels; neither clipped nor rounded."""
    noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
    return clean + noise * (sigma / 255)


def jpeg(clean: Tensor, quality: int) -> Tensor:
    """Gray or RGB [1 or 3, H, W], rounded to 8 bit, through Pillow's JPEG of a quality 1..100;
    colour with chroma at half the resolution (4:2:0)."""
    with Image.open(io.BytesIO(jpeg_file(clean, quality))) as decoded:
        return from_levels(np.atleast_3d(decoded).transpose(2, 0, 1))


def jpeg_file(clean: Tensor, quality: int) -> bytes:
    """The file that `jpeg` decodes, of [1 or 3, H, W]."""
    file = io.BytesIO()
    options = {"subsampling": "4:2:0"} if len(clean) == 3 else {}
    Image.fromarray(to_levels(clean)).save(file, "JPEG", quality=int(quality), **options)
    return file.getvalue()


def mosaic(clean: Tensor) -> Tensor:
    """RGB [3, H, W] behind a Bayer filter, G R over B G from the top left; missing samples zero."""
    out = torch.zeros_like(clean)
    for channel, top, left in ((1, 0, 0), (0, 0, 1), (2, 1, 0), (1, 1, 1)):
        spot = (..., channel, slice(top, None, 2), slice(left, None, 2))
        out[spot] = clean[spot]
    return out


# Tasks


def degrade(clean: Tensor, task: Task, generator: torch.Generator | None = None) -> Tensor:
    """The input [..., C, h, w] of a clean picture [..., C, H, W] of the task's channels and size.

    Noise and a range of settings need the generator. Raises DataError for other channels.
    """
    if (task.name, clean.shape[-3]) == ("demosaic", 1):
        raise DataError("demosaic needs a network with 3 channels")
    match task.name:
        case "sr":
            return shrink(clean, task.scale)
        case "denoise":
            return add_noise(clean, draw_setting(task, generator), generator)
        case "car":
            return jpeg(clean, int(draw_setting(task, generator)))
        case _:  # demosaic
            return mosaic(clean)


def draw_setting(task: Task, generator: torch.Generator | None) -> float:
    """The setting of a task, drawn where it is a range: a whole JPEG quality, any noise level."""
    if not task.until:
        return task.setting
    if task.name == "car":
        return int(torch.randint(int(task.setting), task.until + 1, (), generator=generator))
    span = task.until - task.setting
    return task.setting + span * float(torch.rand((), generator=generator))


def pair(
    clean: Tensor, task: Task, generator: torch.Generator | None = None, channels: int | None = None
) -> tuple[Tensor, Tensor]:
    """(degraded [c, h, w], target [c, h·scale, w·scale]) of a clean picture [1 or 3, H, W] in 0..1.

    c is the task's number of channels unless `channels` says otherwise. sr crops to a multiple of
    the scale; car takes Y, or RGB, rounded to 8 bit; noise and a range of settings need the
    generator. Raises DataError for a picture smaller than the scale.
    """
    target = fit_channels(clean, channels or task.channels)
    if task.name == "sr":
        target = crop_to_multiple(target, task.scale)
    elif task.name == "car":
        target = round_8bit(target)
    return degrade(target, task, generator), target


def untouched(
    clean: Tensor, task: Task, generator: torch.Generator | None = None, channels: int | None = None
) -> tuple[Tensor, Tensor]:
    """(prediction, target) [c, H, W], the input as the prediction: the first row of papers' tables.

    For sr that row is made on Y rounded to 8 bit (a gray file as it is), shrunk and enlarged
    without rounding in between: so does the literature, by MATLAB's rgb2ycbcr of uint8.
    """
    if task.name != "sr":
        return pair(clean, task, generator, channels)
    target = crop_to_multiple(round_8bit(fit_channels(clean, 1)), task.scale)
    height, width = target.shape[-2:]
    small = bicubic(target, height // task.scale, width // task.scale, rounded=False)
    return enlarge(small, task.scale), target


# Patches: cut a window, augment it, degrade it, cut the patch out of it


def window_side(task: Task, patch: int, channels: int) -> int:
    """Side in pixels of the clean window that a degraded patch of `patch` pixels is made from.

    Large enough for the patch to look as if the whole picture had been degraded: sr leaves room for
    the kernel, car for every phase of whole JPEG blocks.
    """
    match task.name:
        case "sr":
            return (patch + 2 * SHRINK_REACH) * task.scale
        case "car":
            block = JPEG_BLOCK[channels]
            return math.ceil((patch + block - 1) / block) * block
    return patch


def patch_offset(task: Task, rng: np.random.Generator, channels: int) -> tuple[int, int]:
    """Where the patch begins in the degraded window, (y, x) in low-quality pixels."""
    match task.name:
        case "sr":
            return SHRINK_REACH, SHRINK_REACH
        case "car":
            y, x = rng.integers(JPEG_BLOCK[channels], size=2)
            return int(y), int(x)
    return 0, 0
