"""Sparse masked aggregation in Triton: weighted sums of the open keys' features, and back.

B batch · L referred layers · K sampled keys per layer and query · H,W grid, N = H·W · C channels

The plan (sampling.py) lists each query's keys, open ones first. A program owns a tile of queries
times channels and goes through the lists together, to the longest: a closed key costs nothing but
the wait for its neighbours. All sums are float32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .primitives import (
    KeyPlan,
    entries_of,
    entry_of,
    feature_arguments,
    fill_up,
    gate_of,
    image_of,
    load_corners,
    new_sums,
    offset_of,
    pointer_of,
    reach,
    share_of,
    unpack,
)
from .sampling import sort_by_pixel


@triton.jit(do_not_specialize=["N", "L"])
def _aggregate(
    features,  # L × [B,H+2,W+2,C]
    plan,
    gates_ptr,  # [L], or None
    out_ptr,  # [B,N,L,C]
    strides,
    N,
    L,
    K: tl.constexpr,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum the open keys of BLOCK_N queries of one image on one layer, in BLOCK_C channels."""
    CHUNKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    b = tl.program_id(2).to(tl.int64)
    l = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) // CHUNKS * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    c = tl.program_id(0) % CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]  # [1,BLOCK_C]
    pointer, down, right = image_of(features, strides, b, l, UNIT, NARROW)
    gate = gate_of(gates_ptr, l)
    query = (b * L + l) * N + n
    count = tl.load(plan.count + query, mask=n < tl.where(gate != 0, N, 0), other=0)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for slot in range(tl.max(count, 0)):
        open = slot < count  # [BLOCK_N]
        entry = query * K + slot
        corner, w0, w1, w2, w3 = entry_of(plan, entry, open)
        offset = offset_of(corner, down, right)[:, None]
        mask = open[:, None] & (c < C)
        v0, v1, v2, v3 = load_corners(pointer, offset, c, down, right, mask, [1, UNIT])
        total += w0[:, None] * v0 + w1[:, None] * v1
        total += w2[:, None] * v2 + w3[:, None] * v3
    at = out_ptr + ((((b * N + n) * L + l) * C)[:, None] + c)
    tl.store(at, (gate * total).to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (c < C))


def aggregate(
    features: Sequence[Tensor], plan: KeyPlan, gates: Tensor | None, H: int, W: int
) -> Tensor:
    """s_l Σ_k m f x^l(p_i + Δp_ik) of Eq. 6, [B,H,W,L,C] of the features' type."""
    B, L, N, K = plan.corner.shape
    C = features[0].shape[-1]
    out = torch.empty(B, H, W, L, C, dtype=features[0].dtype, device=features[0].device)
    sizes = {"N": N, "L": L, "K": K, "C": C, **feature_arguments(features)}
    launch(_aggregate, (N, L, B), plan=plan, gates_ptr=gates, out_ptr=out, **sizes)
    return out


