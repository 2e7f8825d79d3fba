"""What a JPEG tells of the photo it was made from: the cells that hold the true DCT coefficients.

An encoder rounds each coefficient to a multiple of a step, level · step. So the photo's own
lies within half a step of it, in a cell, and so must an answer that claims to be that photo.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.fft import dctn, idctn
from scipy.ndimage import maximum_filter, minimum_filter
from torch import Tensor

from acla.data.image import opened, rgb_to_ycc, ycc_to_rgb

BLOCK = 8
END = b"\xff\xd9"  # the last two bytes of a JPEG; those of a damaged one may be missing
# Chosen on the middle of every fourth picture of LIVE1 and Kodak24, qualities 5 to 95
WIDEST, TRUST = 0.7, 0.2  # width of a cell; width · distance of an answer far away, all in steps
CLIPPED_ROUNDS = 30
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of frame headers
ALONE = {0, 1, *range(0xD0, 0xD8), 0xFF}  # filling, and markers without a segment


@dataclass
class Plane:
    """One component of a JPEG. levels: uint8 [8m, 8n], as decoded, in whole blocks; steps: [8, 8],
    vertical frequency first; flat: [m, n], by `flat_blocks`."""

    levels: np.ndarray
    steps: np.ndarray
    flat: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.flat = flat_blocks(self.levels)


@dataclass
class Cells:
    """planes: Y, or Y, Cb and Cr, which may be `ratio` times smaller (1 or 2). They go beyond the
    edges of the picture, whose first pixel is that of Y at [top, left]."""

    planes: list[Plane]
    top: int = 0
    left: int = 0
    ratio: int = 1

    def rows(self, first: int, last: int, count: int) -> np.ndarray:
        """Rows of the first `count` planes as decoded, at the size of Y, float32 [count, rows, W];
        `first` is a multiple of the ratio, as is the number of all rows."""
        smaller = slice(first // self.ratio, -(-last // self.ratio))
        chroma = [repeated(p.levels[smaller], self.ratio) for p in self.planes[1:count]]
        rows = [self.planes[0].levels[first:last], *(plane[: last - first] for plane in chroma)]
        return np.stack(rows).astype(np.float32)

    def project(self, rows: np.ndarray, start: int) -> np.ndarray:
        """`project` of rows [planes, rows, W], levels at the size of Y. Chroma is projected at its
        own size, as encoders shrink it, by means, and moved by as much."""
        y = project(rows[0], self.planes[0], start)
        projected = [y]
        for own, plane in zip(rows[1:], self.planes[1:], strict=False):
            shape = len(own) // self.ratio, self.ratio, -1, self.ratio
            small = own.reshape(shape).mean((1, 3))
            change = project(small, plane, start // self.ratio) - small
            projected.append(own + repeated(change, self.ratio))
        return np.stack(projected)


def repeated(levels: np.ndarray, ratio: int) -> np.ndarray:
    """Levels [H, W], each repeated `ratio` times along both sides."""
    return levels.repeat(ratio, 0).repeat(ratio, 1)


def steps_of(picture: Image.Image, component: int = 0) -> np.ndarray | None:
    """The quantisation steps [8, 8] of a JPEG's component, None for other formats."""
    if not getattr(picture, "quantization", None):
        return None
    table = picture.quantization[picture.layer[component][3]]  # of (identifier, h, v, table)
    return np.array(table, np.float32).clip(1).reshape(BLOCK, BLOCK)  # damaged ones hold 0


