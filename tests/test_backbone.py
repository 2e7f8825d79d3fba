"""All backbones with every attention: published sizes, odd pictures, what a module reads, and
learning."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from acla.config import (
    ATTENTIONS,
    BACKBONES,
    PAPER_POSITIONS,
    ModelConfig,
    Task,
    model_preset,
)
from acla.kernels import to_rows
from acla.models.backbones import Backbone
from acla.models.factory import build_network, describe

SMALL = ModelConfig(blocks=4, width=8, group_blocks=2, reduction=4, keys=4, positions=(1, 3, 4))


def paper(task: Task, backbone: str = "edsr", **changes) -> ModelConfig:
    return replace(model_preset("paper", task, backbone), **changes)


@pytest.mark.parametrize(
    ("config", "params"),
    [
        pytest.param(paper(Task("sr", 2)), 40_729_627, id="edsr-x2"),
        pytest.param(paper(Task("sr", 2), "rcan"), 15_444_667, id="rcan-x2"),
        pytest.param(paper(Task("sr", 2), "han"), 15_924_057, id="han-x2"),
        pytest.param(paper(Task("sr", 3), "han"), 16_108_697, id="han-x3"),
        pytest.param(paper(Task("sr", 4), "han"), 16_071_769, id="han-x4"),
        pytest.param(paper(Task("sr", 2), "a2n"), 1_036_443, id="a2n-x2"),
        pytest.param(paper(Task("sr", 3), "a2n"), 1_036_443, id="a2n-x3"),
        pytest.param(paper(Task("sr", 4), "a2n"), 1_047_459, id="a2n-x4"),
        pytest.param(paper(Task("sr", 2), "a2n-m"), 831_643, id="a2n-m-x2"),
        pytest.param(paper(Task("sr", 4), "a2n-m"), 842_659, id="a2n-m-x4"),
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
def test_parameters_are_the_published(config, params):
    assert describe(config)["params"] == params


def test_multiply_adds_are_the_papers():
    assert describe(paper(Task("sr", 2)))["macs_48x48"] == pytest.approx(93.97e9, rel=0.002)


def test_described_attention_is_counted_once_a_pair():
    size = describe(paper(Task("sr", 2), positions=(3, 12, 26, 31, 32)))
    n, c, k = 48 * 48, 256, 16
    pair = n * c * (c + 1 + k + 3 * k) + 3 * c * n * k
    assert size["attention_macs_48x48"] == 15 * pair + 5 * n * c * c
    assert size["macs_48x48"] - size["attention_macs_48x48"] == pytest.approx(93.97e9, rel=0.002)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("channels", "scale"), [(1, 1), (3, 1), (1, 2), (3, 3), (3, 4)])
def test_pictures_of_any_size(backbone, channels, scale):
    net = build_network(replace(SMALL, backbone=backbone, channels=channels, scale=scale))
    for H, W in ((1, 1), (5, 9), (8, 3)):
        pictures = torch.rand(2, channels, H, W)
        restored = net(pictures)
        assert restored.shape == (2, channels, H * scale, W * scale)
        assert restored.isfinite().all()
        if scale == 1:
            assert torch.equal(restored, pictures)  # starts as the identity


@pytest.mark.parametrize(
    ("backbone", "attention"),
    [
        *(("edsr", attention) for attention in ATTENTIONS if attention != "none"),
        *((backbone, "acla") for backbone in BACKBONES if backbone != "edsr"),
        *(("rcan", attention) for attention in ("cla", "clnl", "mha", "se")),
    ],
)
def test_inserted_modules_start_as_the_identity_and_every_parameter_learns(backbone, attention):
    torch.manual_seed(0)
    keys = 3 if ATTENTIONS[attention].keys else 0
    changes = {"backbone": backbone, "attention": attention, "keys": keys, "scale": 2}
    net = build_network(replace(SMALL, **changes))
    plain = build_network(replace(net.config, attention="none", positions=(), keys=0))
    missing, unexpected = plain.load_state_dict(net.state_dict(), strict=False)
    assert missing == []
    assert all(name.startswith("attention.") for name in unexpected)
    pictures, seeds = torch.rand(2, 3, 7, 5), torch.tensor([1, 2])
    restored, kept = net.forward_with_counts(pictures, seeds)
    assert torch.equal(restored, plain(pictures)) == (attention not in ("se", "acla+se"))
    shapes = {position: tuple(count.shape) for position, count in kept.items()}
    assert shapes == {1: (2, 1), 3: (2, 2), 4: (2, 3)}
    net.double()
    for name, parameter in net.named_parameters():
        if name.startswith("attention."):
            torch.nn.init.normal_(parameter, std=0.3)
        if name.endswith(("squeeze.bias", "conv_du.0.bias", "gamma")):  # opens ReLUs, HAN's paths
            torch.nn.init.ones_(parameter)
        if name.endswith(("conv_du.0.weight", "ADM.0.weight")):  # factors between their ends
            parameter.data *= 0.01
        if name.endswith("ADM.0.weight"):  # one of its ReLUs is open
            parameter.data[1] = -parameter.data[0]
    net(pictures.double(), seeds).square().sum().backward()
    fixed = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(name.startswith(("sub_mean.", "add_mean.")) for name in fixed), fixed


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


def test_mixed_precision_stays_near():
    net = Backbone(replace(SMALL, scale=2)).eval()
    pictures = torch.rand(1, 3, 12, 12)
    with torch.no_grad():
        full = net(pictures)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(pictures)
    assert (half - full).abs().max() < 0.05 * full.abs().max()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_mixed_precision_takes_pictures_of_every_format(backbone):
    net, pictures = build_network(replace(SMALL, backbone=backbone)).eval(), torch.rand(1, 3, 6, 7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert net(pictures.bfloat16()).isfinite().all()
        double = net.double()(pictures.double())
    assert torch.equal(double, net(pictures.double()))


def test_hooks_on_attention_run_in_inference():
    net, seen = Backbone(SMALL).eval(), []
    with torch.no_grad():
        expected = net(torch.ones(1, 3, 6, 7))
        for module in net.attention.values():
            module.register_forward_hook(lambda module, given, result: seen.append(result[0]))
        torch.testing.assert_close(net(torch.ones(1, 3, 6, 7)), expected)
    assert len(seen) == len(SMALL.positions)


@pytest.mark.parametrize("backbone", ["edsr", "rcan", "a2n"])
def test_what_no_block_changes_keeps_its_digits_in_mixed_precision(backbone):
    net = build_network(replace(SMALL, backbone=backbone)).eval()
    for parameter in net.body[-1].parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.normal_(net.tail[-1].weight)
    pictures = torch.rand(1, 3, 7, 5)
    with torch.no_grad():
        full = net(pictures)
        with torch.autocast("cpu", torch.bfloat16):
            short = net(pictures)
    assert (full - pictures).abs().max() > 0.1
    assert torch.equal(short, full)


@pytest.mark.parametrize("backbone", BACKBONES)
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


class Launches(TorchDispatchMode):
    """Counts a GPU's launches on the meta device: one an operator that computes; two a convolution
    with a bias, which follows it, and `attend`: plan and aggregate. Convolutions leave channels
    last, as cuDNN's do."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        convolves = func is torch.ops.aten.convolution.default
        if not func.is_view and not func.name().startswith("aten::empty"):
            biased = convolves and args[2] is not None
            self.count += 1 + (biased or func is torch.ops.acla.attend.default)
        return torch.empty_like(out, memory_format=torch.channels_last) if convolves else out


def test_attention_adds_eight_launches_a_module():
    counted = []
    for kind in ({"attention": "none", "keys": 0}, {"positions": (2, 7, 10, 13, 14)}):
        config = ModelConfig(blocks=16, width=64, **kind)
        with torch.device("meta"), torch.no_grad():
            network, picture = build_network(config), torch.empty(1, 3, 48, 48)
            network(picture)  # derives weights
            with Launches() as launches:
                network(picture)
        counted.append(launches.count)
    assert counted == [107, 147]  # one makes the picture channels last
