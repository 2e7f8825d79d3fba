"""The definition of the operator: its gradients, an independent formulation, its noise, its edges.

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels
"""

import math

import operator_cases
import pytest
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from acla.kernels import attend, logistic_noise, to_rows
from acla.kernels.reference import sample

SIZES = [  # B, H, W, L, K, C
    pytest.param((1, 1, 1, 1, 1, 1), id="one-pixel-one-of-everything"),
    pytest.param((2, 2, 3, 2, 2, 1), id="one-channel"),
    pytest.param((1, 3, 2, 1, 3, 2), id="one-layer-higher-than-wide"),
    pytest.param((1, 1, 4, 2, 1, 2), id="one-row-one-key"),
]


def reference(inputs: operator_cases.Inputs) -> tuple[Tensor, ...]:
    return tuple(inputs.attend("reference"))


# ---- gradients against differences


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("deviation", [1.0, 30.0], ids=["near", "far-outside"])
def test_gradients_are_those_of_the_results(size, deviation):
    inputs = operator_cases.make(size, deviation=deviation, masks=False, gates=[0.5] * size[3])
    gradcheck(inputs, list(inputs.leaves()))


@pytest.mark.parametrize("sign", [-1, 1], ids=["all-masked", "all-kept"])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_where_every_mask_is_certain(size, sign):
    inputs = operator_cases.make(size, mask_sign=sign, gates=[1.0] * size[3])
    inputs.mask_maps = [m * 1000 for m in inputs.mask_maps]  # where the sigmoid is flat
    gradcheck(inputs, list(inputs.leaves()))


def test_gradients_of_features_and_gates_use_the_hard_masks():
    inputs = operator_cases.make_clear((1, 3, 4, 2, 3, 2), around=1e-3, gates=[1.0, 0.0])
    gradcheck(inputs, ["features[0]", "features[1]", "gates"])


def gradcheck(inputs: operator_cases.Inputs, names: list[str]) -> None:
    leaves = inputs.leaves()
    for name in names:
        leaves[name].requires_grad_()
    tensors = [leaves[name] for name in names]
    assert torch.autograd.gradcheck(lambda *_: reference(inputs)[:2], tensors, fast_mode=True)


# ---- an independent formulation


