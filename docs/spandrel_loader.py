"""Our networks in programs that load models with spandrel, such as chaiNNer (extra `spandrel`):

from spandrel import MAIN_REGISTRY, ArchSupport, ModelLoader
MAIN_REGISTRY.add(ArchSupport.from_architecture(Acla()))
network = ModelLoader().load_from_file("weights/sr-x2-none.safetensors")  # pictures in 0..1
"""

import dataclasses
import re
from collections.abc import Mapping

from spandrel import Architecture, ImageModelDescriptor
from torch import Tensor

from acla.checkpoint import infer_config, infer_scales
from acla.config import ModelConfig
from acla.models.backbones import Backbone
from acla.models.factory import build_network
from acla.models.serialization import widened


class Acla(Architecture[Backbone]):
    """EDSR with ACLA, CLA or no attention. Spandrel reads no headers: the tensors tell all but a
    `--residual-scale` of one's own."""

    def __init__(self) -> None:
        super().__init__(id="ACLA", detect=is_ours)

    def load(self, state_dict: Mapping[str, Tensor]) -> ImageModelDescriptor[Backbone]:
        config = config_of(dict(state_dict))
        return ImageModelDescriptor(
            build_network(config),
            widened(state_dict),
            self,
            purpose="SR" if config.scale > 1 else "Restoration",
            tags=[f"{config.blocks} blocks", f"{config.width}nf", config.attention],
            supports_half=False,
            supports_bfloat16=False,
            scale=config.scale,
            input_channels=config.channels,
            output_channels=config.channels,
        )


def is_ours(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are an EDSR's for pictures in 0..1; published ones have the same names."""
    names = {"head.0.weight", "body.0.body.2.bias", "sub_mean.bias"}
    return names <= tensors.keys() and bool((tensors["sub_mean.bias"].abs() <= 1).all())


def config_of(tensors: dict[str, Tensor]) -> ModelConfig:
    """The configuration that names and shapes of a network's tensors imply."""
    config = infer_config(tensors, "edsr")
    scale = 1 if "tail.0.weight" in tensors else infer_scales(tensors, config)[0]
    modules = (re.fullmatch(r"attention\.(\d+)\.points\.bias", name) for name in tensors)
    positions = tuple(sorted(int(module[1]) for module in modules if module))
    if not positions:
        return dataclasses.replace(config, scale=scale)
    first = f"attention.{positions[0]}"  # it refers to its own layer alone
    return dataclasses.replace(
        config,
        scale=scale,
        positions=positions,
        attention="acla" if f"{first}.mask" in tensors else "cla",
        keys=len(tensors[f"{first}.points.bias"]) // 3,  # dy, dx and weight of each
    )
