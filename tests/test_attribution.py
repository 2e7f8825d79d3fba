"""Local attribution, its diffusion index, keys and branches: against other ways to compute them."""

import math
from types import SimpleNamespace

import pytest
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from acla.analysis import attribution
from acla.analysis.attribution import diffusion_index, keys_of, local_attribution, observe
from acla.config import ModelConfig
from acla.kernels import reference, to_rows
from acla.models.backbones import Backbone
from acla.models.factory import build_network

SMALL = {"blocks": 3, "width": 8, "keys": 4, "channels": 1, "group_blocks": 1, "reduction": 4}
WINDOW = (5, 6, 4)


def perturbed(std: float = 0.15, **fields: object) -> Backbone:
    """A network in which everything does something."""
    torch.manual_seed(0)
    model = build_network(ModelConfig(**{**SMALL, **fields})).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += std * torch.randn_like(parameter)
        if name.endswith(".mask"):
            parameter.data += 4 * torch.randn_like(parameter)
    return model.requires_grad_(False)


# Local attribution


@pytest.mark.parametrize(("y", "x"), [(2, 3), (5, 4), (0, 0)])
def test_the_detector_adds_slopes_in_the_window(y, x):
    picture, side = torch.rand(1, 3, 9, 8, dtype=torch.float64), 4
    total = 0.0
    for c in range(3):
        for i in range(y, y + side):
            for j in range(x, x + side):
                here = picture[0, c, i, j]
                down = picture[0, c, i + 1, j] - here if i + 1 < 9 else 0.0
                right = picture[0, c, i, j + 1] - here if j + 1 < 8 else 0.0
                total += math.hypot(down, right)
    assert attribution.detail(picture, (y, x, side)).item() == pytest.approx(total)


def test_a_flat_window_has_no_gradient():
    picture = torch.full((1, 1, 9, 8), 0.5, requires_grad=True)
    attribution.detail(picture, WINDOW).backward()
    assert torch.equal(picture.grad, torch.zeros_like(picture))


@pytest.mark.parametrize("sigma", [1.2, 0.7, 0.05, 0])
def test_every_channel_is_blurred_alone(sigma):
    picture = torch.rand(2, 7, 3, dtype=torch.float64)
    planes = [ndimage.gaussian_filter(plane, sigma, mode="nearest") for plane in picture.numpy()]
    for plane, wanted in zip(attribution.blurred(picture, sigma), planes, strict=True):
        torch.testing.assert_close(plane, torch.from_numpy(wanted))


@pytest.mark.parametrize("along", [1, 2], ids=["down", "to the right"])
def test_attribution_of_the_identity_is_known_and_ends_behind_the_window(along):
    size = (14, 13)
    picture = torch.arange(size[along - 1]).square() / 400  # rises along one axis, blurred too
    picture = picture.view(-1, 1).expand(size) if along == 1 else picture.expand(size)
    identity = SimpleNamespace(forward_with_counts=lambda pictures, temperature: (pictures, {}))
    found = local_attribution(identity, picture[None], WINDOW, 8)
    # So the detector is what comes next to the window more than its first row or column
    top, left, side = WINDOW
    slope = torch.zeros(1, *size, dtype=torch.float64)
    rows, columns = slice(top, top + side), slice(left, left + side)
    for at, sign in ((0, -1), (side, 1)):
        slope[0, top + at if along == 1 else rows, columns if along == 1 else left + at] = sign
    change = picture[None].double() - attribution.blurred(picture[None].double(), attribution.SIGMA)
    torch.testing.assert_close(found, slope * change, rtol=0, atol=1e-7)
    assert (found.abs() > 1e-9).sum() == 2 * side


def test_attribution_ends_at_the_receptive_field():
    model = perturbed(attention="none", keys=0, blocks=1)
    found = local_attribution(model, torch.rand(1, 19, 18), WINDOW, 3)
    reach = 5  # one pixel each: head, two of the block, end of the body, tail
    rows, columns = found[0].abs().sum(1), found[0].abs().sum(0)
    # The last slopes of the window read one pixel behind it
    assert rows.nonzero().flatten().tolist() == list(range(WINDOW[0] - reach, 5 + 5 + reach))
    assert columns.nonzero().flatten().tolist() == list(range(WINDOW[1] - reach, 6 + 5 + reach))


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"attention": "none", "keys": 0}, id="edsr"),
        pytest.param({"positions": (1, 3), "scale": 2, "mask_bias": 60.0}, id="acla-masks-open"),
        pytest.param({"backbone": "rcan", "attention": "cla", "positions": (2,)}, id="rcan-cla"),
        pytest.param({"backbone": "han", "attention": "none", "keys": 0, "blocks": 2}, id="han"),
        pytest.param({"backbone": "a2n", "attention": "none", "keys": 0}, id="a2n"),
    ],
)
def test_attributions_add_up_to_what_the_detector_gains(fields, make_picture):
    model, picture = perturbed(**fields), make_picture(14, 13, 1)
    steps = 160 if "mask_bias" in fields else 40  # offsets make the path less smooth
    found = local_attribution(model, picture, WINDOW, steps)
    with torch.no_grad():
        answers = [
            attribution.detail(model(p.float()[None]), WINDOW).item()
            for p in (attribution.blurred(picture.double(), attribution.SIGMA), picture)
        ]
    assert found.sum().item() == pytest.approx(answers[1] - answers[0], rel=0.01)
    assert abs(answers[1] - answers[0]) > 0.1


