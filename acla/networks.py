"""Networks by their configuration, and their sizes."""

from dataclasses import asdict, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from acla.backbone import Backbone
from acla.config import ModelConfig
from acla.cost import full_attention_flops


def build_network(config: ModelConfig) -> Backbone:
    """The network that a configuration describes, with new weights."""
    return Backbone(config)


def describe(config: ModelConfig, side: int = 48) -> dict[str, object]:
    """The size of a network, without building its tensors: parameters (the fixed mean shifts
    included) and multiply-adds for one low-quality picture of side × side, every key kept. (The
    paper's "FLOPs (G)" are these multiply-adds.)"""
    plain = replace(config, attention="none", positions=())
    with torch.device("meta"):
        params = sum(p.numel() for p in build_network(config).parameters())
        backbone = build_network(plain)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone(torch.empty(1, config.channels, side, side))
    attention = full_attention_flops(
        len(config.positions), side * side, config.width, config.keys, config.attention == "acla"
    )
    return {
        "params": params,
        f"macs_{side}x{side}": (counter.get_total_flops() + attention) // 2,
        f"attention_macs_{side}x{side}": attention // 2,
        **asdict(config),
    }
