"""Cross-layer attention: CLA (Eq. 5) and, with a mask unit, ACLA (Eq. 6 to 9).

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels
offsets are (dy, dx) in pixels, y first

Where each equation is computed:

    Eq. 1, 3   NL and CLNL                 `NonLocal` in baselines.py
    Eq. 2      z = x + h(y)                h in `CrossLayerAttention.forward`, x + in backbones.py
                                           both in `whole`, on CPUs in inference
    Eq. 5, 6   y, weighted sum of keys     sampling, softmax, sum: `kernels.attend`; g in `forward`
    Eq. 7, 9   binary Gumbel gate with its straight-through estimator
                                           `binary_gate` in kernels/reference.py; the fast backends
                                           compute the same inside `kernels.attend`
    Eq. 8      mask unit M(x(p))           the map M(x) in `mask_maps`, read at the sampled
                                           positions p in `kernels.attend`: the same, since M is
                                           linear
    Eq. 10     gates of insert positions   `draw_gates` in gumbel.py
    Eq. 11     several referred layers     `Backbone.walk` in backbones.py
    Eq. 12, 13 cost                        cost.py
    Eq. 14     loss of the search          `Search.weight_step`, `alpha_step` in search/loop.py

The operator of Eq. 6 to 9 and 11 written literally is kernels/reference.py.
"""

import math
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from acla.kernels import Attended, attend, attend_module

RING_KEYS = 8
LARGE_PRODUCT = 2**29  # multiply-adds that take a GPU longer in float32 than a launch does


