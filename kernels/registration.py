"""The operator as torch knows it: schema, shapes without data, gradients, FLOPs.

So `torch.compile`, `torch.export`, FLOP counting and `torch.library.opcheck` work on it. The
backend is an argument and is chosen when the operator runs, on real tensors."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .dispatch import choose_backend

Lists = Sequence[Tensor]

LIBRARY = torch.library.Library("acla", "DEF")
LIBRARY.define(
    "attend(Tensor[] features, Tensor points, Tensor[] mask_maps, Tensor? gates, Tensor? seeds, "
    "float temperature, str backend) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "attend_backward(Tensor[] features, Tensor points, Tensor[] mask_maps, Tensor? gates, "
    "Tensor? seeds, float temperature, str backend, Tensor? aggregate, Tensor? coverage, "
    "Tensor? kept, bool[] wanted) -> Tensor[]"
)


def passes(backend: str) -> tuple[Callable, Callable]:
    """A backend's forward and backward functions."""
    match backend:
        case "cpp":
            from . import cpp_backend as module
        case "torch":
            from . import torch_backend as module
        case "triton":
            from . import triton_backend as module
    return module.forward, module.backward


@functools.partial(LIBRARY.impl, "attend", dispatch_key="CompositeExplicitAutograd")
def attend(
    features: Lists,
    points: Tensor,
    mask_maps: Lists,
    gates: Tensor | None,
    seeds: Tensor | None,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    forward, _ = passes(choose_backend(backend, points, features))
    aggregate, coverage, kept = forward(features, points, mask_maps or None, gates, seeds)
    return aggregate.to(features[0].dtype), coverage.to(points.dtype), kept


@torch.library.register_fake("acla::attend", lib=LIBRARY)
def attend_shapes(features, points, mask_maps, gates, seeds, temperature, backend):
    B, H, W, L, _, _ = points.shape
    aggregate = features[0].new_empty(B, H, W, L, features[0].shape[-1])
    return aggregate, points.new_empty(B, H, W, L), points.new_empty(B, L, dtype=torch.float64)


@functools.partial(LIBRARY.impl, "attend_backward", dispatch_key="CompositeExplicitAutograd")
def attend_backward(
    features: Lists,
    points: Tensor,
    mask_maps: Lists,
    gates: Tensor | None,
    seeds: Tensor | None,
    temperature: float,
    backend: str,
    aggregate: Tensor | None,
    coverage: Tensor | None,
    kept: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of features, points, mask maps and gates in this order, empty where not wanted."""
    _, backward = passes(choose_backend(backend, points, features))
    L = len(features)
    grads = backward(
        features,
        points,
        mask_maps or None,
        gates,
        seeds,
        temperature,
        (aggregate, coverage, kept),
        (list(wanted[:L]), wanted[L], list(wanted[L + 1 : -1]), wanted[-1]),
    )
    flat = [*grads[0], grads[1], *grads[2], grads[3]]
    return [points.new_empty(0) if grad is None else grad for grad in flat]


@torch.library.register_fake("acla::attend_backward", lib=LIBRARY)
def attend_backward_shapes(features, points, mask_maps, gates, seeds, *others):
    inputs, wanted = [*features, points, *mask_maps, gates], others[-1]
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if w
        else points.new_empty(0)
        for tensor, w in zip(inputs, wanted, strict=True)
    ]


def keep_inputs(ctx, inputs, output) -> None:
    """Save the inputs alone; the backward pass computes the rest again."""
    features, points, mask_maps, gates, seeds, ctx.temperature, ctx.backend = inputs
    ctx.layers = len(features)
    ctx.save_for_backward(points, gates, seeds, *features, *mask_maps)
    ctx.set_materialize_grads(False)


def gradients(ctx, *results: Tensor | None) -> tuple:
    """Gradients of all inputs, from those of the three results (None means zero)."""
    points, gates, seeds, *lists = ctx.saved_tensors
    features, mask_maps = lists[: ctx.layers], lists[ctx.layers :]
    for_features, for_points, for_maps, for_gates, *_ = ctx.needs_input_grad
    wanted = [*for_features, for_points, *for_maps, for_gates]
    grads = torch.ops.acla.attend_backward(
        features, points, mask_maps, gates, seeds, ctx.temperature, ctx.backend, *results, wanted
    )
    grads = [grad if w else None for grad, w in zip(grads, wanted, strict=True)]
    L = ctx.layers
    return grads[:L], grads[L], grads[L + 1 : -1], grads[-1], None, None, None


def no_gradients(ctx, *_: Tensor) -> None:
    """Refuse gradients of gradients."""
    raise RuntimeError("attend has first-order gradients only; 'reference' has the rest")


torch.library.register_autograd("acla::attend", gradients, setup_context=keep_inputs, lib=LIBRARY)
torch.library.register_autograd("acla::attend_backward", no_gradients, lib=LIBRARY)


@register_flop_formula(torch.ops.acla.attend)
def attend_flops(features, points, *_, **__) -> int:
    """6 a channel and key, every key kept (the aggregation of Eq. 12); shapes for
    tensors."""
    B, H, W, L, _, K = points
    return 6 * features[0][-1] * B * H * W * L * K


@register_flop_formula(torch.ops.acla.attend_backward)
def attend_backward_flops(features, points, *_, **__) -> int:
    """The dots and the scatter: each as much as the forward pass."""
    return 2 * attend_flops(features, points)
