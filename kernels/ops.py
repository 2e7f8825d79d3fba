"""The public operator: its arguments, their checks, its results.

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels
offsets are (dy, dx) in pixels, y first

The environment variable ACLA_BACKEND names the backend that "auto" takes.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import registration
from .dispatch import why_not
from .inputs import Inputs


class Attended(NamedTuple):
    """What `attend` returns: each layer's sum, before the value convolution g and the sum over l.

    aggregate: [B,H,W,L,C] s_l Σ_k m f x^l(p_i + Δp_ik), of the features' type.
    coverage: [B,H,W,L] s_l Σ_k m f (share of the sample inside the image), what g's bias is times;
        of the points' type.
    kept: [B,L] Σ_i Σ_k m, exact, float64; counts the masks whether or not s_l is 0. None where not
        wanted.
    """

    aggregate: Tensor
    coverage: Tensor
    kept: Tensor | None


def to_rows(feature: Tensor) -> Tensor:
    """A feature map [B,C,H,W] as `attend` reads it: rows [B,H+2,W+2,C] with a zero border."""
    if feature.device.type == "cuda":
        return torch.ops.acla.to_rows(feature)
    return registration.padded(feature)


def attend(
    features: Sequence[Tensor],
    points: Tensor,
    mask_maps: Sequence[Tensor] | None = None,
    gates: Tensor | None = None,
    *,
    seeds: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    counts: bool = True,
) -> Attended:
    """Sampled, masked, weighted sums of L layers' keys (Eq. 6 and 11 before g and the sum over l).

    Args:
        features: L tensors [B,H+2,W+2,C] with a zero border (`to_rows`), the referred layers. Any
            floating type, the same for all. Views are read in place if their last stride is 1.
        points: [B,H,W,L,3,K], for each key dy and dx in pixels and the attention logit; the softmax
            of the logits runs over the K keys of a layer. A key outside the image contributes zero;
            a NaN or infinite offset is outside.
        mask_maps: L tensors [B,H+2,W+2,K], the mask unit's logits on each layer, border included
            (the unit applied to the zero border, which gives its bias); key k reads channel k at
            its position (Eq. 8). None keeps every key.
        gates: [L], s_l of Eq. 11 as 0 or 1. A layer whose gate is 0 is not read unless the
            gates need a gradient. None means 1.
        seeds: [B] int64, one an image, for the mask's Gumbel noise (`logistic_noise`, counter = the
            key's index in [H,W,L,K]). None means no noise: evaluation.
        temperature: τ of Eq. 7; only the gradient of the masks depends on it.
        backend: "auto", or one of `BACKENDS`, which runs or raises.
        counts: whether `kept` is wanted, which costs a GPU a launch.

    Gradients: the masks' own is the sigmoid's at τ, every other one uses the hard masks (Eq. 7, 9);
    that of `kept` reaches the masks too. Only "reference" has gradients of gradients.

    Raises:
        ValueError: shapes, types or devices that do not fit together; an unknown backend.
        RuntimeError: a named backend that cannot run here, with the reason.
    """
    features, mask_maps = list(features), None if mask_maps is None else list(mask_maps)
    inputs = Inputs(features, points, mask_maps, gates, seeds, temperature)
    check_inputs(inputs)
    if backend == "auto":
        backend = os.environ.get("ACLA_BACKEND") or "auto"
    if backend == "reference":
        from . import reference

        out = reference.attend(*inputs)
    else:
        out = torch.ops.acla.attend(
            features, points, mask_maps or [], gates, seeds, temperature, backend, counts
        )
    aggregate, coverage, kept = out
    kept = kept if counts else None
    return Attended(aggregate.to(features[0].dtype), coverage.to(points.dtype), kept)


def attend_module(
    query: Tensor,
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    mask_weight: Tensor | None,
    mask_bias: Tensor | None,
    output: Tensor,
    output_bias: Tensor,
) -> Tensor:
    """A module in inference, added to its query: masks and points by products, `attend` without
    gates and noise, and its results' product, tile by tile, so that what lies between stays in the
    processor's cache. No gradients; where `runs_whole` allows it.

    Args:
        query: [B,H,W,C], what the points are computed from.
        features: those of `attend`.
        weight, bias: [C,L·3·K] and [L·3·K], of the points.
        mask_weight, mask_bias: [L,C,K] and [L,K], of the mask maps; None keeps every key.
        output, output_bias: [L,C+1,C] and [C]; C rows for a layer's aggregate, the last one for its
            coverage.

    Returns [B,H,W,C] of the query's type. With bfloat16, sums and positions are float32; where the
    processor multiplies bfloat16 in pairs, all weights are rounded to it (those of the points, the
    masks and a key's corners too), as in automatic mixed precision.

    Raises ValueError: shapes or types that do not fit together.
    """
    B, H, W, C = query.shape
    L, K = len(features), len(bias) // (3 * len(features))
    wanted = {
        "features": ([list(one.shape) for one in features], L * [[B, H + 2, W + 2, C]]),
        "weight": (list(weight.shape), [C, L * 3 * K]),
        "output": (list(output.shape), [L, C + 1, C]),
        "output_bias": (list(output_bias.shape), [C]),
    }
    if mask_weight is not None:
        wanted["mask_weight"] = list(mask_weight.shape), [L, C, K]
        wanted["mask_bias"] = list(mask_bias.shape), [L, K]
    for name, (shape, expected) in wanted.items():
        if shape != expected:
            raise ValueError(f"{name} must be {expected}, not {shape}")
    if query.dtype == torch.bfloat16 and C % 2:
        raise ValueError(f"bfloat16 needs an even number of channels, not {C}")
    return torch.ops.acla.attend_module(
        query, list(features), weight, bias, mask_weight, mask_bias, output, output_bias
    )


def runs_whole(query: Tensor, features: Sequence[Tensor]) -> bool:
    """Whether `attend_module` computes what `attend` and its products would, to the rounding of the
    format, and faster."""
    kinds = {tensor.dtype for tensor in (query, *features)}
    even = features[0].shape[-1] % 2 == 0  # bfloat16 is multiplied in pairs
    return (
        query.device.type == "cpu"
        and kinds in ({torch.float32}, {torch.float64}, {torch.bfloat16 if even else None})
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and (os.environ.get("ACLA_BACKEND") or "auto") in ("auto", "cpp")
        and why_not("cpp", query) is None
    )


def check_inputs(inputs: Inputs) -> None:
    """Refuse arguments that do not fit together, naming the argument and what was wanted."""
    features, points, mask_maps, gates, seeds, temperature = inputs
    if points.ndim != 6 or points.shape[4] != 3:
        raise ValueError(f"points must be [B,H,W,L,3,K], not {list(points.shape)}")
    B, H, W, L, _, K = points.shape
    if min(points.shape) < 1:
        raise ValueError(f"points must not be empty: {list(points.shape)}")
    if len(features) != L:
        raise ValueError(f"points is for {L} layers, but there are {len(features)} features")
    C = features[0].shape[-1]
    wanted = {
        f"features[{l}]": (feature, (B, H + 2, W + 2, C)) for l, feature in enumerate(features)
    }
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
        elif name.startswith("features") and tensor.dtype != features[0].dtype:
            raise ValueError(f"{name} is {tensor.dtype}, but features[0] is {features[0].dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
