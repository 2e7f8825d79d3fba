"""PSNR and SSIM of arrays [H, W] or [H, W, 3] of levels 0..255.

The caller chooses the channels and rounds.
"""

import math

import numpy as np
from skimage.metrics import structural_similarity

WINDOW = 11  # side of Wang's Gaussian window, in pixels


def psnr(prediction: np.ndarray, target: np.ndarray, border: int = 0, peak: float = 255.0) -> float:
    """10 log10(peak² / MSE) in dB over all channels, `border` pixels cut on every side.

    Equal pictures score infinity. Raises ValueError if nothing is left inside the border.
    """
    prediction, target = inside(prediction, target, border)
    error = np.mean((prediction - target) ** 2)
    return math.inf if error == 0 else float(10 * np.log10(peak**2 / error))


def ssim(
    prediction: np.ndarray, target: np.ndarray, border: int = 0, peak: float = 255.0
) -> float | None:
    """SSIM (Wang et al. 2004), averaged over channels, `border` pixels cut on every side.

    11×11 Gaussian window of σ 1.5, C1 = (0.01 peak)², C2 = (0.03 peak)², population covariance,
    averaged where the window lies inside the picture. None for a picture with a side below 11
    pixels: the window fits nowhere.
    """
    prediction, target = inside(prediction, target, border)
    if min(target.shape[:2]) < WINDOW:
        return None
    value = structural_similarity(
        prediction,
        target,
        gaussian_weights=True,  # scikit-image averages over the valid region only
        sigma=1.5,
        use_sample_covariance=False,
        data_range=peak,
        channel_axis=2 if target.ndim == 3 else None,
    )
    return float(value)


def inside(
    prediction: np.ndarray, target: np.ndarray, border: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64 without their border. Raises ValueError for different or empty shapes."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {prediction.shape} and target {target.shape} differ in shape")
    if min(target.shape[:2]) <= 2 * border:
        height, width = target.shape[:2]
        raise ValueError(f"nothing is left of {height}×{width} pixels without a border of {border}")
    cut = slice(border, -border or None)
    return prediction[cut, cut].astype(np.float64), target[cut, cut].astype(np.float64)
