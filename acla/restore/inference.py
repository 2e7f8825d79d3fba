"""A picture through a network: whole or in tiles, turned, within the memory at hand."""

import ctypes
import math
import platform
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from acla.config import Task
from acla.console import notice
from acla.data.degradations import pair
from acla.errors import AclaError, CheckpointError, UsageError, out_of_memory
from acla.models.backbones import Backbone
from acla.models.serialization import Checkpoint

# Side of the default tile per scale: the paper's networks need about 1.5 GB for one
TILE = {1: 384, 2: 192, 3: 128, 4: 128}


# Number formats

AUTOCAST_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("auto", *AUTOCAST_TYPES)


def pick_precision(name: str, device: torch.device, task: Task) -> str:
    """The number format that a network computes in: "auto" is the short one that this device
    multiplies faster than fp32, without timing anything. GPUs with tensor cores: fp16, which has
    eight times bf16's precision at its speed; CPUs with instructions for bf16: bf16, except for
    demosaicing, of which it would cost 0.006 dB."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "fp16" if torch.cuda.get_device_capability(device) >= (7, 0) else "fp32"
    capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    fits = device.type == "cpu" and capable and task.name != "demosaic"
    return "bf16" if fits else "fp32"


def computing_in(precision: str, device: torch.device) -> torch.autocast:
    """A context in which networks compute in "fp32", "bf16" or "fp16" on this device. Sampling
    positions (from rounded weights in `attend_module`), the mean colour, a backbone's first and
    last convolution and its long shortcuts stay in float32."""
    dtype = AUTOCAST_TYPES[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


# One picture through a network


def keep_memory(device: torch.device) -> None:
    """Have this process keep the memory of freed tensors of up to 256 MiB for the next ones, at the
    cost of a higher peak. glibc gives those above 32 MiB, the features of a tile, back to the
    kernel, which clears every page of them again. Nothing changes with other C libraries."""
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 256 << 20) or mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD; old ones' limit
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory at the heap's end


def restore(
    model: Backbone, picture: Tensor, tile: int | None = None, ensemble: bool = False
) -> Tensor:
    """Restore a picture [C,h,w] in 0..1 → [C,h·scale,w·scale], not rounded or clipped.

    tile: largest side of a tile in low-quality pixels, 32 or more; None takes the picture whole.
    Neighbouring tiles share 32 pixels, or a third of smaller ones, where they blend. When memory
    runs out, again with tiles of half the side. ensemble: average over the 8 flips and rotations.
    The picture may lie on another device than the model.
    """
    check_tile(tile)

    def whole(tile: int | None) -> Tensor:
        return torch.cat(list(strips(model, picture, tile, ensemble)), 1)

    return within_memory(whole, tile, picture)


def restored_pair(
    network: Checkpoint,
    clean: Tensor,
    task: Task,
    generator: torch.Generator,
    tile: int | None = None,
    ensemble: bool = False,
) -> tuple[Tensor, Tensor]:
    """(prediction, target), both on the CPU, of a clean picture [C,H,W] that is degraded and
    restored. Raises CheckpointError for an answer that is not finite."""
    low, target = pair(clean, task, generator, network.config.channels)
    device = next(network.model.parameters()).device
    prediction = restore(network.model, low.to(device), tile, ensemble).cpu()
    if not torch.isfinite(prediction).all():
        raise CheckpointError("the network's output is not finite")
    return prediction, target


def check_ensemble(ensemble: bool, task: Task) -> None:
    """Refuse to turn a Bayer mosaic: turned, it is another pattern. Raises UsageError."""
    if ensemble and task.name == "demosaic":
        raise UsageError("--ensemble turns the picture, and a turned Bayer mosaic is another one")


def default_tile(scale: int, height: int, width: int) -> int | None:
    """The side of a tile where --tile names none: None, the picture whole, if it is no larger."""
    return TILE[scale] if height * width > TILE[scale] ** 2 else None


OVERLAP = 32  # low-quality pixels that neighbouring tiles share, of smaller tiles a third
LEAST = 32  # side of the smallest tile, for attention to whole patches of a training's size
SMALLEST = 96  # side of the smallest tile that is tried when memory runs out
Result = TypeVar("Result")


def check_tile(tile: int | None) -> None:
    """Refuse tiles that would be all border. Raises UsageError."""
    if tile is not None and tile < LEAST:
        raise UsageError(f"--tile must be {LEAST} pixels or more, not {tile}")


def overlap(tile: int) -> int:
    """Low-quality pixels that neighbouring tiles of this side share."""
    return min(OVERLAP, tile // 3)


@torch.no_grad()
def strips(
    model: Backbone,
    picture: Tensor,
    tile: int | None,
    ensemble: bool,
    advance: Callable[[float], object] = float,
) -> Iterator[Tensor]:
    """The restored picture from top to bottom, in strips [C,rows,w·scale], one for each row of
    tiles. picture: [C,h,w], or what has its shape and gives its parts. advance: called with the
    share of tiles done, 0..1, before the first and after each."""
    _, h, w = picture.shape
    advance(0)
    if tile is None or tile >= max(h, w):
        whole = predict(model, picture[:, :, :], ensemble)
        advance(1)
        yield whole
        return
    scale, shared = model.config.scale, overlap(tile) * model.config.scale
    (rows, tops), (columns, lefts) = tile_grid(h, tile), tile_grid(w, tile)
    total = picture[:, :0, :0].new_zeros(picture.shape[0], 0, w * scale)
    weights = total[:1]
    done, tiles = 0, len(tops) * len(lefts)
    for top, following in zip(tops, [*tops[1:], h], strict=True):
        # Total and weights begin at `top`; they already hold what the row of tiles above left
        missing = rows * scale - total.shape[1]
        zeros = total.new_zeros(len(total), missing, w * scale)
        total = torch.cat([total, zeros], 1)
        weights = torch.cat([weights, zeros[:1]], 1)
        vertical = blend_weights(rows * scale, shared, top > 0, top + rows < h, total)
        for left in lefts:
            part = picture[:, top : top + rows, left : left + columns]
            ends = left > 0, left + columns < w
            weight = vertical[:, None] * blend_weights(columns * scale, shared, *ends, total)
            place = slice(left * scale, (left + columns) * scale)
            total[:, :, place] += weight * predict(model, part, ensemble)
            weights[:, :, place] += weight
            done += 1
            advance(done / tiles)
        ready = (following - top) * scale
        yield total[:, :ready] / weights[:, :ready]
        total, weights = total[:, ready:], weights[:, ready:]


def predict(model: Backbone, part: Tensor, ensemble: bool) -> Tensor:
    """A picture [C,h,w], or a part of one, through the network in one go → [C,h·scale,w·scale], on
    the picture's device; as the mean over the 8 flips and rotations, if wanted."""
    given = part.to(next(model.parameters()).device).unsqueeze(0)
    if not ensemble:
        return model(given)[0].to(part.device)
    total = torch.zeros((), device=given.device)
    for which in range(8):
        turned = torch.rot90(given, which % 4, (2, 3))
        restored = model(turned.flip(3)).flip(3) if which >= 4 else model(turned)
        total = total + torch.rot90(restored, -(which % 4), (2, 3))
    return (total[0] / 8).to(part.device)