def whole_blocks(data: bytes, side: int = BLOCK) -> bytes:
    """A JPEG whose size is rounded up to multiples of `side`, that of a component's blocks in
    pixels of the picture: the same compressed blocks of that component, none cut off.
    """
    at = 2
    while (marker := data[at + 1]) not in FRAMES:
        alone = data[at] != 0xFF or marker in ALONE
        at += 1 if alone else 2 + int.from_bytes(data[at + 2 : at + 4])
    sides = [int.from_bytes(data[place : place + 2]) for place in (at + 5, at + 7)]
    rounded = b"".join((-(-length // side) * side).to_bytes(2) for length in sides)
    return data[: at + 5] + rounded + data[at + 9 :]


def decode_cells(path: str | Path, data: bytes) -> Cells:
    """The cells of the Y, which has full size, of a JPEG's bytes and, where they are stored at the
    size of Y or at half of it, of its Cb and Cr. Raises PictureError, which names the path."""
    with opened(path, None, whole_blocks(data) + END) as picture:
        sampling = np.array([layer[1:3] for layer in picture.layer])
        steps = [steps_of(picture, component) for component in range(len(sampling))]
        picture.draft("L", None)
        y = np.asarray(picture)
    ratio = next((r for r in (1, 2) if (sampling[0] == r * sampling[1:]).all()), None)
    if len(sampling) == 1 or not ratio:
        return Cells([Plane(y, steps[0])])
    with opened(path, None, whole_blocks(data, BLOCK * ratio) + END) as picture:
        # At half the size of Y, libjpeg decodes smaller components as they are stored
        picture.draft("YCbCr", (picture.width // ratio, picture.height // ratio))
        stored = np.asarray(picture)[:, :, 1:].transpose(2, 0, 1)
    lack = [(0, ratio * length - own) for length, own in zip(stored[0].shape, y.shape, strict=True)]
    planes = [np.pad(y, lack, mode="edge"), *stored]
    return Cells([Plane(*both) for both in zip(planes, steps, strict=True)], ratio=ratio)


# Projection


def to_blocks(y: np.ndarray) -> np.ndarray:
    """Levels [8m, 8n] as a JPEG's blocks [m, n, 8, 8], around 0."""
    height, width = y.shape
    blocks = y.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK).swapaxes(1, 2)
    return blocks.astype(np.float32) - 128


def dct(blocks: np.ndarray) -> np.ndarray:
    return dctn(blocks, axes=(-2, -1), norm="ortho")


def idct(coefficients: np.ndarray) -> np.ndarray:
    return idctn(coefficients, axes=(-2, -1), norm="ortho")


def decoded_levels(y: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The quantised levels [m, n, 8, 8] that were decoded to y [8m, 8n], as far as they show.

    Decoding rounds pixels, and clips them to 0..255: those are set, again and again, to what the
    levels so far make of them beyond.
    """
    blocks = to_blocks(y)
    levels = np.rint(dct(blocks) / steps)
    clipped = ((y == 0) | (y == 255)).reshape(len(blocks), BLOCK, -1, BLOCK).any((1, 3))
    seen = blocks[clipped]
    guess = seen
    for _ in range(CLIPPED_ROUNDS if clipped.any() else 0):
        levels[clipped] = np.rint(dct(guess) / steps)
        guess = idct(levels[clipped] * steps)
        guess = np.where(seen == 127, np.maximum(guess, seen), guess)
        guess = np.where(seen == -128, np.minimum(guess, seen), guess)
        guess = np.where((seen > -128) & (seen < 127), seen, guess)
    return levels


def flat_blocks(y: np.ndarray) -> np.ndarray:
    """Which blocks [m, n] of y [8m, 8n] are of one level, as are all around them: a white page."""
    blocks = y.reshape(len(y) // BLOCK, BLOCK, -1, BLOCK)
    low, high = blocks.min((1, 3)), blocks.max((1, 3))
    return minimum_filter(low, 3) == maximum_filter(high, 3)


def project(levels: np.ndarray, plane: Plane, start: int = 0) -> np.ndarray:
    """Levels [8k, 8n], float32, with each coefficient moved to the nearest value in its cell.

    They begin at row `start` of the plane, a multiple of 8. Photos lie near the middle of their
    cells (narrow quantisation constraint set: Park and Lee, IEEE Trans. Image Processing 8, 1999),
    so these are WIDEST of a step at most, and narrower in a block whose answer lies further from
    the levels than a photo would. Where the file is flat it is kept.
    """
    own = plane.levels[start : start + len(levels)]
    quantised = decoded_levels(own, plane.steps)
    apart = dct(to_blocks(levels)) / plane.steps - quantised
    distance = np.sqrt((apart**2).mean((2, 3), keepdims=True))
    reach = np.minimum(WIDEST, TRUST / np.maximum(distance, TRUST)) / 2
    blocks = idct(plane.steps * (quantised + np.clip(apart, -reach, reach)))
    kept = plane.flat[start // BLOCK :][: len(blocks), :, None, None]
    blocks = np.where(kept, to_blocks(own), blocks)
    return blocks.swapaxes(1, 2).reshape(levels.shape) + 128


def projected(strips: Iterator[Tensor], cells: Cells, height: int) -> Iterator[Tensor]:
    """Strips [C, rows, W] in 0..1 of the first planes, together `height` rows, projected, anew cut.

    What a block holds beyond the picture is taken as the file has it.
    """
    start, end, block = 0, len(cells.planes[0].levels), BLOCK * cells.ratio
    held = None
    for strip in strips:
        count = len(strip)
        held = cells.rows(0, cells.top, count) if held is None else held
        first, columns = start + held.shape[1], slice(cells.left, cells.left + strip.shape[2])
        last = first + strip.shape[1]
        last = end if last == cells.top + height else last
        rows = cells.rows(first - first % cells.ratio, last, count)[:, first % cells.ratio :]
        rows[:, : strip.shape[1], columns] = 255 * strip.cpu().numpy()
        held = np.concatenate([held, rows], 1)
        whole = held.shape[1] // block * block
        if not whole:
            continue
        inside = slice(max(cells.top - start, 0), cells.top + height - start)
        answer = cells.project(held[:, :whole], start)[:, inside, columns]
        yield torch.from_numpy(answer.copy() / 255)
        held, start = held[:, whole:], start + whole


def project_onto(answer: Tensor, data: bytes) -> Tensor:
    """[1 or 3, H, W] in 0..1, projected onto the cells of a JPEG's bytes, gray or 4:2:0."""
    cells = decode_cells("JPEG", data)
    planes = answer if len(answer) == 1 else rgb_to_ycc(answer)
    planes = torch.cat(list(projected(iter([planes]), cells, answer.shape[1])), 1)
    return planes if len(answer) == 1 else ycc_to_rgb(planes)
