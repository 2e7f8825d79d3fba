"""Parts of several Triton kernels: layers in tuples, positions, bilinear corners, noise of masks.

B batch · L referred layers · K sampled keys per layer and query · H,W grid, N = H·W · C channels
offsets are (dy, dx) in pixels, y first

Rows have a one-pixel border, so that the four corners of a position clamped to [-1,H] × [-1,W] lie
inside the tensor: no bounds are checked and nothing outside is touched. Corners are numbered 0 at
(row, column), 1 to its right, 2 below it, 3 below and to the right.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .inputs import Inputs
from .launch import VECTOR, power_of_two


class Keys(NamedTuple):
    """What says where the keys lie and which of them are open."""

    points: Tensor  # [B,H,W,L,3,K]
    maps: tuple[Tensor, ...] | None  # L × [B,H+2,W+2,K]
    seeds: Tensor | None  # [B]
    points_strides: tuple[int, ...]
    map_strides: tuple[tuple[int, ...], ...] | None

    @classmethod
    def of(cls, inputs: Inputs) -> "Keys":
        points, maps, strides = inputs.points.detach(), None, None
        if inputs.mask_maps is not None:
            maps, strides = layers(inputs.mask_maps)
        return cls(points, maps, inputs.seeds, points.stride(), strides)


class KeyPlan(NamedTuple):
    """The keys of each query, open ones first: entry (b, l, n, slot) of the lists [B,L,N,K].

    For the forward pass only open keys of open layers are written; for the backward pass all, with
    the key's number.
    """

    corner: Tensor  # int64: row of corner 0 in the upper half, its column in the lower
    dy: Tensor  # float32, within the four corners
    dx: Tensor  # float32
    weight: Tensor  # float32, f of Eq. 6
    key: Tensor | None  # int32
    count: Tensor  # [B,L,N] int32, open keys


def new_sums(L: int, shape: Sequence[int], device: torch.device, zero: bool) -> list[Tensor]:
    """A float32 tensor for each of L layers, filled with zeros, by one launch, if kernels add."""
    tensors = [torch.empty(shape, dtype=torch.float32, device=device) for _ in range(L)]
    if zero:
        torch._foreach_zero_(tensors)
    return tensors


def layers(tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[tuple[int, ...], ...]]:
    """L tensors [B,H+2,W+2,·] as kernel arguments: themselves and their strides (image, row,
    column), once if they agree. Copies what is not dense in its last dimension."""
    tensors = [tensor.detach() for tensor in tensors]
    if len({tensor.dtype for tensor in tensors}) > 1:
        tensors = [tensor.float() for tensor in tensors]
    tensors = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]
    strides = [tensor.stride()[:3] for tensor in tensors]
    return fill_up(tensors), fill_up(strides[:1] if len(set(strides)) == 1 else strides)


def fill_up(items: Sequence) -> tuple:
    """The last item repeated to a power of two: 32 modules of a supernet compile six kernels."""
    return (*items, *[items[-1]] * (power_of_two(len(items)) - len(items)))


def unit_of(tensors: Sequence[Tensor]) -> int:
    """Elements that divide where every row starts: 16 bytes' worth, or 1. (Whether the tensor
    itself starts at a multiple of 16 bytes, Triton finds out.)"""
    width = VECTOR // tensors[0].element_size()
    for tensor in tensors:
        strides = zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)
        if any(stride % width for stride, size in strides if size > 1):
            return 1
    return width


def narrow(tensors: Sequence[Tensor]) -> bool:
    """Whether 32 bits count the elements of an image of [B,H+2,W+2,·], which the steps along both
    its sides reach."""
    return all(max(t.shape[i] * t.stride(i) for i in (1, 2)) < 1 << 30 for t in tensors)


def feature_arguments(features: Sequence[Tensor]) -> dict[str, object]:
    """L features [B,H+2,W+2,C] as kernel arguments, with what is known of their strides."""
    tensors, strides = layers(features)
    known = {"UNIT": unit_of(tensors), "NARROW": narrow(tensors)}
    return {"features": tensors, "strides": strides, **known}


@triton.jit
def wide(number):
    """A run-time argument as int64. (Inside a tuple Triton makes a stride of 1 a constant.)"""
    return tl.full([], number, tl.int64)


@triton.jit
def pointer_of(tensors, l):
    """Address of layer l, which is searched: a kernel indexes a tuple by constants only.

    (A table of addresses would have to be copied to the device, which no CUDA graph can capture.)
    """
    pointer = tensors[0]
    for i in tl.static_range(1, len(tensors)):
        pointer = tl.where(l == i, tensors[i], pointer)
    return pointer


@triton.jit
def layer_of(tensors, strides, l):
    """Address and strides (image, row, column) of layer l."""
    image = wide(strides[0][0])
    row = wide(strides[0][1])
    column = wide(strides[0][2])
    for i in tl.static_range(1, len(strides)):
        image = tl.where(l == i, wide(strides[i][0]), image)
        row = tl.where(l == i, wide(strides[i][1]), row)
        column = tl.where(l == i, wide(strides[i][2]), column)
    return pointer_of(tensors, l), image, row, column


@triton.jit
def image_of(tensors, strides, b, l, UNIT: tl.constexpr, NARROW: tl.constexpr):
    """Address of image b of layer l, where rows start at multiples of UNIT, and the strides (row,
    column): of 32 bits if NARROW, which takes fewer registers and instructions."""
    pointer, image, row, column = layer_of(tensors, strides, l)
    if NARROW:
        row = row.to(tl.int32)
        column = column.to(tl.int32)
    return pointer + tl.multiple_of(b * image, UNIT), row, column


@triton.jit
def gate_of(gates_ptr, l):
    """s_l as float32, 1 without gates."""
    gate = tl.full([], 1.0, tl.float32)
    if gates_ptr is not None:
        gate = tl.load(gates_ptr + l).to(tl.float32)
    return gate


@triton.jit
def reach(count, gate, K: tl.constexpr, CLOSED: tl.constexpr, SHUT: tl.constexpr):
    """How many entries of each list need dots: the open keys of an open layer, the closed ones too
    if CLOSED (the masks' gradient); and the open keys of a shut layer if SHUT (the gate's)."""
    of_open = count
    if CLOSED:
        of_open = tl.full(count.shape, K, tl.int32)
    of_shut = tl.zeros(count.shape, tl.int32)
    if SHUT:
        of_shut = count
    return tl.where(gate != 0, of_open, of_shut)


@triton.jit
def position_of(keys, b, n, l, key, valid, W):
    """The keys' y and x, and the address of their dy. The tiles are n's times key's."""
    strides = keys.points_strides
    y = n // W
    x = n % W
    query = y.to(tl.int64) * wide(strides[1]) + x.to(tl.int64) * wide(strides[2])
    layer = b * wide(strides[0]) + l * wide(strides[3])
    at = keys.points + (layer + query + key.to(tl.int64) * wide(strides[5]))
    dy = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    dx = tl.load(at + wide(strides[4]), mask=valid, other=0.0).to(tl.float32)
    return y.to(tl.float32) + dy, x.to(tl.float32) + dx, at