def by_grid_sample(inputs: operator_cases.Inputs, border: Tensor) -> tuple[Tensor, ...]:
    """The operator key by key with grid_sample; `border` [K] is what the mask maps hold outside."""
    B, H, W, L, _, K = inputs.points.shape
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")

    def read(image: Tensor, l: int, k: int) -> Tensor:  # [B,H+2,W+2,C] → [B,H,W,C]
        dy, dx = inputs.points[..., l, 0, k], inputs.points[..., l, 1, k]
        place = torch.stack([(2 * (x + dx) + 1) / W - 1, (2 * (y + dy) + 1) / H - 1], -1)
        inner = image[:, 1:-1, 1:-1].permute(0, 3, 1, 2)
        read = grid_sample(inner, place, padding_mode="zeros", align_corners=False)
        return read.permute(0, 2, 3, 1)

    aggregate, coverage, kept = [], [], []
    noise = torch.zeros(B, H, W, L, K)
    if inputs.seeds is not None:
        noise = logistic_noise(inputs.seeds, noise[0].numel()).view(noise.shape)
    ones = torch.ones(B, H + 2, W + 2, 1, dtype=torch.float64)
    for l in range(L):
        weight = inputs.points[..., l, 2, :].exp()
        weight = weight / weight.sum(-1, keepdim=True)
        masks = []
        for k in range(K):
            logit = noise[..., l, k].double()
            if inputs.mask_maps is not None:
                channel = inputs.mask_maps[l][..., k : k + 1]
                logit = logit + read(channel - border[k], l, k)[..., 0] + border[k]
                soft = 1 / (1 + torch.exp(-logit / inputs.temperature))
                masks.append((logit > 0).double() + soft - soft.detach())
            else:
                masks.append(torch.ones_like(logit))
        gate = 1.0 if inputs.gates is None else inputs.gates[l]
        terms = [(gate * masks[k] * weight[..., k])[..., None] for k in range(K)]
        aggregate.append(sum(terms[k] * read(inputs.features[l], l, k) for k in range(K)))
        coverage.append(sum(terms[k] * read(ones, l, k) for k in range(K))[..., 0])
        kept.append(sum(mask.sum((1, 2)) for mask in masks))
    return torch.stack(aggregate, 3), torch.stack(coverage, 3), torch.stack(kept, 1)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="masks"),
        pytest.param({"masks": False}, id="no-masks"),
        pytest.param({"seeds": True, "gates": [1.0, 0.0]}, id="noise-and-gates"),
        pytest.param({"deviation": 9.0}, id="mostly-outside"),
    ],
)
@pytest.mark.parametrize("size", [(2, 5, 7, 2, 3, 4), (1, 1, 6, 2, 2, 3)], ids=["5x7", "1x6"])
def test_equals_the_definition_with_grid_sample(size, options):
    inputs = operator_cases.make_clear(size, **options)
    border = torch.tensor([-0.5, 0.25, 1.0][: size[4]], dtype=torch.float64)
    for name, leaf in inputs.leaves().items():
        value = border if name.startswith("mask") else 0.0
        if name.startswith(("features", "mask")):
            inner = leaf[:, 1:-1, 1:-1].clone()
            leaf.copy_(torch.zeros_like(leaf) + value)
            leaf[:, 1:-1, 1:-1] = inner
    leaves = inputs.leaves()
    wanted = list(leaves.values())
    found, expected = [], []
    for results, call in ((found, reference), (expected, lambda i: by_grid_sample(i, border))):
        for leaf in wanted:
            leaf.requires_grad_()
        out = call(inputs)
        loss = sum((o * c).sum() for o, c in zip(out, inputs.cotangents, strict=True))
        results += [*out, *torch.autograd.grad(loss, wanted)]
    for name, ours, theirs in zip([*"acy", *leaves], found, expected, strict=True):
        if name.startswith(("features", "mask")):  # grid_sample knows no border
            ours, theirs = ours[:, 1:-1, 1:-1], theirs[:, 1:-1, 1:-1]
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: n + m)


def test_the_mask_unit_commutes_with_sampling_also_across_the_border():
    # Identity 1: M(x(p)) is the sampled map M(x), if the map's border holds M of the zero border.
    torch.manual_seed(0)
    rows = pad(torch.randn(1, 4, 5, 6, dtype=torch.float64), (0, 0, 1, 1, 1, 1))
    unit = torch.nn.Linear(6, 3, dtype=torch.float64)
    position = torch.rand(1, 50, 1, 2, dtype=torch.float64) * torch.tensor([9.0, 10.0]) - 2.5
    assert ((position < 0) | (position > 4)).any()
    torch.testing.assert_close(unit(sample(rows, position)), sample(unit(rows), position))


# ---- masks and gates


@pytest.mark.parametrize("logit", [-0.8, 0.3], ids=["closed", "open"])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_mask_gradient_is_the_sigmoids(logit, temperature):
    x, g, seeds = torch.tensor([2.0, -3.0]).double(), 1.25, torch.tensor([7])
    rows = to_rows(x.view(1, 2, 1, 1))
    mask = torch.full((1, 3, 3, 1), logit, dtype=torch.float64, requires_grad=True)
    points = torch.zeros(1, 1, 1, 1, 3, 1, dtype=torch.float64)
    out = attend([rows], points, [mask], seeds=seeds, temperature=temperature, backend="reference")
    (out.aggregate.sum() * g + out.kept.sum() * 0.5).backward()
    z = (logit + logistic_noise(seeds, 1).item()) / temperature
    s = 1 / (1 + math.exp(-z))
    assert out.kept.item() == float(z > 0)
    assert mask.grad[0, 1, 1, 0].item() == pytest.approx(
        (g * x.sum().item() + 0.5) * s * (1 - s) / temperature, rel=1e-6
    )
    assert mask.grad.count_nonzero() == 1


