"""EDSR and RCAN, with attention modules behind chosen blocks.

The walk over blocks and modules (Eq. 2, 10 and 11) is `Backbone.walk`; the modules are in
attention.py and baselines.py, A2N and HAN in files of their own.

Parameter names follow the networks' public PyTorch releases (head, body, tail), so that their files
can be converted. Pictures are in 0..1 inside, not 0..255, since offsets need features of about 1;
layers that turn features into factors scale them to the range of the published networks."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from acla.config import ATTENTIONS, ModelConfig
from acla.kernels import runs_whole, to_rows
from acla.models.attention import (
    CrossLayerAttention,
    as_autocast,
    full_precision,
    mask_maps,
    zero,
)
from acla.models.baselines import MultiHeadAttention, NonLocal, SqueezedAttention, SqueezeExcitation
from acla.models.gumbel import position_seeds

LEVELS = 255  # published networks work on pictures in 0..LEVELS
RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, as EDSR subtracts it


def convolution(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


class FactorConvolution(nn.Conv2d):
    """A 1×1 convolution whose output a sigmoid turns into factors. It scales features to the range
    of pictures in 0..255: on smaller ones all factors would begin at 1/2, too flat for weights of
    the common learning rate to change."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, LEVELS * self.weight, self.bias)


class MeanShift(nn.Conv2d):
    """Adds `sign` times the mean colour; fixed, but counted among the parameters as in EDSR. Always
    in full precision, since its input or output is a picture."""

    def __init__(self, channels: int, sign: int):
        super().__init__(channels, channels, 1)
        mean = torch.tensor(RGB_MEAN)
        self.weight.data = torch.eye(channels).view(channels, channels, 1, 1)
        self.bias.data = sign * (mean if channels == 3 else mean.mean(0, keepdim=True))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):
            return super().forward(x.to(self.weight.dtype))


class Residual(nn.Module):
    """Layers and a shortcut around them, which keep the size of features [B,C,H,W]: the blocks of
    EDSR, the blocks (RCAB) and groups of RCAN."""

    def __init__(self, *layers: nn.Module, scale: float = 1.0):
        super().__init__()
        self.body, self.scale = nn.Sequential(*layers), scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.body(x), alpha=self.scale)


