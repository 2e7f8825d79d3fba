"""CLA and ACLA modules against the paper's formulas, written out another way."""

import functools

import pytest
import torch
from torch.nn import functional as F

from acla.kernels import binary_gate, logistic_noise, runs_whole, to_rows, why_not
from acla.models import attention
from acla.models.attention import CrossLayerAttention, pointwise, rings


def random_module(width, layers, keys, masked, seed=0):
    """A module whose every parameter is random, so that nothing hides behind a zero."""
    torch.manual_seed(seed)
    module = CrossLayerAttention(width, layers, keys, masked).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return module


def by_hand(module, maps, gates, noise):
    """Eq. 6, 7, 9 and 11 on whole maps [B,C,H,W]: g before the sampling, the mask unit on the
    sampled feature, and grid_sample for the sampling. The query is the last map."""
    B, _, H, W = maps[-1].shape
    L, K = module.layers, module.keys
    weight, bias = module.points.weight, module.points.bias
    points = F.conv2d(maps[-1], weight[..., None, None], bias).view(B, L, 3, K, H, W)
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    total = 0
    for l in range(L):
        f = points[:, l, 2].softmax(1)
        value = F.conv2d(maps[l], module.value[l, :, :, None, None], module.value_bias[l])
        for k in range(K):
            py, px = y + points[:, l, 0, k], x + points[:, l, 1, k]
            grid = torch.stack([(2 * px + 1) / W - 1, (2 * py + 1) / H - 1], -1)
            sampled = F.grid_sample(value, grid, align_corners=False)
            m = 1.0
            if module.mask is not None:
                key = F.grid_sample(maps[l], grid, align_corners=False)
                beta = torch.einsum("bchw,c->bhw", key, module.mask[l, k]) + module.mask_bias[l, k]
                m = binary_gate(beta, noise[:, :, :, l, k], 1.0)[:, None]
            total = total + gates[l] * m * f[:, k : k + 1] * sampled
    return F.conv2d(total, module.output.weight[..., None, None], module.output.bias)


@pytest.mark.parametrize("masked", [False, True], ids=["cla", "acla"])
@pytest.mark.parametrize(
    ("B", "C", "L", "K", "H", "W"),
    [
        pytest.param(1, 1, 1, 1, 1, 1, id="one-of-everything"),
        pytest.param(2, 3, 2, 5, 4, 7, id="rectangle-odd-keys"),
        pytest.param(1, 4, 3, 16, 6, 2, id="narrow-more-keys-than-columns"),
    ],
)
def test_the_module_is_the_papers_formula(masked, B, C, L, K, H, W):
    module = random_module(C, L, K, masked)
    maps = [torch.randn(B, C, H, W, dtype=torch.float64, requires_grad=True) for _ in range(L)]
    gates = torch.ones(L, dtype=torch.float64, requires_grad=True)
    seeds = torch.arange(B) + 5
    noise = logistic_noise(seeds, H * W * L * K).view(B, H, W, L, K).double()
    z, kept = module(maps[-1], [to_rows(m) for m in maps], gates, seeds)
    expected = by_hand(module, maps, gates, noise)
    torch.testing.assert_close(z, expected)
    assert kept.shape == (B, L)
    assert (kept <= H * W * K).all()
    along = torch.randn_like(z)
    inputs = [*maps, gates, *module.parameters()]
    ours = torch.autograd.grad((z * along).sum(), inputs, allow_unused=True)
    theirs = torch.autograd.grad((expected * along).sum(), inputs, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("C", "L", "K"), [(1, 1, 1), (8, 3, 16), (64, 5, 8)])
def test_parameters_are_those_of_the_formula(C, L, K):
    cla = L * (C * 2 * K + 2 * K + C * K + K + C * C + C) + C * C + C
    counted = [
        sum(p.numel() for p in CrossLayerAttention(C, L, K, masked).parameters())
        for masked in (False, True)
    ]
    assert counted == [cla, cla + L * (C * K + K)]


