"""Offset sampling in Triton: from points and mask maps to each query's list of open keys, and back.

B batch · L referred layers · K sampled keys per layer and query · H,W grid, N = H·W
offsets are (dy, dx) in pixels, y first

Nothing here touches a feature: 1×1 convolutions and bilinear sampling are linear, so M(x(p)) is a
sample of the map M(x) at p. What the sum needs of a key is its corner, its place (dy, dx) within
the four corners, and its weight f.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .accounting import tally
from .inputs import Inputs, Leaves
from .launch import launch
from .primitives import (
    KeyPlan,
    Keys,
    blend,
    decide,
    entries_of,
    fill_up,
    gate_of,
    inside,
    mask_logit,
    new_sums,
    pack,
    pointer_of,
    position_of,
    reach,
    share_of,
    shares,
    unpack,
    wide,
)


@triton.jit(do_not_specialize=["H", "W", "L"])
def _plan(
    keys,
    gates_ptr,  # [L], or None
    plan,  # without keys in the forward pass
    coverage_ptr,  # [B,N,L], or None
    kept_ptr,  # [B,L], or None
    H,
    W,
    L,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Decide, weigh and list all keys of BLOCK_N queries of one image on one layer."""
    b = tl.program_id(2).to(tl.int64)
    l = tl.program_id(1).to(tl.int64)
    N = H * W
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]  # [BLOCK_N,1]
    key = tl.arange(0, BLOCK_K)[None, :]  # [1,BLOCK_K]
    valid = (n < N) & (key < K)  # [BLOCK_N,BLOCK_K], like all tiles below
    gate = gate_of(gates_ptr, l)

    row, column, dy, dx, open, at = decide(keys, b, l, n, key, valid, H, W, L, K)
    rank = tl.cumsum(open.to(tl.int32), 1)  # open keys up to and with this one
    count = tl.sum(open.to(tl.int32), 1)[:, None]  # [BLOCK_N,1]
    if kept_ptr is not None:
        tally(kept_ptr + b * L + l, open)

    covered = tl.zeros([BLOCK_N, 1], tl.float32)
    if (gate != 0) | (plan.key is not None):
        logit_at = at + 2 * wide(keys.points_strides[4])
        f = tl.load(logit_at, mask=valid, other=-float("inf")).to(tl.float32)
        f = tl.where(n < N, f, 0.0)  # rows past the end must not divide by 0
        f = tl.exp(f - tl.max(f, 1)[:, None])
        f = f / tl.sum(f, 1)[:, None]
        if coverage_ptr is not None:
            i0, i1, i2, i3 = inside(row, column, H, W)
            share, _, _ = blend(i0, i1, i2, i3, dy, dx)
            covered = gate * tl.sum(tl.where(open, f * share, 0.0), 1)[:, None]
        slot = tl.where(open, rank - 1, count + key - rank)
        entry = ((b * L + l) * N + n) * K + slot
        written = open
        if plan.key is not None:
            written = valid
            tl.store(plan.key + entry, tl.broadcast_to(key, [BLOCK_N, BLOCK_K]), mask=written)
        tl.store(plan.corner + entry, pack(row, column), mask=written)
        tl.store(plan.dy + entry, dy, mask=written)
        tl.store(plan.dx + entry, dx, mask=written)
        tl.store(plan.weight + entry, f, mask=written)
    tl.store(plan.count + (b * L + l) * N + n, count, mask=n < N)
    if coverage_ptr is not None:
        tl.store(coverage_ptr + (b * N + n) * L + l, covered, mask=n < N)


