"""The operator as torch knows it: schema, shapes without data, gradients, FLOPs.

So `torch.compile`, `torch.export`, FLOP counting and `torch.library.opcheck` work on it. Schemas
give the arguments' types. The backend is chosen when the operator runs."""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .dispatch import choose_backend, why_not
from .inputs import Inputs, Leaves

LIBRARY = torch.library.Library("acla", "DEF")
LIBRARY.define("to_rows(Tensor feature) -> Tensor")
LIBRARY.define(
    "attend(Tensor[] features, Tensor points, Tensor[] mask_maps, Tensor? gates, Tensor? seeds, "
    "float temperature, str backend, bool counts) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "attend_module(Tensor query, Tensor[] features, Tensor weight, Tensor bias, "
    "Tensor? mask_weight, Tensor? mask_bias, Tensor output, Tensor output_bias) -> Tensor"
)
LIBRARY.define(
    "attend_backward(Tensor[] features, Tensor points, Tensor[] mask_maps, Tensor? gates, "
    "Tensor? seeds, float temperature, str backend, Tensor? aggregate, Tensor? coverage, "
    "Tensor? kept, bool[] wanted) -> Tensor[]"
)


def module_of(backend: str) -> ModuleType:
    """The module with a backend's `forward` and `backward`."""
    return importlib.import_module(f"{__package__}.{backend}_backend")


@functools.partial(LIBRARY.impl, "attend", dispatch_key="CompositeExplicitAutograd")
def attend(features, points, mask_maps, gates, seeds, temperature, backend, counts):
    module = module_of(choose_backend(backend, points, features))
    inputs = Inputs(features, points, mask_maps or None, gates, seeds, temperature)
    aggregate, coverage, kept = module.forward(inputs, counts)
    kept = kept if counts else uncounted(points)
    return aggregate.to(features[0].dtype), coverage.to(points.dtype), kept


@functools.partial(LIBRARY.impl, "attend_module", dispatch_key="CPU")
def attend_module(query, features, *weights):
    from . import cpp_backend

    return cpp_backend.attend_module(query, features, *weights)


@torch.library.register_fake("acla::attend_module", lib=LIBRARY)
def attend_module_shape(query, *_):
    return query.new_empty(query.shape)


def uncounted(points: Tensor) -> Tensor:
    """In place of the counts, where they are not wanted."""
    return points.new_empty(0, dtype=torch.float64)


@functools.partial(LIBRARY.impl, "to_rows", dispatch_key="CompositeExplicitAutograd")
def to_rows(feature: Tensor) -> Tensor:
    """[B,C,H,W] → [B,H+2,W+2,C] with a zero border: on a GPU one launch, where torch has two."""
    if feature.device.type == "cuda" and why_not("triton", feature, [feature]) is None:
        from . import padding

        return padding.pad(feature)
    return padded(feature)


def padded(feature: Tensor) -> Tensor:
    """`to_rows` by torch's own operators, which compilation and export look into."""
    return torch.nn.functional.pad(feature.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()


@torch.library.register_fake("acla::to_rows", lib=LIBRARY)
def to_rows_shape(feature):
    B, C, H, W = feature.shape
    return feature.new_empty(B, H + 2, W + 2, C)


def to_rows_gradient(ctx, grad: Tensor) -> Tensor:
    return grad[:, 1:-1, 1:-1].permute(0, 3, 1, 2)


torch.library.register_autograd("acla::to_rows", to_rows_gradient, lib=LIBRARY)


@torch.library.register_fake("acla::attend", lib=LIBRARY)
def attend_shapes(features, points, mask_maps, gates, seeds, temperature, backend, counts):
    B, H, W, L, _, _ = points.shape
    aggregate = features[0].new_empty(B, H, W, L, features[0].shape[-1])
    kept = points.new_empty(B, L, dtype=torch.float64) if counts else uncounted(points)
    return aggregate, points.new_empty(B, H, W, L), kept


@functools.partial(LIBRARY.impl, "attend_backward", dispatch_key="CompositeExplicitAutograd")
def attend_backward(features, points, mask_maps, gates, seeds, temperature, backend, *others):
    """Gradients of features, points, mask maps and gates in this order, empty where not wanted."""
    module = module_of(choose_backend(backend, points, features))
    inputs = Inputs(features, points, mask_maps or None, gates, seeds, temperature)
    *results, wanted = others  # the gradients of the three results
    grads = module.backward(inputs, results, Leaves.split(wanted, len(features))).flat()
    leaves = Leaves(features, points, mask_maps, gates).flat()
    return [
        grad.to(leaf.dtype) if w else points.new_empty(0)
        for grad, leaf, w in zip(grads, leaves, wanted, strict=True)
    ]


@torch.library.register_fake("acla::attend_backward", lib=LIBRARY)
def attend_backward_shapes(features, points, mask_maps, gates, seeds, *others):
    leaves = Leaves(features, points, mask_maps, gates).flat()
    return [
        torch.empty_like(leaf, memory_format=torch.contiguous_format) if w else points.new_empty(0)
        for leaf, w in zip(leaves, others[-1], strict=True)
    ]


def keep_inputs(ctx, inputs, output) -> None:
    """Save the inputs alone; the backward pass computes the rest again."""
    features, points, mask_maps, gates, seeds, ctx.temperature, ctx.backend, ctx.counts = inputs
    ctx.layers = len(features)
    ctx.save_for_backward(points, gates, seeds, *features, *mask_maps)
    ctx.set_materialize_grads(False)


def gradients(ctx, aggregate: Tensor | None, coverage: Tensor | None, kept: Tensor | None) -> tuple:
    """Gradients of all inputs, from those of the three results (None means zero)."""
    results = aggregate, coverage, kept if ctx.counts else None
    points, gates, seeds, *lists = ctx.saved_tensors
    features, mask_maps = lists[: ctx.layers], lists[ctx.layers :]
    wanted = Leaves(*ctx.needs_input_grad[:4]).flat()
    grads = torch.ops.acla.attend_backward(
        features, points, mask_maps, gates, seeds, ctx.temperature, ctx.backend, *results, wanted
    )
    grads = [grad if w else None for grad, w in zip(grads, wanted, strict=True)]
    return *Leaves.split(grads, ctx.layers), None, None, None, None


def no_gradients(ctx, *_: Tensor) -> None:
    """Refuse gradients of gradients."""
    raise RuntimeError("attend has first-order gradients only; 'reference' has the rest")


torch.library.register_autograd("acla::attend", gradients, setup_context=keep_inputs, lib=LIBRARY)
torch.library.register_autograd("acla::attend_backward", no_gradients, lib=LIBRARY)


@register_flop_formula(torch.ops.acla.attend)
def attend_flops(features, points, *_, **__) -> int:
    """6 a channel and key, every key kept (Eq. 12's aggregation); shapes for tensors."""
    B, H, W, L, _, K = points
    return 6 * features[0][-1] * B * H * W * L * K


@register_flop_formula(torch.ops.acla.attend_module)
def attend_module_flops(query, features, weight, bias, mask_weight, _, output, *__, **___) -> int:
    """The products of points, masks and output, and every key kept."""
    N, L = query[:3].numel(), len(features)
    K = bias[0] // (3 * L)
    masks = 2 * features[0][:3].numel() * mask_weight.numel() if mask_weight else 0
    return N * (2 * weight.numel() + 6 * query[-1] * L * K + 2 * output.numel()) + masks


@register_flop_formula(torch.ops.acla.attend_backward)
def attend_backward_flops(features, points, *_, **__) -> int:
    """The dots and the scatter: each as much as the forward pass."""
    return 2 * attend_flops(features, points)
