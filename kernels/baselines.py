"""Implementations of the operator that the benchmark compares: ours, and what users write today.

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from . import attend, to_rows

LAYERS, KEYS = 5, 16


@dataclass
class Case:
    """One problem: what `attend` takes, and the gradient that its first result gets."""

    features: list[Tensor]
    points: Tensor
    mask_maps: list[Tensor]
    gradient: Tensor

    @property
    def inputs(self) -> list[Tensor]:
        return [*self.features, self.points, *self.mask_maps]

    def kept(self) -> float:
        """Share of the keys that the masks keep."""
        B, H, W, L, _, K = self.points.shape
        with torch.no_grad():
            return attend(self.features, self.points, self.mask_maps).kept.sum().item() / (
                B * H * W * L * K
            )


def make_case(size: tuple[int, ...], keep: float, dtype: torch.dtype, device: str) -> Case:
    """Random features, offsets of a few pixels, and mask maps that keep about `keep` of the keys.

    size: (B, H, W, C); the layers are LAYERS and the keys KEYS.
    """
    B, H, W, C = size
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device)

    features = [to_rows(normal(B, C, H, W)).to(dtype) for _ in range(LAYERS)]
    points = normal(B, H, W, LAYERS, 3, KEYS) * 3
    # Of a map of independent normals, a bilinear sample's deviation is two thirds of a pixel's.
    shift = torch.distributions.Normal(0, 2 / 3).icdf(torch.tensor(min(keep, 1 - 1e-6))).item()
    maps = [normal(B, H + 2, W + 2, KEYS) + shift for _ in range(LAYERS)]
    gradient = normal(B, H, W, LAYERS, C).to(dtype)
    return Case(features, points, maps, gradient)


Implementation = Callable[[Case], Tensor]  # → aggregate [B,H,W,L,C]


def by_backend(name: str) -> Implementation:
    def run(case: Case) -> Tensor:
        return attend(case.features, case.points, case.mask_maps, backend=name).aggregate

    return run


def grids(points: Tensor, size: tuple[int, int]) -> Tensor:
    """grid_sample's (x, y) [B,H,W,L,K,2] of the keys, on maps with a one-pixel border."""
    H, W = size
    y = torch.arange(H, device=points.device).view(H, 1, 1, 1) + points[..., 0, :] + 1
    x = torch.arange(W, device=points.device).view(1, W, 1, 1) + points[..., 1, :] + 1
    return torch.stack([(2 * x + 1) / (W + 2) - 1, (2 * y + 1) / (H + 2) - 1], -1)


def open_keys(mask_map: Tensor, grid: Tensor) -> Tensor:
    """Hard masks [B,H,W,K] of one layer with the sigmoid's gradient; grid [B,H,W,K,2]."""
    B, H, W, K, _ = grid.shape
    each = mask_map.permute(0, 3, 1, 2).reshape(B * K, 1, *mask_map.shape[1:3])
    where = grid.permute(0, 3, 1, 2, 4).reshape(B * K, H, W, 2)
    beta = F.grid_sample(each, where, padding_mode="border", align_corners=False)
    soft = beta.view(B, K, H, W).permute(0, 2, 3, 1).sigmoid()
    return (soft > 0.5).to(soft) + (soft - soft.detach())


def by_grid_sample(per_key: bool) -> Implementation:
    """What users write today: every key of every layer is sampled, then multiplied by its weight
    and mask.

    In float32 whatever the features are, for grid_sample wants the positions in their type: in 16
    bits keys would move to other pixels (and on CPUs some of its results are NaN).
    """

    def run(case: Case) -> Tensor:
        _, H, W, L, _, K = case.points.shape
        grid = grids(case.points, (H, W))
        sums = []
        for l in range(L):
            value = case.features[l].permute(0, 3, 1, 2).float()
            where = grid[:, :, :, l]
            weight = case.points[..., l, 2, :].softmax(-1) * open_keys(case.mask_maps[l], where)
            if per_key:
                total = 0.0
                for k in range(K):
                    sampled = F.grid_sample(value, where[:, :, :, k], align_corners=False)
                    total = total + sampled * weight[:, None, :, :, k]
            else:
                sampled = F.grid_sample(value, where.flatten(2, 3), align_corners=False)
                total = (sampled.unflatten(3, (W, K)) * weight.unsqueeze(1)).sum(-1)
            sums.append(total.permute(0, 2, 3, 1))
        return torch.stack(sums, 3).to(case.features[0].dtype)

    return run


def by_deform_conv(deform_conv2d: Callable) -> Implementation:
    """The authors' pattern: a 1×1 deformable convolution with an identity kernel for each key."""

    def run(case: Case) -> Tensor:
        _, H, W, L, _, K = case.points.shape
        C = case.features[0].shape[-1]
        grid = grids(case.points, (H, W))
        identity = torch.eye(C, device=case.points.device).view(C, C, 1, 1)
        sums = []
        for l in range(L):
            value = case.features[l][:, 1:-1, 1:-1].permute(0, 3, 1, 2)
            weight = case.points[..., l, 2, :].softmax(-1)
            weight = weight * open_keys(case.mask_maps[l], grid[:, :, :, l])
            total = 0.0
            for k in range(K):
                offset = case.points[..., l, :2, k].permute(0, 3, 1, 2)
                sampled = deform_conv2d(value.float(), offset, identity)
                total = total + sampled * weight[:, None, :, :, k]
            sums.append(total.permute(0, 2, 3, 1))
        return torch.stack(sums, 3).to(case.features[0].dtype)

    return run


def by_convolution(case: Case) -> Tensor:
    """One 3×3 convolution of the same width: the scale that everything else is read on."""
    value = case.features[0][:, 1:-1, 1:-1].permute(0, 3, 1, 2)
    C = value.shape[1]
    kernel = value.new_ones(C, C, 3, 3).contiguous(memory_format=torch.channels_last)
    return F.conv2d(value, kernel.requires_grad_(value.requires_grad), padding=1)


def implementations(device: str) -> dict[str, Implementation]:
    """Everything that runs on the device, by name; our fastest backend first, the reference left
    out. A missing torchvision is noted on standard error."""
    fast = {"cpu": ("cpp", "torch"), "cuda": ("triton", "torch")}[device]
    by_name = {name: by_backend(name) for name in fast}
    by_name["grid_sample per layer"] = by_grid_sample(per_key=False)
    by_name["grid_sample per key"] = by_grid_sample(per_key=True)
    try:
        from torchvision.ops import deform_conv2d
    except ImportError:
        print("torchvision is not installed: no deform_conv2d rows", file=sys.stderr)
    else:
        by_name["deform_conv2d"] = by_deform_conv(deform_conv2d)
    return by_name