def make_plan(
    inputs: Inputs, coverage: Tensor | None = None, kept: Tensor | None = None
) -> KeyPlan:
    """The forward pass's plan, which also fills coverage [B,H,W,L], float32, and kept [B,L],
    float64 zeros, where keys are counted; without them the backward pass's: closed keys and layers
    too, with the keys' numbers."""
    B, H, W, L, _, K = inputs.points.shape

    def empty(dtype: torch.dtype, *last: int) -> Tensor:
        return torch.empty(B, L, H * W, *last, dtype=dtype, device=inputs.points.device)

    plan = KeyPlan(
        corner=empty(torch.int64, K),
        dy=empty(torch.float32, K),
        dx=empty(torch.float32, K),
        weight=empty(torch.float32, K),
        key=empty(torch.int32, K) if coverage is None else None,
        count=empty(torch.int32),
    )
    arguments = {"gates_ptr": inputs.gates, "coverage_ptr": coverage, "kept_ptr": kept}
    shape = {"H": H, "W": W, "L": L, "K": K}
    launch(_plan, (H * W, L, B), keys=Keys.of(inputs), plan=plan, **arguments, **shape)
    return plan


class Sent(NamedTuple):
    """The gradients that `_spread` reads, None for zeros."""

    dots: Tensor | None  # [B,L,N,K,4], of the aggregate with the corners
    coverage: Tensor | None  # [B,N,L]
    kept: Tensor | None  # [B,L]


class Spread(NamedTuple):
    """The gradients that `_spread` writes, None where not wanted."""

    points: Tensor | None  # [B,N,L,3,K]
    maps: tuple[Tensor, ...] | None  # L × [B,H+2,W+2,K] float32, zeros to add to
    masks: Tensor | None  # [B,L,N,K]
    gates: Tensor | None  # [B,L,N], each query's share


@triton.jit
def corner_dots(sent, known, b, l, n, entry, row, column, H, W, L):
    """The four dots of entries, where known; with the coverage's gradient at corners inside."""
    d0 = tl.zeros(known.shape, tl.float32)
    d1, d2, d3 = d0, d0, d0
    if sent.dots is not None:
        at = sent.dots + entry * 4
        d0 = tl.load(at, mask=known, other=0.0)
        d1 = tl.load(at + 1, mask=known, other=0.0)
        d2 = tl.load(at + 2, mask=known, other=0.0)
        d3 = tl.load(at + 3, mask=known, other=0.0)
    if sent.coverage is not None:
        N = H * W
        at = sent.coverage + (b * N + n) * L + l
        covered = tl.load(at, mask=n < N, other=0.0).to(tl.float32)
        i0, i1, i2, i3 = inside(row, column, H, W)
        d0 += covered * i0
        d1 += covered * i1
        d2 += covered * i2
        d3 += covered * i3
    return d0, d1, d2, d3


@triton.jit
def add_to_map(maps, b, l, key, value, row, column, dy, dx, valid, H, W, K: tl.constexpr):
    """Add each key's value to the four corners in its channel of layer l's map."""
    down = (W + 2).to(tl.int64) * K
    pixel = (b * (H + 2) + row) * (W + 2) + column
    at = pointer_of(maps, l) + (pixel * K + key)
    s0, s1, s2, s3 = shares(dy, dx)
    tl.atomic_add(at, value * s0, mask=valid, sem="relaxed")
    tl.atomic_add(at + K, value * s1, mask=valid, sem="relaxed")
    tl.atomic_add(at + down, value * s2, mask=valid, sem="relaxed")
    tl.atomic_add(at + (down + K), value * s3, mask=valid, sem="relaxed")


