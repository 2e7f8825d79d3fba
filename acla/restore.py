"""One picture through a network: whole, or in tiles that overlap and blend."""

import torch
from torch import Tensor

from acla.backbone import Backbone
from acla.errors import UsageError

OVERLAP = 32  # low-quality pixels that neighbouring tiles share


@torch.no_grad()
def restore(model: Backbone, picture: Tensor, tile: int | None = None) -> Tensor:
    """Restore a picture [C,h,w] in 0..1 → [C,h·scale,w·scale], not rounded or clipped.

    tile: side of square tiles in low-quality pixels, more than 64; None takes the picture whole.
    Neighbouring tiles share 32 pixels, where they blend.
    """
    check_tile(tile)
    if tile is None:
        return model(picture.unsqueeze(0))[0]
    scale = model.config.scale
    _, h, w = picture.shape
    total = picture.new_zeros(picture.shape[0], h * scale, w * scale)
    weights = picture.new_zeros(1, h * scale, w * scale)
    for top in starts(h, tile):
        for left in starts(w, tile):
            part = picture[:, top : top + tile, left : left + tile]
            ramp = window(part.shape[1], scale, top > 0, top + tile < h, picture)[:, None]
            ramp = ramp * window(part.shape[2], scale, left > 0, left + tile < w, picture)
            rows = slice(top * scale, top * scale + ramp.shape[0])
            columns = slice(left * scale, left * scale + ramp.shape[1])
            total[:, rows, columns] += ramp * model(part.unsqueeze(0))[0]
            weights[:, rows, columns] += ramp
    return total / weights


def check_tile(tile: int | None) -> None:
    """Refuse tiles that would be all overlap. Raises UsageError."""
    if tile is not None and tile <= 2 * OVERLAP:
        raise UsageError(f"--tile must be more than {2 * OVERLAP} pixels, not {tile}")


def starts(length: int, tile: int) -> list[int]:
    """Where tiles begin: OVERLAP apart from the end of the one before, the last one flush with the
    border."""
    last = max(0, length - tile)
    return [*range(0, last, tile - OVERLAP), last]


def window(length: int, scale: int, before: bool, after: bool, like: Tensor) -> Tensor:
    """Blending weights along one side of a tile [length·scale]. Where a tile lies before, or after,
    the outer quarter of what they share has weight 0, for there the cut shows; the middle half is a
    ramp. Two neighbours' weights add to 1."""
    at = (torch.arange(OVERLAP * scale, dtype=like.dtype, device=like.device) + 0.5) / scale
    ramp = ((at / OVERLAP - 0.25) / 0.5).clamp(0, 1)
    weight = like.new_ones(length * scale)
    if before:
        weight[: len(ramp)] *= ramp
    if after:
        weight[-len(ramp) :] *= ramp.flip(0)
    return weight
