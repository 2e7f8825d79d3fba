"""PSNR and SSIM, the protocol by which each task is scored, and the published figures."""

import csv
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from PIL import features
from skimage.metrics import structural_similarity
from torch import Tensor

from acla.config import Task
from acla.console import markdown, progress
from acla.data.image import load, luma, round_8bit, to_rgb
from acla.errors import CheckpointError, DataError, UsageError

PEAK = 255.0
WINDOW = 11  # side of Wang's Gaussian window, in pixels


# Of arrays [H, W] or [H, W, 3] of levels 0..255


def psnr(prediction: np.ndarray, target: np.ndarray, border: int = 0) -> float:
    """10 log10(255² / MSE) in dB over all channels, `border` pixels cut on every side.

    Equal pictures score infinity. Raises ValueError if nothing is left inside the border.
    """
    prediction, target = without_border(prediction, target, border)
    error = np.mean((prediction - target) ** 2)
    return math.inf if error == 0 else float(10 * np.log10(PEAK**2 / error))


def ssim(prediction: np.ndarray, target: np.ndarray, border: int = 0) -> float | None:
    """SSIM (Wang et al. 2004), averaged over channels, `border` pixels cut on every side.

    11×11 Gaussian window of σ 1.5, C1 = (0.01 · 255)², C2 = (0.03 · 255)², population covariance,
    averaged where the window lies inside the picture. None for a picture with a side below 11
    pixels: the window fits nowhere.
    """
    prediction, target = without_border(prediction, target, border)
    if min(target.shape[:2]) < WINDOW:
        return None
    value = structural_similarity(
        prediction,
        target,
        gaussian_weights=True,  # scikit-image averages over the valid region only
        sigma=1.5,
        use_sample_covariance=False,
        data_range=PEAK,
        channel_axis=2 if target.ndim == 3 else None,
    )
    return float(value)