def test_cla_is_acla_with_every_mask_open():
    acla = random_module(6, 2, 4, masked=True)
    with torch.no_grad():
        acla.mask.zero_()
        acla.mask_bias.fill_(50.0)
    cla = CrossLayerAttention(6, 2, 4, masked=False).double()
    cla.load_state_dict({k: v for k, v in acla.state_dict().items() if "mask" not in k})
    maps = [torch.randn(1, 6, 5, 4, dtype=torch.float64) for _ in range(2)]
    rows = [to_rows(m) for m in maps]
    torch.testing.assert_close(acla(maps[1], rows)[0], cla(maps[1], rows)[0])


def test_a_fresh_module_adds_nothing_but_learns():
    module = CrossLayerAttention(8, 2, 16, masked=True)
    maps = [torch.randn(2, 8, 9, 5) for _ in range(2)]
    z, kept = module(maps[1], [to_rows(m) for m in maps])
    assert torch.count_nonzero(z) == 0
    assert (kept == 9 * 5 * 16).all()  # mask logits start positive
    z.square().sum().add(z.sum()).backward()
    assert torch.count_nonzero(module.output.weight.grad) > 0


def test_the_first_offsets_are_spread_over_rings():
    offsets = rings(16, 2.0)
    assert offsets.shape == (2, 16)
    radius = offsets.norm(dim=0)
    torch.testing.assert_close(radius, torch.tensor([2.0] * 8 + [4.0] * 8))
    apart = torch.cdist(offsets.T, offsets.T) + 9 * torch.eye(16)
    assert apart.min() > 1
    for keys in (1, 2, 5, 11):
        assert rings(keys, 2.0).isfinite().all()


def test_without_gradients_h_is_folded_into_g():
    module = random_module(6, 3, 4, masked=True)
    maps = [torch.randn(2, 6, 5, 4, dtype=torch.float64) for _ in range(3)]
    rows = [to_rows(m) for m in maps]
    z, kept = module(maps[2], rows)
    with torch.no_grad():
        folded, folded_kept = module(maps[2], rows)
    torch.testing.assert_close(folded, z.detach())
    assert torch.equal(folded_kept, kept)


@pytest.mark.skipif(bool(why_not("cpp", torch.zeros(1))), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("B", "C", "L", "K", "H", "W"),
    [
        pytest.param(1, 2, 1, 1, 1, 1, id="one-of-everything"),
        pytest.param(2, 14, 3, 5, 9, 17, id="no-multiple-of-a-vector"),
        pytest.param(2, 42, 2, 17, 5, 11, id="a-vector-and-some"),
        pytest.param(1, 64, 2, 16, 10, 8, id="whole-vectors"),
        pytest.param(1, 288, 1, 9, 3, 4, id="more-than-the-registers"),
    ],
)
@pytest.mark.parametrize("masks", ["none", "open", "mixed"])
def test_a_module_in_one_pass_is_its_parts_in_turn(masks, B, C, L, K, H, W, dtype):
    module = random_module(C, L, K, masked=masks != "none")
    if masks == "open":
        torch.nn.init.constant_(module.mask_bias, 1e3)
    if masks == "mixed":  # far from 0, where no rounding decides
        module.mask.data.mul_(0.5 / module.mask.data.abs().sum(-1, keepdim=True) / 5)
        module.mask_bias.data.copy_(1.0 - 2 * (torch.arange(L * K).view(L, K) % 3 == 1))
    maps = [torch.randn(B, C, H, W).clamp(-5, 5).to(dtype).double() for _ in range(L)]
    rows = [to_rows(m) for m in maps]
    with torch.no_grad():
        expected = maps[-1] + module(maps[-1], rows)[0]
        query, rows = maps[-1].to(dtype), [one.to(dtype) for one in rows]
        assert runs_whole(query, rows)
        whole = module.to(torch.float32 if dtype == torch.bfloat16 else dtype).whole(query, rows)
    assert whole.dtype == dtype
    tolerance = 16 if dtype == torch.bfloat16 else 1e4
    tolerance *= torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(whole.double(), expected, rtol=0, atol=tolerance)