@triton.jit(do_not_specialize=["N", "L"])
def _dots(
    features,  # L × [B,H+2,W+2,C]
    plan,
    gates_ptr,  # [L], or None
    grad_ptr,  # [B,N,L,C]
    out_ptr,  # [B,L,N,K,4]
    strides,
    N,
    L,
    K: tl.constexpr,
    C: tl.constexpr,
    CLOSED: tl.constexpr,
    SHUT: tl.constexpr,
    UNIT: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Multiply the gradient with the features at each key's four corners, for BLOCK_N queries of
    one image on one layer and all channels."""
    b = tl.program_id(2).to(tl.int64)
    l = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    pointer, down, right = image_of(features, strides, b, l, UNIT, NARROW)
    gate = gate_of(gates_ptr, l)
    query = (b * L + l) * N + n
    count = tl.load(plan.count + query, mask=n < N, other=0)
    limit = tl.where(n < N, reach(count, gate, K, CLOSED, SHUT), 0)
    grad_at = grad_ptr + (((b * N + n) * L + l) * C)[:, None]
    for slot in range(tl.max(limit, 0)):
        valid = slot < limit  # [BLOCK_N]
        entry = query * K + slot
        corner = tl.load(plan.corner + entry, mask=valid, other=0)
        offset = offset_of(corner, down, right)[:, None]
        d0 = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        d1, d2, d3 = d0, d0, d0
        for begin in range(0, C, BLOCK_C):
            c = begin + tl.arange(0, BLOCK_C)[None, :]  # [1,BLOCK_C]
            mask = valid[:, None] & (c < C)
            grad = tl.load(grad_at + c, mask=mask, other=0.0).to(tl.float32)
            v0, v1, v2, v3 = load_corners(pointer, offset, c, down, right, mask, [1, UNIT])
            d0 += grad * v0
            d1 += grad * v1
            d2 += grad * v2
            d3 += grad * v3
        # [BLOCK_N,2,2], whose last two dimensions count in the order 0, 1, 2, 3
        pairs = tl.join(
            tl.join(tl.sum(d0, 1), tl.sum(d2, 1)), tl.join(tl.sum(d1, 1), tl.sum(d3, 1))
        )
        out_at = out_ptr + ((entry * 4)[:, None] + tl.arange(0, 4)[None, :])
        tl.store(out_at, tl.reshape(pairs, [BLOCK_N, 4]), mask=valid[:, None])


def dots(
    features: Sequence[Tensor],
    plan: KeyPlan,
    gates: Tensor | None,
    grad: Tensor,
    closed: bool,
    shut: bool,
) -> Tensor:
    """Products of the gradient [B,H,W,L,C] with the feature at each key's corners, [B,L,N,K,4]
    float32: all that the gradients of offsets, logits, masks and gates need of the features.
    Written as far as `primitives.reach` says."""
    B, L, N, K = plan.corner.shape
    out = torch.empty(B, L, N, K, 4, dtype=torch.float32, device=grad.device)
    arguments = {"plan": plan, "gates_ptr": gates, "grad_ptr": grad, "out_ptr": out}
    sizes = {"N": N, "L": L, "K": K, "C": grad.shape[-1], "CLOSED": closed, "SHUT": shut}
    launch(_dots, (N, L, B), **feature_arguments(features), **arguments, **sizes)
    return out


@triton.jit(do_not_specialize=["N", "L", "H", "W"])
def _scatter(
    plan,
    gates_ptr,  # [L], or None
    grad_ptr,  # [B,N,L,C]
    outs,  # L × [B,H+2,W+2,C] float32, zeros to add to
    N,
    L,
    H,
    W,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add the gradients of BLOCK_N queries of one image on one layer to the corners of their open
    keys, in BLOCK_C channels. The order of the additions varies."""
    CHUNKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    b = tl.program_id(2).to(tl.int64)
    l = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) // CHUNKS * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    c = tl.program_id(0) % CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]  # [1,BLOCK_C]
    pointer = pointer_of(outs, l)
    gate = gate_of(gates_ptr, l)
    query = (b * L + l) * N + n
    count = tl.load(plan.count + query, mask=n < tl.where(gate != 0, N, 0), other=0)
    grad_at = grad_ptr + ((((b * N + n) * L + l) * C)[:, None] + c)
    grad = tl.load(grad_at, mask=(count > 0)[:, None] & (c < C), other=0.0).to(tl.float32)
    grad *= gate
    for slot in range(tl.max(count, 0)):
        open = slot < count  # [BLOCK_N]
        entry = query * K + slot
        corner, w0, w1, w2, w3 = entry_of(plan, entry, open)
        row, column = unpack(corner)
        at = pointer + ((((b * (H + 2) + row) * (W + 2) + column) * C)[:, None] + c)
        below = at + (W + 2).to(tl.int64) * C
        mask = open[:, None] & (c < C)
        tl.atomic_add(at, w0[:, None] * grad, mask=mask, sem="relaxed")
        tl.atomic_add(at + C, w1[:, None] * grad, mask=mask, sem="relaxed")
        tl.atomic_add(below, w2[:, None] * grad, mask=mask, sem="relaxed")
        tl.atomic_add(below + C, w3[:, None] * grad, mask=mask, sem="relaxed")


