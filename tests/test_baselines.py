"""The baseline attentions against the papers' formulas, written as loops; memory and precision."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import train
from acla.config import ATTENTIONS, ModelConfig
from acla.kernels import to_rows
from acla.kernels.timing import allocations
from acla.models import baselines
from acla.models.attention import CrossLayerAttention
from acla.models.backbones import Backbone, build_module
from acla.models.baselines import MultiHeadAttention, NonLocal, SqueezedAttention, SqueezeExcitation

SMALL = ModelConfig(blocks=5, width=8, group_blocks=1, reduction=4, channels=3)
AWKWARD = [
    pytest.param(1, 1, id="one-pixel"),
    pytest.param(1, 4, id="one-line"),
    pytest.param(3, 2, id="rectangle"),
]


def random_module(module, seed=0, std=0.6):
    """The module in double precision with every parameter random: nothing hides behind a zero."""
    torch.manual_seed(seed)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=std)
    return module


def random_maps(layers, shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(layers)
    ]


def make(name, width, layers):
    """The module of an attention as a network builds it, without masks, which gradcheck cannot
    follow."""
    if name == "acla+se":
        return SqueezedAttention(width, layers, 2, False)
    return build_module(config(name, width=width), layers)


def config(attention, **changes):
    keys = 3 if ATTENTIONS[attention].keys else 0
    return replace(SMALL, attention=attention, keys=keys, **changes)


# The formulas


@pytest.mark.parametrize("name", ["nl", "clnl", "mha", "se", "acla+se"])
@pytest.mark.parametrize(("H", "W"), AWKWARD)
def test_gradients_are_those_of_finite_differences(name, H, W, monkeypatch):
    monkeypatch.setattr(baselines, "RADIUS", 1)  # less than a side: offsets are clipped
    module = random_module(make(name, 4, 2))
    names, parameters = zip(*module.named_parameters(), strict=True)
    query, *maps = random_maps(3, (2, 4, H, W))

    def increment(query, first, second, *parameters):
        given = query, [to_rows(first), to_rows(second)]
        return functional_call(module, dict(zip(names, parameters, strict=True)), given)[0]

    assert torch.autograd.gradcheck(increment, (query, *maps, *parameters))


def non_local_by_hand(module, query, maps, gates):
    """Eq. 3 and 2 by the affinity of every query with every key of every layer; Eq. 1 with one."""
    B, C, H, W = query.shape
    flat = [m.flatten(2).permute(0, 2, 1) for m in (query, *maps)]
    rows = []
    for b in range(B):
        for i in range(H * W):
            theta = module.theta(flat[0][b, i])
            total, normaliser = 0, 0
            for l, layer in enumerate(flat[1:]):
                for n in range(H * W):
                    phi, g = module.referred[l](layer[b, n]).chunk(2)
                    affinity = gates[l] * torch.exp(theta @ phi)
                    total, normaliser = total + affinity * g, normaliser + affinity
            rows.append(module.output(total / normaliser))
    out = torch.stack(rows).view(B, H * W, C)
    return out.permute(0, 2, 1).reshape(B, C, H, W)


def assert_same_gradients(ours, theirs, inputs):
    along = torch.randn_like(ours)
    ours = torch.autograd.grad((ours * along).sum(), inputs, allow_unused=True)
    theirs = torch.autograd.grad((theirs * along).sum(), inputs, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):  # None where a layer was left out
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


@pytest.mark.parametrize(("H", "W"), AWKWARD)
def test_nl_is_equation_1(H, W):
    module = random_module(NonLocal(5, 1))
    first, own = random_maps(2, (2, 5, H, W))
    z, kept = module(own, [to_rows(first), to_rows(own)])
    expected = non_local_by_hand(module, own, [own], torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(z, expected)
    assert_same_gradients(z, expected, [own, *module.parameters()])
    assert kept.tolist() == [[0, (H * W) ** 2]] * 2


@pytest.mark.parametrize("gates", [(1, 1, 1), (0, 1, 1), (0, 0, 1), (1, 0, 1)])
@pytest.mark.parametrize("learned", [False, True], ids=["gates-given", "gates-learned"])
def test_clnl_is_equation_3_and_honours_gates(gates, learned):
    module = random_module(NonLocal(4, 3))
    maps = random_maps(3, (1, 4, 2, 3))
    rows = [to_rows(m) for m in maps]
    s = torch.tensor(gates, dtype=torch.float64, requires_grad=learned)
    z, kept = module(maps[-1], rows, s)
    expected = non_local_by_hand(module, maps[-1], maps, s)
    torch.testing.assert_close(z, expected)
    assert_same_gradients(z, expected, [*maps, *module.parameters(), *([s] if learned else [])])
    read = [36.0 * (learned or s) for s in gates]  # a shut gate that learns is read too
    assert kept.tolist() == [read]


def test_se_by_hand():
    module = random_module(SqueezeExcitation(20))
    (x,) = random_maps(1, (2, 20, 3, 5))
    z, kept = module(x, [to_rows(x)] * 3)
    mean = x.sum((2, 3)) / 15
    inner = (mean @ module.squeeze.weight.T + module.squeeze.bias).clamp(min=0)
    s = 1 / (1 + torch.exp(-(inner @ module.excite.weight.T + module.excite.bias)))
    torch.testing.assert_close(x + z, torch.einsum("bc,bchw->bchw", s, x))
    assert module.squeeze.weight.shape == (1, 20)
    assert kept.tolist() == [[0, 0, 0]] * 2


def test_acla_then_se_by_hand():
    module = random_module(SqueezedAttention(8, 2, 3, True))
    acla = CrossLayerAttention(8, 2, 3, True).double()
    state = module.state_dict()
    acla.load_state_dict({n: t for n, t in state.items() if not n.startswith("excitation")})
    maps, seeds = random_maps(2, (2, 8, 5, 4)), torch.tensor([3, 4])
    rows, gates = [to_rows(m) for m in maps], torch.tensor([0.0, 1.0], dtype=torch.float64)
    added, kept = acla(maps[1], rows, gates, seeds)
    y = maps[1] + added
    s = F.linear(
        y.mean((2, 3)), state["excitation.squeeze.weight"], state["excitation.squeeze.bias"]
    )
    s = F.linear(s.relu(), state["excitation.excite.weight"], state["excitation.excite.bias"])
    z, counted = module(maps[1], rows, gates, seeds)
    torch.testing.assert_close(maps[1] + z, y * s.sigmoid()[..., None, None])
    assert torch.equal(counted, kept)


@pytest.mark.parametrize(("width", "heads"), [(1, 1), (6, 2), (8, 8), (24, 8)])
def test_mha_without_positions_is_torchs(width, heads):
    module = random_module(MultiHeadAttention(width, heads))
    nn.init.zeros_(module.vertical)
    nn.init.zeros_(module.horizontal)
    theirs = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(module.project.weight)
        theirs.in_proj_bias.copy_(module.project.bias)
        theirs.out_proj.load_state_dict(module.output.state_dict())
    (x,) = random_maps(1, (2, width, 4, 3))
    flat = x.flatten(2).permute(0, 2, 1)
    z, kept = module(x, [to_rows(x)] * 2)
    expected = theirs(flat, flat, flat, need_weights=False)[0].permute(0, 2, 1).view_as(z)
    torch.testing.assert_close(z, expected)
    assert_same_gradients(z, expected, [x])
    assert kept.tolist() == [[0, 144]] * 2


def test_heads_have_sixteen_channels_or_more():
    widths = (1, 8, 31, 32, 40, 64, 128, 256, 252)
    assert [MultiHeadAttention(width).heads for width in widths] == [1, 1, 1, 2, 2, 4, 8, 8, 4]


@pytest.mark.parametrize(("H", "W"), [*AWKWARD, pytest.param(7, 2, id="farther-than-the-radius")])
def test_mha_with_positions_is_bello_et_al(H, W, monkeypatch):
    monkeypatch.setattr(baselines, "RADIUS", 2)
    module = random_module(MultiHeadAttention(6, heads=2))
    (x,) = random_maps(1, (1, 6, H, W))
    heads, d = 2, 3
    q, k, v = module.project(x[0].permute(1, 2, 0)).unflatten(-1, (3, heads, d)).unbind(2)
    places = [(y, x) for y in range(H) for x in range(W)]
    rows = []
    for py, px in places:
        of_heads = []
        for h in range(heads):
            logits = []
            for ny, nx in places:
                vertical = module.vertical[min(max(ny - py, -2), 2) + 2]
                horizontal = module.horizontal[min(max(nx - px, -2), 2) + 2]
                logits.append(q[py, px, h] @ (k[ny, nx, h] + vertical + horizontal) / math.sqrt(d))
            weights = torch.stack(logits).softmax(0)
            of_heads.append(sum(w * v[y, x, h] for w, (y, x) in zip(weights, places, strict=True)))
        rows.append(module.output(torch.cat(of_heads)))
    expected = torch.stack(rows).view(H, W, 6).permute(2, 0, 1)[None]
    z = module(x, [to_rows(x)])[0]
    torch.testing.assert_close(z, expected)
    assert_same_gradients(z, expected, [x, *module.parameters()])


# Memory and numbers


@pytest.mark.parametrize("limit", [2**24, 13 * 2 * 2 * 35, 1])  # all queries, thirteen, and one
def test_multi_head_attention_is_the_same_without_gradients(limit, monkeypatch):
    monkeypatch.setattr(baselines, "MAX_LOGITS", limit)
    module = random_module(MultiHeadAttention(32))
    (x,) = random_maps(1, (2, 32, 7, 5))
    expected = module(x, [to_rows(x)])[0]
    with torch.no_grad():
        torch.testing.assert_close(module(x, [to_rows(x)])[0], expected)


@pytest.mark.parametrize(
    ("name", "factor"), [("nl", 4), ("clnl", 4), ("clnl-learned", 4), ("mha", 8)]
)
def test_memory_grows_with_the_positions_not_their_square(name, factor):
    """N is 4 times as large, and N·(H + W) 8 times; N² logits would be 16 times as many."""
    peaks = []
    for side in (32, 64):
        module = build_module(config(name.removesuffix("-learned")), 2)
        maps = [torch.randn(1, 8, side, side, requires_grad=True) for _ in range(2)]
        gates = torch.ones(2, requires_grad=True) if name == "clnl-learned" else None

        def train_once(module=module, maps=maps, gates=gates):
            z = module(maps[1], [to_rows(m) for m in maps], gates)[0]
            (z + maps[1]).square().sum().backward()

        peaks.append(max(accumulate(allocations(train_once))))
    assert peaks[1] < 1.2 * factor * peaks[0]


@pytest.mark.parametrize("name", ["nl", "clnl", "mha"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_large_affinities_stay_finite(name, bf16):
    """exp of these logits would pass every number format."""
    module = random_module(build_module(config(name), 2)).float()
    maps = [100 * torch.randn(1, 8, 6, 5) for _ in range(2)]
    maps = [m.requires_grad_() for m in maps]
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        z = module(maps[1], [to_rows(m) for m in maps])[0]
        z.square().sum().backward()
    assert z.isfinite().all()
    assert z.abs().max() > 0
    assert all(m.grad is None or m.grad.isfinite().all() for m in maps)


@pytest.mark.parametrize("name", ["nl", "clnl", "mha", "se", "acla+se"])
def test_mixed_precision_and_strides_stay_near(name):
    module = random_module(build_module(config(name), 2), std=0.2).float()
    maps = [torch.randn(2, 8, 6, 5) for _ in range(2)]
    rows = [to_rows(m) for m in maps]
    exact = module(maps[1], rows)[0]
    strided = maps[1].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    spaced = [torch.stack([r, r], 3)[:, :, :, 0] for r in rows]
    torch.testing.assert_close(module(strided, spaced)[0], exact)
    with torch.autocast("cpu", torch.bfloat16):
        half = module(maps[1], rows)[0]
    assert (half - exact).abs().max() < 0.05 * exact.abs().max()


# In a network


@pytest.mark.parametrize("attention", ["acla", "acla+se", "nl", "clnl", "se", "mha"])
def test_recomputation_in_the_backward_pass_gives_the_same_gradients(attention):
    torch.manual_seed(1)
    net = Backbone(config(attention, positions=(2, 3))).double()
    for parameter in [*net.attention.parameters(), *net.tail.parameters()]:
        nn.init.normal_(parameter, std=0.3)
    pictures, seeds = torch.rand(1, 3, 4, 5, dtype=torch.float64), torch.tensor([9])
    results = []
    for limit in (math.inf, 0):
        net.sample_limit = limit
        net.zero_grad()
        net(pictures, seeds).square().sum().backward()
        results.append([p.grad.clone() for p in net.attention.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("searched", "plain"), [("cla-i", "cla"), ("cla-k", "acla")])
def test_cla_i_is_cla_and_cla_k_is_acla(searched, plain):
    ours, theirs = build_module(config(searched), 2), build_module(config(plain), 2)
    random_module(theirs)
    ours.double().load_state_dict(theirs.state_dict())
    maps, seeds = random_maps(2, (1, 8, 5, 6)), torch.tensor([5])
    rows = [to_rows(m) for m in maps]
    z, kept = ours(maps[1], rows, seeds=seeds)
    expected, expected_kept = theirs(maps[1], rows, seeds=seeds)
    assert torch.equal(z, expected)
    assert torch.equal(kept, expected_kept)
    assert (kept < 5 * 6 * 3).any() == (searched == "cla-k")


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_train_describes_every_attention(attention, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arch = ["--arch", "none"] if attention == "none" else ["--attention", attention]
    train.main(["--describe", "--device", "cpu", "--preset", "tiny", "--task", "sr", *arch])
    size = json.loads(capsys.readouterr().out)
    net = Backbone(ModelConfig(**{f: size[f] for f in vars(SMALL)} | {"positions": ()}))
    net = Backbone(replace(net.config, positions=tuple(size["positions"])))
    assert size["params"] == sum(p.numel() for p in net.parameters())
    assert size["attention_params"] == sum(p.numel() for p in net.attention.parameters())
    assert (size["attention_macs_48x48"] > 0) == (attention != "none")
    evenly = attention in ("cla", "cla-k", "nl", "clnl", "se", "mha")
    searched = [] if attention == "none" else [3, 12, 26, 31, 32]
    assert size["positions"] == ([8, 16, 24, 32] if evenly else searched)
