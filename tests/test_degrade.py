"""Degradations against slow definitions, golden values and each other."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from acla.config import Task
from acla.data.degradations import (
    add_noise,
    bicubic,
    crop_to_multiple,
    degrade,
    enlarge,
    generator_for,
    jpeg,
    jpeg_file,
    mosaic,
    pair,
    shrink,
    untouched,
    window_side,
)
from acla.data.image import from_levels, luma, round_8bit, to_levels
from acla.errors import DataError


def matlab_line(line: list[float], out_length: int) -> list[float]:
    """One line through imresize's definition, with 1-based indices and plain loops."""
    scale = out_length / len(line)

    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0

    width = 4 / scale if scale < 1 else 4
    out = []
    for i in range(1, out_length + 1):
        u = i / scale + 0.5 * (1 - 1 / scale)
        left = math.floor(u - width / 2)
        weights, values = [], []
        for j in range(left, left + math.ceil(width) + 2):
            weights.append(scale * kernel(scale * (u - j)) if scale < 1 else kernel(u - j))
            mirrored = [*range(len(line)), *reversed(range(len(line)))]
            values.append(line[mirrored[(j - 1) % len(mirrored)]])
        total = sum(weights)
        out.append(sum(w / total * v for w, v in zip(weights, values, strict=True)))
    return out


def matlab_imresize(levels: np.ndarray, height: int, width: int, rounded: bool) -> np.ndarray:
    """A plane [H, W] of 0..255, height first; `rounded` as for uint8, halves up."""

    def settle(x: list[float]) -> list[float]:
        return [min(max(math.floor(v + 0.5), 0), 255) for v in x] if rounded else x

    columns = [settle(matlab_line(column.tolist(), height)) for column in levels.T]
    rows = [settle(matlab_line(row.tolist(), width)) for row in np.array(columns).T]
    return np.array(rows)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize(
    ("h", "w"), [(9, 5), (6, 8), (1, 1), (1, 7), (2, 1)], ids=lambda side: str(side)
)
def test_shrink_equals_the_definition_byte_for_byte(make_picture, scale, h, w):
    image = make_picture(h * scale, w * scale)
    ours = to_levels(shrink(image, scale))
    levels = to_levels(image)
    for channel in range(3):
        theirs = matlab_imresize(levels[:, :, channel], h, w, rounded=True)
        assert np.array_equal(ours[:, :, channel], theirs)


@pytest.mark.parametrize(("to_h", "to_w"), [(12, 21), (5, 4), (3, 14)], ids=["up", "down", "both"])
def test_unrounded_bicubic_equals_the_definition(make_picture, to_h, to_w):
    image = make_picture(6, 7, 1).double()
    ours = bicubic(image, to_h, to_w, rounded=False)[0] * 255
    theirs = matlab_imresize(image[0].numpy() * 255, to_h, to_w, rounded=False)
    assert np.abs(ours.numpy() - theirs).max() < 1e-10


def test_shrink_golden_values():
    edge = torch.zeros(1, 6, 12)
    edge[:, :, 5:] = 1
    edge[:, 4:, :3] = 0.6
    assert to_levels(shrink(edge, 2)).tolist() == [
        [0, 0, 128, 255, 255, 255],  # 127.5 goes up
        [10, 0, 127, 255, 255, 255],
        [152, 61, 121, 255, 255, 255],
    ]
    assert to_levels(shrink(edge, 3)).tolist() == [[0, 85, 255, 255], [92, 93, 255, 255]]


def test_enlarge_keeps_a_constant_and_overshoots_an_edge():
    assert torch.allclose(enlarge(torch.full((1, 3, 4), 0.3), 3), torch.full((1, 9, 12), 0.3))
    edge = enlarge(torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]), 2)
    assert edge.shape == (1, 2, 8)
    assert edge.min() < 0 < 1 < edge.max()


def test_shrink_wants_multiples_and_crop_gives_them(make_picture):
    image = make_picture(7, 11)
    with pytest.raises(ValueError, match="no multiple of the scale 3"):
        shrink(image, 3)
    cropped = crop_to_multiple(image, 3)
    assert torch.equal(cropped, image[:, :6, :9])
    with pytest.raises(DataError, match="1×11 pixels is smaller than the scale 2"):
        crop_to_multiple(image[:, :1], 2)


def test_noise_has_the_level_and_is_neither_clipped_nor_rounded():
    clean = torch.full((3, 200, 200), 0.9)
    noisy = add_noise(clean, 50, generator_for("a"))
    assert (noisy - clean).std().item() * 255 == pytest.approx(50, rel=0.01)
    assert (noisy - clean).mean().item() == pytest.approx(0, abs=0.002)
    assert noisy.max() > 1
    assert not torch.equal(noisy, round_8bit(noisy))


def test_noise_depends_on_name_and_seed_only():
    clean = torch.zeros(1, 8, 8)
    first = add_noise(clean, 10, generator_for("kodim01", 3))
    assert torch.equal(first, add_noise(clean, 10, generator_for("kodim01", 3)))
    assert not torch.equal(first, add_noise(clean, 10, generator_for("kodim02", 3)))
    assert not torch.equal(first, add_noise(clean, 10, generator_for("kodim01", 4)))
    assert generator_for("kodim01", 3).initial_seed() == 2767136849319165824