class CrossLayerAttention(nn.Module):
    """The module behind one insert position. It returns the increment h(y) of z = x + h(y) (Eq. 2).

    Every pair of query and referred layer has its own offsets and weights (on the query), value g
    and mask unit M (on the referred layer). All are 1×1 convolutions; those of the query are one,
    `points`. g runs after the sum over the keys, which is exact: both are linear, and g's bias is
    weighted by the key weights inside the image.

    offset_radius: pixels between the rings of initial offsets; mask_bias: initial bias of the mask
    unit, which keeps keys with probability σ(mask_bias) under noise, and all of them without noise
    if it is positive.

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
        self.cache: dict[str, tuple[list, tuple[Tensor | None, ...]]] = {}  # see `fused`
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise h to zero, so that inserting the module changes nothing, the offsets to rings
        and the masks to open."""
        bound = 1 / math.sqrt(self.value.shape[-1])  # as torch initialises a 1×1 convolution
        nn.init.uniform_(self.value, -bound, bound)
        nn.init.uniform_(self.value_bias, -bound, bound)
        weight = rearrange(self.points.weight.data, "(l yxw k) c -> l yxw k c", yxw=3, k=self.keys)
        bias = rearrange(self.points.bias.data, "(l yxw k) -> l yxw k", yxw=3, k=self.keys)
        weight[:, :2] = 0
        bias[:, :2] = rings(self.keys, self.offset_radius)
        zero(self.output)
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
        maps: Sequence[Tensor] | None = None,
        counts: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """query x^j [B,C,H,W]; rows of the L referred layers [B,H+2,W+2,C], x^j's own last
        (`kernels.to_rows`); gates s_l [L] (Eq. 11); seeds [B] int64 of the masks' noise, None for
        masks without noise; temperature τ of the masks' gradient (Eq. 9); maps M(x^l) of the L
        layers [B,H+2,W+2,K], where `mask_maps` has computed those of several modules together.

        Returns h(y) [B,C,H,W] and the keys kept [B,L], over all queries, None without `counts`."""
        points = self.locate(query)
        if maps is None and self.mask is not None:
            maps = [mask_maps([self], layer, one)[0] for layer, one in enumerate(rows)]
        attended = attend(
            rows, points, maps, gates, seeds=seeds, temperature=temperature, counts=counts
        )
        return self.combine(attended), attended.kept

    def whole(self, query: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """x + h(y) [B,C,H,W] (Eq. 2) of the same query and rows in one pass of the CPU kernel, in
        inference and where `runs_whole` allows it."""
        parts = self.points.weight, self.points.bias, self.output.weight, self.value
        parts += self.value_bias, self.output.bias
        if self.mask is not None:
            parts += self.mask, self.mask_bias
        given = fused(self, "whole", arrange, *parts)
        return attend_module(query.permute(0, 2, 3, 1), rows, *given).permute(0, 3, 1, 2)

    def locate(self, query: Tensor) -> Tensor:
        """Offsets and weights of all keys (Eq. 5), `attend`'s points: [B,C,H,W] → [B,H,W,L,3,K]."""
        # Positions need more than the eight bits of bfloat16 or the eleven of TF32.
        with full_precision(query):
            query = query.permute(0, 2, 3, 1).to(self.points.weight.dtype)
            points = pointwise(query, self.points.weight, self.points.bias, full=True)
        return rearrange(
            points, "b h w (l yxw k) -> b h w l yxw k", l=self.layers, yxw=3, k=self.keys
        )

    def combine(self, attended: Attended) -> Tensor:
        """h(y) [B,C,H,W] of what `attend` returns: g, the sum over the layers, h."""
        if torch.is_grad_enabled():  # g and its bias after the sum (Eq. 5), then h (Eq. 2)
            value = rearrange(self.value, "l out c -> out (l c)")
            y = pointwise(attended.aggregate.flatten(3), value)
            y = y + attended.coverage.to(y.dtype) @ self.value_bias.to(y.dtype)
            z = pointwise(y, self.output.weight, self.output.bias)
        else:
            parts = self.output.weight, self.value, self.value_bias
            value, bias = fused(self, "h∘g", fold, *parts)
            z = pointwise(attended.aggregate.flatten(3), value, self.output.bias)
            coverage = attended.coverage.to(z.dtype).flatten(0, 2)
            z = z.flatten(0, 2).addmm_(coverage, bias.to(z.dtype)).view_as(z)
        return z.permute(0, 3, 1, 2)

    def train(self, mode: bool = True) -> "CrossLayerAttention":
        """As every module; what was derived goes, since fused optimisers count no change."""
        self.cache.clear()
        return super().train(mode)

    def select(self, layers: Sequence[int]) -> dict[str, Tensor]:
        """The state dict of the module that refers to these layers alone, counted from 0."""
        index = torch.as_tensor(list(layers), device=self.value.device)
        state = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        for name in ("value", "value_bias", "mask", "mask_bias"):
            if name in state:
                state[name] = state[name][index].clone()
        for name in ("points.weight", "points.bias"):
            per_layer = state[name].unflatten(0, (self.layers, -1))
            state[name] = per_layer[index].flatten(0, 1).clone()
        return state


def zero(layer: nn.Module) -> nn.Module:
    """The layer with parameters of zero: what it ends initially changes nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def fold(output: Tensor, value: Tensor, value_bias: Tensor) -> tuple[Tensor, Tensor]:
    """h∘g as one matrix: [C,C] after [L,C,C] and [L,C] → [C, L·C] and g's bias behind h [L,C]."""
    return output @ rearrange(value, "l out c -> out (l c)"), value_bias @ output.T


def arrange(
    points: Tensor,
    points_bias: Tensor,
    output: Tensor,
    value: Tensor,
    value_bias: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    mask_bias: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """A module's parameters as the arguments of `attend_module`."""
    h = torch.cat([(output @ value).mT, (value_bias @ output.T).unsqueeze(1)], 1)
    masks = None if mask is None else mask.mT.contiguous()
    return points.T.contiguous(), points_bias, masks, mask_bias, h, bias


def concatenate(*parts: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and biases of several 1×1 convolutions, in turns, as those of one."""
    return torch.cat(parts[::2]), torch.cat(parts[1::2])


def fused(
    module: CrossLayerAttention,
    name: str,
    function: Callable[..., tuple[Tensor | None, ...]],
    *parts: Tensor,
) -> tuple[Tensor | None, ...]:
    """function(*parts) of a module's weights, in their precision. Without gradients the module
    keeps it until one of them changes, or it is set to train or evaluate. (Torch counts no change
    by fused optimisers, or of `weight.data`.)"""
    with full_precision(parts[0]):
        counted = not torch.compiler.is_compiling() and not parts[0].is_inference()
        if torch.is_grad_enabled() or not counted:
            return function(*parts)
        versions = [(part.data_ptr(), part._version) for part in parts]
        if name not in module.cache or module.cache[name][0] != versions:
            module.cache[name] = versions, function(*parts)
        return module.cache[name][1]


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context without automatic mixed precision on the tensor's device."""
    return torch.autocast(autocast_kind(tensor), enabled=False)


def as_autocast(tensor: Tensor) -> Tensor:
    """The tensor in the format of automatic mixed precision, where that is on, but for float64."""
    kind = autocast_kind(tensor)
    if not torch.is_autocast_enabled(kind) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


def autocast_kind(tensor: Tensor) -> str:
    return "cpu" if tensor.is_meta else tensor.device.type  # autocast lacks meta


def mask_maps(
    modules: Sequence[CrossLayerAttention], layer: int, rows: Tensor
) -> tuple[Tensor, ...]:
    """M(x) of Eq. 8, border included: the maps [B,H+2,W+2,K] of several modules on one layer that
    all of them refer to (their l-th, counted from 0), by one product."""
    parts = (part[layer] for module in modules for part in (module.mask, module.mask_bias))
    weight, bias = fused(modules[0], f"M {layer} {len(modules)}", concatenate, *parts)
    # Full precision: TF32 would open keys that the CPU closes.
    maps = pointwise(rows, weight, bias, full=True)
    if maps.device.type == "cpu":  # as its kernel reads them; once, not in every module
        maps = maps.to(weight.dtype)
    return maps.split([module.keys for module in modules], -1)


def pointwise(
    rows: Tensor, weight: Tensor, bias: Tensor | None = None, full: bool = False
) -> Tensor:
    """A 1×1 convolution on channels-last features: [B,H,W,C], weight [out,C] → [B,H,W,out].

    full: in full float32 precision on GPUs too, by a matrix product, whose bias costs no launch.
    There, convolutions round to TF32 by default, the backbone's too; without `full` a large product
    is as exact and as fast as they.
    """
    device = rows.device.type
    if device == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        # Torch computes convolutions of several pictures by oneDNN, there up to twice as fast as
        # its matrix product; so every line of pixels is a picture here.
        B, H, _, _ = rows.shape
        lines = convolve(rows.flatten(0, 1).unsqueeze(1), weight, bias)
        return lines.squeeze(1).unflatten(0, (B, H))
    if full or device != "cuda" or rows.numel() * len(weight) < LARGE_PRODUCT:
        return F.linear(rows, weight, bias)
    return convolve(rows, weight, bias)


def convolve(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`pointwise` by torch's convolution, on channels-last memory."""
    out = F.conv2d(rows.permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1)


def rings(keys: int, step: float) -> Tensor:
    """Initial offsets (dy, dx) [2,K] in pixels: eight keys a ring, rings of radius step, 2 step,
    3 step …, each turned a little against the previous one. (Our choice, open in the paper: spread
    keys differ from the first step on.)"""
    key = torch.arange(keys, dtype=torch.float32)
    ring = key.div(RING_KEYS, rounding_mode="floor")
    in_ring = (keys - ring * RING_KEYS).clamp(max=RING_KEYS)
    angle = 2 * math.pi * (key % RING_KEYS + ring / 2) / in_ring
    radius = step * (ring + 1)
    return torch.stack([radius * angle.sin(), radius * angle.cos()])
