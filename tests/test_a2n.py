"""A2N and A2N-M: sizes from the fields, and the branch weights. That they compute the published
function is in test_checkpoint."""

import re
from dataclasses import replace

import pytest
import torch

from acla.config import ModelConfig, Task, model_preset
from acla.models.factory import build_network

SMALL = ModelConfig("a2n", blocks=2, width=8, reduction=4, keys=4, positions=(1, 2))


def random_network(**changes):
    net = build_network(replace(SMALL, **changes)).double().eval()
    torch.manual_seed(1)
    for name, parameter in net.named_parameters():
        factors = re.search(r"ADM\.0|(k2|2\.conv)\.weight", name)  # between their ends
        torch.nn.init.normal_(parameter, std=0.01 if factors else 5.0 if "ADM" in name else 0.2)
    return net


def parameters(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_network(config).parameters())


def counted(blocks, width, reduction, side, channels, scale):
    """Parameters, part by part."""
    c, u = width, 24
    block = 2 * c * c + 3 * 9 * c * c + (c * c + c) + side * side * c * c
    block += c * (c // reduction) + 2 * (c // reduction)
    total = (9 * channels * c + c) + blocks * block + (9 * c * c + c)
    for inputs in {1: [], 2: [c], 3: [c], 4: [c, u]}[scale]:
        total += (9 * inputs * u + u) + (u * u + u) + (9 * u * u + u)
    last = c if scale == 1 else u
    return total + 9 * last * channels + channels


@pytest.mark.parametrize("backbone", ["a2n", "a2n-m"])
@pytest.mark.parametrize("task", [Task("sr", 4), Task("denoise", 30), Task("car", 10)], ids=str)
def test_fields_drive_the_size(backbone, task):
    config = model_preset("tiny", task, backbone)
    assert (config.blocks, config.width, config.reduction) == (16, 16, 4)
    for change in ({}, {"blocks": 3}, {"width": 10}, {"reduction": 2}, {"reduction": 8}):
        c = replace(config, **change)
        side = 3 if backbone == "a2n" else 1
        params = counted(c.blocks, c.width, c.reduction, side, c.channels, c.scale)
        assert parameters(c) == params


def test_branch_weights_are_read_by_a_hook():
    net = random_network(scale=2)
    read = []
    for block in net.blocks:
        block.ADM.register_forward_hook(lambda module, given, weights: read.append(weights))
    with torch.no_grad():
        net(torch.rand(3, 3, 6, 5, dtype=torch.float64))
    assert [weights.shape for weights in read] == [(3, 2), (3, 2)]
    for weights in read:
        torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))
        assert len(weights.unique()) == 6  # each picture has its own


def test_fresh_branch_weights_tell_pictures_apart():
    torch.manual_seed(0)
    net, read = build_network(ModelConfig("a2n", width=40, reduction=4, scale=2)).eval(), []
    for block in net.blocks:
        block.ADM.register_forward_hook(lambda module, given, weights: read.append(weights[:, 0]))
    with torch.no_grad():
        net(torch.rand(12, 3, 1, 1).expand(-1, -1, 16, 16))
    assert torch.stack(read).std(1).min() > 1e-3


def test_each_branch_counts_as_its_weight_says():
    block = random_network().body[0]
    x = torch.rand(2, 8, 4, 5, dtype=torch.float64)
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    block.ADM.register_forward_hook(lambda module, given, found: weights)
    with torch.no_grad():
        whole = block(x)
        block.attention.k4.weight.zero_()
        unattended = block(x)
        block.non_attention.weight.zero_()
        empty = block(x)
    assert torch.equal(empty, x)
    assert torch.equal(unattended[0], x[0])
    assert torch.equal(unattended[1], whole[1])
    assert not torch.equal(whole, unattended)
