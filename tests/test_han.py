"""HAN: its size from the fields, its two attentions and what they read. That it computes the
published function is in test_checkpoint."""

from dataclasses import replace

import torch

from acla.config import ModelConfig, Task, model_preset
from acla.kernels import to_rows
from acla.models.factory import build_network
from acla.models.han import ChannelSpatialAttention, LayerAttention

SMALL = ModelConfig("han", blocks=2, width=8, group_blocks=2, reduction=4, keys=4, positions=(1, 2))


def random_network(config):
    """Features so small that LAM's shares of layers lie between 0 and 1, and both gammas not 0."""
    net = build_network(config).double().eval()
    torch.manual_seed(1)
    for name, parameter in net.named_parameters():
        if "mean" not in name:
            small = name.startswith(("head.", "body.")) and name.endswith("bias")
            wide = name.startswith(("last", "tail", "csa", "la"))
            std = 1e-3 if small or name == "head.0.weight" else 0.5 if wide else 0.1
            torch.nn.init.normal_(parameter, std=std)
        if name.endswith("conv_du.0.bias"):
            torch.nn.init.ones_(parameter)  # so that no ReLU is shut
    return net


def parameters(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_network(config).parameters())


def test_fields_drive_the_size():
    config = model_preset("tiny", Task("car"), "han")
    assert (config.blocks, config.group_blocks, config.width) == (10, 2, 16)
    for change in ({}, {"blocks": 3}, {"width": 12}, {"group_blocks": 1}, {"reduction": 4}):
        changed = replace(config, **change)
        rcan = parameters(replace(changed, backbone="rcan"))
        c, layers = changed.width, changed.blocks + 1
        more = (9 * layers * c * c + c) + (18 * c * c + c) + 30
        assert parameters(changed) == rcan + more


def test_layer_attention_shares_out_among_layers():
    attention = LayerAttention()
    torch.nn.init.ones_(attention.gamma)
    # In 0..255 the two layers agree by ln 2 with themselves and by 0 with each other.
    size = torch.tensor(2.0).log().sqrt() / 255
    layers = torch.zeros(1, 2, 3, 1, 1)
    layers[0, 0, 0], layers[0, 1, 2] = size, size
    expected = torch.tensor([[4 / 3, 0, 2 / 3], [2 / 3, 0, 4 / 3]]) * size
    torch.testing.assert_close(attention(layers).view(2, 3), expected.view(2, 3))


def test_fresh_attentions_change_nothing():
    layers = torch.rand(2, 3, 4, 5, 6)
    assert torch.equal(LayerAttention()(layers), layers)
    assert torch.equal(ChannelSpatialAttention()(layers[0]), layers[0])


def test_layer_attention_keeps_its_digits_in_mixed_precision():
    attention = LayerAttention()
    torch.nn.init.ones_(attention.gamma)
    layers = torch.rand(2, 4, 8, 9, 9)
    with torch.no_grad():
        full = attention(layers)
        for short in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", short):
                half = attention(layers)
            torch.testing.assert_close(half.float(), full, rtol=0.01, atol=0.01)


def test_layers_are_read_from_behind_the_attention():
    net = random_network(replace(SMALL, scale=2))
    read = []
    net.la.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    net.csa.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    pictures = torch.rand(1, 3, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        net(pictures)
        x = net.head(net.sub_mean(pictures))
        x1 = net.body[0](x)
        y1 = x1 + net.attention["1"](x1, [to_rows(x1)])[0]
        x2 = net.body[1](y1)
        y2 = x2 + net.attention["2"](x2, [to_rows(x1), to_rows(x2)])[0]
        deep = net.body[2](y2)
    found = {tensor.dim(): tensor for tensor in read}
    torch.testing.assert_close(found[5], torch.stack([deep, y2, y1], 1))
    torch.testing.assert_close(found[4], deep)
    assert not torch.allclose(y1, x1)
