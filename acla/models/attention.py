"""Cross-layer attention: CLA (Eq. 5) and, with a mask unit, ACLA (Eq. 6 to 9).

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels
offsets are (dy, dx) in pixels, y first
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import attend

RING_KEYS = 8


class CrossLayerAttention(nn.Module):
    """The module behind one insert position: z = x + h(y) (Eq. 2), which returns the increment
    h(y).

    Every pair of query and referred layer has its own offsets and weights (on the query), value g
    and mask unit M (on the referred layer). All are 1×1 convolutions; those of the query are one,
    `points`. g runs after the sum over the keys, which is exact: both are linear, and g's bias is
    weighted by what fell inside the image.

    offset_radius: pixels between the rings on which keys start; mask_bias: that of a fresh mask
    unit, which keeps keys with probability σ(mask_bias) under noise, and always without noise where
    it is positive.

    Parameters: L·(C·3K + 3K + C² + C) + C² + C, and L·(CK + K) for the mask unit.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        keys: int,
        masked: bool,
        offset_radius: float = 2.0,
        mask_bias: float = 2.0,
    ):
        super().__init__()
        self.layers, self.keys = layers, keys
        self.offset_radius, self.initial_mask_bias = offset_radius, mask_bias
        self.points = nn.Linear(width, layers * 3 * keys)
        self.value = nn.Parameter(torch.empty(layers, width, width))  # [L, out, in]
        self.value_bias = nn.Parameter(torch.empty(layers, width))
        self.mask = nn.Parameter(torch.empty(layers, keys, width)) if masked else None
        self.mask_bias = nn.Parameter(torch.empty(layers, keys)) if masked else None
        self.output = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """h starts at zero, so that inserting the module changes nothing; keys start on rings and
        open."""
        bound = 1 / math.sqrt(self.value.shape[-1])  # as torch initialises a 1×1 convolution
        nn.init.uniform_(self.value, -bound, bound)
        nn.init.uniform_(self.value_bias, -bound, bound)
        weight = rearrange(self.points.weight.data, "(l yxw k) c -> l yxw k c", yxw=3, k=self.keys)
        bias = rearrange(self.points.bias.data, "(l yxw k) -> l yxw k", yxw=3, k=self.keys)
        weight[:, :2] = 0
        bias[:, :2] = rings(self.keys, self.offset_radius)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        if self.mask is not None:
            nn.init.zeros_(self.mask)
            nn.init.constant_(self.mask_bias, self.initial_mask_bias)

    def forward(
        self,
        query: Tensor,
        rows: Sequence[Tensor],
        gates: Tensor | None = None,
        seeds: Tensor | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """query x^j [B,C,H,W]; rows of the L referred layers [B,H+2,W+2,C], x^j's own last; gates
        s_l [L] (Eq. 11).

        Returns h(y) [B,C,H,W] and the keys kept [B,L]. Without seeds [B] the masks are drawn
        without noise."""
        # Positions need more than the eight bits of bfloat16 or the eleven of TF32.
        with torch.autocast(query.device.type, enabled=False):
            query = query.permute(0, 2, 3, 1).to(self.points.weight.dtype)
            points = pointwise(query, self.points.weight, self.points.bias, full=True)
        points = rearrange(
            points, "b h w (l yxw k) -> b h w l yxw k", l=self.layers, yxw=3, k=self.keys
        )
        maps = None
        if self.mask is not None:
            maps = [
                pointwise(r, m, b) for r, m, b in zip(rows, self.mask, self.mask_bias, strict=True)
            ]
        attended = attend(rows, points, maps, gates, seeds=seeds, temperature=temperature)
        value, bias = rearrange(self.value, "l out c -> out (l c)"), self.value_bias
        if torch.is_grad_enabled():
            y = pointwise(attended.aggregate.flatten(3), value)
            y = y + attended.coverage.to(y.dtype) @ bias.to(y.dtype)
            z = pointwise(y, self.output.weight, self.output.bias)
        else:  # h∘g is one matrix: folding it costs less than applying h
            value, bias = self.output.weight @ value, F.linear(bias, self.output.weight)
            z = pointwise(attended.aggregate.flatten(3), value, self.output.bias)
            coverage = attended.coverage.to(z.dtype).flatten(0, 2)
            z = torch.addmm(z.flatten(0, 2), coverage, bias.to(z.dtype)).view_as(z)
        return z.permute(0, 3, 1, 2), attended.kept

    def select(self, layers: Sequence[int]) -> dict[str, Tensor]:
        """The state dict of the module that refers to these layers only, counted from 0."""
        index = torch.as_tensor(list(layers), device=self.value.device)
        state = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        for name in ("value", "value_bias", "mask", "mask_bias"):
            if name in state:
                state[name] = state[name][index].clone()
        for name in ("points.weight", "points.bias"):
            per_layer = state[name].unflatten(0, (self.layers, -1))
            state[name] = per_layer[index].flatten(0, 1).clone()
        return state


def pointwise(
    rows: Tensor, weight: Tensor, bias: Tensor | None = None, full: bool = False
) -> Tensor:
    """A 1×1 convolution on channels-last features: [B,H,W,C], weight [out,C] → [B,H,W,out].

    full: in all bits of float32 on GPUs too, by a matrix product. Convolutions round to TF32 there
    unless torch is told otherwise; the backbone's do, and what is not `full` is as exact and fast.
    """
    device = rows.device.type
    if device == "cpu":
        # Torch gives convolutions of several pictures to oneDNN, which is up to twice as fast as
        # its matrix product; so every line of pixels is a picture here.
        B, H, _, _ = rows.shape
        lines = convolved(rows.flatten(0, 1).unsqueeze(1), weight, bias)
        return lines.squeeze(1).unflatten(0, (B, H))
    if full or device != "cuda":
        return F.linear(rows, weight, bias)
    return convolved(rows, weight, bias)


def convolved(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`pointwise` by torch's convolution, of pictures that lie channels last."""
    out = F.conv2d(rows.permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1)


def rings(keys: int, step: float) -> Tensor:
    """First offsets (dy, dx) [2,K] in pixels: eight keys a ring, rings of radius step, 2 step,
    3 step …, each turned a little against the one before. (The paper does not say; spread, the keys
    differ from the first step on.)"""
    key = torch.arange(keys, dtype=torch.float32)
    ring = key.div(RING_KEYS, rounding_mode="floor")
    in_ring = (keys - ring * RING_KEYS).clamp(max=RING_KEYS)
    angle = 2 * math.pi * (key % RING_KEYS + ring / 2) / in_ring
    radius = step * (ring + 1)
    return torch.stack([radius * angle.sin(), radius * angle.cos()])