def without_border(
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


# The protocol

TASK_OF_SET = {
    **dict.fromkeys(("LIVE1", "Classic5", "sample"), Task("car", 10)),
    **dict.fromkeys(("Set5", "Set14", "B100", "Urban100", "Manga109"), Task("sr", 2)),
    **dict.fromkeys(("Kodak24", "BSD68"), Task("denoise", 30)),
    "McMaster18": Task("demosaic", 0),
}


def task_of_set(name: str) -> Task:
    """The task that a known set serves when nothing names one. Raises UsageError for other sets."""
    if name not in TASK_OF_SET:
        known = ", ".join(TASK_OF_SET)
        raise UsageError(f"no task is known for set {name!r}: give --task (known sets: {known})")
    return TASK_OF_SET[name]


def border(task: Task) -> int:
    """Pixels cut from each side before scoring."""
    return task.scale if task.name == "sr" else 0


def score(prediction: Tensor, target: Tensor, task: Task) -> tuple[float, float | None]:
    """(PSNR in dB, SSIM) of prediction against target [1 or 3, H, W] in 0..1, by the protocol.

    The prediction is rounded to 8 bit and clipped. sr compares Y: RGB becomes Y in floating point,
    not rounded; one channel is Y already. Equal pictures score infinity; SSIM is None below 11
    pixels a side. Raises DataError if the sizes differ or the border leaves nothing.
    """
    first = score_psnr(prediction, target, task)
    return first, ssim(*compared_levels(prediction, target, task), border(task))


def score_psnr(prediction: Tensor, target: Tensor, task: Task) -> float:
    """The PSNR of `score` alone, in a fraction of the time."""
    try:
        return psnr(*compared_levels(prediction, target, task), border(task))
    except ValueError as error:
        raise DataError(str(error)) from error


def compared_levels(prediction: Tensor, target: Tensor, task: Task) -> list[np.ndarray]:
    """What `score` compares: levels [H, W] or [H, W, 3] of prediction and target."""
    prediction, target = round_8bit(prediction.double()), exact(target)
    if task.name == "sr":
        prediction, target = (luma(x) if len(x) == 3 else x for x in (prediction, target))
    elif len(target) == 3:
        prediction = to_rgb(prediction)
    return [(255 * x).permute(1, 2, 0).squeeze(2).cpu().numpy() for x in (prediction, target)]


def exact(image: Tensor) -> Tensor:
    """In float64, with values that float32 only nearly holds (k/255) exact: equals score equal."""
    image = image.double()
    near = round_8bit(image)
    return torch.where((image - near).abs() < 1e-6, near, image)


class Scored(NamedTuple):
    """A picture's prediction [C, H, W], with what `score` gives; seconds: of the prediction."""

    path: Path
    clean: Tensor
    prediction: Tensor
    psnr: float
    ssim: float | None
    seconds: float


def score_pictures(
    predict: Callable[[Tensor, Path], tuple[Tensor, Tensor]],
    paths: Sequence[Path],
    task: Task,
    **bar: object,
) -> Iterator[Scored]:
    """Every picture's prediction and score, one in memory at a time, with a progress bar.

    predict: (clean [C, H, W], path) → (prediction, target). Raises DataError and CheckpointError,
    which name the picture.
    """
    for path in progress(paths, unit="picture", **bar):
        clean = load(path)
        try:
            start = time.perf_counter()
            prediction, target = predict(clean, path)
            seconds = time.perf_counter() - start
            yield Scored(path, clean, prediction, *score(prediction, target, task), seconds)
        except (DataError, CheckpointError) as error:
            raise type(error)(f"{path.name}: {error}") from error


def protocol_line(task: Task, baseline: bool = False, channels: int | None = None) -> str:
    """The protocol in one line: channel, range, border, how the input was made.

    baseline: of the untouched input; channels: of the network's pictures, if not the task's own.
    """
    gray = "Y" if task.name == "sr" else "Y (gray files as they are)"
    channel = gray if (channels or task.channels) == 1 else "RGB"
    match task.name:
        case "sr" if baseline:
            channel = "Y of 8 bit (gray files as they are)"
            made = f"bicubic ×{task.scale} of Y, shrunk and enlarged without rounding in between"
        case "sr":
            if channel == "RGB":
                channel = "Y in floating point from RGB (gray files as R = G = B)"
            made = f"bicubic ×{task.scale} of 8 bit as MATLAB's imresize"
        case "denoise":
            made = f"Gaussian noise, σ = {task.value} of 255, seeded per picture, not clipped"
        case "car":
            codec = "libjpeg-turbo" if features.check("libjpeg_turbo") else "libjpeg"
            version = features.version("libjpeg_turbo") or features.version("jpg")
            encoder = f"Pillow {PIL.__version__} ({codec} {version})"
            kind = "colour JPEG (4:2:0)" if channel == "RGB" else "grayscale JPEG"
            made = f"{kind}, quality {task.value}, {encoder}"
        case _:
            made = "Bayer mosaic GRBG, missing samples zero"
    cut = f"border of {border(task)} px cut" if border(task) else "no border cut"
    return f"{task}: {channel}, range 0..255, {cut}, output rounded to 8 bit; input: {made}"


# The published figures


@functools.cache
def published_rows() -> list[dict[str, str]]:
    """The figures of Tables 1, 2, 3 and 10 of the paper, as they are printed."""
    with open(
        Path(__file__).with_name("published_scores.csv"), encoding="utf-8", newline=""
    ) as file:
        return list(csv.DictReader(file))


def published(dataset: str, task: Task) -> dict[str, dict[str, float | str]]:
    """method → {"psnr": dB, "ssim" if printed, "note" on a misprint}, for a set and setting."""
    methods = {}
    for row in published_rows():
        if (row["dataset"], row["task"], row["setting"]) == (dataset, task.name, task.label):
            figures = {name: float(row[name]) for name in ("psnr", "ssim") if row[name]}
            methods[row["method"]] = figures | ({"note": row["note"]} if row["note"] else {})
    return methods


def result_table(label: str, result: dict[str, Any]) -> str:
    """A result of evaluate.py as text: the protocol, our means, and the published figures below."""
    rows = {label: result["mean"]} | {f"paper: {m}": v for m, v in result["published"].items()}
    cells = []
    for name, row in rows.items():
        ssim = "–" if row.get("ssim") is None else f"{row['ssim']:.4f}"
        cells.append([name, f"{row['psnr']:.2f}", ssim, row.get("note", "")])
    title = f"{result['dataset']}, {len(result['images'])} pictures"
    return f"{result['protocol']}\n\n{markdown([title, 'PSNR, dB', 'SSIM', 'note'], cells)}\n"
