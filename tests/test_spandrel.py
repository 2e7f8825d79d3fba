"""The example that makes spandrel load our networks."""

import importlib.util
from pathlib import Path

import pytest
import torch

from acla.config import ModelConfig, Task
from acla.models.factory import build_network
from acla.models.serialization import load_model, save_model

EXAMPLE = Path(__file__).parents[1] / "docs" / "spandrel_loader.py"


@pytest.fixture(scope="module")
def loader():
    try:
        import spandrel
    except Exception as error:  # a torchvision of another torch raises RuntimeError
        pytest.skip(f"spandrel cannot be imported: {error}")
    spec = importlib.util.spec_from_file_location("spandrel_loader", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    registry = spandrel.MAIN_REGISTRY.copy()
    registry.add(spandrel.ArchSupport.from_architecture(example.Acla()))
    return spandrel.ModelLoader(registry=registry)


@pytest.mark.parametrize(
    ("task", "more"),
    [
        (Task("car", 10), {"positions": (2, 3), "channels": 1}),
        (Task("denoise", 30), {"positions": (1, 3), "attention": "cla", "keys": 5}),
        *((Task("sr", n), {"attention": "none", "keys": 0, "scale": n}) for n in (2, 3, 4)),
    ],
    ids=str,
)
def test_it_is_the_same_network(loader, tmp_path, task, more):
    config = ModelConfig(blocks=3, width=8, **more)
    save_model(tmp_path / "net.safetensors", build_network(config), config, task, {})
    found = loader.load_from_file(tmp_path / "net.safetensors")
    picture = torch.rand(1, config.channels, 17, 12)
    own = load_model(tmp_path / "net.safetensors").model
    assert (found.architecture.id, found.scale) == ("ACLA", config.scale)
    assert torch.equal(found(picture), own(picture).clamp(0, 1))