def test_modules_are_computed_part_by_part_where_one_pass_cannot_be(monkeypatch):
    query = torch.randn(1, 2, 3, 3)
    assert not runs_whole(query, [query])  # gradients are recorded
    with torch.no_grad():
        assert not runs_whole(query.bfloat16(), [query])
        assert not runs_whole(*2 * (query[:, :, :, :1].bfloat16(),))  # an odd number of channels
        assert not runs_whole(query.half(), [query.half()])
        monkeypatch.setenv("ACLA_BACKEND", "torch")
        assert not runs_whole(query, [query])


def test_the_folded_weights_follow_every_change_of_the_module():
    module = random_module(6, 2, 4, masked=True)
    maps = [torch.randn(1, 6, 5, 4, dtype=torch.float64) for _ in range(2)]

    def check():
        rows = [to_rows(m) for m in maps]
        z, _ = module(maps[1], rows)
        for _ in range(2):  # folded, then kept
            with torch.no_grad():
                torch.testing.assert_close(module(maps[1], rows)[0], z.detach())

    check()
    module(maps[1], [to_rows(m) for m in maps])[0].sum().backward()
    for optimizer in (torch.optim.SGD, functools.partial(torch.optim.Adam, fused=True)):
        optimizer(module.train().parameters(), lr=0.1).step()
        module.eval()
        check()
    module.load_state_dict(random_module(6, 2, 4, masked=True, seed=1).state_dict())
    check()
    module, maps = module.float(), [m.float() for m in maps]
    check()


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


def test_on_gpus_a_large_pointwise_convolution_is_one_but_in_full_a_product(monkeypatch):
    rows, weight, bias = torch.randn(2, 5, 4, 6), torch.randn(3, 6), torch.randn(3)
    expected, taken = F.linear(rows, weight, bias), []
    for name in ("conv2d", "linear"):
        function = getattr(F, name)
        noted = lambda *args, n=name, f=function: taken.append(n) or f(*args)  # noqa: E731
        monkeypatch.setattr(F, name, noted)
    for large, full in ((720, False), (721, False), (720, True)):
        monkeypatch.setattr(attention, "LARGE_PRODUCT", large)  # 2·5·4·6·3 multiply-adds
        found = pointwise(rows.as_subclass(OnGpu), weight, bias, full=full)
        torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)
    assert taken == ["conv2d", "linear", "linear"]


@pytest.mark.parametrize("learns", [True, False])
def test_points_and_masks_are_computed_in_full(monkeypatch, learns):
    module = random_module(4, 2, 3, masked=True)
    maps = [torch.randn(1, 4, 5, 6, dtype=torch.float64) for _ in range(2)]
    full = []

    def noted(rows, weight, bias=None, **options):
        full.append((len(weight), options.get("full", False)))
        return pointwise(rows, weight, bias, **options)

    monkeypatch.setattr(attention, "pointwise", noted)
    with torch.set_grad_enabled(learns):
        module(maps[1], [to_rows(m) for m in maps])
    masks, points, products = [(3, True)] * 2, [(18, True)], [(4, False)] * (2 if learns else 1)
    assert full == [*points, *masks, *products]


def test_selected_layers_give_what_shut_gates_give():
    module = random_module(5, 4, 3, masked=True)
    maps = [torch.randn(2, 5, 6, 3, dtype=torch.float64) for _ in range(4)]
    rows = [to_rows(m) for m in maps]
    gates = torch.tensor([0, 1, 0, 1], dtype=torch.float64)
    small = CrossLayerAttention(5, 2, 3, masked=True).double()
    small.load_state_dict(module.select([1, 3]))
    ours, kept = small(maps[3], [rows[1], rows[3]])
    full, all_kept = module(maps[3], rows, gates)
    torch.testing.assert_close(ours, full)
    assert torch.equal(kept, all_kept[:, [1, 3]])