@triton.jit
def locate(y, x, H, W):
    """Row and column of corner 0, border included, and (dy, dx) within the four corners."""
    height = H.to(tl.float32)
    width = W.to(tl.float32)
    y = tl.where(y > -1, y, -1.0)  # NaN is outside
    x = tl.where(x > -1, x, -1.0)
    y = tl.where(y < height, y, height)
    x = tl.where(x < width, x, width)
    y0 = tl.minimum(tl.floor(y), height - 1)
    x0 = tl.minimum(tl.floor(x), width - 1)
    return y0.to(tl.int32) + 1, x0.to(tl.int32) + 1, y - y0, x - x0


@triton.jit
def pack(row, column):
    """A corner as one int64: its row in the upper half, its column in the lower."""
    return (row.to(tl.int64) << 32) | column.to(tl.int64)


@triton.jit
def unpack(corner):
    """Row and column of a packed corner, int64."""
    return corner >> 32, corner.to(tl.int32).to(tl.int64)


@triton.jit
def offset_of(corner, row_stride, column_stride):
    """Where a packed corner lies in an image, in elements, of the strides' type."""
    row, column = unpack(corner)
    return row.to(row_stride.dtype) * row_stride + column.to(row_stride.dtype) * column_stride


@triton.jit
def load_corners(pointer, offset, c, row, column, mask, UNIT: tl.constexpr):
    """The values at the four corners, float32: of channels c of the pixels at an offset (corner 0),
    with the strides of rows and columns.

    A run of channels starts at a multiple of UNIT (one number a dimension) at each corner. The
    compiler cannot know: each sum needs the hint where it is made, to load 16 bytes at once.
    """
    v0 = tl.load(pointer + tl.multiple_of(offset + c, UNIT), mask=mask, other=0.0)
    offset1 = offset + column
    v1 = tl.load(pointer + tl.multiple_of(offset1 + c, UNIT), mask=mask, other=0.0)
    offset2 = offset + row
    v2 = tl.load(pointer + tl.multiple_of(offset2 + c, UNIT), mask=mask, other=0.0)
    offset3 = offset1 + row
    v3 = tl.load(pointer + tl.multiple_of(offset3 + c, UNIT), mask=mask, other=0.0)
    return v0.to(tl.float32), v1.to(tl.float32), v2.to(tl.float32), v3.to(tl.float32)