@triton.jit(do_not_specialize=["temperature", "H", "W", "L"])
def _spread(
    keys,
    gates_ptr,  # [L], or None
    plan,
    sent,
    grads,
    temperature,
    H,
    W,
    L,
    K: tl.constexpr,
    CLOSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Turn dots into the gradients of offsets, logits, masks and gate: all keys of BLOCK_N queries
    of one image on one layer. The order of the additions to the maps' gradients varies."""
    b = tl.program_id(2).to(tl.int64)
    l = tl.program_id(1).to(tl.int64)
    N = H * W
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]  # [BLOCK_N,1]
    slot = tl.arange(0, BLOCK_K)[None, :]  # [1,BLOCK_K]
    valid = (n < N) & (slot < K)  # [BLOCK_N,BLOCK_K], like all tiles below
    gate = gate_of(gates_ptr, l)
    query = (b * L + l) * N + n
    entry = query * K + slot
    count = tl.load(plan.count + query, mask=n < N, other=0)  # [BLOCK_N,1]
    open = tl.where(slot < count, 1.0, 0.0)
    row, column = unpack(tl.load(plan.corner + entry, mask=valid, other=0))
    dy = tl.load(plan.dy + entry, mask=valid, other=0.0)
    dx = tl.load(plan.dx + entry, mask=valid, other=0.0)
    f = tl.load(plan.weight + entry, mask=valid, other=0.0)
    key = tl.load(plan.key + entry, mask=valid, other=0)
    known = valid & (slot < reach(count, gate, K, CLOSED, grads.gates is not None))
    d0, d1, d2, d3 = corner_dots(sent, known, b, l, n, entry, row, column, H, W, L)
    dot, dot_y, dot_x = blend(d0, d1, d2, d3, dy, dx)  # of the gradient with the sample
    of_gate = tl.sum(open * f * dot, 1)[:, None]  # [BLOCK_N,1]
    if grads.gates is not None:
        tl.store(grads.gates + query, of_gate, mask=n < N)
    grad_y, grad_x = gate * open * f * dot_y, gate * open * f * dot_x
    if keys.maps is not None:
        logit, slope_y, slope_x = mask_logit(keys, b, l, n, key, row, column, dy, dx, valid, L, K)
        e = tl.exp(-tl.abs(logit) / temperature)
        grad_mask = gate * f * dot
        if sent.kept is not None:
            grad_mask += tl.load(sent.kept + b * L + l).to(tl.float32)
        grad_mask *= e / ((1 + e) * (1 + e) * temperature)  # the sigmoid's slope: straight-through
        grad_y += grad_mask * slope_y
        grad_x += grad_mask * slope_x
        if grads.masks is not None:
            tl.store(grads.masks + entry, grad_mask, mask=valid)
        if grads.maps is not None:
            add_to_map(grads.maps, b, l, key, grad_mask, row, column, dy, dx, valid, H, W, K)
    if grads.points is not None:
        y, x, _ = position_of(keys, b, n, l, key, valid, W)
        at = grads.points + (((b * N + n) * L + l) * 3 * K + key)
        # Farther out, moving changes nothing.
        tl.store(at, tl.where((y >= -1) & (y <= H), grad_y, 0.0), mask=valid)
        tl.store(at + K, tl.where((x >= -1) & (x <= W), grad_x, 0.0), mask=valid)
        tl.store(at + 2 * K, gate * f * (open * dot - of_gate), mask=valid)


def spread(
    inputs: Inputs,
    plan: KeyPlan,
    dots: Tensor | None,
    grad_coverage: Tensor | None,
    grad_kept: Tensor | None,
    wanted: Leaves,
    closed: bool,
) -> tuple[Tensor | None, list[Tensor] | None, Tensor | None]:
    """Gradients of points (contiguous), of all mask maps L × [B,H+2,W+2,K], both float32, and of
    the gates [L], float64; None where not wanted. `dots` is the result of `aggregation.dots`, with
    the same `closed`."""
    B, H, W, L, _, K = inputs.points.shape
    device = inputs.points.device
    maps_wanted, ordered = any(wanted.mask_maps), torch.are_deterministic_algorithms_enabled()

    def empty(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=device) if wanted else None

    grad_maps = None
    if maps_wanted and not ordered:
        grad_maps = new_sums(L, (B, H + 2, W + 2, K), device, zero=True)
    grads = Spread(
        points=empty(wanted.points, *inputs.points.shape),
        maps=grad_maps and fill_up(grad_maps),
        masks=empty(maps_wanted and ordered, B, L, H * W, K),
        gates=empty(wanted.gates, B, L, H * W),
    )
    arguments = {"keys": Keys.of(inputs), "gates_ptr": inputs.gates, "plan": plan, "grads": grads}
    arguments |= {"sent": Sent(dots, grad_coverage, grad_kept)}
    sizes = {"H": H, "W": W, "L": L, "K": K, "CLOSED": closed}
    temperature = float(inputs.temperature)
    launch(_spread, (H * W, L, B), temperature=temperature, **arguments, **sizes)
    if grads.masks is not None:
        grad_maps = sum_maps(plan, grads.masks, H, W)
    return (
        grads.points,
        grad_maps,
        None if grads.gates is None else grads.gates.double().sum((0, 2)),
    )