def test_jpeg_is_pillows_grayscale_jpeg(make_picture):
    gray = make_picture(19, 30, 1)
    file = io.BytesIO()
    Image.fromarray(to_levels(gray), "L").save(file, "JPEG", quality=10)
    assert np.array_equal(to_levels(jpeg(gray, 10)), np.asarray(Image.open(file)))
    assert (jpeg(gray, 90) - gray).abs().mean() < (jpeg(gray, 10) - gray).abs().mean()


def test_mosaic_is_grbg():
    r, g, b = (torch.full((3, 5), value) for value in (0.1, 0.2, 0.3))
    seen = mosaic(torch.stack([r, g, b]))
    assert seen.sum(0)[:2, :2].tolist() == [
        [pytest.approx(0.2), pytest.approx(0.1)],
        [pytest.approx(0.3), pytest.approx(0.2)],
    ]
    assert ((seen != 0).sum(0) == 1).all()  # one sample at every pixel, odd sizes too


@pytest.mark.parametrize(
    "task", [Task("sr", 3), Task("denoise", 30), Task("car", 10), Task("demosaic", 0)], ids=str
)
@pytest.mark.parametrize("channels", [1, 3])
def test_pair_fits_the_task(make_picture, task, channels):
    clean = make_picture(20, 31, channels)
    before = clean.clone()
    degraded, target = pair(clean, task, generator_for("x"))
    assert torch.equal(clean, before)
    assert len(degraded) == len(target) == task.channels
    assert target.shape[1:] == tuple(side * task.scale for side in degraded.shape[1:])
    assert degraded.dtype == target.dtype == torch.float32
    on_the_grid = torch.equal(degraded, round_8bit(degraded))
    assert on_the_grid != (task.name == "denoise")


def test_car_rounds_y_before_compression(make_picture):
    clean = make_picture(16, 16)
    degraded, target = pair(clean, Task("car", 40))
    assert torch.equal(target, round_8bit(luma(clean)))
    assert torch.equal(degraded, jpeg(target, 40))


def test_colour_jpegs_hold_chroma_at_half_the_resolution(make_picture):
    clean = make_picture(16, 24)
    degraded, target = pair(clean, Task("car", 40), channels=3)
    assert torch.equal(target, round_8bit(clean))
    assert torch.equal(degraded, jpeg(target, 40))
    with Image.open(io.BytesIO(jpeg_file(target, 40))) as picture:
        assert [layer[1:3] for layer in picture.layer] == [(2, 2), (1, 1), (1, 1)]
        assert np.array_equal(to_levels(degraded), np.asarray(picture))


def test_channels_that_do_not_fit_are_refused(make_picture):
    with pytest.raises(DataError, match="demosaic needs a network with"):
        pair(make_picture(8, 8), Task("demosaic", 0), channels=1)


def test_gray_network_gets_luma(make_picture):
    clean = make_picture(8, 8)
    degraded, target = pair(clean, Task("denoise", 10), generator_for("x"), channels=1)
    assert torch.equal(target, luma(clean))
    assert degraded.shape == (1, 8, 8)


def test_untouched_sr_is_y_without_rounding_in_between(make_picture):
    clean = make_picture(9, 12)
    prediction, target = untouched(clean, Task("sr", 2))
    assert torch.equal(target, round_8bit(luma(clean))[:, :8])
    small = matlab_imresize(target[0].double().numpy() * 255, 4, 6, rounded=False)
    large = matlab_imresize(small, 8, 12, rounded=False)
    assert np.abs(prediction[0].numpy() * 255 - large).max() < 1e-3
    gray = make_picture(8, 8, 1)
    assert torch.equal(untouched(gray, Task("sr", 2))[1], gray)


@pytest.mark.parametrize(
    ("task", "patch", "channels", "side"),
    [
        (Task("car", 10), 48, 1, 56),
        (Task("car", 10), 30, 1, 40),
        (Task("car", 10), 48, 3, 64),
        (Task("sr", 3), 10, 3, 42),
        (Task("denoise", 30), 48, 3, 48),
    ],
    ids=str,
)
def test_window_leaves_room(task, patch, channels, side):
    assert window_side(task, patch, channels) == side


def test_qualities_of_a_range_are_drawn_evenly_and_again_the_same(make_scene):
    clean = from_levels(make_scene(16, 16, 1)[None])
    task, generator = Task("car", 5, 7), torch.Generator().manual_seed(1)
    drawn = [degrade(clean, task, generator) for _ in range(60)]
    one_by_one = [jpeg(clean, q) for q in (5, 6, 7)]
    counts = [sum(torch.equal(d, one) for d in drawn) for one in one_by_one]
    assert sum(counts) == 60
    assert min(counts) >= 8  # 20 are expected; fewer than 8 have a chance below 1e-3
    again = torch.Generator().manual_seed(1)
    assert all(torch.equal(d, degrade(clean, task, again)) for d in drawn)


def test_noise_levels_of_a_range_are_drawn_evenly_and_again_the_same():
    clean = torch.full((3, 64, 64), 0.5)
    task, generator = Task("denoise", 0, 40), torch.Generator().manual_seed(1)
    drawn = [degrade(clean, task, generator) for _ in range(60)]
    sigmas = torch.stack([(d - clean).std() * 255 for d in drawn])
    assert 0 <= sigmas.min() < 5
    assert 35 < sigmas.max() < 41
    assert sigmas.mean() == pytest.approx(20, abs=6)  # four standard errors
    again = torch.Generator().manual_seed(1)
    assert all(torch.equal(d, degrade(clean, task, again)) for d in drawn)