def tile_grid(length: int, tile: int) -> tuple[int, list[int]]:
    """(side, starts) of the tiles along one side of a picture: as few as tiles of side `tile` need
    to share `overlap(tile)` pixels, evenly spaced, and no larger than that takes."""
    shared = overlap(tile)
    count = 1 + max(0, math.ceil((length - tile) / (tile - shared)))
    side = min(length, max(LEAST, math.ceil((length + (count - 1) * shared) / count)))
    return side, [(length - side) * i // max(1, count - 1) for i in range(count)]


def blend_weights(size: int, shared: int, before: bool, after: bool, like: Tensor) -> Tensor:
    """Blending weights [size] along one side of a tile, of which neighbours share `shared` or more.

    Where a tile lies before, or after, the outer quarter of `shared` has weight 0, because the cut
    shows there; the middle half is a ramp.
    """
    at = (torch.arange(shared, dtype=like.dtype, device=like.device) + 0.5) / shared
    ramp = ((at - 0.25) / 0.5).clamp(0, 1)
    weight = like.new_ones(size)
    if before:
        weight[:shared] *= ramp
    if after:
        weight[-shared:] *= ramp.flip(0)
    return weight


def within_memory(
    work: Callable[[int | None], Result], tile: int | None, picture: Tensor
) -> Result:
    """work(tile), and again with tiles of half the side, with a notice, as long as memory runs out.

    Raises AclaError when the smallest tile needs too much.
    """
    longest = max(picture.shape[1:])
    while True:
        try:
            return work(tile)
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is of the latter
            if not out_of_memory(error):
                raise
            side = min(tile or longest, longest)
            tile = max(side // 2, SMALLEST)
            if tile >= side:
                raise AclaError(f"out of memory, even for {side} pixels a side") from error
        # Behind the handler the failed attempt's tensors are gone
        notice(f"out of memory with {side} pixels a side; again with tiles of {tile}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
