"""The projection onto a JPEG's cells as a layer, of the measurement in docs/."""

import argparse
import importlib.util
from pathlib import Path

import pytest
import torch

from acla.config import Task
from acla.data import jpeg
from acla.data.datasets import PatchSampler, Pictures, sample_set
from acla.data.degradations import jpeg_file

SCRIPT = Path(__file__).parents[1] / "docs" / "projection_layer.py"
SPEC = importlib.util.spec_from_file_location("projection_layer", SCRIPT)
layer = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(layer)


@pytest.fixture(scope="module")
def clean() -> torch.Tensor:
    torch.manual_seed(0)
    small = torch.rand(1, 1, 6, 7)
    return torch.nn.functional.interpolate(small, size=(40, 48), mode="bicubic")[0].clamp(0, 1)


@pytest.mark.parametrize("noise", [0.002, 0.02, 0.2])
def test_the_layer_is_the_projection_of_restore(clean, noise):
    low, quantised, steps = layer.compress(clean, 20)
    answer = low + noise * torch.randn(low.shape)
    plane = jpeg.decode_cells("JPEG", jpeg_file(clean, 20)).planes[0]
    expected = jpeg.project(255 * answer[0].numpy(), plane)
    projected = layer.project(answer[None], quantised[None], steps[None])
    torch.testing.assert_close(255 * projected[0, 0], torch.tensor(expected), rtol=0, atol=1e-2)


def test_its_gradient_is_that_of_the_answer_inside_the_cells_alone(clean):
    low, quantised, steps = (part[None] for part in layer.compress(clean, 20))
    weights = torch.randn(low.shape)
    for noise, inside in ((1e-6, True), (10.0, False)):
        answer = (low + noise * torch.randn(low.shape)).requires_grad_()
        (weights * layer.project(answer, quantised, steps)).sum().backward()
        near = (answer.grad - weights).norm() / weights.norm()
        assert near < 0.5 if inside else near > 0.9


def test_networks_with_and_without_the_layer_begin_alike_and_part():
    pictures = Pictures(sample_set("train"))
    sampler = PatchSampler(pictures, Task("car", 5, 95), 16, 2)
    args = argparse.Namespace(init=None, seed=0, steps=6, lr=1e-3)
    one, same, other = (layer.train(sampler, args, first) for first in (1.0, 1.0, 0.5))
    weights = [network.state_dict() for network in (one, same, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