def test_a_closed_gate_gives_zeros_and_still_has_a_gradient():
    inputs = operator_cases.make((1, 4, 3, 2, 3, 2), gates=[1.0, 0.0])
    closed = inputs.run("reference")
    inputs.gates = torch.ones(2, dtype=torch.float64)
    opened = inputs.run("reference")
    assert not closed["aggregate"][..., 1, :].any()
    assert not closed["coverage"][..., 1].any()
    torch.testing.assert_close(closed["kept"], opened["kept"])
    torch.testing.assert_close(closed["∂gates"], opened["∂gates"])
    assert closed["∂gates"].abs().min() > 0
    assert not closed["∂features[1]"].any()


# ---- positions


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("axis", [0, 1], ids=["dy", "dx"])
def test_a_position_that_is_no_number_is_outside(wrong, axis):
    inputs = operator_cases.make((1, 3, 4, 1, 2, 3), masks=False)
    inputs.features = [to_rows(torch.randn(1, 3, 3, 4, dtype=torch.float64))]
    inputs.points[..., axis, 1] = wrong
    found = inputs.run("reference")
    inputs.points.data[..., axis, 1] = 50.0 if wrong > 0 else -50.0
    expected = inputs.run("reference")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    assert not found["∂points"][..., axis, 1].any()


def test_whole_offsets_read_pixels():
    picture = torch.arange(12.0).view(1, 1, 3, 4)
    points = torch.zeros(1, 3, 4, 1, 3, 1)
    points[..., 0, :], points[..., 1, :] = 1, -2
    out = attend([to_rows(picture)], points, backend="reference")
    expected = pad(picture, (2, 0, 0, 1))[0, 0, 1:, :4]
    torch.testing.assert_close(out.aggregate[0, :, :, 0, 0], expected, rtol=0, atol=0)
    torch.testing.assert_close(out.coverage[0, :, :, 0], (expected > 0).float(), rtol=0, atol=0)


@pytest.mark.parametrize(("edge", "share"), [(-0.25, 0.75), (-1.0, 0.0), (2.5, 0.5), (3.0, 0.0)])
def test_a_sample_fades_over_one_pixel_at_the_border(edge, share):
    points = torch.zeros(1, 3, 3, 1, 3, 1)
    points[0, 0, 0, 0, 0] = edge
    out = attend([to_rows(torch.ones(1, 1, 3, 3))], points, backend="reference")
    assert out.aggregate[0, 0, 0, 0, 0] == out.coverage[0, 0, 0, 0] == share


# ---- noise


def test_noise_comes_from_philox_4x32_10():
    # Known answer of the authors of Philox (Random123): key 0, counter 0, first word.
    u = ((0x6627E8D5 >> 9) + 0.5) * 2.0**-23
    expected = math.log(u) - math.log1p(-u)
    assert logistic_noise(torch.tensor([0]), 1).item() == pytest.approx(expected, rel=1e-5)


def test_noise_is_logistic_and_independent_between_seeds():
    noise = logistic_noise(torch.tensor([1, -2, 1 << 40]), 1 << 17).double()
    assert noise.mean(1).abs().max() < 0.02
    assert (noise.var(1) / (math.pi**2 / 3) - 1).abs().max() < 0.02
    assert (torch.corrcoef(noise) - torch.eye(3)).abs().max() < 0.02
    assert noise.abs().max() < 17  # finite: u never reaches 0 or 1


def test_a_draw_is_a_function_of_seed_and_index_alone():
    seeds = torch.tensor([5, 6])
    many = logistic_noise(seeds, 100)
    assert torch.equal(logistic_noise(seeds, 10), many[:, :10])
    assert torch.equal(logistic_noise(seeds[1:], 100), many[1:])