def test_masks_are_steps_and_have_no_slope(make_picture, monkeypatch):
    model, picture = perturbed(positions=(1, 2)), make_picture(14, 13, 1)
    for module in model.attention.values():
        module.mask.data *= 0.02
        module.mask_bias.data.fill_(1.5)
    assert {row["share"] for row in observe(model, picture, 0, 0).kept} == {1}
    found = local_attribution(model, picture, WINDOW, 2)
    monkeypatch.setattr(attribution, "FIXED_MASKS", 1.0)
    sloped = local_attribution(model, picture, WINDOW, 2)
    for module in model.attention.values():  # all keys are kept, as CLA keeps them
        module.mask_bias.fill_(60.0)
    wanted = local_attribution(model, picture, WINDOW, 2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (sloped - found).abs().max() > 1e-3


# The diffusion index


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 4, 4)])
def test_gini_is_half_the_mean_difference_over_the_mean(shape):
    attribution = torch.randn(shape, dtype=torch.float64) ** 3
    x = attribution.abs().sum(0).flatten()
    gini = (x[:, None] - x[None]).abs().mean() / (2 * x.mean())
    assert diffusion_index(attribution) == pytest.approx(100 * (1 - gini.item()), rel=1e-12)


def test_one_pixel_and_all_pixels_are_the_ends():
    one = torch.zeros(1, 8, 10)
    one[0, 3, 4] = -2
    assert diffusion_index(one) == pytest.approx(100 / 80)
    assert diffusion_index(torch.full((1, 8, 10), -0.3)) == pytest.approx(100)
    assert diffusion_index(torch.zeros(1, 8, 10)) is None


# Keys


@pytest.mark.parametrize("attention", ["acla", "cla", "acla+se"])
def test_keys_are_those_that_the_operator_reads(attention):
    H, W, L, K = 5, 4, 2, 4
    model = perturbed(attention=attention, positions=(1, 2))
    module = model.attention["2"]
    module.points.weight.data *= 8  # some keys lie outside
    query, rows = torch.randn(1, 8, H, W), [to_rows(torch.randn(1, 8, H, W)) for _ in range(L)]
    points = module.points(query.permute(0, 2, 3, 1)).unflatten(-1, (L, 3, K))
    maps = None
    if module.mask is not None:
        maps = [rows[l] @ module.mask[l].T + module.mask_bias[l] for l in range(L)]
    aggregate, _, counts = reference.attend(rows, points, maps)
    total, outside = torch.zeros(L), 0
    for y in range(H):
        for x in range(W):
            keys = keys_of(module, query, rows, y, x)
            total += keys.kept.sum(1)
            outside += (keys.position < 0).sum().item()
            for l in range(L):
                found = [reference.sample(rows[l], p.view(1, 1, 1, 2)) for p in keys.position[l]]
                found = torch.stack([f[0, 0, 0] for f in found])
                mean = ((keys.kept[l] * keys.weight[l])[:, None] * found).sum(0)
                torch.testing.assert_close(mean, aggregate[0, y, x, l], rtol=1e-4, atol=1e-5)
    assert total.tolist() == counts[0].tolist()
    assert outside > 0
    assert (0 < total.sum() < H * W * L * K) == (attention != "cla")


def test_shares_are_means_over_all_pixels():
    model, picture = perturbed(positions=(1, 3), scale=2), torch.rand(1, 4, 5)
    at = {(y, x): observe(model, picture, y, x) for y in range(4) for x in range(5)}
    seen = at[0, 0]
    assert [(row["position"], row["layer"]) for row in seen.kept] == [(1, 1), (3, 1), (3, 3)]
    for row in seen.kept:
        l = [1, 3].index(row["layer"])
        kept = torch.stack([found.keys[row["position"]].kept[l] for found in at.values()])
        assert row["share"] == pytest.approx(kept.float().mean().item())
    assert any(row["share"] not in (0, 1) for row in seen.kept)
    torch.testing.assert_close(seen.restored, model(picture[None])[0])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_cla_keeps_all_and_others_have_no_keys():
    picture = torch.rand(1, 4, 5)
    seen = observe(perturbed(attention="cla", positions=(2,)), picture, 1, 1)
    assert seen.kept == [{"position": 2, "layer": 2, "share": 1.0}]
    seen = observe(perturbed(attention="mha", keys=0, positions=(2,)), picture, 1, 1)
    assert (seen.kept, seen.keys, seen.branches) == ([], {}, [])


def test_branches_are_a2ns_weights():
    model, picture = perturbed(0.1, backbone="a2n", attention="none", keys=0), torch.rand(1, 6, 5)
    x, wanted = model.shallow(picture[None]), []
    for block in model.blocks:
        y = 255 * F.leaky_relu(block.conv_first(x), 0.2).mean((2, 3))
        logits = block.ADM[2](nn.functional.relu(block.ADM[0](y))) / 30
        wanted.append(torch.sigmoid(logits[0, 0] - logits[0, 1]).item())
        x = block(x)
    assert observe(model, picture, 0, 0).branches == pytest.approx(wanted)
    assert max(abs(weight - 0.5) for weight in wanted) > 0.01
