"""FLOPs accounting in Triton: how many keys each image keeps on each layer, exactly (for Eq. 12).

B batch · L referred layers · K sampled keys per layer and query · H,W grid, N = H·W
offsets are (dy, dx) in pixels, y first

`tally` runs inside the sampling kernel: training needs no second pass. `count` gathers from the
mask maps alone and finds the same numbers: what a module would cost, before it runs.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .inputs import Inputs
from .launch import launch
from .primitives import Keys, decide


@triton.jit
def tally(kept_ptr, open):
    """Add a tile's open keys to the count of its image and layer.

    The count is float64: whole numbers below 2^53 and their sums are exact in it, in any order.
    """
    tl.atomic_add(kept_ptr, tl.sum(tl.sum(open.to(tl.int32), 1), 0).to(tl.float64), sem="relaxed")


@triton.jit(do_not_specialize=["H", "W", "L"])
def _count(
    keys,
    kept_ptr,  # [B,L], zeros to add to
    H,
    W,
    L,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Count the open keys of BLOCK_N queries of one image on one layer."""
    b = tl.program_id(2).to(tl.int64)
    l = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]  # [BLOCK_N,1]
    key = tl.arange(0, BLOCK_K)[None, :]  # [1,BLOCK_K]
    valid = (n < H * W) & (key < K)  # [BLOCK_N,BLOCK_K]
    _, _, _, _, open, _ = decide(keys, b, l, n, key, valid, H, W, L, K)
    tally(kept_ptr + b * L + l, open)


def count(points: Tensor, mask_maps: Sequence[Tensor], seeds: Tensor | None = None) -> Tensor:
    """Keys kept [B,L], float64, as `kernels.attend` counts them, without touching a feature.

    points [B,H,W,L,3,K] (only the offsets are read), mask_maps L × [B,H+2,W+2,K], seeds [B] int64.
    """
    B, H, W, L, _, K = points.shape
    kept = torch.zeros(B, L, dtype=torch.float64, device=points.device)
    seeds = None if seeds is None else seeds.contiguous()
    keys = Keys.of(Inputs((), points, mask_maps, seeds=seeds))
    with torch.cuda.device_of(points):
        launch(_count, (H * W, L, B), keys=keys, kept_ptr=kept, H=H, W=W, L=L, K=K)
    return kept