@triton.jit(do_not_specialize=["W"])
def _sum_maps(
    order_ptr,  # [B·L·N·K] int64, entries sorted by their corner's pixel
    first_ptr,  # [L·B·(H+2)·(W+2) + 1] int64, where in it the entries of each pixel begin
    plan,
    grad_mask_ptr,  # [B,L,N,K]
    outs,  # L × [B,H+2,W+2,K] float32
    W,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum, in a fixed order, what the keys send to one pixel of a mask map."""
    l = tl.program_id(1)
    pixel = tl.program_id(0).to(tl.int64)  # of [B,H+2,W+2]
    of_all = l.to(tl.int64) * tl.num_programs(0) + pixel
    key = tl.arange(0, BLOCK_K)[None, :]  # [1,BLOCK_K]
    total = tl.zeros([BLOCK_K], tl.float32)
    for corner in tl.static_range(4):
        begin, end = entries_of(first_ptr, of_all, corner, W)
        for e in range(begin, end, BLOCK_E):
            at = e + tl.arange(0, BLOCK_E)  # [BLOCK_E]
            valid = at < end
            entry = tl.load(order_ptr + at, mask=valid, other=0)
            share = share_of(plan, entry, valid, corner)
            sent = share * tl.load(grad_mask_ptr + entry, mask=valid, other=0.0)
            channel = tl.load(plan.key + entry, mask=valid, other=0)
            total += tl.sum(tl.where(channel[:, None] == key, sent[:, None], 0.0), 0)
    at = pointer_of(outs, l) + (pixel * K + tl.arange(0, BLOCK_K))
    tl.store(at, total, mask=tl.arange(0, BLOCK_K) < K)


def sum_maps(plan: KeyPlan, grad_mask: Tensor, H: int, W: int) -> list[Tensor]:
    """The mask maps' gradients L × [B,H+2,W+2,K] from the keys' [B,L,N,K], in a fixed order."""
    B, L, _, K = grad_mask.shape
    order, first = sort_by_pixel(plan, H, W)
    outs = new_sums(L, (B, H + 2, W + 2, K), grad_mask.device, zero=False)
    arguments = {"order_ptr": order, "first_ptr": first, "plan": plan, "grad_mask_ptr": grad_mask}
    arguments |= {"outs": fill_up(outs), "W": W, "K": K}
    launch(_sum_maps, (B * (H + 2) * (W + 2), L, 1), rows_block=None, **arguments)
    return outs


def sort_by_pixel(
    plan: KeyPlan, H: int, W: int, listed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The plan's entries in the order of their corner's pixel in [L,B,H+2,W+2], and where in it
    each pixel begins. `listed` [B,L,N,K]: the entries to take; None means all. Equal pixels keep
    their order."""
    B, L, _, _ = plan.corner.shape
    device = plan.corner.device
    image = torch.arange(L, device=device) * B + torch.arange(B, device=device).unsqueeze(1)
    row, column = plan.corner >> 32, plan.corner & 0xFFFFFFFF
    pixel = (image.view(B, L, 1, 1) * (H + 2) + row) * (W + 2) + column
    pixels = L * B * (H + 2) * (W + 2)
    if listed is not None:
        pixel = pixel.where(listed, pixels)
    pixel, order = pixel.flatten().sort(stable=True)
    return order, torch.searchsorted(pixel, torch.arange(pixels + 1, device=device))