@triton.jit
def shares(dy, dx):
    """The corners' weights, whose sum is 1."""
    return (1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx


@triton.jit
def entry_of(plan, entry, valid):
    """Packed corner of a plan's entries, and the weights of its four pixels, f included."""
    corner = tl.load(plan.corner + entry, mask=valid, other=0)
    f = tl.load(plan.weight + entry, mask=valid, other=0.0)
    dy = tl.load(plan.dy + entry, mask=valid, other=0.0)
    dx = tl.load(plan.dx + entry, mask=valid, other=0.0)
    s0, s1, s2, s3 = shares(dy, dx)
    return corner, f * s0, f * s1, f * s2, f * s3


@triton.jit
def share_of(plan, entry, valid, CORNER: tl.constexpr):
    """The weight of one corner in some entries of a plan, 0 where not valid."""
    dy = tl.load(plan.dy + entry, mask=valid, other=0.0)
    dx = tl.load(plan.dx + entry, mask=valid, other=0.0)
    along_y = dy if CORNER >= 2 else 1 - dy
    along_x = dx if CORNER % 2 else 1 - dx
    return tl.where(valid, along_y * along_x, 0.0)


@triton.jit
def entries_of(first_ptr, pixel, CORNER: tl.constexpr, W):
    """Begin and end, in the sorted order, of the entries whose corner CORNER is this pixel.

    Rows of pixels follow each other: a step left of a row's first, or up from an image's, meets
    the last column or row of another, where no entry has its corner 0.
    """
    above = W.to(tl.int64) + 2
    start = pixel - (CORNER % 2) - (CORNER // 2) * above
    exists = start >= 0
    begin = tl.load(first_ptr + start, mask=exists, other=0)
    return begin, tl.load(first_ptr + start + 1, mask=exists, other=0)


@triton.jit
def blend(v0, v1, v2, v3, dy, dx):
    """The bilinear value of four corners and its slopes in y and x."""
    value = (1 - dy) * ((1 - dx) * v0 + dx * v1) + dy * ((1 - dx) * v2 + dx * v3)
    slope_y = (1 - dx) * (v2 - v0) + dx * (v3 - v1)
    slope_x = (1 - dy) * (v1 - v0) + dy * (v3 - v2)
    return value, slope_y, slope_x


@triton.jit
def inside(row, column, H, W):
    """1 for each of the corners that is a pixel, 0 for each on the border."""
    up = tl.where(row >= 1, 1.0, 0.0)
    low = tl.where(row < H, 1.0, 0.0)
    left = tl.where(column >= 1, 1.0, 0.0)
    right = tl.where(column < W, 1.0, 0.0)
    return up * left, up * right, low * left, low * right


@triton.jit
def logistic_noise(seed, counter):
    """Draw number `counter` (int64) of a seed (`philox.draw`, Eq. 7)."""
    low = counter.to(tl.uint32)
    zero = tl.zeros_like(low)
    word, _, _, _ = tl.philox(seed, low, (counter >> 32).to(tl.uint32), zero, zero)
    u = ((word >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608)  # 23 bits, in (0, 1)
    return tl.log(u) - tl.log(1 - u)


@triton.jit
def mask_logit(keys, b, l, n, key, row, column, dy, dx, valid, L, K):
    """β + noise of the keys, whose sign is the mask (Eq. 7 and 8), and β's slopes in y and x.

    n [BLOCK_N,1]; everything else but the scalars [BLOCK_N,BLOCK_K].
    """
    pointer, image, row_stride, column_stride = layer_of(keys.maps, keys.map_strides, l)
    offset = b * image + row * row_stride + column * column_stride
    v0, v1, v2, v3 = load_corners(pointer, offset, key, row_stride, column_stride, valid, [1, 1])
    logit, slope_y, slope_x = blend(v0, v1, v2, v3, dy, dx)
    if keys.seeds is not None:
        counter = (n.to(tl.int64) * L + l) * K + key  # in [H,W,L,K]
        logit += logistic_noise(tl.load(keys.seeds + b), counter)
    return logit, slope_y, slope_x


@triton.jit
def decide(keys, b, l, n, key, valid, H, W, L, K):
    """Where the keys lie (row, column, dy, dx), which are open, and the address of their dy.

    n [BLOCK_N,1], key [1,BLOCK_K]; results [BLOCK_N,BLOCK_K].
    """
    y, x, at = position_of(keys, b, n, l, key, valid, W)
    row, column, dy, dx = locate(y, x, H, W)
    open = valid
    if keys.maps is not None:
        logit, _, _ = mask_logit(keys, b, l, n, key, row, column, dy, dx, valid, L, K)
        open = valid & (logit > 0)
    return row, column, dy, dx, open, at
