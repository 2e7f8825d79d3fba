"""What a JPEG tells of the photo it was made from: the cells that hold the true DCT coefficients.

An encoder rounds each coefficient of Y to a multiple of a step, level · step. So the photo's own
lies within half a step of it, in a cell, and so must an answer that claims to be that photo.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy.fft import dctn, idctn
from torch import Tensor

BLOCK = 8
END = b"\xff\xd9"  # the last two bytes of a JPEG; those of a damaged one may be missing
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of frame headers


@dataclass
class LumaCells:
    """y: uint8 [8m, 8n], as decoded, in whole blocks, also beyond the edges of the picture, whose
    first pixel is y[top, left]; steps: [8, 8], vertical frequency first; width: that of the cells
    in steps, 1 for all that the file allows."""

    y: np.ndarray
    steps: np.ndarray
    top: int = 0
    left: int = 0
    width: float = 1.0


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


def cell_width(quality: int) -> float:
    """The part of a cell, 0..1, that answers for a JPEG of a quality 1..100 are kept in.

    Photos lie near the middle of their cells (narrow quantisation constraint set: Park and Lee,
    IEEE Trans. Image Processing 8, 1999); the more so, the better the file is beside the network.
    """
    return 0.7 * min(1.0, math.sqrt(2 - quality / 50))


# Projection


def dct(y: np.ndarray) -> np.ndarray:
    """Coefficients [m, n, 8, 8] of a JPEG's blocks of levels [8m, 8n]."""
    height, width = y.shape
    blocks = y.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK).swapaxes(1, 2)
    return dctn(blocks.astype(np.float32) - 128, axes=(2, 3), norm="ortho")


def project(y: np.ndarray, cells: LumaCells, start: int = 0) -> np.ndarray:
    """Levels [8k, 8n], float32, with each coefficient moved to the nearest value in its cell.

    They begin at row `start` of cells.y, a multiple of 8. A cell lies around the coefficient's
    level, which is the nearest to that of the decoded Y: decoding rounds pixels, and clips them.
    """
    steps = cells.steps
    middle = steps * np.rint(dct(cells.y[start : start + len(y)]) / steps)
    reach = cells.width / 2 * steps
    inside = np.clip(dct(y), middle - reach, middle + reach)
    return idctn(inside, axes=(2, 3), norm="ortho").swapaxes(1, 2).reshape(y.shape) + 128


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
