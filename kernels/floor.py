"""The least time of the operator on a GPU, by memory, gathers and instructions.

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels

A floor leaves out what a better program could avoid or hide: launches, waiting, reading a pixel
from memory twice; and, to stay simple, what is done once a key and not once a channel (positions,
softmax, masks).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .launch import VECTOR

CORNERS = 4
REAL = 4  # bytes of an offset, a logit, a mask map's value; sums are as wide


class Work(NamedTuple):
    """What one pass does at least."""

    bytes: int  # to and from memory: every tensor once
    flops: int  # Eq. 12's aggregation, 6 a channel and key, as `kernels.registration` counts it
    gathered: int  # bytes between the caches and the registers: every corner of every key
    instructions: int  # of one lane each


class Gpu(NamedTuple):
    """What a GPU does in a second at most, all multiprocessors together."""

    memory: float  # bytes
    cache: float  # bytes from L1
    lanes: float  # instructions of one lane


def forward_work(
    B: int, L: int, K: int, H: int, W: int, C: int, keep: float, dtype: torch.dtype
) -> Work:
    """Sampling and summing the kept keys; `keep` is their share, `dtype` the features'.

    Features, points and mask maps are read (all features: several keys read every pixel), the three
    results written. A channel of a kept key takes a multiply-add for each corner, the share of a
    load, and a conversion where the features are narrower than the sums.
    """
    queries = B * H * W * L
    kept = round(queries * K * keep)
    results = queries * (C * dtype.itemsize + REAL) + B * L * torch.float64.itemsize
    return Work(
        bytes=inputs_bytes(B, L, K, H, W, C, dtype) + results,
        flops=6 * C * kept,
        gathered=CORNERS * C * dtype.itemsize * kept,
        instructions=round(CORNERS * C * kept * per_value(dtype)),
    )


def backward_work(
    B: int, L: int, K: int, H: int, W: int, C: int, keep: float, dtype: torch.dtype
) -> Work:
    """The gradients of features, points and mask maps, from that of the aggregate alone.

    The inputs are read again, and the aggregate's gradient; their own gradients are written. Those
    of the masks need the dots of every key, kept or not, which cost what forward does for a kept
    one. Then each kept key sends the gradient to its corners: by adding float32 products to memory,
    or, sorted by pixel, by gathering gradients of the features' type. What is less of each counts:
    the bytes of gathering, the instructions of adding.
    """
    keys = B * H * W * L * K
    kept = round(keys * keep)
    gradient = B * H * W * L * C * dtype.itemsize
    return Work(
        bytes=2 * inputs_bytes(B, L, K, H, W, C, dtype) + gradient,
        flops=6 * C * (keys + kept),
        gathered=CORNERS * C * dtype.itemsize * (keys + kept),
        instructions=round(CORNERS * C * (keys * per_value(dtype) + kept * (1 + REAL / VECTOR))),
    )


def inputs_bytes(B: int, L: int, K: int, H: int, W: int, C: int, dtype: torch.dtype) -> int:
    """Bytes of features and mask maps, borders included, and of points."""
    pixels = B * L * (H + 2) * (W + 2)
    return pixels * (C * dtype.itemsize + K * REAL) + B * H * W * L * 3 * K * REAL


def per_value(dtype: torch.dtype) -> float:
    """Instructions for a value gathered: multiply-add, conversion, share of a wide load."""
    return 1 + (dtype.itemsize < REAL) + dtype.itemsize / VECTOR


def works(
    B: int, L: int, K: int, H: int, W: int, C: int, keep: float, dtype: torch.dtype, which: str
) -> tuple[Work, ...]:
    """The passes, one after another, of "forward" or "both"."""
    problem = (B, L, K, H, W, C, keep, dtype)
    forward = forward_work(*problem)
    return (forward,) if which == "forward" else (forward, backward_work(*problem))


def floor_ms(passes: Sequence[Work], gpu: Gpu) -> float:
    """Milliseconds: of each pass the longest of memory, gathers and instructions, which overlap at
    best; passes do not, the gradient comes between them."""
    return 1e3 * sum(
        max(work.bytes / gpu.memory, work.gathered / gpu.cache, work.instructions / gpu.lanes)
        for work in passes
    )


# Compute capability → bytes from L1 and instructions of warps, a clock and multiprocessor.
# L1 shares its array with shared memory, 32 banks of 4 bytes a clock (torch/cuda/_device_limits.py
# takes the same), and four schedulers issue an instruction each: CUDA C++ Programming Guide, the
# sections on compute capabilities 8.x and 9.0.
PER_CLOCK = {(8, 0): (128, 4), (8, 6): (128, 4), (8, 9): (128, 4), (9, 0): (128, 4)}


def gpu_of(device: torch.device) -> Gpu:
    """The limits of a CUDA device: highest clocks, and memory that moves twice a clock.

    Clocks are the driver's, as Triton reads them: torch's device properties lack them since CUDA
    13. Raises LookupError, with the reason, where the limits are not known."""
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    if torch.version.hip or capability not in PER_CLOCK:
        raise LookupError(f"no limits are known for {properties.name}")
    try:
        from triton.runtime import driver

        limits = driver.active.utils.get_device_properties(device.index or 0)
        clock, memory_clock = limits["sm_clock_rate"], limits["mem_clock_rate"]  # kHz
        bus = limits["mem_bus_width"]  # bits
    except (ImportError, RuntimeError, AttributeError, KeyError) as error:
        raise LookupError(f"Triton's driver does not give the clocks ({error!r})") from error
    if not (clock and memory_clock and bus):
        raise LookupError("the driver gives no clocks")
    cache, warps = PER_CLOCK[capability]
    clocks = properties.multi_processor_count * clock * 1e3
    return Gpu(
        memory=2 * memory_clock * 1e3 * bus / 8,
        cache=clocks * cache,
        lanes=clocks * warps * properties.warp_size,
    )
