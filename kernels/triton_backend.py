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

from .inputs import Inputs, Leaves

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
    """None where Triton can launch kernels on this GPU, tried once a process, else the reason."""
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


def forward(inputs: Inputs, counts: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """The results of `kernels.attend`: aggregate, coverage in float32, kept, if counted."""
    from . import aggregation, sampling

    inputs = inputs._replace(gates=dense(inputs.gates), seeds=dense(inputs.seeds))
    B, H, W, L, _, _ = inputs.points.shape
    device = inputs.points.device
    with torch.cuda.device_of(inputs.points):
        coverage = torch.empty(B, H, W, L, dtype=torch.float32, device=device)
        kept = torch.zeros(B, L, dtype=torch.float64, device=device) if counts else None
        plan = sampling.make_plan(inputs, coverage, kept)
        return aggregation.aggregate(inputs.features, plan, inputs.gates, H, W), coverage, kept


def backward(
    inputs: Inputs, gradients: tuple[Tensor | None, Tensor | None, Tensor | None], wanted: Leaves
) -> Leaves:
    """The gradients that are `wanted`, of all layers if one is, from those of the three results of
    `forward`; of these None means zero. In float32, and float64 for gates.

    The sums over keys are atomic, and their last bits vary, unless
    torch.use_deterministic_algorithms is on.
    """
    from . import aggregation, sampling

    inputs = inputs._replace(gates=dense(inputs.gates), seeds=dense(inputs.seeds))
    features, gates = inputs.features, inputs.gates
    grad, grad_coverage, grad_kept = map(dense, gradients)
    maps_wanted, none = any(wanted.mask_maps), [None] * len(features)
    closed = inputs.mask_maps is not None and (maps_wanted or wanted.points)
    grad_features = grad_points = grad_maps = grad_gates = dots = None
    with torch.cuda.device_of(inputs.points):
        plan = sampling.make_plan(inputs)
        if wanted.points or maps_wanted or wanted.gates:
            if grad is not None:
                dots = aggregation.dots(features, plan, gates, grad, closed, wanted.gates)
            grad_points, grad_maps, grad_gates = sampling.spread(
                inputs, plan, dots, grad_coverage, grad_kept, wanted, closed
            )
        if any(wanted.features) and grad is not None:
            ordered = torch.are_deterministic_algorithms_enabled()
            add = aggregation.sum_rows if ordered else aggregation.scatter
            grad_features = add(plan, gates, grad)
        elif any(wanted.features):
            grad_features = [f.new_zeros(f.shape) for f in features]
    no_maps = none if inputs.mask_maps else []
    return Leaves(grad_features or none, grad_points, grad_maps or no_maps, grad_gates)


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor without gaps or gradient, which kernels walk with one step."""
    return None if tensor is None else tensor.detach().contiguous()