class ChannelAttention(nn.Module):
    """RCAN's: features [B,C,H,W] times a factor 0..1 a channel, from the channels' means."""

    def __init__(self, width: int, reduction: int):
        super().__init__()
        inner = max(1, width // reduction)
        self.conv_du = nn.Sequential(
            FactorConvolution(width, inner), nn.ReLU(), convolution(inner, width, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv_du(x.mean((2, 3), keepdim=True))


class Upsampler(nn.Sequential):
    """×2 and ×3 in one step of sub-pixel convolution, ×4 in two steps of ×2."""

    def __init__(self, scale: int, width: int):
        steps = [2, 2] if scale == 4 else [scale]
        layers: list[nn.Module] = []
        for step in steps:
            layers += [convolution(width, width * step * step), nn.PixelShuffle(step)]
        super().__init__(*layers)


class Backbone(nn.Module):
    """A restoration network: pictures [B,C,H,W] in 0..1 → [B,C,H·scale,W·scale].

    x^p is the output of block p (EDSR) or group p (RCAN) before the attention module behind it. The
    module at an insert position queries x^p and refers to the features of every insert position up
    to its own (Eq. 11). At scale 1 the output is added to the input and the network starts as the
    identity.

    This class is EDSR or RCAN. Subclasses override the parts (`build`) and the begin and end of the
    walk over the blocks (`blocks`, `shallow`, `finish`)."""

    # Whether `finish` needs the outputs of all blocks, not just the last
    collects = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # Bytes of samples above which attention is recomputed in the backward pass
        self.sample_limit = math.inf
        self.build(config)
        self.attention = nn.ModuleDict(
            {
                str(position): build_module(config, layers)
                for layers, position in enumerate(config.positions, 1)
            }
        )
        # As the features; otherwise every convolution copies its weights and their gradients
        self.to(memory_format=torch.channels_last)

    def build(self, config: ModelConfig) -> None:
        """Create the network's parts, except its attention modules."""
        width, channels = config.width, config.channels
        self.sub_mean = MeanShift(channels, -1)
        self.head = nn.Sequential(convolution(channels, width))
        blocks = [build_block(config) for _ in range(config.blocks)]
        self.body = nn.Sequential(*blocks, convolution(width, width))
        enlarge = [Upsampler(config.scale, width)] if config.scale > 1 else []
        self.tail = nn.Sequential(*enlarge, convolution(width, channels))
        self.add_mean = MeanShift(channels, +1) if config.scale > 1 else None
        if config.scale == 1:
            zero(self.tail[-1])

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """The blocks that insert positions count."""
        return self.body[:-1]

    def shallow(self, pictures: Tensor) -> Tensor:
        """The features [B,width,H,W] that the first block reads."""
        return self.head(self.sub_mean(pictures))

    def finish(self, pictures: Tensor, x: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """The restored pictures from the input, the shallow features x, and the outputs of the
        blocks with the attention behind them: all of them if `collects`, else the last."""
        restored = self.enlarge(self.body[-1](outputs[-1]) + x)
        return pictures + restored if self.add_mean is None else self.add_mean(restored)

    def enlarge(self, x: Tensor) -> Tensor:
        """The tail, features to colours; its last convolution in full precision."""
        x, last = self.tail[:-1](x), self.tail[-1]
        with full_precision(x):
            return last(x.to(last.weight.dtype))

    def forward(
        self, pictures: Tensor, seeds: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Restore pictures [B,C,H,W]. In training, seeds [B] int64 draw the key masks with noise,
        and temperature τ is that of their gradient (Eq. 9)."""
        return self.walk(pictures, seeds, None, temperature, counts=False)[0]

    def forward_with_counts(
        self,
        pictures: Tensor,
        seeds: Tensor | None = None,
        gates: Tensor | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Restored pictures, and the keys that every executed module kept, {position: [B,L]}.

        gates [J]: s_j of Eq. 11, exactly 0 or 1, one an insert position. If they need no gradient,
        modules with a gate of 0 are skipped."""
        return self.walk(pictures, seeds, gates, temperature, counts=True)

    def walk(
        self,
        pictures: Tensor,
        seeds: Tensor | None,
        gates: Tensor | None,
        temperature: float,
        counts: bool,
    ) -> tuple[Tensor, dict[int, Tensor | None]]:
        """`forward_with_counts`, or without the counts."""
        shut: set[int] = set()
        if gates is not None and not gates.requires_grad:
            shut = {p for p, s in zip(self.config.positions, gates.tolist(), strict=True) if s == 0}
        # What a picture's values go through, rather than their changes, is never in a short format
        with full_precision(pictures):
            x = self.shallow(pictures.contiguous(memory_format=torch.channels_last))
        y, outputs, rows, maps, kept = as_autocast(x), [], [], [], {}
        masked = [p for p in self.config.positions if self.config.kind.masked and p not in shut]
        whole = self.config.keys and gates is None and seeds is None and not counts
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self.attention.values())
        for position, block in enumerate(self.blocks, 1):
            y = block(y)
            if str(position) in self.attention:
                rows.append(to_rows(y))
                whole = whole and not hooked and runs_whole(y, rows)
                later = [] if whole else [p for p in masked if p >= position]
                if later:
                    modules = [self.attention[str(p)] for p in later]
                    of_layer = mask_maps(modules, len(rows) - 1, rows[-1])
                    maps.append(dict(zip(later, of_layer, strict=True)))
                if whole:
                    y, kept[position] = self.attention[str(position)].whole(y, rows), None
                elif position not in shut:
                    # A module refers to its own layer whenever it is open, so its own gate is a
                    # factor of its output alone.
                    own = referred = None
                    if gates is not None:
                        own = gates[len(rows) - 1]
                        referred = torch.cat([gates[: len(rows) - 1], own.new_ones(1)])
                    inputs = y, tuple(rows), referred, position_seeds(seeds, position), temperature
                    if self.config.keys:
                        own_maps = [of_layer[position] for of_layer in maps] if masked else None
                        inputs = *inputs, own_maps, counts
                    z, kept[position] = self.run_attention(str(position), *inputs)
                    y = y + (z if own is None else own * z)
            outputs = [*outputs, y] if self.collects else [y]
        return self.finish(pictures, x, outputs), kept

    def run_attention(self, position: str, *inputs: object) -> tuple[Tensor, Tensor]:
        """Run one module. If the samples of all modules would exceed the limit, it saves its inputs
        alone and is recomputed in the backward pass."""
        module, modules = self.attention[position], len(self.attention)
        query = inputs[0]
        samples = query.numel() * query.element_size() * modules * (modules + 1) // 2
        if samples > self.sample_limit and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)
        return module(*inputs)


def build_module(config: ModelConfig, layers: int) -> nn.Module:
    """An attention module that refers to `layers` layers, its own last."""
    kind = ATTENTIONS[config.attention]
    match kind.module:
        case "cla" | "acla" | "acla+se":
            module = SqueezedAttention if kind.module == "acla+se" else CrossLayerAttention
            initial = {"offset_radius": config.offset_radius, "mask_bias": config.mask_bias}
            return module(config.width, layers, config.keys, kind.masked, **initial)
        case "nl":
            return NonLocal(config.width, layers=1)
        case "clnl":
            return NonLocal(config.width, layers)
        case "se":
            return SqueezeExcitation(config.width)
        case _:  # mha
            return MultiHeadAttention(config.width)


def build_block(config: ModelConfig) -> nn.Module:
    """One block of EDSR or group of RCAN, behind which a module can be inserted."""
    width = config.width
    if config.backbone == "edsr":
        return Residual(*two_convolutions(width), scale=config.residual_scale)
    blocks = [
        Residual(*two_convolutions(width), ChannelAttention(width, config.reduction))
        for _ in range(config.group_blocks)
    ]
    return Residual(*blocks, convolution(width, width))


def two_convolutions(width: int) -> tuple[nn.Module, ...]:
    return convolution(width, width), nn.ReLU(), convolution(width, width)
