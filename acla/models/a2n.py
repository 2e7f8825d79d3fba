"""A2N and A2N-M: attention in attention (Chen et al. 2021). Every block weighs, picture by picture,
a branch with pixel attention against one without.

Inside the blocks, parameter names follow the public PyTorch release, whose files `acla.checkpoint`
converts."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from acla.config import ModelConfig
from acla.models.attention import zero
from acla.models.backbones import LEVELS, Backbone, FactorConvolution, convolution

TEMPERATURE = 30  # of the softmax over the two branches
SLOPE = 0.2  # of every LeakyReLU
TAIL_WIDTH = 24  # channels from the first enlargement on


def unbiased(width: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, size, padding=size // 2, bias=False)


class PixelAttention(nn.Module):
    """A factor 0..1 for every channel and pixel, from the channels of that pixel."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = FactorConvolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(x).sigmoid()


class AttentionBranch(nn.Module):
    """Features times a factor 0..1 for every channel and pixel, from 3×3 pixels around it."""

    def __init__(self, width: int):
        super().__init__()
        self.k1 = unbiased(width, 3)
        self.k2 = FactorConvolution(width, width)
        self.k3 = unbiased(width, 3)
        self.k4 = unbiased(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        factor = self.k2(F.leaky_relu(self.k1(x), SLOPE)).sigmoid()
        return self.k4(self.k3(x) * factor)


class BranchWeights(nn.Sequential):
    """Features [B,C,H,W] → [B,2]: the weights of the branch with attention and of the one without,
    which sum to 1. From the channels' means in the range of pictures in 0..255, to which the
    temperature belongs."""

    def __init__(self, width: int, reduction: int):
        inner = max(1, width // reduction)
        super().__init__(
            nn.Linear(width, inner, bias=False), nn.ReLU(), nn.Linear(inner, 2, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(LEVELS * x.mean((2, 3))) / TEMPERATURE).softmax(1)


class AttentionInAttentionBlock(nn.Module):
    """A2N's block: two branches, their weights (`ADM`; a forward hook there reads them) and a
    shortcut around both. size: side of the convolution without attention, 3 or, in A2N-M, 1."""

    def __init__(self, width: int, reduction: int, size: int):
        super().__init__()
        self.conv_first = unbiased(width, 1)
        self.ADM = BranchWeights(width, reduction)
        self.attention = AttentionBranch(width)
        self.non_attention = unbiased(width, size)
        self.conv_last = unbiased(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.conv_first(x), SLOPE)
        attended, plain = self.ADM(y)[:, :, None, None, None].unbind(1)  # [B,1,1,1] each
        y = attended * self.attention(y) + plain * self.non_attention(y)
        return x + self.conv_last(F.leaky_relu(y, SLOPE))


class Enlargement(nn.Sequential):
    """One step of the tail: repeated pixels, then two convolutions around pixel attention."""

    def __init__(self, step: int, inputs: int):
        super().__init__(
            nn.Upsample(scale_factor=step, mode="nearest"),
            convolution(inputs, TAIL_WIDTH),
            PixelAttention(TAIL_WIDTH),
            nn.LeakyReLU(SLOPE),
            convolution(TAIL_WIDTH, TAIL_WIDTH),
            nn.LeakyReLU(SLOPE),
        )


class A2N(Backbone):
    """A2N or A2N-M. The tail enlarges ×2 and ×3 in one step, ×4 in two; its output is added to the
    bilinearly enlarged pictures. At scale 1 it is one convolution, which starts at zero."""

    def build(self, config: ModelConfig) -> None:
        width, channels, scale = config.width, config.channels, config.scale
        size = 3 if config.backbone == "a2n" else 1
        blocks = [
            AttentionInAttentionBlock(width, config.reduction, size) for _ in range(config.blocks)
        ]
        steps = {1: [], 4: [2, 2]}.get(scale, [scale])
        widths = [width] + len(steps) * [TAIL_WIDTH]
        enlarge = [Enlargement(step, inputs) for step, inputs in zip(steps, widths, strict=False)]
        self.head = nn.Sequential(convolution(channels, width))
        self.body = nn.Sequential(*blocks, convolution(width, width))
        self.tail = nn.Sequential(*enlarge, convolution(widths[-1], channels))
        if scale == 1:
            zero(self.tail[-1])

    def shallow(self, pictures: Tensor) -> Tensor:
        return self.head(pictures.to(self.head[0].weight.dtype))

    def finish(self, pictures: Tensor, x: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        restored = self.enlarge(self.body[-1](outputs[-1]) + x)
        scale = self.config.scale
        if scale > 1:
            pictures = F.interpolate(pictures, scale_factor=scale, mode="bilinear")
        return pictures + restored
