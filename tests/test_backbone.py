"""EDSR and RCAN: the paper's sizes, what an inserted module sees, and odd pictures."""

from dataclasses import replace

import pytest
import torch

from acla.config import PAPER_POSITIONS, ModelConfig, Task, model_preset
from acla.models.backbones import Backbone
from acla.models.factory import build_network, describe
from kernels import to_rows

SMALL = ModelConfig(blocks=4, width=8, group_blocks=2, reduction=4, keys=4, positions=(1, 3, 4))


def paper(task: Task, backbone: str = "edsr", **changes) -> ModelConfig:
    return replace(model_preset("paper", task, backbone), **changes)


@pytest.mark.parametrize(
    ("config", "params"),
    [
        pytest.param(paper(Task("sr", 2)), 40_729_627, id="edsr-x2"),
        pytest.param(paper(Task("sr", 2), "rcan"), 15_444_667, id="rcan-x2"),
        pytest.param(
            paper(Task("sr", 2), positions=(3, 12, 26, 31, 32)), 42_292_187, id="edsr-acla-42.29M"
        ),
        pytest.param(
            paper(Task("sr", 2), positions=(3, 12, 26, 31, 32), attention="cla", keys=8),
            42_137_987,
            id="edsr-cla-42.13M",
        ),
        pytest.param(paper(Task("denoise", 30)), 4_877_327, id="16-blocks-4.88M"),
    ],
)
def test_parameters_are_the_papers(config, params):
    assert describe(config)["params"] == params


def test_multiply_adds_are_the_papers():
    assert describe(paper(Task("sr", 2)))["macs_48x48"] == pytest.approx(93.97e9, rel=0.002)


def test_described_attention_is_counted_once_a_pair():
    size = describe(paper(Task("sr", 2), positions=(3, 12, 26, 31, 32)))
    n, c, k = 48 * 48, 256, 16
    pair = n * c * (c + 1 + k + 3 * k) + 3 * c * n * k
    assert size["attention_macs_48x48"] == 15 * pair + 5 * n * c * c
    assert size["macs_48x48"] - size["attention_macs_48x48"] == pytest.approx(93.97e9, rel=0.002)


@pytest.mark.parametrize("backbone", ["edsr", "rcan"])
@pytest.mark.parametrize(("channels", "scale"), [(1, 1), (3, 1), (1, 2), (3, 3), (3, 4)])
@pytest.mark.parametrize(("H", "W"), [(1, 1), (5, 9), (8, 3)])
def test_any_picture_goes_through(backbone, channels, scale, H, W):
    net = Backbone(replace(SMALL, backbone=backbone, channels=channels, scale=scale))
    pictures = torch.rand(2, channels, H, W)
    restored = net(pictures)
    assert restored.shape == (2, channels, H * scale, W * scale)
    assert restored.isfinite().all()
    if scale == 1:
        assert torch.equal(restored, pictures)  # starts as the identity


@pytest.mark.parametrize("backbone", ["edsr", "rcan"])
@pytest.mark.parametrize("attention", ["cla", "acla"])
def test_inserting_modules_leaves_a_network_unchanged(backbone, attention):
    plain = Backbone(
        replace(SMALL, backbone=backbone, attention="none", positions=(), scale=2)
    ).eval()
    torch.nn.init.normal_(plain.tail[-1].weight)
    inserted = Backbone(replace(SMALL, backbone=backbone, attention=attention, scale=2)).eval()
    missing, unexpected = inserted.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert all(name.startswith("attention.") for name in missing)
    pictures = torch.rand(1, 3, 7, 6)
    torch.testing.assert_close(inserted(pictures), plain(pictures), rtol=0, atol=0)


@pytest.mark.parametrize("backbone", ["edsr", "rcan"])
def test_a_module_reads_features_from_before_the_attention_behind_them(backbone):
    net = Backbone(replace(SMALL, backbone=backbone, scale=2)).double()
    for parameter in net.attention.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pictures = torch.rand(1, 3, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        *blocks, last = net.body
        x = net.head(net.sub_mean(pictures))
        x1 = blocks[0](x)
        y = x1 + net.attention["1"](x1, [to_rows(x1)])[0]
        x3 = blocks[2](blocks[1](y))
        y = x3 + net.attention["3"](x3, [to_rows(x1), to_rows(x3)])[0]
        x4 = blocks[3](y)
        y = x4 + net.attention["4"](x4, [to_rows(x1), to_rows(x3), to_rows(x4)])[0]
        expected = net.add_mean(net.tail(last(y) + x))
        torch.testing.assert_close(net(pictures), expected)


def test_seeds_draw_the_masks_of_each_picture_by_itself():
    net = Backbone(SMALL)
    for parameter in [*net.attention.parameters(), *net.tail.parameters()]:
        torch.nn.init.normal_(parameter, std=0.2)
    pictures, seeds = torch.rand(3, 3, 6, 5), torch.tensor([4, 5, 6])
    with torch.no_grad():
        together = net(pictures, seeds)
        torch.testing.assert_close(together[1:2], net(pictures[1:2], seeds[1:2]))
        assert not torch.allclose(together, net(pictures, seeds + 1))
        assert not torch.allclose(together, net(pictures))


def test_each_module_draws_noise_of_its_own():
    net, drawn = Backbone(SMALL), []
    for module in net.attention.values():
        module.register_forward_hook(lambda module, given, result: drawn.append(given[3].tolist()))
    net(torch.rand(2, 3, 6, 5), torch.tensor([4, 5]))
    assert len({seed for seeds in drawn for seed in seeds}) == 6


def test_every_parameter_learns():
    net = Backbone(replace(SMALL, scale=2))
    for parameter in net.attention.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    net(torch.rand(2, 3, 6, 5), torch.tensor([1, 2])).square().sum().backward()
    fixed = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert fixed == ["sub_mean.weight", "sub_mean.bias", "add_mean.weight", "add_mean.bias"]


def test_mixed_precision_stays_near():
    net = Backbone(replace(SMALL, scale=2)).eval()
    pictures = torch.rand(1, 3, 12, 12)
    with torch.no_grad():
        full = net(pictures)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(pictures)
    assert (half - full).abs().max() < 0.05 * full.abs().max()


@pytest.mark.parametrize("backbone", ["edsr", "rcan", "han", "a2n"])
def test_the_mean_colour_keeps_its_digits_in_mixed_precision(backbone):
    net = build_network(replace(SMALL, backbone=backbone, scale=2)).eval()
    for parameter in net.tail.parameters():
        torch.nn.init.zeros_(parameter)
    pictures = torch.rand(1, 3, 4, 4).expand(1, 3, 4, 4)
    with torch.no_grad():
        full = net(pictures)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(pictures)
    assert half.dtype == torch.float32
    assert torch.equal(half, full)


def test_table_9_has_a_network_for_every_row():
    for (name, backbone), positions in PAPER_POSITIONS.items():
        task = Task(name, {"sr": 2, "denoise": 30, "car": 10, "demosaic": 0}[name])
        assert describe(paper(task, backbone, positions=positions))["params"] > 4_000_000