def scatter(plan: KeyPlan, gates: Tensor | None, grad: Tensor) -> list[Tensor]:
    """The features' gradients L × [B,H+2,W+2,C], float32, added atomically: the last bits vary from
    run to run. grad [B,H,W,L,C], contiguous."""
    B, H, W, L, C = grad.shape
    outs = new_sums(L, (B, H + 2, W + 2, C), grad.device, zero=True)
    arguments = {"plan": plan, "gates_ptr": gates, "grad_ptr": grad, "outs": fill_up(outs)}
    sizes = {"N": H * W, "L": L, "H": H, "W": W, "K": plan.corner.shape[-1], "C": C}
    launch(_scatter, (H * W, L, B), **arguments, **sizes)
    return outs


@triton.jit(do_not_specialize=["L", "H", "W"])
def _sum_rows(
    order_ptr,  # [B·L·N·K] int64, entries sorted by their corner's pixel
    first_ptr,  # [L·B·(H+2)·(W+2) + 1] int64, where in it the entries of each pixel begin
    plan,
    gates_ptr,  # [L], or None
    grad_ptr,  # [B,N,L,C]
    outs,  # L × [B,H+2,W+2,C] float32
    L,
    H,
    W,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum, in a fixed order, what the open keys send to a feature's pixel, in BLOCK_C channels."""
    CHUNKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    l = tl.program_id(1).to(tl.int64)
    pixel = (tl.program_id(0) // CHUNKS).to(tl.int64)  # of [B,H+2,W+2]
    of_all = l * (tl.num_programs(0) // CHUNKS) + pixel
    b = pixel // ((H + 2) * (W + 2))
    N = H * W
    c = tl.program_id(0) % CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]  # [1,BLOCK_C]
    total = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
    for corner in tl.static_range(4):
        begin, end = entries_of(first_ptr, of_all, corner, W)
        for e in range(begin, end, BLOCK_E):
            at = e + tl.arange(0, BLOCK_E)  # [BLOCK_E]
            valid = at < end
            entry = tl.load(order_ptr + at, mask=valid, other=0)
            n = entry // K - (b * L + l) * N
            f = tl.load(plan.weight + entry, mask=valid, other=0.0)
            f *= share_of(plan, entry, valid, corner)
            grad_row = (b * N + n) * L + l
            mask = valid[:, None] & (c < C)
            grad = tl.load(grad_ptr + ((grad_row * C)[:, None] + c), mask=mask, other=0.0)
            total += f[:, None] * grad.to(tl.float32)
    whole = gate_of(gates_ptr, l) * tl.sum(total, 0)[None, :]
    tl.store(pointer_of(outs, l) + (pixel * C + c), whole, mask=c < C)


def sum_rows(plan: KeyPlan, gates: Tensor | None, grad: Tensor) -> list[Tensor]:
    """As `scatter`, but every sum in one order: the same bits in every run."""
    B, H, W, L, C = grad.shape
    K = plan.corner.shape[-1]
    listed = torch.arange(K, device=grad.device) < plan.count.unsqueeze(-1)  # [B,L,N,K]
    if gates is not None:
        listed &= (gates != 0).view(L, 1, 1)
    order, first = sort_by_pixel(plan, H, W, listed)
    outs = new_sums(L, (B, H + 2, W + 2, C), grad.device, zero=False)
    arguments = {"plan": plan, "gates_ptr": gates, "grad_ptr": grad, "outs": fill_up(outs)}
    arguments |= {"order_ptr": order, "first_ptr": first}
    sizes = {"L": L, "H": H, "W": W, "K": K, "C": C}
    launch(_sum_rows, (B * (H + 2) * (W + 2), L, 1), rows_block=None, **arguments, **sizes)
    return outs
