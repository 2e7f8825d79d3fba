"""EDSR and RCAN, with attention modules behind chosen blocks.

Parameter names follow the networks' public PyTorch releases (head, body, tail), so that their files
can be read. Pictures are in 0..1 inside, not 0..255, for offsets want features of about 1; what
turns features into factors takes them as large as the published networks do."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from acla.config import MASKED, ModelConfig
from acla.models.attention import CrossLayerAttention
from acla.models.baselines import MultiHeadAttention, NonLocal, SqueezedAttention, SqueezeExcitation
from acla.models.gumbel import position_seeds
from kernels import to_rows

LEVELS = 255  # published networks work on pictures in 0..255
RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, as EDSR subtracts it


def convolution(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


class FactorConvolution(nn.Conv2d):
    """A 1×1 convolution of features that a sigmoid turns into factors. It takes them as large as
    pictures in 0..255 make them: on smaller ones all factors begin at 1/2, and weights that learn
    as fast as the others could not make up for it."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, LEVELS * self.weight, self.bias)


class MeanShift(nn.Conv2d):
    """Adds `sign` times the mean colour; fixed, but counted among the parameters as in EDSR. Always
    of full precision, for what it is given or gives are pictures."""

    def __init__(self, channels: int, sign: int):
        super().__init__(channels, channels, 1)
        mean = torch.tensor(RGB_MEAN)
        self.weight.data = torch.eye(channels).view(channels, channels, 1, 1)
        self.bias.data = sign * (mean if channels == 3 else mean.mean(0, keepdim=True))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        kind = "cpu" if x.is_meta else x.device.type  # autocast does not know meta
        with torch.autocast(kind, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class ResidualBlock(nn.Module):
    """EDSR's block: two 3×3 convolutions and a scaled shortcut."""

    def __init__(self, width: int, residual_scale: float):
        super().__init__()
        self.body = nn.Sequential(convolution(width, width), nn.ReLU(), convolution(width, width))
        self.residual_scale = residual_scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) * self.residual_scale


