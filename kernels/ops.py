"""The public operator: checks, the choice of a backend, autograd.

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels
offsets are (dy, dx) in pixels, y first
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("reference",)


class Attended(NamedTuple):
    """What `attend` returns: each referred layer's sum, before the value convolution g and the sum over layers."""

    aggregate: Tensor  # [B,H,W,L,C] s_l Σ_k m f x^l(p_i + Δp_ik), of the features' type
    coverage: Tensor  # [B,H,W,L] s_l Σ_k m f (share of the sample inside the image): what g's bias is times
    kept: Tensor  # [B,L] Σ_i Σ_k m, exact, float64; counts masks whether or not s_l is 0


def to_rows(feature: Tensor) -> Tensor:
    """A feature map [B,C,H,W] as rows with a one-pixel zero border [B,H+2,W+2,C], contiguous: what `attend` reads."""
    return torch.nn.functional.pad(feature.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()


def attend(
    features: Sequence[Tensor],
    points: Tensor,
    mask_maps: Sequence[Tensor] | None = None,
    gates: Tensor | None = None,
    *,
    seeds: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Attended:
    """Sampled, masked, weighted sums of the keys of L layers (Eq. 6 and 11, before g and the sum over l).

    Args:
        features: L tensors [B,H+2,W+2,C] with a zero border (`to_rows`), the referred layers. Any floating type.
        points: [B,H,W,L,3,K], for each key dy and dx in pixels and the attention logit; the softmax of the logits
            runs over the K keys of a layer. A key outside the image contributes zero; a NaN or infinite offset
            is outside.
        mask_maps: L tensors [B,H+2,W+2,K], the mask unit's logits on each layer, border included (the unit
            applied to the zero border, which gives its bias); key k reads channel k at its position (Eq. 8). None
            keeps every key.
        gates: [L], s_l of Eq. 11 as 0 or 1. A layer whose gate is 0 costs no gather unless the gates need a
            gradient. None means 1.
        seeds: [B] int64, one an image, for the mask's Gumbel noise (`logistic_noise`, counter = the key's index in
            [H,W,L,K]). None means no noise: evaluation.
        temperature: τ of Eq. 7; only the gradient of the masks depends on it.
        backend: "auto", or one of `available_backends()`, which runs or raises.

    Gradients: the masks' own is the sigmoid's at τ, every other one uses the hard masks (Eq. 7, 9); that of `kept`
    reaches the masks too, so that a cost can close keys.

    Raises:
        ValueError: shapes, types or devices that do not fit together.
        RuntimeError: a named backend that cannot run here, with the reason.
    """
    features, mask_maps = list(features), None if mask_maps is None else list(mask_maps)
    check(features, points, mask_maps, gates, seeds, temperature)
    match choose_backend(backend):
        case "reference":
            from kernels import reference

            return Attended(
                *reference.attend(features, points, mask_maps, gates, seeds, temperature)
            )
    raise AssertionError(backend)


def available_backends() -> tuple[str, ...]:
    """The names that `backend=` takes besides "auto"."""
    return BACKENDS


def choose_backend(backend: str) -> str:
    """The backend to run; a named one is never replaced by another."""
    if backend == "auto":
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
    return backend


def check(
    features: list[Tensor],
    points: Tensor,
    mask_maps: list[Tensor] | None,
    gates: Tensor | None,
    seeds: Tensor | None,
    temperature: float,
) -> None:
    """Refuse arguments that do not fit together; the message names the argument, its shape and the one wanted."""
    if points.ndim != 6 or points.shape[4] != 3:
        raise ValueError(f"points must be [B,H,W,L,3,K], not {list(points.shape)}")
    B, H, W, L, _, K = points.shape
    if min(points.shape) < 1:
        raise ValueError(f"points must not be empty: {list(points.shape)}")
    if len(features) != L:
        raise ValueError(f"points is for {L} layers, but there are {len(features)} features")
    C = features[0].shape[-1]
    wanted = {f"features[{l}]": (feature, (B, H + 2, W + 2, C)) for l, feature in enumerate(features)}
    if mask_maps is not None:
        if len(mask_maps) != L:
            raise ValueError(f"points is for {L} layers, but there are {len(mask_maps)} mask_maps")
        wanted |= {f"mask_maps[{l}]": (m, (B, H + 2, W + 2, K)) for l, m in enumerate(mask_maps)}
    if gates is not None:
        wanted["gates"] = (gates, (L,))
    if seeds is not None:
        wanted["seeds"] = (seeds, (B,))
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(tensor.shape)}")
        if tensor.device != points.device:
            raise ValueError(f"{name} is on {tensor.device}, but points is on {points.device}")
        if name == "seeds":
            if tensor.dtype != torch.int64:
                raise ValueError(f"seeds must be int64, not {tensor.dtype}")
        elif not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {tensor.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
