"""Networks from configurations, and their sizes."""

from dataclasses import asdict

import torch
from torch.utils.flop_counter import FlopCounterMode

from acla.config import ModelConfig
from acla.models.a2n import A2N
from acla.models.backbones import Backbone
from acla.models.cost import full_attention_flops
from acla.models.han import HAN


def build_network(config: ModelConfig) -> Backbone:
    """The network of a configuration, with initial weights."""
    match config.backbone:
        case "edsr" | "rcan":
            return Backbone(config)
        case "han":
            return HAN(config)
        case _:  # a2n, a2n-m
            return A2N(config)


def describe(config: ModelConfig, side: int = 48) -> dict[str, object]:
    """The size of a network, without allocating its tensors: parameters (including the fixed mean
    shifts) and multiply-adds for one low-quality picture of side × side with every key kept; the
    attention's share of both; and the configuration. (The paper's "FLOPs (G)" are these
    multiply-adds.)"""
    with torch.device("meta"):
        network, backbone = build_network(config), build_network(config.plain)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone(torch.empty(1, config.channels, side, side))
    size = side * side, config.width, config.keys
    attention = full_attention_flops(config.attention, len(config.positions), *size)
    return {
        "params": sum(p.numel() for p in network.parameters()),
        "attention_params": sum(p.numel() for p in network.attention.parameters()),
        f"macs_{side}x{side}": (counter.get_total_flops() + attention) // 2,
        f"attention_macs_{side}x{side}": attention // 2,
        **asdict(config),
    }
