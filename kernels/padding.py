"""Features as rows in Triton: channels last, a zero border of one pixel, in one launch.

B batch · H,W grid · C channels
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .primitives import wide


@triton.jit(do_not_specialize=["H", "W"])
def _pad(
    features,  # 1 × [B,C,H,W]
    out_ptr,  # [B,H+2,W+2,C]
    strides,  # of the feature
    H,
    W,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Copy BLOCK_N pixels of one image, border included, in BLOCK_C channels."""
    CHUNKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    b = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) // CHUNKS * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    c = tl.program_id(0) % CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]  # [1,BLOCK_C]
    y = n // (W + 2) - 1
    x = n % (W + 2) - 1
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    pixel = b * wide(strides[0]) + y * wide(strides[2]) + x * wide(strides[3])
    at = features[0] + (pixel[:, None] + c * wide(strides[1]))
    value = tl.load(at, mask=inside[:, None] & (c < C), other=0.0)
    pixels = (H + 2) * (W + 2)
    out = out_ptr + ((b * pixels + n)[:, None] * C + c)
    tl.store(out, value, mask=(n < pixels)[:, None] & (c < C))


def pad(feature: Tensor) -> Tensor:
    """The rows [B,H+2,W+2,C] of a feature map [B,C,H,W] with any strides."""
    B, C, H, W = feature.shape
    out = torch.empty(B, H + 2, W + 2, C, dtype=feature.dtype, device=feature.device)
    grid = (H + 2) * (W + 2), 1, B
    features, strides = (feature.detach(),), feature.stride()
    launch(_pad, grid, features=features, out_ptr=out, strides=strides, H=H, W=W, C=C)
    return out
