"""The operator on GPUs: the Triton kernels in order, forward and backward.

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels

Forward: plan (sampling.py) → aggregate (aggregation.py). Backward: plan → dots → offsets, logits,
masks and gates by arithmetic → scatter of the open keys. The plan is not kept between the passes
but made again: it is larger than what it is made of.
"""

import functools
import importlib.util
import os
import subprocess
from collections.abc import Sequence

import torch
from torch import Tensor

TYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST = (7, 0)  # compute capability, of NVIDIA's GPUs
# What Triton raises for want of a compiler, of Python's headers, of a driver, of a place to write.
UNREACHABLE = (RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError)


def why_not_triton(points: Tensor, features: Sequence[Tensor] = ()) -> str | None:
    """None where the Triton kernels run on these tensors, else the reason why they do not."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
    if points.device.type != "cuda" and not (interpreted and points.device.type == "cpu"):
        return f"tensors are on {points.device}, triton needs cuda"
    for tensor in (points, *features):
        if tensor.dtype not in TYPES:
            return f"triton computes in float32, fp16 and bf16, not in {tensor.dtype}"
    return None if points.device.type == "cpu" else why_not_on(points.device)


@functools.cache
def why_not_on(device: torch.device) -> str | None:
    """None where Triton can launch kernels on this GPU, else the reason why it cannot. Tried once
    per process and GPU."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < OLDEST:
        own, oldest = (".".join(map(str, version)) for version in (capability, OLDEST))
        return f"{device} has compute capability {own}, triton needs {oldest}"
    try:
        from triton.runtime import driver

        _ = driver.active.utils  # C code that talks to the GPU, compiled at its first use
    except UNREACHABLE as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return f"triton needs a C compiler and Python.h to reach {device}: {first}"
    return None


def forward(
    features: Sequence[Tensor],
    points: Tensor,
    mask_maps: Sequence[Tensor] | None,
    gates: Tensor | None,
    seeds: Tensor | None,
    counts: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three results of `kernels.attend`: aggregate, coverage, kept, where it is counted."""
    from . import aggregation, sampling

    gates, seeds = dense(gates), dense(seeds)
    with torch.cuda.device_of(points):
        plan, coverage, kept = sampling.sample(points, mask_maps, gates, seeds, counts)
        _, H, W, _, _, _ = points.shape
        aggregate = aggregation.aggregate(features, plan, gates, H, W)
        return aggregate, coverage.to(points.dtype), kept


def backward(
    features: Sequence[Tensor],
    points: Tensor,
    mask_maps: Sequence[Tensor] | None,
    gates: Tensor | None,
    seeds: Tensor | None,
    temperature: float,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    wanted: tuple[Sequence[bool], bool, Sequence[bool], bool],
) -> tuple[list[Tensor | None], Tensor | None, list[Tensor | None], Tensor | None]:
    """Gradients for features, points, mask maps and gates, None where not `wanted` (in that order).

    `gradients` are those of the three results of `forward`; None means zero. The sums over keys are
    atomic, and their last bits vary, unless torch.use_deterministic_algorithms is on.
    """
    from . import aggregation, sampling

    gates, seeds = dense(gates), dense(seeds)
    grad, grad_coverage, grad_kept = map(dense, gradients)
    maps_wanted = mask_maps is not None and any(wanted[2])
    needed = sampling.Wanted(
        features=any(wanted[0]),
        points=wanted[1],
        maps=maps_wanted,
        gates=wanted[3],
        closed=mask_maps is not None and (maps_wanted or wanted[1]),
        ordered=torch.are_deterministic_algorithms_enabled(),
    )
    grad_features = grad_points = grad_maps = grad_gates = dots = None
    with torch.cuda.device_of(points):
        plan = sampling.resample(points, mask_maps, gates, seeds)
        if needed.points or needed.maps or needed.gates:
            if grad is not None:
                dots = aggregation.dots(features, plan, gates, grad, needed.closed, needed.gates)
            grad_points, grad_maps, grad_gates = sampling.spread(
                *(points, mask_maps, gates, seeds, temperature, plan),
                *(dots, grad_coverage, grad_kept, needed),
            )
        if needed.features and grad is not None:
            add = aggregation.sum_rows if needed.ordered else aggregation.scatter
            grad_features = add(plan, gates, grad)
        elif needed.features:
            grad_features = [f.new_zeros(f.shape) for f in features]
    return (
        share_out(grad_features, features, wanted[0]),
        None if grad_points is None else grad_points.to(points.dtype),
        share_out(grad_maps, mask_maps or (), wanted[2]) if mask_maps is not None else [],
        None if grad_gates is None else grad_gates.to(gates.dtype),
    )


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor without gaps or gradient, which kernels walk with one step."""
    return None if tensor is None else tensor.detach().contiguous()


def share_out(
    gradients: Sequence[Tensor] | None, tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients in their tensors' types, None where not wanted."""
    if gradients is None:
        return [None] * len(tensors)
    parts = zip(gradients, tensors, wanted, strict=True)
    return [g.to(t.dtype) if w else None for g, t, w in parts]
