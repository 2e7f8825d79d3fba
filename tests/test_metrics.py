"""PSNR and SSIM against direct computations."""

import math

import numpy as np
import pytest

from acla.data.metrics import psnr, ssim


def ssim_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """Wang's SSIM of two planes with a loop over every whole window."""
    g = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    w = np.outer(g, g) / np.outer(g, g).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = (plane[y : y + 11, x : x + 11].astype(float) for plane in (a, b))
            mp, mq = (w * p).sum(), (w * q).sum()
            vp, vq = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum()
            cov = (w * (p - mp) * (q - mq)).sum()
            top = (2 * mp * mq + c1) * (2 * cov + c2)
            values.append(top / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


@pytest.fixture
def planes(make_scene):
    clean = make_scene(23, 17, 1)
    noise = np.random.default_rng(1).integers(-20, 21, clean.shape)
    return np.clip(clean.astype(int) + noise, 0, 255).astype(np.uint8), clean


def test_ssim_equals_the_direct_computation(planes):
    assert ssim(*planes) == pytest.approx(ssim_by_hand(*planes), abs=1e-9)


def test_ssim_cuts_the_border_first(planes):
    a, b = planes
    assert ssim(a, b, border=3) == pytest.approx(
        ssim_by_hand(a[3:-3, 3:-3], b[3:-3, 3:-3]), abs=1e-9
    )


def test_ssim_of_colour_is_the_mean_over_channels(make_scene):
    a, b = make_scene(15, 14), make_scene(15, 14, seed=5)
    by_channel = [ssim_by_hand(a[..., c], b[..., c]) for c in range(3)]
    assert ssim(a, b) == pytest.approx(np.mean(by_channel), abs=1e-9)


def test_psnr_by_hand():
    a = np.zeros((4, 5, 3), np.uint8)
    b = np.full((4, 5, 3), 10, np.uint8)
    assert psnr(a, b) == pytest.approx(20 * math.log10(255 / 10))
    assert psnr(a, a) == math.inf
    b[1:-1, 1:-1] = 0
    assert psnr(a, b, border=1) == math.inf


def test_uint8_does_not_wrap_around():
    a, b = np.full((3, 3), 250, np.uint8), np.full((3, 3), 5, np.uint8)
    assert psnr(a, b) == pytest.approx(20 * math.log10(255 / 245))


@pytest.mark.parametrize(("h", "w"), [(10, 40), (40, 10), (1, 1)])
def test_too_small_for_ssim_is_none(h, w):
    assert ssim(np.zeros((h, w)), np.zeros((h, w))) is None


def test_eleven_pixels_are_one_window(make_scene):
    a, b = make_scene(11, 11, 1), make_scene(11, 11, 1, seed=2)
    assert ssim(a, b) == pytest.approx(ssim_by_hand(a, b), abs=1e-9)


def test_different_sizes_and_empty_insides_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        psnr(np.zeros((3, 3)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="nothing is left of 4×9 pixels"):
        psnr(np.zeros((4, 9)), np.zeros((4, 9)), border=2)