class ChannelAttention(nn.Module):
    """RCAN's channel attention: a factor for each channel from the channels' means."""

    def __init__(self, width: int, reduction: int):
        super().__init__()
        inner = max(1, width // reduction)
        self.conv_du = nn.Sequential(
            FactorConvolution(width, inner), nn.ReLU(), convolution(inner, width, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv_du(x.mean((2, 3), keepdim=True))


class ChannelAttentionBlock(nn.Module):
    """RCAN's residual block (RCAB)."""

    def __init__(self, width: int, reduction: int):
        super().__init__()
        self.body = nn.Sequential(
            convolution(width, width),
            nn.ReLU(),
            convolution(width, width),
            ChannelAttention(width, reduction),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ResidualGroup(nn.Module):
    """RCAN's residual group: blocks, a convolution and a shortcut around all."""

    def __init__(self, width: int, blocks: int, reduction: int):
        super().__init__()
        inner = [ChannelAttentionBlock(width, reduction) for _ in range(blocks)]
        self.body = nn.Sequential(*inner, convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Upsampler(nn.Sequential):
    """×2 and ×3 in one step of sub-pixel convolution, ×4 in two steps of ×2."""

    def __init__(self, scale: int, width: int):
        steps = [2] * int(math.log2(scale)) if scale in (2, 4) else [scale]
        layers: list[nn.Module] = []
        for step in steps:
            layers += [convolution(width, width * step * step), nn.PixelShuffle(step)]
        super().__init__(*layers)


class Backbone(nn.Module):
    """A restoration network: pictures [B,C,H,W] in 0..1 → [B,C,H·scale,W·scale].

    x^p is the output of block p (EDSR) or group p (RCAN) before the attention module behind it. The
    module at an insert position queries x^p and refers to the features of every insert position up
    to its own. A network that does not enlarge adds its output to its input and starts as the
    identity.

    This one is EDSR or RCAN. Others build other parts (`build`) and begin and end the walk over
    their blocks in their own way (`blocks`, `shallow`, `finish`)."""

    # Whether `finish` needs the output of every block, and not of the last alone
    collects = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # Bytes; above, attention is computed again in the backward pass.
        self.sample_limit = math.inf
        self.build(config)
        self.attention = nn.ModuleDict(
            {
                str(position): build_module(config, layers)
                for layers, position in enumerate(config.positions, 1)
            }
        )
        # As the features: else every convolution moves its weights, and their gradients, each time
        self.to(memory_format=torch.channels_last)

    def build(self, config: ModelConfig) -> None:
        """Make the parts of the network, but for its attention modules."""
        width, channels = config.width, config.channels
        self.sub_mean = MeanShift(channels, -1)
        self.head = nn.Sequential(convolution(channels, width))
        blocks = [build_block(config) for _ in range(config.blocks)]
        self.body = nn.Sequential(*blocks, convolution(width, width))
        enlarge = [Upsampler(config.scale, width)] if config.scale > 1 else []
        self.tail = nn.Sequential(*enlarge, convolution(width, channels))
        self.add_mean = MeanShift(channels, +1) if config.scale > 1 else None
        if config.scale == 1:
            nn.init.zeros_(self.tail[-1].weight)
            nn.init.zeros_(self.tail[-1].bias)

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """The blocks that insert positions count."""
        return self.body[:-1]

    def shallow(self, pictures: Tensor) -> Tensor:
        """The features [B,width,H,W] that the first block reads."""
        return self.head(self.sub_mean(pictures))

    def finish(self, pictures: Tensor, x: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """The restored pictures from the input, the shallow features, and what came out of the
        blocks and the attention behind them: of the last one, or of all where `collects`."""
        restored = self.tail(self.body[-1](outputs[-1]) + x)
        return pictures + restored if self.add_mean is None else self.add_mean(restored)

    def forward(
        self, pictures: Tensor, seeds: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Restore pictures [B,C,H,W]; seeds [B] int64 draw the masks with noise, and temperature is
        that of their gradient, as training has them."""
        return self.attended(pictures, seeds, temperature=temperature)[0]

    def attended(
        self,
        pictures: Tensor,
        seeds: Tensor | None = None,
        gates: Tensor | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Restore pictures and tell, for every module that ran, the keys it kept: {position:
        [B,L]}.

        gates [J] are s_j of Eq. 11, one an insert position, exactly 0 or 1. Where they need no
        gradient, modules that are shut are skipped."""
        shut: set[int] = set()
        if gates is not None and not gates.requires_grad:
            shut = {p for p, s in zip(self.config.positions, gates.tolist(), strict=True) if s == 0}
        x = self.shallow(pictures.contiguous(memory_format=torch.channels_last))
        y, outputs, rows, kept = x, [], [], {}
        for position, block in enumerate(self.blocks, 1):
            y = block(y)
            if str(position) in self.attention:
                rows.append(to_rows(y))
                if position not in shut:
                    # A module that is there refers to its own layer, so its own gate stands before
                    # its output alone.
                    own = referred = None
                    if gates is not None:
                        own = gates[len(rows) - 1]
                        referred = torch.cat([gates[: len(rows) - 1], own.new_ones(1)])
                    given = y, tuple(rows), referred, position_seeds(seeds, position), temperature
                    z, kept[position] = self.run_attention(str(position), *given)
                    y = y + (z if own is None else own * z)
            outputs = [*outputs, y] if self.collects else [y]
        return self.finish(pictures, x, outputs), kept

    def run_attention(self, position: str, *given: object) -> tuple[Tensor, Tensor]:
        """Run one module. Where the samples of all modules would pass the limit, it saves its
        inputs alone and is run again in the backward pass."""
        module, modules = self.attention[position], len(self.attention)
        query = given[0]
        samples = query.numel() * query.element_size() * modules * (modules + 1) // 2
        if samples > self.sample_limit and torch.is_grad_enabled():
            return checkpoint(module, *given, use_reentrant=False, preserve_rng_state=False)
        return module(*given)


def build_module(config: ModelConfig, layers: int) -> nn.Module:
    """The attention module that refers to `layers` layers."""
    match config.attention:
        case "cla" | "acla" | "cla-i" | "cla-k" | "acla+se":
            kind = SqueezedAttention if config.attention == "acla+se" else CrossLayerAttention
            masked = config.attention in MASKED
            starts = {"offset_radius": config.offset_radius, "mask_bias": config.mask_bias}
            return kind(config.width, layers, config.keys, masked, **starts)
        case "nl":
            return NonLocal(config.width, layers=1)
        case "clnl":
            return NonLocal(config.width, layers)
        case "se":
            return SqueezeExcitation(config.width)
        case "mha":
            return MultiHeadAttention(config.width)
    raise ValueError(f"no attention module is called {config.attention!r}")


def build_block(config: ModelConfig) -> nn.Module:
    """One block that a module can stand behind."""
    match config.backbone:
        case "edsr":
            return ResidualBlock(config.width, config.residual_scale)
        case "rcan":
            return ResidualGroup(config.width, config.group_blocks, config.reduction)
    raise ValueError(f"no backbone is called {config.backbone!r}")
