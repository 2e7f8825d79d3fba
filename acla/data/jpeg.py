"""What a JPEG tells of the photo it was made from: the cells that hold the true DCT coefficients.

An encoder rounds each coefficient of Y to a multiple of a step, level · step. So the photo's own
lies within half a step of it, in a cell, and so must an answer that claims to be that photo.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from scipy.fft import dctn, idctn
from scipy.ndimage import maximum_filter, minimum_filter
from torch import Tensor

BLOCK = 8
END = b"\xff\xd9"  # the last two bytes of a JPEG; those of a damaged one may be missing
# Chosen on the middle of every fourth picture of LIVE1 and Kodak24, qualities 5 to 95
WIDEST, TRUST = 0.7, 0.2  # width of a cell; width · distance of an answer far away, all in steps
CLIPPED_ROUNDS = 30
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of frame headers


@dataclass
class LumaCells:
    """y: uint8 [8m, 8n], as decoded, in whole blocks, also beyond the edges of the picture, whose
    first pixel is y[top, left]; steps: [8, 8], vertical frequency first; flat: [m, n], by
    `flat_blocks`."""

    y: np.ndarray
    steps: np.ndarray
    top: int = 0
    left: int = 0
    flat: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.flat = flat_blocks(self.y)


def luma_steps(picture: Image.Image) -> np.ndarray | None:
    """The quantisation steps [8, 8] of a JPEG's first component, None for other formats."""
    if not getattr(picture, "quantization", None):
        return None
    table = picture.quantization[picture.layer[0][3]]  # of (identifier, h, v, table)
    return np.array(table, np.float32).reshape(BLOCK, BLOCK)


def whole_blocks(data: bytes) -> bytes:
    """A JPEG whose size is rounded up to whole blocks: the same compressed blocks, none cut off.

    Raises IndexError where there is no frame header.
    """
    at = 2
    while (marker := data[at + 1]) not in FRAMES:
        filling = data[at] != 0xFF or marker in (0, 0xFF)
        at += 1 if filling else 2 + int.from_bytes(data[at + 2 : at + 4])
    sides = [int.from_bytes(data[place : place + 2]) for place in (at + 5, at + 7)]
    rounded = b"".join((-(-side // BLOCK) * BLOCK).to_bytes(2) for side in sides)
    return data[: at + 5] + rounded + data[at + 9 :]


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


def project(y: np.ndarray, cells: LumaCells, start: int = 0) -> np.ndarray:
    """Levels [8k, 8n], float32, with each coefficient moved to the nearest value in its cell.

    They begin at row `start` of cells.y, a multiple of 8. Photos lie near the middle of their cells
    (narrow quantisation constraint set: Park and Lee, IEEE Trans. Image Processing 8, 1999), so
    these are WIDEST of a step at most, and narrower in a block whose answer lies further from the
    levels than a photo would. Where the file is flat there is nothing to restore, and it is kept.
    """
    own = cells.y[start : start + len(y)]
    levels = decoded_levels(own, cells.steps)
    apart = dct(to_blocks(y)) / cells.steps - levels
    distance = np.sqrt((apart**2).mean((2, 3), keepdims=True))
    reach = np.minimum(WIDEST, TRUST / np.maximum(distance, TRUST)) / 2
    blocks = idct(cells.steps * (levels + np.clip(apart, -reach, reach)))
    kept = cells.flat[start // BLOCK :][: len(blocks), :, None, None]
    blocks = np.where(kept, to_blocks(own), blocks)
    return blocks.swapaxes(1, 2).reshape(y.shape) + 128


def projected(strips: Iterator[Tensor], cells: LumaCells, height: int) -> Iterator[Tensor]:
    """Strips of Y [1, rows, W] in 0..1, together `height` rows, projected, in strips of their own.

    What a block holds beyond the picture is taken as the file has it.
    """
    held, start = cells.y[: cells.top].astype(np.float32), 0
    for strip in strips:
        first, columns = start + len(held), slice(cells.left, cells.left + strip.shape[2])
        last = first + strip.shape[1]
        last = len(cells.y) if last == cells.top + height else last
        rows = cells.y[first:last].astype(np.float32)
        rows[: strip.shape[1], columns] = 255 * strip[0].cpu().numpy()
        held = np.concatenate([held, rows])
        whole = len(held) // BLOCK * BLOCK
        if not whole:
            continue
        inside = slice(max(cells.top - start, 0), cells.top + height - start)
        answer = project(held[:whole], cells, start)[inside, columns]
        yield torch.from_numpy(answer.copy() / 255)[None]
        held, start = held[whole:], start + whole


def project_onto(y: Tensor, data: bytes) -> Tensor:
    """Y [1, H, W] in 0..1, projected onto the cells of a grayscale JPEG's bytes."""
    with Image.open(io.BytesIO(whole_blocks(data))) as picture:
        cells = LumaCells(np.asarray(picture), luma_steps(picture))
    return torch.cat(list(projected(iter([y]), cells, y.shape[1])), 1)
