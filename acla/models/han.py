"""HAN: a holistic attention network (Niu et al. 2020), RCAN with attention over the layers (LAM)
and over channels and pixels (CSAM) behind its groups.

Parameter names follow the public PyTorch release (`last_conv`, `last`, `la`, `csa`); only the
3×3×3 kernel of `csa` lacks its two axes of length 1."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acla.config import ModelConfig
from acla.models.attention import full_precision
from acla.models.backbones import LEVELS, Backbone, convolution


class LayerAttention(nn.Module):
    """LAM: adds to every layer's features a weighted mean of all layers', with the largest weights
    for the layers that agree with it least.

    Agreement is the sum of products over channels and pixels, of features scaled to the range of
    pictures in 0..255: on smaller ones softmax would be flatter, which no weight could offset."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, layers: Tensor) -> Tensor:
        """Features [B,N,C,H,W] of N layers → as many."""
        rows = layers.flatten(2)
        with full_precision(layers):  # float16 ends at 65,504
            scaled = LEVELS * rows.to(self.gamma.dtype)
            weights = (-scaled @ scaled.mT).softmax(-1)  # [B,N,N]
        return layers + self.gamma * (weights.to(rows.dtype) @ rows).view_as(layers)


class ChannelSpatialAttention(nn.Module):
    """CSAM: a factor 1 to 1 + gamma for every channel and pixel, from the 3×3×3 values around it
    (the third axis: channels in their order), scaled to the range of pictures in 0..255."""

    def __init__(self):
        super().__init__()
        # Three axes: networks in channels_last memory support no five
        self.kernel = nn.Parameter(torch.empty(3, 3, 3))
        self.bias = nn.Parameter(torch.empty(1))
        self.gamma = nn.Parameter(torch.zeros(1))
        for parameter in (self.kernel, self.bias):  # as torch initialises a convolution
            nn.init.uniform_(parameter, -1 / math.sqrt(27), 1 / math.sqrt(27))

    def forward(self, x: Tensor) -> Tensor:
        """Features [B,C,H,W] → as many."""
        kernel = LEVELS * self.kernel[None, None]
        factor = F.conv3d(x[:, None], kernel, self.bias, padding=1)[:, 0].sigmoid()
        return x + self.gamma * factor * x


class HAN(Backbone):
    """HAN. As published, LAM reads the outputs of all groups and of the body's last convolution,
    CSAM the last of these."""

    collects = True

    def build(self, config: ModelConfig) -> None:
        super().build(replace(config, backbone="rcan"))
        width, layers = config.width, config.blocks + 1
        self.csa = ChannelSpatialAttention()
        self.la = LayerAttention()
        self.last_conv = convolution(width * layers, width)
        self.last = convolution(width * 2, width)

    def finish(self, pictures: Tensor, x: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        deep = self.body[-1](outputs[-1])
        layers = torch.stack([deep, *reversed(outputs)], 1)  # the last one first, as published
        mixed = self.last_conv(self.la(layers).flatten(1, 2))
        restored = self.enlarge(self.last(torch.cat([self.csa(deep), mixed], 1)) + x)
        return pictures + restored if self.add_mean is None else self.add_mean(restored)
