"""HAN: the published size, the function written straight, and what its attentions read."""

from dataclasses import replace

import pytest
import torch
from published import han

from acla.config import ModelConfig, Task, model_preset
from acla.models.factory import build_network
from acla.models.han import ChannelSpatialAttention, LayerAttention
from acla.models.serialization import load_model, save_model
from kernels import to_rows

SMALL = ModelConfig("han", blocks=2, width=8, group_blocks=2, reduction=4, keys=4, positions=(1, 2))
PLAIN = replace(SMALL, attention="none", keys=0, positions=())


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


@pytest.mark.parametrize(("scale", "params"), [(2, 15_924_057), (3, 16_108_697), (4, 16_071_769)])
def test_parameters_are_the_published(scale, params):
    found = parameters(model_preset("paper", Task("sr", scale), "han"))
    rcan = parameters(model_preset("paper", Task("sr", scale), "rcan"))
    c, layers = 64, 11
    assert found == params == rcan + (9 * layers * c * c + c) + (18 * c * c + c) + (27 + 1 + 1) + 1


def test_fields_drive_the_size():
    config = model_preset("tiny", Task("car"), "han")
    assert (config.blocks, config.group_blocks, config.width) == (10, 2, 16)
    for change in ({}, {"blocks": 3}, {"width": 12}, {"group_blocks": 1}, {"reduction": 4}):
        changed = replace(config, **change)
        rcan = parameters(replace(changed, backbone="rcan"))
        c, layers = changed.width, changed.blocks + 1
        more = (9 * layers * c * c + c) + (18 * c * c + c) + 30
        assert parameters(changed) == rcan + more


@pytest.mark.parametrize(("channels", "scale"), [(1, 1), (3, 1), (1, 2), (3, 3), (3, 4)])
@pytest.mark.parametrize(("H", "W"), [(1, 1), (5, 9), (8, 3)])
def test_any_picture_goes_through(channels, scale, H, W):
    net = build_network(replace(SMALL, channels=channels, scale=scale))
    pictures = torch.rand(2, channels, H, W)
    restored = net(pictures)
    assert restored.shape == (2, channels, H * scale, W * scale)
    assert restored.isfinite().all()
    if scale == 1:
        assert torch.equal(restored, pictures)  # starts as the identity


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_function_written_straight(scale):
    net = random_network(replace(PLAIN, scale=scale))
    tensors = net.state_dict()
    tensors["csa.conv.weight"] = tensors.pop("csa.kernel")[None, None]
    tensors["csa.conv.bias"] = tensors.pop("csa.bias")
    pictures = torch.rand(2, 3, 7, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(pictures), han(tensors, pictures, scale, levels=255))


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


@pytest.mark.parametrize("attention", ["cla", "acla"])
def test_inserting_modules_leaves_a_network_unchanged(attention):
    plain = random_network(replace(PLAIN, scale=2)).float()
    inserted = build_network(replace(SMALL, attention=attention, scale=2)).eval()
    missing, unexpected = inserted.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert all(name.startswith("attention.") for name in missing)
    pictures = torch.rand(1, 3, 7, 6)
    torch.testing.assert_close(inserted(pictures), plain(pictures), rtol=0, atol=0)


def test_every_parameter_learns():
    net = random_network(replace(SMALL, scale=2)).train()
    pictures = torch.rand(2, 3, 6, 5, dtype=torch.float64)
    net(pictures, torch.tensor([1, 2])).square().sum().backward()
    fixed = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert fixed == ["sub_mean.weight", "sub_mean.bias", "add_mean.weight", "add_mean.bias"]


@pytest.mark.parametrize("scale", [1, 3])
def test_a_file_rebuilds_the_network(tmp_path, scale):
    net = random_network(replace(SMALL, scale=scale)).float()
    path = tmp_path / "model.safetensors"
    task = Task("sr", 3) if scale == 3 else Task("demosaic", 0)
    save_model(path, net, net.config, task, {})
    found = load_model(path)
    assert found.config == net.config
    pictures = torch.rand(1, 3, 7, 4)
    with torch.no_grad():
        assert torch.equal(found.model(pictures), net(pictures))
