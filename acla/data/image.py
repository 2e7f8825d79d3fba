"""Picture files to tensors and back.

A picture is float32 [C, H, W] in 0..1, unless a docstring says levels (0..255 or 0..65535).
"""

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from acla.data.deep_colour import is_deep_colour, read_deep
from acla.errors import PictureError, one_line
from acla.files import write_atomically

FORMATS = {".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
FORMATS |= dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG")
SUFFIXES = tuple(FORMATS)
GRAY_MODES = ("1", "L", "LA", "La")
SIGNED = 2  # TIFF's SampleFormat
# What readers and writers raise of damaged pictures and metadata
BROKEN = (OSError, EOFError, SyntaxError, ValueError, LookupError, ArithmeticError, TypeError)
BROKEN += (AttributeError, AssertionError, struct.error, zlib.error)
for library in ("PIL", "tifffile"):  # what they log of damaged files is said in one line
    logging.getLogger(library).addHandler(logging.NullHandler())
# Pillow refuses more than twice this, lest a small file fill the memory; phones have 200 megapixels
Image.MAX_IMAGE_PIXELS = 2**27
LUMA = (65.481, 128.553, 24.966)


def load(path: str | Path) -> Tensor:
    """Read a picture as float32 [C, H, W] in 0..1.

    C is 1 for gray files (16-bit gray keeps its depth) and 3 for all others: palettes and CMYK
    become RGB, alpha is dropped. The pixels come as they are stored; an EXIF orientation is not
    applied. A PNG of 16-bit colour needs the extra io16. Raises PictureError, which names the file,
    for anything that is not a whole picture.
    """
    with opened(path) as picture:
        if is_deep_colour(picture, path):
            levels, _ = read_deep(picture, path)
        else:
            levels = to_array(picture, path)
    return from_levels(np.atleast_3d(levels).transpose(2, 0, 1))


@contextmanager
def opened(
    path: str | Path, formats: tuple[str, ...] | None = None, data: bytes | None = None
) -> Iterator[Image.Image]:
    """A Pillow picture for as long as the block lasts, its pixels not decoded yet.

    formats: those of Pillow that are tried, by default all. data: bytes to read instead of the
    file's own. What Pillow raises in the block on account of the file becomes a PictureError, which
    names it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, many pixels: the picture decides
            with Image.open(io.BytesIO(data) if data else path, formats=formats) as picture:
                yield picture
    except FileNotFoundError as error:
        raise PictureError(f"{path}: there is no such file") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"{path}: more pixels than Pillow accepts ({error})") from error
    except BROKEN as error:
        raise PictureError(f"{path}: not a readable picture ({one_line(error)})") from error


def to_array(picture: Image.Image, path: str | Path) -> np.ndarray:
    """The levels of an opened picture [H, W] or [H, W, 3]: uint16 for 16-bit gray, else uint8."""
    tags = getattr(picture, "tag_v2", {})
    bits = max(tags.get(ExifTags.Base.BitsPerSample, (8,)))
    if SIGNED in tags.get(ExifTags.Base.SampleFormat, ()) and bits <= 16:
        raise PictureError(f"{path}: signed values of {bits} bits; convert it to unsigned ones")
    if picture.mode.startswith("I"):
        levels = np.asarray(picture)
        if levels.min() < 0 or levels.max() > 65535:
            raise PictureError(f"{path}: gray values outside 16 bits (0..65535)")
        return full_scale(levels, tags)
    if picture.mode == "F":
        raise PictureError(f"{path}: gray values in floating point; convert it to 8 or 16 bits")
    gray = picture.mode in GRAY_MODES
    return np.asarray(picture.convert("L" if gray else "RGB"))


def full_scale(levels: np.ndarray, tags: Mapping[int, Any]) -> np.ndarray:
    """Gray levels as uint16, 0 black. tags: of a TIFF, where 0 may be white, or bits be 12."""
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    top = 4095 if bits == 12 else 65535
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
        levels = top - levels
    return np.rint(levels.astype(np.float64) * (65535 / top)).astype(np.uint16)


def save(image: Tensor, path: str | Path) -> None:
    """Write a picture [1 or 3, H, W] in 0..1, rounded to 8 bit and clipped.

    The suffix names the format. The file appears whole or not at all. Raises PictureError.
    """
    if not torch.isfinite(image).all():
        raise PictureError(f"{path}: the picture holds values that are not finite")
    write(Image.fromarray(to_levels(image)), path)


def write(picture: Image.Image, path: str | Path, **options: object) -> None:
    """Write a Pillow picture whole or not at all.

    `options` go to Pillow (quality, exif, icc_profile …). Raises PictureError.
    """
    path, file = Path(path), io.BytesIO()
    kind = format_of(path)
    try:
        picture.save(file, format=kind, **options)
        write_atomically(path, file.getvalue())
    except BROKEN as error:
        raise PictureError(f"{path}: cannot be written ({one_line(error)})") from error


def format_of(path: Path) -> str:
    """Pillow's format for a suffix. Raises PictureError, which names the file."""
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise PictureError(f"{path}: unknown suffix {path.suffix!r}; known: {', '.join(SUFFIXES)}")
    return kind


def from_levels(levels: np.ndarray) -> Tensor:
    """uint8 or uint16 [C, H, W] levels as a float32 picture in 0..1."""
    return torch.from_numpy(levels.astype(np.float32, order="C")).div_(np.iinfo(levels.dtype).max)


def to_levels(image: Tensor, dtype: type = np.uint8) -> np.ndarray:
    """Picture [1 or 3, H, W] in 0..1 → uint8 or uint16 [H, W] or [H, W, 3], rounded and clipped."""
    top = np.iinfo(dtype).max
    levels = (image.detach().float().cpu() * top).round_().clamp_(0, top).numpy().astype(dtype)
    return levels[0] if len(levels) == 1 else np.ascontiguousarray(levels.transpose(1, 2, 0))


def round_8bit(image: Tensor) -> Tensor:
    """The nearest values k/255, k = 0..255: what an 8-bit file can hold."""
    return (image * 255).round().clamp(0, 255) / 255


def luma(rgb: Tensor) -> Tensor:
    """Y of BT.601 in studio range (16..235 of 255), not rounded: [3, H, W] → [1, H, W] in 0..1.

    Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255 on 0..255 values.
    """
    weights = torch.tensor(LUMA, dtype=torch.float64, device=rgb.device)
    y = (rgb.double() * weights[:, None, None]).sum(0, keepdim=True)
    return ((16 + y) / 255).to(rgb.dtype)


def to_studio(y: Tensor) -> Tensor:
    """Y of a JPEG, full range, as `luma` has it: 0..1 → 16/255..235/255."""
    return (16 + 219 * y) / 255


def to_full(y: Tensor) -> Tensor:
    """The reverse of `to_studio`."""
    return (255 * y - 16) / 219


def ycc_to_rgb(ycc: Tensor) -> Tensor:
    """Y, Cb, Cr of a JPEG (JFIF, full range) → RGB, [3, H, W] in 0..1, not rounded or clipped."""
    y, cb, cr = ycc[0], ycc[1] - 128 / 255, ycc[2] - 128 / 255
    return torch.stack([y + 1.402 * cr, y - 0.34414 * cb - 0.71414 * cr, y + 1.772 * cb])


def rgb_to_ycc(rgb: Tensor) -> Tensor:
    """The reverse of `ycc_to_rgb`."""
    r, g, b = rgb
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return torch.stack([y, 128 / 255 + (b - y) / 1.772, 128 / 255 + (r - y) / 1.402])


def middle(image: Tensor, side: int | None, grid: int = 1) -> Tensor:
    """The middle of [C, H, W], at most `side` pixels a side (None: all), aligned to `grid`."""
    if side is None:
        return image
    y, x = (max(0, length - side) // 2 // grid * grid for length in image.shape[1:])
    return image[:, y : y + side, x : x + side]


def to_rgb(image: Tensor) -> Tensor:
    """Gray [1, H, W] repeated to three channels; RGB as it is."""
    return image.expand(3, -1, -1) if len(image) == 1 else image


def fit_channels(image: Tensor, channels: int) -> Tensor:
    """[1 or 3, H, W] with so many channels: colour becomes Y, unrounded; gray stays or repeats."""
    if channels == 3:
        return to_rgb(image)
    return image if len(image) == 1 else luma(image)
